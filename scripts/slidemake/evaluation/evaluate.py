"""From out-of-fold predictions to the table of metrics: pooled, per repeat, fold and site, with intervals and controls.

What the headline is. A repeat (seed) of the cross-validation predicts every patient once, out of fold. The `pooled`
figure is the metric of each repeat's predictions, averaged over repeats; its interval is the percentile interval of
that average over 2,000 resamples of patients, the same resampled patients in all repeats and in all models. AUROCs of
classes have intervals of their own (`statistics.auroc_intervals`), since percentiles are too sure of them in small
cohorts, and a second one (`procedure`) for models that other patients would train. The metric
of the probability averaged over repeats is another thing (an ensemble, usually better than any model trained) and is
reported apart as `ensemble`. How much the figure moves when folds or seeds change is `spread`. Thresholds are those
that inner validation chose, row by row; nothing is refitted on the predictions evaluated here.

Read ECE with care: resampling adds noise that ECE counts as error, so its percentile interval sits high and may exclude
the figure itself. `calibration.ece_if_calibrated` says what perfect predictions would show in a sample of this size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.core.tables import read_table
from slidemake.evaluation.aurocs import of_procedure
from slidemake.evaluation.choice import with_choice
from slidemake.evaluation.clinical import clinical
from slidemake.evaluation.comparisons import adjust, compare
from slidemake.evaluation.confounding import confounding
from slidemake.evaluation.files import read_models, write_metrics
from slidemake.evaluation.probabilities.about import about_predictions
from slidemake.evaluation.scopes import (
    Draws,
    ensemble_scope,
    fold_scopes,
    group_scopes,
    site_scopes,
    spread,
    subset_scopes,
)
from slidemake.evaluation.subgroups import groups_of
from slidemake.evaluation.verdict import verdict
from slidemake.tasks.base import Figures, Predictions
from slidemake.tasks.controls import CHOSEN, CONTROLS, REFERENCE

Groups = Mapping[str, Mapping[str, str]]  # {column: {patient: value}}
DEFAULTS: dict[str, Any] = {
    "bootstrap": 2000,
    "seed": 0,
    "ece_bins": 15,
    "level": 0.95,
    "stratify": True,
    "specificity": 0.9,
    "abstention_alpha": 0.1,
    "prevalence": None,
    "subgroups": None,
    "subgroup_patients": 20,
    "subgroup_class": 5,
}


def _is_control(table: Predictions) -> bool:
    return table.name in CONTROLS or table.name == table.outcome.null


def _one_model(table: Predictions, draws: Draws, groups: Groups) -> tuple[dict[str, Any], Figures]:
    """A model's entry of metrics.json, and the draws of its pooled figures."""
    outcome, control = table.outcome, _is_control(table)
    pooled = subset_scopes(table, np.arange(len(table.patients)), "pooled", draws)
    folds = fold_scopes(table, draws)
    count = max(len(set(row.tolist()) - {-1}) for row in table.fold)
    scopes = {"pooled": pooled.entry, "ensemble": ensemble_scope(table, draws), **pooled.repeats, **folds}
    scopes |= site_scopes(table, draws)
    of_spread = {
        "repeats": spread(pooled.repeats, "repeat:"),
        "folds": spread(folds, "fold:", 1 / (count - 1) if count > 1 else None),
    }
    looked_at = groups if not control or table.name == REFERENCE else {}
    subgroups = {column: group_scopes(table, column, values, draws) for column, values in looked_at.items()}
    entry: dict[str, Any] = {"control": control, "scopes": scopes, "spread": of_spread, "subgroups": subgroups}
    entry["procedure"] = of_procedure(table, draws.options["level"])
    if outcome.positive is not None:
        view = outcome.as_classes(table)[""][1]
        auroc = pooled.entry["metrics"]["auroc"]["value"]
        entry["clinical"] = clinical(view, table.ranks, auroc, draws.options)
    entry |= about_predictions(table, draws.options, lambda scope, chosen: draws.weights(scope, table, chosen))
    return {**entry, **outcome.extras(table)}, pooled.draws


