"""Is one model better than another? DeLong and paired bootstrap on the same patients, corrected for how often one asks.

DeLong, DeLong and Clarke-Pearson 1988: the AUROC is the mean of psi(x_i, y_j) over pairs of a positive x and a negative
y, psi = 1, 1/2 or 0 as x is above, level with or below y. Each patient's share in it (the structural components, V10 of
a positive, V01 of a negative) gives the covariance of two AUROCs measured on the same patients, and from it a z-test. A
model that was cross-validated several times has the mean AUROC of its repeats; the components of a mean are the means
of the components, so the test applies as it stands. They are computed by mid-ranks (Sun and Xu 2014).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from slidemake.statistics.bootstrap import percentile_interval
from slidemake.tasks.base import Predictions
from slidemake.tasks.controls import NOT_A_RIVAL, REFERENCE


def structural_components(positive: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUROC, V10 of the positives (in their order) and V01 of the negatives; both classes must be there."""
    x, y = score[positive], score[~positive]
    everyone = rankdata(np.r_[x, y])
    above = (everyone[: len(x)] - rankdata(x)) / len(y)
    below = 1 - (everyone[len(x) :] - rankdata(y)) / len(x)
    return float(above.mean()), above, below


def _mean_components(positive: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Means over the repeats (R, n) of AUROC, V10 and V01."""
    found = [structural_components(positive, row) for row in scores]
    return (
        float(np.mean([auroc for auroc, _, _ in found])),
        np.mean([above for _, above, _ in found], axis=0),
        np.mean([below for _, _, below in found], axis=0),
    )


def delong(positive: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float | None]:
    """Difference of two AUROCs on the same patients, its standard error, z and two-sided p.

    positive (n,) bool; first, second (R, n) scores of R repeats, R = 1 for a single model each. Equal scores give a
    difference of 0 and p = 1. A standard error of 0 with a difference (both models perfect or constant) gives no p.
    """
    parts = [_mean_components(positive, np.atleast_2d(scores)) for scores in (first, second)]
    difference = parts[0][0] - parts[1][0]
    variance = 0.0
    for one, two in ((parts[0][1], parts[1][1]), (parts[0][2], parts[1][2])):
        shares = one - two
        if len(shares) < 2:
            return {"difference": difference, "se": None, "z": None, "p": None}
        variance += float(shares.var(ddof=1)) / len(shares)
    error = float(np.sqrt(variance))
    if error < 1e-12:
        return {"difference": difference, "se": 0.0, "z": None, "p": 1.0 if abs(difference) < 1e-12 else None}
    z = difference / error
    return {"difference": difference, "se": error, "z": z, "p": float(2 * norm.sf(abs(z)))}


def bootstrap_p(draws: np.ndarray) -> float | None:
    """Two-sided p of "no difference" from paired draws of a difference: twice the smaller share beyond 0, at least
    2 / (B + 1), so that it never says 0. None when no draw has a value."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return None
    beyond = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return float(min(1.0, 2 * (beyond + 1) / (len(known) + 1)))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values (Holm 1979): valid for all comparisons together, whatever their dependence. None stays None."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    running = 0.0
    for rank, (value, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * value))
        adjusted[i] = running
    return adjusted


def pairs(models: Sequence[Predictions], controls: Container[str]) -> list[tuple[Predictions, Predictions]]:
    """Which models are compared: each with every model named after it, with all controls, and controls with the
    reference."""
    own = [m for m in models if m.name not in controls]
    references = [m for m in models if m.name in controls]
    found = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :]]
    return found + [
        (a, b)
        for a in models
        for b in references
        if a.name != b.name and (b.name == REFERENCE or a.name not in controls)
    ]


def compare(
    a: Predictions, b: Predictions, values: dict[str, Any], draws: dict[str, dict[str, np.ndarray]], level: float
) -> dict[str, Any]:
    """Paired differences a - b of the pooled metrics, on the same resampled patients; of classes with DeLong's test."""
    about: dict[str, Any] = {"model": a.name, "reference": b.name, "metrics": {}, "delong": None}
    if a.cohort() != b.cohort():
        return {**about, "reason": "the two models saw different patients"}
    for name in values[a.name]["scopes"]["pooled"]["metrics"]:
        one, two = (values[m]["scopes"]["pooled"]["metrics"].get(name, {}).get("value") for m in (a.name, b.name))
        if one is None or two is None:
            about["metrics"][name] = {"difference": None, "low": None, "high": None, "p": None}
            continue
        apart = draws[a.name][name] - draws[b.name][name]
        low, high = percentile_interval(apart, level)
        about["metrics"][name] = {"difference": one - two, "low": low, "high": high, "p": bootstrap_p(apart)}
    return {**about, "delong": _delong_of(a, b) if a.outcome.tests_auroc else None, "reason": None}


def _delong_of(a: Predictions, b: Predictions) -> dict[str, Any]:
    nothing = {"difference": None, "se": None, "z": None, "p": None}
    positive = a.truth[:, 0] == 1
    if len(a.names) != 2:
        return {**nothing, "reason": "more than two classes"}
    if positive.all() or not positive.any():
        return {**nothing, "reason": "one class only"}
    if not (np.isfinite(a.values).all() and np.isfinite(b.values).all()):
        return {**nothing, "reason": "the repeats tested different patients"}
    found = delong(positive, a.ranks[..., 1], b.ranks[..., 1])
    reason = None if found["p"] is not None else "no variance: every positive ranks alike against the negatives"
    return {**found, "reason": reason}


def adjust(comparisons: list[dict[str, Any]], metric: str) -> None:
    """Add `p_holm` to every comparison that claims something: those with a null control claim nothing.

    Corrected together are the p-values of the metric, DeLong's where there is one, and the bootstrap's elsewhere.
    """
    asked = [c for c in comparisons if not {c["model"], c["reference"]} & set(NOT_A_RIVAL)]

    def p_of(c: dict[str, Any]) -> float | None:
        if c["delong"] and c["delong"]["p"] is not None:
            return c["delong"]["p"]
        return c["metrics"].get(metric, {}).get("p")

    for comparison in comparisons:
        comparison["p_holm"] = None
    for comparison, p in zip(asked, holm([p_of(c) for c in asked]), strict=True):
        comparison["p_holm"] = p
