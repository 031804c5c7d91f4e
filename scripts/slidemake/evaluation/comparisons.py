"""Is one model better than another? DeLong and paired bootstrap on the same patients, corrected for how often one asks.

AUROCs are compared by DeLong, DeLong and Clarke-Pearson 1988, paired, with the variance that training adds where
patients were dealt to folds (`statistics.auroc_intervals`): the question is then which way of training is better, and
not which of the models at hand. Other metrics have the paired bootstrap, which is of the models as they were trained.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from slidemake.evaluation.aurocs import ranked_patients, training_ratio
from slidemake.statistics.auroc_intervals import auroc_difference
from slidemake.statistics.bootstrap import percentile_interval
from slidemake.tasks.base import Predictions
from slidemake.tasks.controls import NOT_A_RIVAL, REFERENCE


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
    """Paired differences a - b of the pooled metrics, on the same resampled patients; of classes without an order
    with DeLong's test, whose interval their AUROC has."""
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
    tested = _auroc_test(a, b, level) if a.outcome.tests_auroc else None
    if tested and tested["low"] is not None:
        about["metrics"]["auroc"] |= {"low": tested["low"], "high": tested["high"]}
    return {**about, "delong": tested, "reason": None}


def _auroc_test(a: Predictions, b: Predictions, level: float) -> dict[str, Any]:
    first, second, ratio = ranked_patients(a), ranked_patients(b), training_ratio(a)
    nothing = dict.fromkeys(("difference", "low", "high", "se", "z", "p"))
    about = {"tested_to_trained": ratio}
    if first is None or second is None:
        return {**nothing, **about, "reason": "one class only"}
    found = auroc_difference(first, second, level, ratio)
    reason = None if found["p"] is not None else "no variance: every positive ranks alike against the negatives"
    return {**found, **about, "reason": reason}


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
