"""Metrics of predicted grades, vectorised over weighted copies of the same patients (see `metrics.py`).

kappa               Cohen's kappa with quadratic weights (Cohen 1968): agreement beyond chance, near misses count less
mae                 mean number of grades that the prediction is off
accuracy, balanced_accuracy
c_index             of two patients of different grades, how often the expected grade orders them right
"""

from __future__ import annotations

import numpy as np

from slidemake.statistics.class_metrics import confusion
from slidemake.statistics.survival_metrics import weighted_concordance

METRICS = ("kappa", "mae", "c_index", "balanced_accuracy", "accuracy")
LOWER_IS_BETTER = ("mae",)


def _kappa(matrix: np.ndarray) -> np.ndarray:
    """(B,) of confusion matrices (B, K, K); NaN where truth and prediction are all one and the same grade."""
    k = matrix.shape[1]
    distance = (np.arange(k)[:, None] - np.arange(k)) ** 2.0
    total = matrix.sum((1, 2))
    expected = matrix.sum(2)[:, :, None] * matrix.sum(1)[:, None, :] / total[:, None, None]
    chance = (distance * expected).sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance > 0, 1 - (distance * matrix).sum((1, 2)) / chance, np.nan)


def metrics_over(
    truth: np.ndarray,
    expected: np.ndarray,
    predicted: np.ndarray | None,
    grades: int,
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """{metric: (B,)} of true grades (n,), expected grades (n,) float and decisions (n,), for weights (B, n).

    Without decisions those metrics that need them are left out.
    """
    truth = np.asarray(truth, int)
    weights = np.ones((1, len(truth))) if weights is None else np.asarray(weights, float)
    everyone = np.ones(len(truth), bool)  # a grade is a time without censoring: higher is later
    found = {"c_index": weighted_concordance(truth.astype(float), everyone, -expected, weights, weights)}
    if predicted is not None:
        matrix = confusion(truth, np.asarray(predicted, int), grades, weights)
        total = matrix.sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = np.diagonal(matrix, axis1=1, axis2=2) / matrix.sum(2)
        found |= {
            "kappa": _kappa(matrix),
            "mae": weights @ np.abs(truth - predicted).astype(float) / total,
            "balanced_accuracy": recall.mean(1),
            "accuracy": np.trace(matrix, axis1=1, axis2=2) / total,
        }
    return {name: found[name] for name in METRICS if name in found}


def why_undefined(metric: str, truth: np.ndarray, predicted: np.ndarray | None, names: tuple[str, ...]) -> str | None:
    """Why `metric` has no value for these patients, or None when it has one."""
    if not len(truth):
        return "no patients"
    present = np.unique(truth)
    if metric == "c_index" and len(present) < 2:
        return f"all {len(truth)} patients have grade {names[present[0]]}"
    if metric == "kappa" and predicted is not None and len(np.unique([*truth, *predicted])) < 2:
        return f"all {len(truth)} patients have grade {names[present[0]]} and are predicted to"
    absent = [name for i, name in enumerate(names) if i not in present]
    if metric == "balanced_accuracy" and absent:
        return f"no patient of grade {', '.join(absent)} among {len(truth)}"
    return None
