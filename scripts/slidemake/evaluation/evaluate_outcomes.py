"""The table of metrics of tasks that are no plain classes: ordinal, multilabel, regression, survival.

Scopes, intervals, controls and files are as in `evaluation.py`: `pooled` is the mean over repeats of a metric on each
repeat's out-of-fold predictions, with a percentile interval over resamples of patients, the same in all repeats and
models; `ensemble` is of the prediction averaged over repeats. What is computed comes from `tasks/kinds.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.core.tables import read_table
from slidemake.core.words import contamination_warning
from slidemake.evaluation.choice import with_choice
from slidemake.evaluation.comparisons import adjust, paired
from slidemake.evaluation.files import read_models, write_metrics
from slidemake.evaluation.probabilities.about import about_predictions
from slidemake.evaluation.subgroups import by_group, groups_of
from slidemake.evaluation.verdict_outcomes import outcome_verdict
from slidemake.statistics.bootstrap import (
    UNDEFINED_ONCE,
    bootstrap_weights,
    mean_over,
    scope_seed,
    with_intervals,
)
from slidemake.tasks.controls import CHOSEN, CONTROLS, REFERENCE
from slidemake.tasks.kinds import KINDS, Kind
from slidemake.tasks.outcome_table import OutcomeTable, read_outcome_validation, read_outcomes

OPTIONS: dict[str, Any] = {
    "bootstrap": 2000,
    "seed": 0,
    "level": 0.95,
    "stratify": True,
    "subgroup_patients": 20,
    "subgroup_class": 5,
    "abstention_alpha": 0.1,
    "ece_bins": 15,
}
MIN_SITE = 5  # patients below which a site gets no figures of its own


class _Draws:
    """Bootstrap weights per scope and set of patients, made once and shared by all models."""

    def __init__(self, kind: Kind, options: dict[str, Any]):
        self.kind, self.options = kind, options
        self._kept: dict[tuple, np.ndarray] = {}

    def weights(self, scope: str, table: OutcomeTable, chosen: np.ndarray) -> np.ndarray:
        key = (scope, tuple(table.patients[i] for i in chosen))
        if key not in self._kept:
            strata = self.kind.strata(table.truth[chosen])
            strata = strata if self.options["stratify"] else np.zeros_like(strata)
            seed = scope_seed(self.options["seed"], scope)
            self._kept[key] = bootstrap_weights(strata, self.options["bootstrap"], seed)[0]
        return self._kept[key]


def _figures(
    kind: Kind, values: dict, draws: dict, table: OutcomeTable, repeat: int, chosen: np.ndarray, level: float
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, reason}} of point values (1,) and draws (B,)."""

    def why(name: str) -> str:
        return f"not defined, because {kind.why(name, table, repeat, chosen) or UNDEFINED_ONCE}"

    return with_intervals(values, draws, level, why)


def _entry(kind: Kind, table: OutcomeTable, chosen: np.ndarray, metrics: dict, reason: str | None = None) -> dict:
    positives = kind.positives(table.truth[chosen])
    return {"n": len(chosen), "positives": positives, "reason": reason, "metrics": metrics}


def _scope(table: OutcomeTable, chosen: np.ndarray, scope: str, draws: _Draws) -> tuple[dict, dict, dict[str, Any]]:
    """(draws of the mean over repeats, entries of the repeats, entry of the mean) over the patients `chosen`."""
    kind, level = draws.kind, draws.options["level"]
    weights = draws.weights(scope, table, chosen)
    points, resampled, single, at = [], [], {}, 0
    for r, repeat in enumerate(table.repeats):
        known = table.known(r)[chosen]
        if not known.any():
            continue
        part, at = chosen[known], r
        points.append(kind.over(table, r, part, None))
        resampled.append(kind.over(table, r, part, weights[:, known]))
        figures = _figures(kind, points[-1], resampled[-1], table, r, part, level)
        single[f"repeat:{repeat}"] = _entry(kind, table, part, figures)
    mean = mean_over(resampled)
    figures = _figures(kind, mean_over(points), mean, table, at, chosen[table.known(at)[chosen]], level)
    return mean, single, _entry(kind, table, chosen, figures)


