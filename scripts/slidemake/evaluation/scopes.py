"""Figures of one model in parts of its predictions: pooled, per repeat, fold, site, and group, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from slidemake.evaluation.probabilities.calibration import bins_for, mean_over_repeats
from slidemake.evaluation.subgroups import by_group, too_small
from slidemake.statistics.bootstrap import (
    UNDEFINED_ONCE,
    bootstrap_weights,
    mean_over,
    scope_seed,
    with_intervals,
)
from slidemake.statistics.class_metrics import LOWER_IS_BETTER, METRICS, metrics_over, why_undefined
from slidemake.tasks.prediction_table import Predictions

MIN_SITE = 5  # patients below which a site gets no figures of its own


def measured(
    labels: np.ndarray,
    prob: np.ndarray,
    ranks: np.ndarray,
    predicted: np.ndarray | None,
    options: dict[str, Any],
    weights: np.ndarray | None = None,
    size: int | None = None,
) -> dict[str, np.ndarray]:
    """`metrics_over` with the options of the evaluation; size: patients that count, where weights leave some out."""
    bins = bins_for(len(labels) if size is None else size, options["ece_bins"])
    return metrics_over(labels, prob, predicted, bins, weights, options["specificity"], ranks)


class Draws:
    """Bootstrap weights per scope and set of patients, made once and shared by all models."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self._kept: dict[tuple, np.ndarray] = {}
        self.redrawn: dict[str, int] = {}

    def weights(self, scope: str, patients: tuple[str, ...], labels: np.ndarray) -> np.ndarray:
        key = (scope, patients, tuple(int(v) for v in labels))
        if key not in self._kept:
            seed = scope_seed(self.options["seed"], scope)
            found = bootstrap_weights(labels, self.options["bootstrap"], seed, self.options["stratify"])
            self._kept[key] = found[0]
            self.redrawn[scope] = self.redrawn.get(scope, 0) + found[1]
        return self._kept[key]


def figures_of(
    values: dict[str, np.ndarray],
    draws: dict[str, np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    level: float,
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, reason}} of point values (1,) and draws (B,)."""
    return with_intervals(
        values, draws, level, lambda name: why_undefined(name, labels, list(classes)) or UNDEFINED_ONCE
    )


def scope_entry(labels: np.ndarray, classes: tuple[str, ...], metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A scope's entry: patients, positives, prevalence (what AUPRC is without skill), metrics or why there are none."""
    counts = np.bincount(labels, minlength=len(classes))
    positives = int(counts[1]) if len(classes) == 2 else None
    share = counts[1] / max(1, len(labels)) if len(classes) == 2 else (counts / max(1, len(labels))).mean()
    about = {"n": len(labels), "positives": positives, "prevalence": float(share), "reason": None}
    return {**about, "metrics": metrics, **more}


def subset_scopes(p: Predictions, index: np.ndarray, scope: str, draws: Draws) -> tuple[dict, dict, dict[str, Any]]:
    """Scope `scope` over the patients `index` (m,): mean over repeats.

    Returns the draws of the mean {metric: (B,)}, the figures per repeat, and the scope's entry.
    """
    options, labels = draws.options, p.labels[index]
    weights = draws.weights(scope, tuple(p.patients[i] for i in index), labels)
    points, resampled, single = [], [], {}
    for r, repeat in enumerate(p.repeats):
        known = np.isfinite(p.prob[r, index, 0])
        if not known.any():
            continue
        part = index[known]
        of_repeat = (p.labels[part], p.prob[r, part], p.ranks[r, part], p.predicted[r, part], options)
        points.append(measured(*of_repeat))
        resampled.append(measured(*of_repeat, weights[:, known]))
        figures = figures_of(points[-1], resampled[-1], p.labels[part], p.classes, options["level"])
        single[f"repeat:{repeat}"] = scope_entry(p.labels[part], p.classes, figures)
    mean_draws = mean_over(resampled)
    figures = figures_of(mean_over(points), mean_draws, labels, p.classes, options["level"])
    bins = bins_for(len(index), options["ece_bins"])
    return mean_draws, single, scope_entry(labels, p.classes, figures, repeats=len(points), ece_bins=bins)


