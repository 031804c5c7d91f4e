"""The control `site_only` for the types that are no plain classes: what the site alone tells of the outcome.

In each site's training patients the prevalence of every grade or label, the mean, or the hazard relative to the cohort,
each with one pseudo-patient (or pseudo-event) of the whole cohort, so that a site with one patient is not certain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from slidemake.statistics.survival import RiskSets, step
from slidemake.tasks.base import Outcome, Threshold
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.ordinal import OrdinalOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import SurvivalOutcome


def fit_site(
    outcome: Outcome, labels: Mapping[str, Any], sites: Mapping[str, str], train: Sequence[str]
) -> tuple[Callable[[str], np.ndarray], Threshold]:
    """(values (P,) by site, threshold) from training patients; a site without any gets the cohort's values."""
    everyone = [labels[p] for p in train]
    of_site = {site: [labels[p] for p in train if sites[p] == site] for site in sorted({sites[p] for p in train})}
    make = next(f for kind, f in _MAKERS.items() if isinstance(outcome, kind))
    overall: np.ndarray = make(outcome, everyone, everyone)
    known = {site: make(outcome, inside, everyone) for site, inside in of_site.items()}
    threshold: Threshold = None
    if isinstance(outcome, MultilabelOutcome):
        threshold = overall.tolist()
    elif isinstance(outcome, SurvivalOutcome):
        threshold = float(overall[0])
    return lambda site: known.get(site, overall), threshold


def _prevalence(outcome: OrdinalOutcome, inside: list[int], everyone: list[int]) -> np.ndarray:
    grades = len(outcome.classes)
    overall = np.bincount(everyone, minlength=grades) / len(everyone)
    return (np.bincount(inside, minlength=grades) + overall) / (len(inside) + 1)


def _labels(outcome: MultilabelOutcome, inside: list[np.ndarray], everyone: list[np.ndarray]) -> np.ndarray:
    found = []
    for here, all_ in zip(np.asarray(inside).T, np.asarray(everyone).T, strict=True):
        overall = ((all_ == 1).sum() + 0.5) / ((all_ >= 0).sum() + 1)
        found.append(((here == 1).sum() + overall) / ((here >= 0).sum() + 1))
    return np.array(found)


def _mean(outcome: RegressionOutcome, inside: list[float], everyone: list[float]) -> np.ndarray:
    return np.array([(np.sum(inside) + np.mean(everyone)) / (len(inside) + 1)])


def _hazard(outcome: SurvivalOutcome, inside: list[Any], everyone: list[Any]) -> np.ndarray:
    """Observed over expected events (both with one more) times the cohort's hazard."""
    sets = RiskSets(*outcome.arrays(everyone))
    times, hazard = sets.baseline(np.zeros(len(everyone)))
    time, event = outcome.arrays(inside)
    ratio = (event.sum() + 1) / (step(times, hazard, time, before=0.0).sum() + 1)
    return outcome.curve_values(lambda at: np.exp(-ratio * step(times, hazard, at, before=0.0)))


_MAKERS: dict[Any, Any] = {
    OrdinalOutcome: _prevalence,
    MultilabelOutcome: _labels,
    RegressionOutcome: _mean,
    SurvivalOutcome: _hazard,
}
