"""How far probabilities are off, each figure with its interval, and what updating one number would mend.

In the large: log-odds that all predictions would have to move by (0 is right). Slope: 1 is right, below it predictions
are too extreme. Observed to expected: events over the sum of probabilities (1 is right). A model brought to another
site is often off in the large alone; updating the intercept on that site's patients moves every prediction by the same
log-odds (Steyerberg 2004, Statistics in Medicine 23:2567), and the Brier score after it says what that is worth. It is
fitted and measured on the same patients, with one number, so it flatters by about one patient in n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

from slidemake.statistics.reliability import CLIP, logistic_fit

FEW_EVENTS = 5  # patients of the rarer class below which no figure of calibration is told


def _wald(design: np.ndarray, offset: np.ndarray, y: np.ndarray, z: float) -> list[dict[str, float]] | None:
    """Coefficients with Wald intervals; None where there are none."""
    beta = logistic_fit(design, offset, y)
    if beta is None:
        return None
    mean = 1 / (1 + np.exp(-(design @ beta + offset)))
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ (design * (mean * (1 - mean))[:, None]))))
    return [
        {"value": float(b), "low": float(b - z * e), "high": float(b + z * e)} for b, e in zip(beta, error, strict=True)
    ]


def calibration_figures(p: np.ndarray, y: np.ndarray, level: float = 0.95) -> dict[str, Any]:
    """{in_the_large, slope, observed_to_expected: {value, low, high} or None, brier, brier_updated, n, events, reason}
    of probabilities p (n,) and outcomes y (n,) 0 or 1."""
    p, y = np.clip(np.asarray(p, float), CLIP, 1 - CLIP), np.asarray(y, float)
    n, events = len(y), int(y.sum())
    found: dict[str, Any] = {"n": n, "events": events, "in_the_large": None, "slope": None}
    found |= {"observed_to_expected": None, "brier": None, "brier_updated": None, "reason": None}
    if min(events, n - events) < FEW_EVENTS:
        rarer = min(events, n - events)
        return {**found, "reason": f"{rarer} of {n} patients are of the rarer class; at least {FEW_EVENTS} are needed"}
    z, logit, ones = float(norm.ppf((1 + level) / 2)), np.log(p / (1 - p)), np.ones((n, 1))
    ratio, error = events / float(p.sum()), np.sqrt((1 - events / n) / events)
    found["observed_to_expected"] = {
        "value": ratio,
        "low": float(ratio * np.exp(-z * error)),
        "high": float(ratio * np.exp(z * error)),
    }
    found["brier"] = float(((p - y) ** 2).mean())
    if large := _wald(ones, logit, y, z):
        found["in_the_large"] = large[0]
        updated = 1 / (1 + np.exp(-(logit + large[0]["value"])))
        found["brier_updated"] = float(((updated - y) ** 2).mean())
    if np.ptp(logit) > 1e-9 and (line := _wald(np.column_stack([ones, logit]), np.zeros(n), y, z)):
        found["slope"] = line[1]
    return found