def _fold_scopes(table: OutcomeTable, draws: _Draws) -> dict[str, Any]:
    kind, scopes = draws.kind, {}
    for r, repeat in enumerate(table.repeats):
        for fold in sorted(set(table.fold[r].tolist()) - {-1}):
            inside, name = np.flatnonzero(table.fold[r] == fold), f"fold:{repeat}/{fold}"
            resampled = kind.over(table, r, inside, draws.weights(name, table, inside))
            values = kind.over(table, r, inside, None)
            figures = _figures(kind, values, resampled, table, r, inside, draws.options["level"])
            scopes[name] = _entry(kind, table, inside, figures)
    return scopes


def _site_scopes(table: OutcomeTable, draws: _Draws) -> dict[str, Any]:
    scopes = {}
    for site in sorted(set(table.sites) - {""}):
        chosen = np.flatnonzero(np.array(table.sites) == site)
        if len(chosen) < MIN_SITE:
            reason = f"{len(chosen)} patients; figures need at least {MIN_SITE}"
            scopes[f"site:{site}"] = _entry(draws.kind, table, chosen, {}, reason)
        else:
            scopes[f"site:{site}"] = _scope(table, chosen, f"site:{site}", draws)[2]
    return scopes


def _group_scopes(table: OutcomeTable, values: dict[str, str], column: str, draws: _Draws) -> dict[str, Any]:
    """Groups of a column of the sheet: their scopes, or why a group has none, and the gap between them."""
    kind = draws.kind

    def look(group: str, chosen: np.ndarray) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
        if reason := kind.too_small(table, chosen, draws.options):
            return None, _entry(kind, table, chosen, {}, reason)
        found, _, entry = _scope(table, chosen, f"group:{column}={group}", draws)
        return found, entry

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        known = [(r, np.flatnonzero(table.known(r))) for r in range(len(table.repeats))]
        return mean_over([kind.over(table, r, part, weights[:, part]) for r, part in known])

    strata = kind.strata(table.truth)
    return by_group(table.patients, values, look, strata, measure, kind.less_is_better, draws.options)