def evaluate_tables(
    tables: Sequence[Predictions],
    options: Mapping[str, Any] | None = None,
    contamination: Mapping[str, list[str]] | None = None,
    groups: Groups | None = None,
    split: str | None = "kfold",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and curves of all models of a task: the contents of metrics.json and curves.json.

    options: of `evaluation`; missing keys take DEFAULTS. contamination: {encoder: collections of its pretraining that
    the cohort is from}. groups: {column: {patient: value}} to look at. split: how patients were split, None for a
    bundle on another cohort. The baseline that knows no features (prevalence, mean, kaplan_meier) and, of models that
    carry their validation patients, the choice among them are added here. Raises RunError without models, or when they
    are of different tasks.
    """
    options = DEFAULTS | {key: value for key, value in (options or {}).items() if key in DEFAULTS}
    if not tables:
        raise RunError("evaluate: no predictions to evaluate; name at least one model under the task's models")
    if len({(t.outcome.kind, t.names) for t in tables}) > 1:
        listed = "; ".join(f"{t.name}: {', '.join(t.names)}" for t in tables)
        raise RunError(f"evaluate: the models of one task predict different things ({listed}); train them again")
    first = tables[0]
    outcome = first.outcome
    tables = [*(t for t in tables if t.name != outcome.null), outcome.null_model(first)]
    controls = {t.name for t in tables if _is_control(t)}
    tables, asked, chosen = with_choice(tables, controls)
    draws = Draws(options)
    entries: dict[str, Any] = {}
    resampled: dict[str, Figures] = {}
    for table in tables:
        entries[table.name], resampled[table.name] = _one_model(table, draws, groups or {})
    if chosen:
        entries[CHOSEN] |= {"chosen": chosen, "chosen_by": outcome.criterion}
    comparisons = [compare(a, b, entries, resampled, options["level"]) for a, b in asked]
    adjust(comparisons, outcome.primary)
    result = {
        "format": "slidemake-metrics",
        "format_version": 1,
        "version": STAGE_VERSIONS["evaluate"],
        "type": outcome.kind,
        "primary": outcome.primary,
        "check": outcome.check or outcome.primary,
        "chance": outcome.chance,
        "few": [outcome.rare(first.truth), outcome.few],
        "lower_is_better": list(outcome.lower_is_better),
        "options": options,
        "classes": list(outcome.classes),
        "names": list(outcome.names),
        "positive": outcome.positive,
        "patients": len(first.patients),
        "class_counts": outcome.counts(first.truth),
        "repeats": len(first.repeats),
        "split": split,
        "models": entries,
        "comparisons": comparisons,
        "redrawn": draws.redrawn,
        "confounding": confounding(tables, entries, options["seed"]),
        "contamination": dict(contamination or {}),
    }
    result["verdict"] = verdict(result, outcome)
    curves = {"type": outcome.kind, "positive": outcome.positive}
    if "calibration" in entries[first.name]:
        curves["of"] = entries[first.name]["calibration"]["of"]
    of_models = {table.name: outcome.curves(table, entries[table.name]) for table in tables}
    return result, {**curves, "models": of_models}


def evaluate(
    predictions: Sequence[str | Path],
    names: Sequence[str],
    kind: str,
    options: Mapping[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
    contamination: Mapping[str, list[str]] | None = None,
    slides: Path | None = None,
    splits: Path | None = None,
    split: str | None = "kfold",
) -> dict[str, Any]:
    """Read the predictions of every model of a task of type `kind` and write metrics.json, metrics.csv, curves.json.

    slides: cohort/slides.csv, for the subgroups; splits: splits.csv, for the labels of validation patients. Without
    them there are no subgroups, no choice among models and no conformal sets. contamination, split: see
    `evaluate_tables`.
    """
    tables = read_models(predictions, names, kind, splits)
    groups = groups_of(read_table(slides), options.get("subgroups")) if slides is not None else {}
    result, points = evaluate_tables(tables, options, contamination, groups, split)
    write_metrics(result, points, metrics, table, curves)
    return result
