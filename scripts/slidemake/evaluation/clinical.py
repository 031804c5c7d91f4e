"""What two classes mean in use: decisions at the frozen threshold, where they hold, and what they are worth.

Nothing is chosen here. The threshold, and those that rule out and rule in, are of validation patients, fold by fold;
what a site's own best threshold would give is told beside them, and is a figure of hindsight. Figures are means over
repeats; intervals are of the models as they were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slidemake.statistics.auroc_intervals import auroc_log_odds, ranked
from slidemake.statistics.calibration_intervals import calibration_figures
from slidemake.statistics.decision_values import net_benefit, predictive_values, thresholds_for
from slidemake.statistics.meta_analysis import auroc_over_sites
from slidemake.statistics.sample_size import (
    auroc_precision,
    detectable_difference,
    external_validation_size,
    patients_for_difference,
)
from slidemake.statistics.temperature import youden_threshold
from slidemake.tasks.class_predictions import ClassPredictions

MIN_SITE = 5  # patients below which a site gets no figures of its own
THRESHOLDS = np.arange(1, 20) / 20  # of the decision curve
KEPT = {"sensitivity": 0.95, "specificity": 0.95}  # what ruling out, and ruling in, keep among validation patients
DIFFERENCE = 0.05  # in AUROC, of which it is told how many patients would show it


def _known(p: ClassPredictions, inside: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(repeat, indices) of the patients `inside` (n,) bool that each repeat predicts; repeats without any left out."""
    found = [(r, np.flatnonzero(inside & np.isfinite(p.prob[r, :, 0]))) for r in range(len(p.repeats))]
    return [(r, at) for r, at in found if len(at)]


def _counts(p: ClassPredictions, parts: list[tuple[int, np.ndarray]], called: np.ndarray) -> tuple[float, ...]:
    """True positives, false negatives, false positives, true negatives of decisions (R, n) bool, mean over repeats."""
    rows = []
    for r, at in parts:
        yes, truth = called[r, at], p.labels[at] == 1
        rows.append([(yes & truth).sum(), (~yes & truth).sum(), (yes & ~truth).sum(), (~yes & ~truth).sum()])
    return tuple(np.mean(rows, axis=0).tolist())


