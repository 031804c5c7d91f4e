"""Evenly spaced choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slidemake.mil.aggregators import Aggregator


@dataclass(frozen=True)
class Fitted:
    """A trained aggregator, its curve [{epoch, train_loss, val_loss, val_<score of the objective>}] and the epoch that
    was kept (from 1).
    """

    model: Aggregator
    curve: list[dict[str, float | int | None]]
    epoch: int
    invariance: dict[str, Any] | None = None  # what the guard of robust training found (`invariance.guard`)
