"""AUROCs of predictions with the intervals of `statistics.auroc_intervals`, in place of the bootstrap's."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidemake.statistics.auroc_intervals import Ranked, auroc_interval, ranked
from slidemake.tasks.base import Predictions


def ranked_patients(table: Predictions, chosen: np.ndarray | None = None, repeat: int | None = None) -> Ranked | None:
    """How the model ranks the patients `chosen` (indices; None: all), mean over repeats or in one of them (its index).

    None where the task is not of classes without an order, or the AUROC is not defined.
    """
    if not table.outcome.tests_auroc:
        return None
    chosen = np.arange(len(table.patients)) if chosen is None else chosen
    which = slice(None) if repeat is None else slice(repeat, repeat + 1)
    scores = table.ranks[which][:, chosen]
    seen = np.isfinite(scores[..., 0]).any(1)
    if not seen.any():
        return None
    return ranked(table.truth[chosen, 0].astype(int), scores[seen], len(table.names))


def training_ratio(table: Predictions) -> float:
    """Patients that a repeat tests over those that a fold of it trains on, mean over repeats; 0 where patients were not
    dealt to folds, so that the table does not say who trained the model."""
    ratios = []
    for row in table.fold:
        sizes = np.array([(row == fold).sum() for fold in sorted(set(row.tolist()) - {-1})])
        if len(sizes) < 2:
            return 0.0
        tested = sizes.sum()
        ratios.append(tested / np.mean(tested - sizes))
    return float(np.mean(ratios))


def with_auroc_interval(
    figures: dict[str, dict[str, Any]],
    table: Predictions,
    chosen: np.ndarray,
    level: float,
    repeat: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of a scope with the interval of their AUROC, of the models as they were trained."""
    if "auroc" not in figures or figures["auroc"]["value"] is None:
        return figures
    found = ranked_patients(table, chosen, repeat)
    if found is None:
        return figures
    low, high = auroc_interval(found, level)
    return figures | {"auroc": figures["auroc"] | {"low": low, "high": high}}


def of_procedure(table: Predictions, level: float) -> dict[str, Any] | None:
    """Interval of the AUROC that models trained in this way on other patients would have, on others again."""
    found, ratio = ranked_patients(table), training_ratio(table)
    if found is None or not ratio:
        return None
    low, high = auroc_interval(found, level, ratio)
    return {"tested_to_trained": ratio, "auroc": {"low": low, "high": high}}
