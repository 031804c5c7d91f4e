"""Calibration of predicted probabilities, and the points of ROC and precision-recall curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest

from slidemake.statistics.class_metrics import CHUNK, mass_bins, width_bins

MAX_POINTS = 300
CLIP = 1e-6  # probabilities of exactly 0 or 1 have no logit


def wilson_interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); stays inside 0..1 and is honest for small counts."""
    if count <= 0:
        return 0.0, 1.0
    found = binomtest(hits, count).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def reliability_table(confidence: np.ndarray, hit: np.ndarray, bins: int, equal: str = "mass") -> list[dict[str, Any]]:
    """Predicted against observed per bin: lowest and highest probability, means, count, events, Wilson interval.

    confidence (n,) in 0..1, hit (n,) 0 or 1, equal "mass" or "width". Empty bins are left out.
    """
    member = mass_bins(confidence, bins) if equal == "mass" else width_bins(confidence, bins)
    rows = []
    for index in np.unique(member):
        inside = member == index
        count, events = int(inside.sum()), int(hit[inside].sum())
        low, high = wilson_interval(events, count)
        rows.append(
            {
                "from": float(confidence[inside].min()),
                "to": float(confidence[inside].max()),
                "predicted": float(confidence[inside].mean()),
                "observed": events / count,
                "low": low,
                "high": high,
                "count": count,
                "events": events,
            }
        )
    return rows


def logistic_fit(design: np.ndarray, offset: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Maximum likelihood coefficients by Newton's method; None when there are none (separated or constant data)."""
    beta = np.zeros(design.shape[1])
    for _ in range(100):
        mean = 1 / (1 + np.exp(-np.clip(design @ beta + offset, -35, 35)))
        curvature = design.T @ (design * (mean * (1 - mean))[:, None])
        if np.linalg.cond(curvature) > 1e12:
            return None
        step = np.linalg.solve(curvature, design.T @ (y - mean))
        beta += step * min(1.0, 5.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(beta).max() > 200:
            return None
        if np.abs(step).max() < 1e-10:
            return beta
    return None


def calibration_line(p: np.ndarray, y: np.ndarray) -> dict[str, float | str | None]:
    """Calibration slope and intercepts of P(positive) by logistic recalibration (Cox 1958; Van Calster 2019).

    p (n,), y (n,) 0 or 1. `slope` and `intercept` of logit P(y=1) = intercept + slope logit p (1 and 0 are perfect; a
    slope below 1 means too extreme); `in_the_large` is the intercept with the slope held at 1 (0 is perfect; above 0
    means that risks are underestimated). None, with a reason, where the fit does not exist.
    """
    p, y = np.clip(np.asarray(p, float), CLIP, 1 - CLIP), np.asarray(y, float)
    nothing = {"slope": None, "intercept": None, "in_the_large": None}
    if len(np.unique(y)) < 2:
        return {**nothing, "reason": "one class only"}
    logit, ones = np.log(p / (1 - p)), np.ones((len(p), 1))
    large = logistic_fit(ones, logit, y)
    in_the_large = None if large is None else float(large[0])
    if np.ptp(logit) < 1e-9:
        return {**nothing, "in_the_large": in_the_large, "reason": "all predictions are equal"}
    line = logistic_fit(np.column_stack([ones, logit]), np.zeros(len(p)), y)
    if line is None:
        return {
            **nothing,
            "in_the_large": in_the_large,
            "reason": "predictions separate the classes: the slope is infinite",
        }
    return {"intercept": float(line[0]), "slope": float(line[1]), "in_the_large": in_the_large, "reason": None}


def ece_if_calibrated(confidence: np.ndarray, bins: int, seed: int, draws: int = 1000) -> dict[str, float] | None:
    """ECE (equal mass) that perfectly calibrated predictions would show in a sample of this size.

    Mean and 95th percentile over simulated labels. In small samples ECE is far above 0 by chance alone; only a value
    above `p95` speaks against calibration.
    """
    n = len(confidence)
    if not n:
        return None
    rng, member = np.random.default_rng(seed), mass_bins(confidence, bins)
    onehot = np.eye(int(member.max()) + 1)[member]
    step = max(1, CHUNK // n)
    values = np.concatenate(
        [
            np.abs(((rng.random((min(step, draws - start), n)) < confidence) - confidence) @ onehot).sum(1) / n
            for start in range(0, draws, step)
        ]
    )
    return {"mean": float(values.mean()), "p95": float(np.quantile(values, 0.95))}


def _thin(*columns: np.ndarray) -> list[list[float]]:
    """At most MAX_POINTS points of a curve, first and last kept."""
    n = len(columns[0])
    keep = np.arange(n) if n <= MAX_POINTS else np.unique(np.linspace(0, n - 1, MAX_POINTS).round().astype(int))
    return [[round(float(v), 6) for v in column[keep]] for column in columns]


def roc_and_pr(positive: np.ndarray, score: np.ndarray) -> dict[str, Any] | None:
    """Points of the ROC and precision-recall curves, at most 300 each; None when only one class is present.

    By hand: scikit-learn has two functions that sort the same scores twice, end the second at an invented point, and
    take a second to import.
    """
    positive, score = np.asarray(positive, bool), np.asarray(score, float)
    if positive.all() or not positive.any():
        return None
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.r_[score[order][1:] != score[order][:-1], True])
    tp = np.cumsum(positive[order])[ends].astype(float)
    fp = (ends + 1) - tp
    fpr, tpr = _thin(np.r_[0.0, fp / (~positive).sum()], np.r_[0.0, tp / positive.sum()])
    recall, precision = _thin(np.r_[0.0, tp / positive.sum()], np.r_[tp[0] / (tp[0] + fp[0]), tp / (tp + fp)])
    return {
        "roc": {"fpr": fpr, "tpr": tpr},
        "pr": {"recall": recall, "precision": precision, "prevalence": float(positive.mean())},
    }