def fold_scopes(p: Predictions, draws: Draws) -> dict[str, Any]:
    scopes = {}
    for r, repeat in enumerate(p.repeats):
        for fold in sorted(set(p.fold[r].tolist()) - {-1}):
            inside = np.flatnonzero(p.fold[r] == fold)
            labels, name = p.labels[inside], f"fold:{repeat}/{fold}"
            weights = draws.weights(name, tuple(p.patients[i] for i in inside), labels)
            of_fold = (labels, p.prob[r, inside], p.ranks[r, inside], p.predicted[r, inside], draws.options)
            values, resampled = measured(*of_fold), measured(*of_fold, weights)
            figures = figures_of(values, resampled, labels, p.classes, draws.options["level"])
            scopes[name] = scope_entry(labels, p.classes, figures)
    return scopes


def site_scopes(p: Predictions, draws: Draws) -> dict[str, Any]:
    scopes, sites = {}, np.array(p.sites)
    for site in sorted(set(p.sites) - {""}):
        chosen = sites == site
        labels = p.labels[chosen]
        counts = np.bincount(labels, minlength=len(p.classes))
        reason = None
        if len(labels) < MIN_SITE:
            reason = f"{len(labels)} patients; figures need at least {MIN_SITE}"
        elif (counts > 0).sum() < len(p.classes):
            absent = [name for name, count in zip(p.classes, counts, strict=True) if not count]
            reason = f"no patient of class {', '.join(absent)} among {len(labels)}"
        if reason:
            scopes[f"site:{site}"] = scope_entry(labels, p.classes, {}) | {"reason": reason}
        else:
            scopes[f"site:{site}"] = subset_scopes(p, np.flatnonzero(chosen), f"site:{site}", draws)[2]
    return scopes


def group_scopes(p: Predictions, column: str, values: dict[str, str], draws: Draws) -> dict[str, Any]:
    """Groups of a column of the sheet: their scopes, or why a group has none, and the gap between them."""

    def look(group: str, chosen: np.ndarray) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
        labels = p.labels[chosen]
        if reason := too_small(labels, p.classes, draws.options):
            return None, scope_entry(labels, p.classes, {}) | {"reason": reason}
        found, _, entry = subset_scopes(p, chosen, f"group:{column}={group}", draws)
        return found, entry

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        of_repeats = []
        for r in range(len(p.repeats)):
            known = np.isfinite(p.prob[r, :, 0])
            of_repeat = (p.labels[known], p.prob[r, known], p.ranks[r, known], p.predicted[r, known], draws.options)
            size = round(weights[0].sum())  # bins are those of a group, not of all its patients
            of_repeats.append(measured(*of_repeat, weights[:, known], size))
        return mean_over(of_repeats)

    return by_group(p.patients, values, look, p.labels, measure, LOWER_IS_BETTER.__contains__, draws.options)


def ensemble_scope(p: Predictions, draws: Draws) -> dict[str, Any]:
    weights = draws.weights("pooled", p.patients, p.labels)
    of_mean = (p.labels, mean_over_repeats(p.prob), mean_over_repeats(p.ranks), None, draws.options)
    values, resampled = measured(*of_mean), measured(*of_mean, weights)
    figures = figures_of(values, resampled, p.labels, p.classes, draws.options["level"])
    return scope_entry(p.labels, p.classes, figures)


def spread(scopes: dict[str, Any], prefix: str, test_to_train: float | None = None) -> dict[str, Any]:
    """Mean, sd, extremes of each metric over the scopes that start with `prefix`; undefined ones are left out.

    `se_corrected` is the standard error of the mean after Nadeau and Bengio 2003: folds share training patients, so the
    plain sd / sqrt(J) is too small; sd * sqrt(1/J + n_test/n_train).
    """
    found = {}
    for metric in METRICS:
        entries = [scope["metrics"].get(metric) for name, scope in scopes.items() if name.startswith(prefix)]
        values = np.array([e["value"] for e in entries if e and e["value"] is not None])
        if not len(values):
            continue
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        row: dict[str, Any] = {
            "mean": float(values.mean()),
            "sd": sd,
            "min": float(values.min()),
            "max": float(values.max()),
        }
        row |= {"n": len(values), "undefined": len(entries) - len(values)}
        if test_to_train is not None and sd is not None:
            row["se_corrected"] = sd * float(np.sqrt(1 / len(values) + test_to_train))
        found[metric] = row
    return found
