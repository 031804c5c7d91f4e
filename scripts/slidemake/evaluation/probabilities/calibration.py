"""Are the probabilities right? Before and after temperature scaling, over all patients and at every site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slidemake.statistics.class_metrics import confidence_and_hit, ece, mass_bins, metrics_over
from slidemake.statistics.reliability import calibration_line, ece_if_calibrated, reliability_table
from slidemake.statistics.sizes import bins_for
from slidemake.statistics.temperature import probabilities
from slidemake.tasks.class_predictions import ClassPredictions

MIN_PATIENTS = 10  # patients below which a site's calibration is not measured


def mean_over_repeats(prob: np.ndarray) -> np.ndarray:
    """(n, C) probability averaged over the repeats (R, n, C) that have one."""
    return np.nanmean(prob, axis=0)


def _measured(labels: np.ndarray, prob: np.ndarray, options: Mapping[str, Any], tables: bool) -> dict[str, Any]:
    bins = bins_for(len(labels), options["ece_bins"])
    confidence, hit = confidence_and_hit(labels, prob)
    figures = metrics_over(labels, prob, None, bins)
    found: dict[str, Any] = {name: float(figures[name][0]) for name in ("brier", "log_loss", "ece", "ece_width")}
    if prob.shape[1] > 2:  # every class by itself, on average (Kull et al. 2019)
        ones, classes = np.ones((1, len(labels))), range(prob.shape[1])
        each = [ece(prob[:, c], labels == c, mass_bins(prob[:, c], bins), ones)[0] for c in classes]
        found["ece_classwise"] = float(np.mean(each))
    found |= {
        "n": len(labels),
        "bins": bins,
        "ece_if_calibrated": ece_if_calibrated(confidence, bins, options["seed"]),
        **calibration_line(confidence, hit),
    }
    if tables:
        found["table"] = reliability_table(confidence, hit, bins)
        found["table_width"] = reliability_table(confidence, hit, bins, "width")
    return found


def _single(p: ClassPredictions, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of each repeat's own probabilities, averaged: of the models that were trained, whose AUROC is the headline, and
    not of their mean. None where there is one repeat."""
    if len(p.repeats) < 2:
        return None
    known = [(r, np.isfinite(p.prob[r, :, 0])) for r in range(len(p.repeats))]
    found = [_measured(p.labels[seen], p.prob[r, seen], options, False) for r, seen in known if seen.any()]
    chance = [f["ece_if_calibrated"] for f in found]
    mean: dict[str, Any] = {"n": found[0]["n"], "ece": float(np.mean([f["ece"] for f in found]))}
    mean["ece_if_calibrated"] = {key: float(np.mean([c[key] for c in chance])) for key in ("mean", "p95")}
    for key in ("slope", "intercept", "in_the_large"):
        values = [f[key] for f in found]
        mean[key] = None if None in values else float(np.mean(values))
    return mean


def calibration_report(p: ClassPredictions, options: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration of the probability averaged over repeats; `before` is that of the logits without temperature,
    `single` that of each repeat's own probabilities, on average.

    Two classes: of P(positive); more: of the top class, and `ece_classwise` of all of them. Sites with fewer
    than 10 patients get a reason instead of figures.
    """
    after = mean_over_repeats(p.prob)
    before = None if p.logits is None else mean_over_repeats(probabilities(p.logits))
    sites: dict[str, Any] = {}
    names = np.array(p.sites)
    for site in sorted(set(p.sites) - {""}):
        inside = names == site
        if (n := int(inside.sum())) < MIN_PATIENTS:
            sites[site] = {"n": n, "before": None, "after": None, "reason": f"{n} patients; {MIN_PATIENTS} are needed"}
            continue
        sites[site] = {
            "n": n,
            "before": None if before is None else _measured(p.labels[inside], before[inside], options, False),
            "after": _measured(p.labels[inside], after[inside], options, True),
            "reason": None,
        }
    return {
        "of": "probability averaged over repeats" if len(p.repeats) > 1 else "probability",
        **_measured(p.labels, after, options, True),
        "before": None if before is None else _measured(p.labels, before, options, True),
        "single": _single(p, options),
        "sites": sites,
    }
