"""Figures of one model in parts of its predictions: pooled, per repeat, fold, site, and group, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slidemake.evaluation.aurocs import with_auroc_interval
from slidemake.evaluation.subgroups import by_group
from slidemake.statistics.bootstrap import (
    UNDEFINED_ONCE,
    bootstrap_weights,
    mean_over,
    scope_seed,
    with_intervals,
)
from slidemake.tasks.base import Figures, Predictions

MIN_SITE = 5  # patients below which a site gets no figures of its own


class Subset(NamedTuple):
    """Figures over some patients: draws of the mean over repeats {metric: (B,)}, entries of the repeats, and of the
    mean."""

    draws: Figures
    repeats: dict[str, Any]
    entry: dict[str, Any]


class Draws:
    """Bootstrap weights per scope and set of patients, made once and shared by all models."""

    def __init__(self, options: Mapping[str, Any]):
        self.options = options
        self._kept: dict[tuple, np.ndarray] = {}
        self.redrawn: dict[str, int] = {}

    def weights(self, scope: str, table: Predictions, chosen: np.ndarray) -> np.ndarray:
        strata = table.outcome.strata(table.truth[chosen])
        key = (scope, tuple(table.patients[i] for i in chosen), tuple(strata.tolist()))
        if key not in self._kept:
            seed = scope_seed(self.options["seed"], scope)
            found = bootstrap_weights(strata, self.options["bootstrap"], seed, self.options["stratify"])
            self._kept[key] = found[0]
            self.redrawn[scope] = self.redrawn.get(scope, 0) + found[1]
        return self._kept[key]


def figures_of(
    values: Figures, resampled: Figures, table: Predictions, repeat: int, chosen: np.ndarray, level: float
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, reason}} of point values (1,) and draws (B,)."""
    outcome = table.outcome

    def why(name: str) -> str:
        return f"{outcome.undefined}{outcome.why(name, table, repeat, chosen) or UNDEFINED_ONCE}"

    return with_intervals(values, resampled, level, why)


