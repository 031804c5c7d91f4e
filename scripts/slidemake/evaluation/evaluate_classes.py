"""From out-of-fold predictions to the table of metrics: pooled, per repeat, fold and site, with intervals and controls.

What the headline is. A repeat (seed) of the cross-validation predicts every patient once, out of fold. The `pooled`
figure is the metric of each repeat's predictions, averaged over repeats; its interval is the percentile interval of
that average over 2,000 resamples of patients, the same resampled patients in all repeats and in all models. The metric
of the probability averaged over repeats is another thing (an ensemble, usually better than any model trained) and is
reported apart as `ensemble`. How much the figure moves when folds or seeds change is `spread`. Thresholds are those
that inner validation chose, row by row; nothing is refitted on the predictions evaluated here.

Read ECE with care: resampling adds noise that ECE counts as error, so its percentile interval sits high and may exclude
the figure itself. `calibration.ece_if_calibrated` says what perfect predictions would show in a sample of this size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.core.tables import read_table
from slidemake.evaluation.choice import validation_loss, with_choice
from slidemake.evaluation.comparisons import adjust, compare
from slidemake.evaluation.files import read_models, write_metrics
from slidemake.evaluation.probabilities.calibration import calibration_report, mean_over_repeats
from slidemake.evaluation.probabilities.conformal import conformal, risk_coverage
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
from slidemake.evaluation.verdict import confounding, verdict
from slidemake.statistics.class_metrics import confusion
from slidemake.statistics.reliability import roc_and_pr
from slidemake.tasks.controls import CHOSEN, CONTROLS, REFERENCE
from slidemake.tasks.prediction_table import Predictions, read_predictions, read_validation

DEFAULTS: dict[str, Any] = {
    "bootstrap": 2000,
    "seed": 0,
    "ece_bins": 15,
    "level": 0.95,
    "stratify": True,
    "specificity": 0.9,
    "abstention_alpha": 0.1,
    "subgroups": None,
    "subgroup_patients": 20,
    "subgroup_class": 5,
}


def prevalence_model(like: Predictions) -> Predictions:
    """The baseline that knows only how common each class is: the same probabilities for everyone.

    It uses the prevalence of the whole cohort. The training folds' prevalence would be lower wherever the test fold's
    is higher, which pushes its pooled AUROC far below 0.5 for no reason but bookkeeping.
    """
    share = np.bincount(like.labels, minlength=len(like.classes)) / len(like.labels)
    known = np.isfinite(like.prob[..., :1])
    prob = np.where(known, share, np.nan)
    predicted = np.where(known[..., 0], int(share.argmax()), -1)
    return Predictions(
        "prevalence", like.classes, like.patients, like.sites, like.labels, like.repeats, prob, predicted, like.fold
    )


def _confusion(p: Predictions) -> list[list[float]]:
    """Decisions (columns) against truth (rows), averaged over repeats."""
    total = np.zeros((len(p.classes), len(p.classes)))
    for r in range(len(p.repeats)):
        known = p.predicted[r] >= 0
        total += confusion(p.labels[known], p.predicted[r, known], len(p.classes), np.ones((1, int(known.sum()))))[0]
    return (total / len(p.repeats)).tolist()


def _one_model(
    p: Predictions, draws: Draws, groups: dict[str, dict[str, str]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    options = draws.options
    mean_draws, repeats, pooled = subset_scopes(p, np.arange(len(p.patients)), "pooled", draws)
    folds = fold_scopes(p, draws)
    count = max(len(set(row.tolist()) - {-1}) for row in p.fold)
    scopes = {"pooled": pooled, "ensemble": ensemble_scope(p, draws), **repeats, **folds, **site_scopes(p, draws)}
    of_spread = {
        "repeats": spread(repeats, "repeat:"),
        "folds": spread(folds, "fold:", 1 / (count - 1) if count > 1 else None),
    }
    looked_at = groups if p.name not in CONTROLS or p.name == REFERENCE else {}
    subgroups = {column: group_scopes(p, column, values, draws) for column, values in looked_at.items()}
    sets = None
    if p.validation is not None:

        def weights_of(scope: str, chosen: np.ndarray) -> np.ndarray:
            index = np.flatnonzero(chosen)
            return draws.weights(scope, tuple(p.patients[i] for i in index), p.labels[index])

        sets = conformal(p, p.validation, options["abstention_alpha"], options["level"], weights_of)
    entry = {
        "control": p.name in CONTROLS,
        "scopes": scopes,
        "spread": of_spread,
        "calibration": calibration_report(p, options),
        "confusion": _confusion(p),
        "subgroups": subgroups,
        "conformal": sets,
        "abstention": risk_coverage(p),
    }
    return entry, mean_draws


def _curves(p: Predictions, calibration: dict[str, Any]) -> dict[str, Any]:
    """ROC and PR of what ranks patients (mean over repeats), calibration points; of more than two classes one each."""
    prob = mean_over_repeats(p.ranks)
    points = [
        {key: row[key] for key in ("predicted", "observed", "low", "high", "count")} for row in calibration["table"]
    ]
    entry: dict[str, Any] = {"calibration": points}
    if len(p.classes) == 2:
        return entry | (roc_and_pr(p.labels == 1, prob[:, 1]) or {"roc": None, "pr": None})
    by_class = {name: roc_and_pr(p.labels == c, prob[:, c]) for c, name in enumerate(p.classes)}
    return entry | {"roc": None, "pr": None, "classes": by_class}


def evaluate_models(
    models: list[Predictions],
    options: dict[str, Any] | None = None,
    contamination: dict[str, list[str]] | None = None,
    groups: dict[str, dict[str, str]] | None = None,
    split: str | None = "kfold",
) -> tuple[dict, dict]:
    """Metrics and curves of all models of a task: the contents of metrics.json and curves.json.

    options: of `evaluation`; missing keys take DEFAULTS. contamination: {encoder: collections of its pretraining that
    the cohort is from}. groups: {column: {patient: value}} to look at. split: how patients were split, None for a
    bundle on another cohort. Raises RunError without models, or when their classes differ. The baseline `prevalence` is
    added here.
    """
    options = DEFAULTS | {key: value for key, value in (options or {}).items() if key in DEFAULTS}
    if not models:
        raise RunError("evaluate: no predictions to evaluate; name at least one model under the task's models")
    if len({m.classes for m in models}) > 1:
        listed = "; ".join(f"{m.name}: {', '.join(m.classes)}" for m in models)
        raise RunError(f"evaluate: the models of one task have different classes ({listed}); train them again")
    first = models[0]
    models = [m for m in models if m.name != "prevalence"] + [prevalence_model(first)]
    models, asked, chosen = with_choice(models, CONTROLS, validation_loss, ("prob", "predicted", "logits"))
    draws, entries, resampled = Draws(options), {}, {}
    for model in models:
        entries[model.name], resampled[model.name] = _one_model(model, draws, groups or {})
    if chosen:
        entries[CHOSEN] |= {"chosen": chosen, "chosen_by": "log-loss"}
    comparisons = [compare(a, b, entries, resampled, options["level"]) for a, b in asked]
    adjust(comparisons)
    counts = np.bincount(first.labels, minlength=len(first.classes))
    result = {
        "format": "slidemake-metrics",
        "format_version": 1,
        "version": STAGE_VERSIONS["evaluate"],
        "options": options,
        "classes": list(first.classes),
        "positive": first.classes[1] if len(first.classes) == 2 else None,
        "patients": len(first.patients),
        "class_counts": dict(zip(first.classes, counts.tolist(), strict=True)),
        "repeats": len(first.repeats),
        "split": split,
        "models": entries,
        "comparisons": comparisons,
        "redrawn": draws.redrawn,
        "confounding": confounding(models, entries, options["seed"]),
        "contamination": contamination or {},
    }
    result["verdict"] = verdict(result)
    curves = {m.name: _curves(m, entries[m.name]["calibration"]) for m in models}
    return result, {"of": entries[first.name]["calibration"]["of"], "positive": result["positive"], "models": curves}


def evaluate(
    predictions: list[str | Path],
    names: list[str],
    options: dict[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
    contamination: dict[str, list[str]] | None = None,
    slides: Path | None = None,
    splits: Path | None = None,
    split: str | None = "kfold",
) -> dict[str, Any]:
    """Read the predictions of every model of a task and write metrics.json, metrics.csv and curves.json.

    slides: cohort/slides.csv, for the subgroups; splits: splits.csv, for the labels of validation patients. Without
    them there are no subgroups, and no conformal sets. contamination, split: see `evaluate_models`.
    """
    models = read_models(predictions, names, splits, read_predictions, read_validation)
    groups = groups_of(read_table(slides), options.get("subgroups")) if slides is not None else {}
    result, points = evaluate_models(models, options, contamination, groups, split)
    write_metrics(result, points, metrics, table, curves)
    return result
