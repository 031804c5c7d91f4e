"""Patient bootstrap: seeded, stratified by label, percentile intervals (Efron and Tibshirani 1993, chapter 13).

The unit that is resampled is the patient, with all of its predictions (all repeats of the cross-validation): slides of
one patient, and repeats on one patient, are not independent observations. The interval therefore says how much the
figure would vary with other patients of the same kind; it does not contain the variation from training again, which is
reported apart as the spread over repeats.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MAX_ROUNDS = 1000


def scope_seed(seed: int, scope: str) -> list[int]:
    """Seed of one scope's draws: the same for every model, so that differences between models are paired."""
    return [seed, zlib.crc32(scope.encode())]


def bootstrap_indices(
    labels: np.ndarray, draws: int, seed: int | list[int], stratify: bool = True
) -> tuple[np.ndarray, int]:
    """Patients of every resample and the number of resamples that were drawn again.

    labels (n,) int. Returns indices (draws, n) int64 and a count. Stratified draws keep the number of patients per
    label, so every class is in every resample. Without stratification a resample that lost a class is drawn again
    and counted, because AUROC has no value there.
    """
    labels = np.asarray(labels)
    rng, n = np.random.default_rng(seed), len(labels)
    present = np.unique(labels)
    if stratify:
        groups = [np.flatnonzero(labels == value) for value in present]
        parts = [group[rng.integers(len(group), size=(draws, len(group)))] for group in groups]
        return (np.concatenate(parts, axis=1) if parts else np.empty((draws, 0), np.int64)), 0
    if not n:
        return np.empty((draws, 0), np.int64), 0
    indices, redrawn = rng.integers(n, size=(draws, n)), 0
    for _ in range(MAX_ROUNDS):
        complete = np.all([(labels[indices] == value).any(1) for value in present], axis=0)
        lost = np.flatnonzero(~complete)
        if not len(lost):
            return indices, redrawn
        redrawn += len(lost)
        indices[lost] = rng.integers(n, size=(len(lost), n))
    raise ValueError(f"{len(lost)} of {draws} resamples lack a class after {MAX_ROUNDS} attempts; stratify by label")


def bootstrap_weights(
    labels: np.ndarray, draws: int, seed: int | list[int], stratify: bool = True
) -> tuple[np.ndarray, int]:
    """How often each patient is in each resample, (draws, n) int32, and the number of resamples drawn again."""
    indices, redrawn = bootstrap_indices(labels, draws, seed, stratify)
    n = len(labels)
    flat = (indices + np.arange(draws)[:, None] * n).ravel()
    return np.bincount(flat, minlength=draws * n).reshape(draws, n).astype(np.int32), redrawn


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float | None, float | None]:
    """Percentile interval of the draws that have a value; (None, None) when fewer than half of them have one."""
    values = np.asarray(values, float)
    known = values[np.isfinite(values)]
    if not len(known) or 2 * len(known) < len(values):
        return None, None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


UNDEFINED_ONCE = "undefined in one of the repeats"


def with_intervals(
    values: Mapping[str, np.ndarray],
    draws: Mapping[str, np.ndarray],
    level: float,
    why: Callable[[str], str],
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, reason}} of point values (1,) and draws (B,); `why` a metric is not defined."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if np.isfinite(value[0]):
            low, high = percentile_interval(draws[name], level)
            found[name] = {"value": float(value[0]), "low": low, "high": high, "reason": None}
        else:
            found[name] = {"value": None, "low": None, "high": None, "reason": why(name)}
    return found


def mean_over(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{metric: mean over repeats}, of values or of draws."""
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