def scope_entry(
    table: Predictions, chosen: np.ndarray, metrics: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    """A scope's entry: patients, positives, what else is said of them, metrics or why there are none."""
    truth = table.truth[chosen]
    about = {"n": len(chosen), "positives": table.outcome.positives(truth), "reason": reason}
    return {**about, **table.outcome.facts(truth), "metrics": metrics}


def subset_scopes(table: Predictions, chosen: np.ndarray, scope: str, draws: Draws) -> Subset:
    """Scope `scope` over the patients `chosen` (m,)."""
    outcome, options = table.outcome, draws.options
    weights = draws.weights(scope, table, chosen)
    points, resampled, single, at = [], [], {}, 0
    for r, repeat in enumerate(table.repeats):
        known = table.known(r)[chosen]
        if not known.any():
            continue
        part, at = chosen[known], r
        points.append(outcome.over(table, r, part, None, options))
        resampled.append(outcome.over(table, r, part, weights[:, known], options))
        figures = figures_of(points[-1], resampled[-1], table, r, part, options["level"])
        figures = with_auroc_interval(figures, table, part, options["level"], r)
        single[f"repeat:{repeat}"] = scope_entry(table, part, figures)
    mean, inside = mean_over(resampled), chosen[table.known(at)[chosen]]
    figures = figures_of(mean_over(points), mean, table, at, inside, options["level"])
    figures = with_auroc_interval(figures, table, chosen, options["level"])
    entry = scope_entry(table, chosen, figures)
    return Subset(mean, single, {**entry, "repeats": len(points), **outcome.about_subset(len(chosen), options)})


def ensemble_scope(table: Predictions, draws: Draws) -> dict[str, Any]:
    """Figures of the prediction averaged over repeats."""
    everyone, outcome, level = np.arange(len(table.patients)), table.outcome, draws.options["level"]
    weights = draws.weights("pooled", table, everyone)
    values = outcome.of_ensemble(table, None, draws.options)
    resampled = outcome.of_ensemble(table, weights, draws.options)
    mean = table.mean()
    figures = figures_of(values, resampled, mean, 0, everyone, level)
    figures = with_auroc_interval(figures, mean, everyone, level)
    return scope_entry(table, everyone, figures)


def fold_scopes(table: Predictions, draws: Draws) -> dict[str, Any]:
    outcome, scopes = table.outcome, {}
    for r, repeat in enumerate(table.repeats):
        for fold in sorted(set(table.fold[r].tolist()) - {-1}):
            inside, name = np.flatnonzero(table.fold[r] == fold), f"fold:{repeat}/{fold}"
            weights = draws.weights(name, table, inside)
            values = outcome.over(table, r, inside, None, draws.options)
            resampled = outcome.over(table, r, inside, weights, draws.options)
            figures = figures_of(values, resampled, table, r, inside, draws.options["level"])
            figures = with_auroc_interval(figures, table, inside, draws.options["level"], r)
            scopes[name] = scope_entry(table, inside, figures)
    return scopes


def site_scopes(table: Predictions, draws: Draws) -> dict[str, Any]:
    scopes, sites = {}, np.array(table.sites)
    for site in sorted(set(table.sites) - {""}):
        chosen, reason = np.flatnonzero(sites == site), None
        if len(chosen) < MIN_SITE:
            reason = f"{len(chosen)} patients; figures need at least {MIN_SITE}"
        reason = reason or table.outcome.why_no_figures(table.truth[chosen])
        if reason:
            scopes[f"site:{site}"] = scope_entry(table, chosen, {}, reason)
        else:
            scopes[f"site:{site}"] = subset_scopes(table, chosen, f"site:{site}", draws).entry
    return scopes


def group_scopes(table: Predictions, column: str, values: Mapping[str, str], draws: Draws) -> dict[str, Any]:
    """Groups of a column of the sheet: their scopes, or why a group has none, and the gap between them."""
    outcome, options = table.outcome, draws.options

    def look(group: str, chosen: np.ndarray) -> tuple[Figures | None, dict[str, Any]]:
        if reason := outcome.too_small(table.truth[chosen], options):
            return None, scope_entry(table, chosen, {}, reason)
        found = subset_scopes(table, chosen, f"group:{column}={group}", draws)
        return found.draws, found.entry

    def measure(weights: np.ndarray) -> Figures:
        size = round(weights[0].sum())  # bins are those of a group, not of all its patients
        known = [(r, np.flatnonzero(table.known(r))) for r in range(len(table.repeats))]
        return mean_over([outcome.over(table, r, part, weights[:, part], options, size) for r, part in known])

    strata = outcome.strata(table.truth)
    return by_group(table.patients, values, look, strata, measure, outcome.less_is_better, options)


def spread(scopes: Mapping[str, Any], prefix: str, test_to_train: float | None = None) -> dict[str, Any]:
    """Mean, sd, extremes of each metric over the scopes that start with `prefix`; undefined ones are left out.

    `se_corrected` is the standard error of the mean after Nadeau and Bengio 2003: folds share training patients, so the
    plain sd / sqrt(J) is too small; sd * sqrt(1/J + n_test/n_train).
    """
    entries = [scope["metrics"] for name, scope in scopes.items() if name.startswith(prefix)]
    found = {}
    for metric in entries[0] if entries else ():
        values = np.array([e[metric]["value"] for e in entries if e[metric]["value"] is not None])
        if not len(values):
            continue
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        row: dict[str, Any] = {"mean": float(values.mean()), "sd": sd}
        row |= {"min": float(values.min()), "max": float(values.max())}
        row |= {"n": len(values), "undefined": len(entries) - len(values)}
        if test_to_train is not None and sd is not None:
            row["se_corrected"] = sd * float(np.sqrt(1 / len(values) + test_to_train))
        found[metric] = row
    return found