def _spread(scopes: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Mean, sd and extremes of each metric over the scopes that start with `prefix`; undefined ones are left out."""
    entries = [scope["metrics"] for name, scope in scopes.items() if name.startswith(prefix)]
    found = {}
    for metric in entries[0] if entries else ():
        values = np.array([e[metric]["value"] for e in entries if e[metric]["value"] is not None])
        if len(values):
            sd = float(values.std(ddof=1)) if len(values) > 1 else None
            row = {"mean": float(values.mean()), "sd": sd, "min": float(values.min()), "max": float(values.max())}
            found[metric] = {**row, "n": len(values), "undefined": len(entries) - len(values)}
    return found


def _is_control(table: OutcomeTable, kind: Kind) -> bool:
    return table.name in CONTROLS or table.name == kind.null


def _one_model(
    table: OutcomeTable, draws: _Draws, groups: dict[str, dict[str, str]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    kind, everyone = draws.kind, np.arange(len(table.patients))
    mean_draws, repeats, pooled = _scope(table, everyone, "pooled", draws)
    ensemble = _scope(table.mean(), everyone, "pooled", draws)[2]
    folds, sites = _fold_scopes(table, draws), _site_scopes(table, draws)
    scopes = {"pooled": pooled, "ensemble": ensemble, **repeats, **folds, **sites}
    spread = {"repeats": _spread(repeats, "repeat:"), "folds": _spread(folds, "fold:")}
    control = _is_control(table, kind)
    looked_at = groups if not control or table.name == REFERENCE else {}
    subgroups = {column: _group_scopes(table, values, column, draws) for column, values in looked_at.items()}
    entry: dict[str, Any] = {"control": control, "scopes": scopes, "spread": spread, "subgroups": subgroups}
    entry |= about_predictions(table, draws.options, lambda scope, chosen: draws.weights(scope, table, chosen))
    return {**entry, **kind.extras(table)}, mean_draws


def within_sites(entry: dict[str, Any], metric: str) -> dict[str, Any] | None:
    """The metric inside sites, weighted by their patients, beside the pooled one; None when no site has a value."""
    sites = [scope for name, scope in entry["scopes"].items() if name.startswith("site:")]
    found = [(s["n"], s["metrics"][metric]["value"]) for s in sites if s["metrics"]]
    found = [(n, value) for n, value in found if value is not None]
    pooled = entry["scopes"]["pooled"]["metrics"][metric]["value"]
    if not found or pooled is None:
        return None
    patients = sum(n for n, _ in found)
    within = sum(n * value for n, value in found) / patients
    return {"within": within, "pooled": pooled, "sites": len(found), "patients": patients}


def evaluate_tables(
    tables: list[OutcomeTable],
    options: dict[str, Any] | None = None,
    contamination: dict | None = None,
    groups: dict[str, dict[str, str]] | None = None,
    split: str | None = "kfold",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and curves of all models of a task: the contents of metrics.json and curves.json.

    groups: {column: {patient: value}} to look at. split: as `evaluation.evaluate_models` takes it.
    The baseline that knows no features (prevalence, mean, kaplan_meier) and, of models that carry their validation
    patients, the choice among them are added here. Raises RunError without models, or when they are of different tasks.
    """
    options = OPTIONS | {key: value for key, value in (options or {}).items() if key in OPTIONS}
    if not tables:
        raise RunError("evaluate: no predictions to evaluate; name at least one model under the task's models")
    if len({(t.kind, t.names) for t in tables}) > 1:
        raise RunError("evaluate: the models of one task were trained for different labels; train them again")
    kind, first = KINDS[tables[0].kind], tables[0]
    tables = [*tables, kind.null_model(first)]
    controls = {t.name for t in tables if _is_control(t, kind)}
    tables, asked, chosen = with_choice(tables, controls, kind.validation_loss, ("values", "decisions", "raw"))
    draws, entries, resampled = _Draws(kind, options), {}, {}
    for table in tables:
        entries[table.name], resampled[table.name] = _one_model(table, draws, groups or {})
    if chosen:
        entries[CHOSEN] |= {"chosen": chosen, "chosen_by": kind.criterion}
    comparisons = [paired(a, b, entries, resampled, options["level"]) for a, b in asked]
    adjust(comparisons, kind.primary)
    result = {
        "format": "slidemake-metrics",
        "format_version": 1,
        "version": STAGE_VERSIONS["evaluate"],
        "type": kind.kind,
        "primary": kind.primary,
        "check": kind.check or kind.primary,
        "chance": kind.chance,
        "few": [kind.rare(first), kind.few],
        "lower_is_better": list(kind.lower_is_better),
        "options": options,
        "classes": list(first.names) if kind.kind == "ordinal" else [],
        "names": list(first.names),
        "positive": None,
        "patients": len(first.patients),
        "class_counts": kind.counts(first),
        "repeats": len(first.repeats),
        "split": split,
        "models": entries,
        "comparisons": comparisons,
        "confounding": {
            "sites": {site: first.sites.count(site) for site in sorted(set(first.sites))},
            "within_site": {
                name: within_sites(entry, kind.primary) for name, entry in entries.items() if not entry["control"]
            },
        },
        "contamination": contamination or {},
    }
    result["verdict"] = outcome_verdict(result, [contamination_warning(e, c) for e, c in (contamination or {}).items()])
    curves = {
        name: {key: entry.pop(key) for key in ("points", "groups") if key in entry} for name, entry in entries.items()
    }
    return result, {"type": kind.kind, "positive": None, "models": curves}


def evaluate_outcomes(
    predictions: list[str | Path],
    names: list[str],
    kind: str,
    options: dict[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
    contamination: dict[str, list[str]] | None = None,
    slides: Path | None = None,
    splits: Path | None = None,
    split: str | None = "kfold",
) -> dict[str, Any]:
    """Read the predictions of every model of a task of type `kind` and write metrics.json, metrics.csv, curves.json.

    slides: cohort/slides.csv, for the subgroups; splits: splits.csv, for the labels of validation patients. Without
    them there are no subgroups, no choice among models and no conformal intervals.
    """
    read = partial(read_outcomes, kind=kind)
    tables = read_models(predictions, names, splits, read, read_outcome_validation)
    groups = groups_of(read_table(slides), options.get("subgroups")) if slides is not None else {}
    result, points = evaluate_tables(tables, options, contamination, groups, split)
    write_metrics(result, points, metrics, table, curves)
    return result
