"""Metrics of predicted numbers, vectorised over weighted copies of the same patients (see `metrics.py`).

r2        1 - squared error / squared deviation from the mean of the patients evaluated; 0 is that mean, below 0 worse
mae       mean absolute error, in the label's unit
rmse      root of the mean squared error, in the label's unit
pearson   correlation of prediction and truth
slope     of truth on prediction: 1 when a step of the prediction means as much in truth, below 1 when it exaggerates
"""

from __future__ import annotations

import numpy as np

METRICS = ("r2", "mae", "rmse", "pearson", "slope")
LOWER_IS_BETTER = ("mae", "rmse")
SAME = 1e-9  # relative deviation below which values are taken to be the same


def metrics_over(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{metric: (B,)} of truth (n,) and prediction (n,) for every row of weights (B, n); NaN where not defined."""
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    weights = np.ones((1, len(truth))) if weights is None else np.asarray(weights, float)
    if not len(truth):
        return {name: np.full(len(weights), np.nan) for name in METRICS}
    total = weights.sum(1)
    y, p = truth - truth.mean(), predicted - predicted.mean()
    mean_y, mean_p = weights @ y / total, weights @ p / total
    var_y, var_p = weights @ y**2 / total - mean_y**2, weights @ p**2 / total - mean_p**2
    covariance = weights @ (y * p) / total - mean_y * mean_p
    var_y = np.where(var_y > (SAME * (1 + np.abs(truth).max())) ** 2, var_y, np.nan)
    var_p = np.where(var_p > (SAME * (1 + np.abs(predicted).max())) ** 2, var_p, np.nan)
    squared = weights @ (truth - predicted) ** 2 / total
    return {
        "r2": 1 - squared / var_y,
        "mae": weights @ np.abs(truth - predicted) / total,
        "rmse": np.sqrt(squared),
        "pearson": np.clip(covariance / np.sqrt(var_y * var_p), -1, 1),
        "slope": covariance / var_p,
    }


def why_undefined(metric: str, truth: np.ndarray, predicted: np.ndarray) -> str | None:
    """Why `metric` has no value for these patients, or None when it has one."""
    if not len(truth):
        return "no patients"
    if metric in ("mae", "rmse"):
        return None
    if metric in ("r2", "pearson") and np.ptp(truth) <= 2 * SAME * (1 + np.abs(truth).max()):
        return "one patient only" if len(truth) == 1 else f"all {len(truth)} patients have the same value"
    if metric in ("pearson", "slope") and np.ptp(predicted) <= 2 * SAME * (1 + np.abs(predicted).max()):
        return "all predictions are the same"
    return None