def decisions(
    p: ClassPredictions, inside: np.ndarray, called: np.ndarray, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Figures of decisions (R, n) among the patients `inside`; `at_prevalence` where the options name one."""
    parts = _known(p, inside)
    if not parts:
        return None
    tp, fn, fp, tn = counts = _counts(p, parts, called)
    found: dict[str, Any] = {"n": tp + fn + fp + tn, "positives": tp + fn}
    found |= predictive_values((tp, fn, fp, tn), None, options["level"])
    if options.get("prevalence") is not None:
        stated = predictive_values((tp, fn, fp, tn), options["prevalence"], options["level"])
        found["at_prevalence"] = {key: stated[key] for key in ("ppv", "npv")}
    return {**found, "counts": list(counts)}


def ruled(p: ClassPredictions, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Patients whom the model rules out or in by thresholds of validation patients; None where a fold has none."""
    everyone = np.ones(len(p.patients), bool)
    out, within = np.zeros(p.fold.shape, bool), np.zeros(p.fold.shape, bool)
    limits = []
    for r, repeat in enumerate(p.repeats):
        for fold in sorted(set(p.fold[r].tolist()) - {-1}):
            if (repeat, fold) not in (p.validation or {}):
                return None
            prob, labels = (p.validation or {})[repeat, fold]
            found = thresholds_for(labels == 1, prob[:, 1], **KEPT)
            if found["rule_out"] is None:
                return None
            limits.append(found)
            inside = p.fold[r] == fold
            out[r, inside] = p.prob[r, inside, 1] < found["rule_out"]
            if found["rule_in"] is not None:
                within[r, inside] = p.prob[r, inside, 1] >= found["rule_in"]
    of_out, of_in = decisions(p, everyone, ~out, options), decisions(p, everyone, within, options)
    assert of_out is not None
    assert of_in is not None
    _, fn, _, tn = of_out["counts"]
    ins = of_in["counts"][0] + of_in["counts"][2]
    medians = {key: _median([f[key] for f in limits]) for key in ("rule_out", "rule_in")}
    return {
        **KEPT,
        "thresholds": medians,
        "ruled_out": (fn + tn) / of_out["n"],
        "ruled_in": ins / of_in["n"],
        "sensitivity_of_out": of_out["sensitivity"],
        "npv_of_out": of_out["npv"],
        "specificity_of_in": of_in["specificity"],
        "ppv_of_in": of_in["ppv"],
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def calibration(p: ClassPredictions, inside: np.ndarray, level: float) -> dict[str, Any]:
    """`calibration_figures` of each repeat, averaged: of the models that were trained, and not of their mean."""
    found = [calibration_figures(p.prob[r, at, 1], p.labels[at], level) for r, at in _known(p, inside)]
    if not found:
        return calibration_figures(np.zeros(0), np.zeros(0), level)
    if refused := next((f for f in found if f["reason"]), None):
        return refused
    mean: dict[str, Any] = {key: found[0][key] for key in ("n", "events", "reason")}
    for key in ("in_the_large", "slope", "observed_to_expected"):
        parts = [f[key] for f in found]
        mean[key] = None
        if all(parts):
            mean[key] = {end: float(np.mean([part[end] for part in parts])) for end in ("value", "low", "high")}
    for key in ("brier", "brier_updated"):
        values = [f[key] for f in found]
        mean[key] = None if None in values else float(np.mean(values))
    return mean


def at_site(p: ClassPredictions, inside: np.ndarray, called: np.ndarray, options: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen threshold at one site, beside what the best one of its own patients would give (hindsight)."""
    labels = p.labels[inside]
    found: dict[str, Any] = {"n": len(labels), "positives": int((labels == 1).sum()), "reason": None}
    if len(labels) < MIN_SITE:
        return found | {"reason": f"{len(labels)} patients; figures need at least {MIN_SITE}"}
    if len(set(labels.tolist())) < 2:
        return found | {"reason": f"all {len(labels)} patients are of one class"}
    own = np.zeros(p.fold.shape, bool)
    for r, at in _known(p, inside):
        own[r, at] = p.prob[r, at, 1] >= youden_threshold(p.prob[r, at, 1], p.labels[at] == 1)
    hindsight = decisions(p, inside, own, options)
    return found | {
        "frozen": decisions(p, inside, called, options),
        "own": {key: hindsight[key] for key in ("sensitivity", "specificity")} if hindsight else None,
        "calibration": calibration(p, inside, options["level"]),
    }


def over_sites(p: ClassPredictions, ranks: np.ndarray, level: float) -> dict[str, Any] | None:
    """AUROC over the sites that have two patients of each class: mean, interval, and what a new site may expect."""
    sites, parts = np.array(p.sites), []
    for site in sorted(set(p.sites) - {""}):
        inside = sites == site
        found = ranked(p.labels[inside], ranks[:, inside, 1])
        if found is not None and found.rarest >= 2:
            parts.append(auroc_log_odds(found))
    return auroc_over_sites([odds for odds, _ in parts], [variance for _, variance in parts], level)


def sizes(p: ClassPredictions, auroc: float | None, level: float) -> dict[str, Any] | None:
    """What these patients can tell of an AUROC, and how many it would take."""
    positives = int((p.labels == 1).sum())
    negatives = len(p.labels) - positives
    if auroc is None or min(positives, negatives) < 2:
        return None
    at = min(max(auroc, 0.5), 0.99)
    share = positives / len(p.labels)
    return {
        "auroc": at,
        "known_to": auroc_precision(at, positives, negatives, level),
        "detectable": detectable_difference(at, positives, negatives, level=level),
        "difference": DIFFERENCE,
        "patients_for_difference": patients_for_difference(DIFFERENCE, at, share, level=level),
        "external": external_validation_size(share, at, level),
    }


def clinical(p: ClassPredictions, ranks: np.ndarray, auroc: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """All of this for predictions of two classes; ranks (R, n, 2): what patients are ranked by; auroc: pooled."""
    everyone, called, sites = np.ones(len(p.patients), bool), p.predicted == 1, np.array(p.sites)
    curves = [net_benefit(p.labels[at] == 1, p.prob[r, at, 1], THRESHOLDS) for r, at in _known(p, everyone)]
    return {
        "prevalence": options.get("prevalence"),
        "decisions": decisions(p, everyone, called, options),
        "ruled": ruled(p, options),
        "calibration": calibration(p, everyone, options["level"]),
        "sites": {site: at_site(p, sites == site, called, options) for site in sorted(set(p.sites) - {""})},
        "over_sites": over_sites(p, ranks, options["level"]),
        "net_benefit": {key: np.mean([curve[key] for curve in curves], axis=0).tolist() for key in curves[0]},
        "sizes": sizes(p, auroc, options["level"]),
    }
