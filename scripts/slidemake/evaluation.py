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

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.bootstrap import bootstrap_weights, percentile_interval, scope_seed
from slidemake.failures import RunError
from slidemake.metrics import METRICS, confidence_and_hit, confusion, metrics_over, why_undefined
from slidemake.prediction_table import Predictions, read_predictions
from slidemake.provenance import STAGE_VERSIONS, file_sums, write_json, write_text
from slidemake.reliability import calibration_line, ece_if_calibrated, reliability_table, roc_and_pr
from slidemake.verdict import CONTROLS, REFERENCE, confounding, verdict

DEFAULTS: dict[str, Any] = {"bootstrap": 2000, "seed": 0, "ece_bins": 15, "level": 0.95, "stratify": True}
MIN_SITE = 5  # patients below which a site gets no figures of its own
PER_BIN = 5  # patients a calibration bin should hold on average: fewer bins in small samples
COLUMNS = ("model", "metric", "scope", "value", "low", "high", "n", "positives", "reason")


def bins_for(n: int, asked: int) -> int:
    """Calibration bins for n patients: as asked, but never so many that they hold fewer than 5 patients on average."""
    return max(2, min(asked, n // PER_BIN))


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


def _figures(
    values: dict[str, np.ndarray],
    draws: dict[str, np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    level: float,
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, reason}} of point values (1,) and draws (B,)."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if np.isfinite(value[0]):
            low, high = percentile_interval(draws[name], level)
            found[name] = {"value": float(value[0]), "low": low, "high": high, "reason": None}
        else:
            reason = why_undefined(name, labels, list(classes)) or "undefined in one of the repeats"
            found[name] = {"value": None, "low": None, "high": None, "reason": reason}
    return found


def _scope(labels: np.ndarray, classes: tuple[str, ...], metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    positives = int((labels == 1).sum()) if len(classes) == 2 else None
    return {"n": len(labels), "positives": positives, "reason": None, "metrics": metrics, **more}


def _mean_over(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


def _subset_scopes(p: Predictions, chosen: np.ndarray, scope: str, draws: Draws) -> tuple[dict, dict, dict[str, Any]]:
    """Scope `scope` over the patients `chosen` (n,) bool: mean over repeats.

    Returns the draws of the mean {metric: (B,)}, the figures per repeat, and the scope's entry.
    """
    options, index = draws.options, np.flatnonzero(chosen)
    labels = p.labels[index]
    weights = draws.weights(scope, tuple(p.patients[i] for i in index), labels)
    points, resampled, single = [], [], {}
    for r, repeat in enumerate(p.repeats):
        known = np.isfinite(p.prob[r, index, 0])
        if not known.any():
            continue
        part = index[known]
        bins = bins_for(len(part), options["ece_bins"])
        of_repeat = (p.labels[part], p.prob[r, part], p.predicted[r, part], bins)
        points.append(metrics_over(*of_repeat))
        resampled.append(metrics_over(*of_repeat, weights[:, known]))
        figures = _figures(points[-1], resampled[-1], p.labels[part], p.classes, options["level"])
        single[f"repeat:{repeat}"] = _scope(p.labels[part], p.classes, figures)
    mean_draws = _mean_over(resampled)
    figures = _figures(_mean_over(points), mean_draws, labels, p.classes, options["level"])
    bins = bins_for(len(index), options["ece_bins"])
    return mean_draws, single, _scope(labels, p.classes, figures, repeats=len(points), ece_bins=bins)


def _fold_scopes(p: Predictions, draws: Draws) -> dict[str, Any]:
    scopes = {}
    for r, repeat in enumerate(p.repeats):
        for fold in sorted(set(p.fold[r].tolist()) - {-1}):
            inside = np.flatnonzero(p.fold[r] == fold)
            labels, name = p.labels[inside], f"fold:{repeat}/{fold}"
            weights = draws.weights(name, tuple(p.patients[i] for i in inside), labels)
            bins = bins_for(len(inside), draws.options["ece_bins"])
            of_fold = (labels, p.prob[r, inside], p.predicted[r, inside], bins)
            values, resampled = metrics_over(*of_fold), metrics_over(*of_fold, weights)
            figures = _figures(values, resampled, labels, p.classes, draws.options["level"])
            scopes[name] = _scope(labels, p.classes, figures)
    return scopes


def _site_scopes(p: Predictions, draws: Draws) -> dict[str, Any]:
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
            scopes[f"site:{site}"] = _scope(labels, p.classes, {}) | {"reason": reason}
        else:
            scopes[f"site:{site}"] = _subset_scopes(p, chosen, f"site:{site}", draws)[2]
    return scopes


def mean_probability(p: Predictions) -> np.ndarray:
    """(n, C) probability averaged over the repeats that have one."""
    return np.nanmean(p.prob, axis=0)


def _ensemble_scope(p: Predictions, draws: Draws) -> dict[str, Any]:
    weights = draws.weights("pooled", p.patients, p.labels)
    of_mean = (p.labels, mean_probability(p), None, bins_for(len(p.labels), draws.options["ece_bins"]))
    values, resampled = metrics_over(*of_mean), metrics_over(*of_mean, weights=weights)
    figures = _figures(values, resampled, p.labels, p.classes, draws.options["level"])
    return _scope(p.labels, p.classes, figures)


def _spread(scopes: dict[str, Any], prefix: str, test_to_train: float | None = None) -> dict[str, Any]:
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


def _calibration(p: Predictions, options: dict[str, Any]) -> dict[str, Any]:
    confidence, hit = confidence_and_hit(p.labels, mean_probability(p))
    bins = bins_for(len(hit), options["ece_bins"])
    return {
        "of": "probability averaged over repeats" if len(p.repeats) > 1 else "probability",
        "bins": bins,
        "table": reliability_table(confidence, hit, bins),
        "table_width": reliability_table(confidence, hit, bins, "width"),
        "ece_if_calibrated": ece_if_calibrated(confidence, bins, options["seed"]),
        **calibration_line(confidence, hit),
    }


def _confusion(p: Predictions) -> list[list[float]]:
    """Decisions (columns) against truth (rows), averaged over repeats."""
    total = np.zeros((len(p.classes), len(p.classes)))
    for r in range(len(p.repeats)):
        known = p.predicted[r] >= 0
        total += confusion(p.labels[known], p.predicted[r, known], len(p.classes), np.ones((1, int(known.sum()))))[0]
    return (total / len(p.repeats)).tolist()


def _one_model(p: Predictions, draws: Draws) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    everyone = np.ones(len(p.patients), bool)
    mean_draws, repeats, pooled = _subset_scopes(p, everyone, "pooled", draws)
    folds = _fold_scopes(p, draws)
    count = max(len(set(row.tolist()) - {-1}) for row in p.fold)
    scopes = {"pooled": pooled, "ensemble": _ensemble_scope(p, draws), **repeats, **folds, **_site_scopes(p, draws)}
    spread = {
        "repeats": _spread(repeats, "repeat:"),
        "folds": _spread(folds, "fold:", 1 / (count - 1) if count > 1 else None),
    }
    entry = {"control": p.name in CONTROLS, "scopes": scopes, "spread": spread}
    return entry | {"calibration": _calibration(p, draws.options), "confusion": _confusion(p)}, mean_draws


def _difference(
    a: Predictions, b: Predictions, values: dict[str, Any], draws: dict[str, dict[str, np.ndarray]], level: float
) -> dict[str, Any]:
    """Paired differences a - b of the pooled metrics, on the same resampled patients."""
    if a.cohort() != b.cohort():
        return {"model": a.name, "reference": b.name, "metrics": {}, "reason": "the two models saw different patients"}
    metrics: dict[str, dict[str, float | None]] = {}
    for name in METRICS:
        one, two = (values[m]["scopes"]["pooled"]["metrics"][name]["value"] for m in (a.name, b.name))
        if one is None or two is None:
            metrics[name] = {"difference": None, "low": None, "high": None}
            continue
        low, high = percentile_interval(draws[a.name][name] - draws[b.name][name], level)
        metrics[name] = {"difference": one - two, "low": low, "high": high}
    return {"model": a.name, "reference": b.name, "metrics": metrics, "reason": None}


def _curves(p: Predictions, calibration: dict[str, Any]) -> dict[str, Any]:
    """ROC, PR and calibration points of the mean probability; one curve per class with more than two classes."""
    prob = mean_probability(p)
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
) -> tuple[dict, dict]:
    """Metrics and curves of all models of a task: the contents of metrics.json and curves.json.

    options: bootstrap (draws), seed, ece_bins, level, stratify; missing keys take DEFAULTS. contamination: {encoder:
    collections of its pretraining that the cohort is from}. Raises RunError without
    models, or when their classes differ. The baseline `prevalence` is added here.
    """
    options = DEFAULTS | {key: value for key, value in (options or {}).items() if key in DEFAULTS}
    if not models:
        raise RunError("evaluate: no predictions to evaluate; name at least one model under the task's models")
    if len({m.classes for m in models}) > 1:
        listed = "; ".join(f"{m.name}: {', '.join(m.classes)}" for m in models)
        raise RunError(f"evaluate: the models of one task have different classes ({listed}); train them again")
    first = models[0]
    models = [m for m in models if m.name != "prevalence"] + [prevalence_model(first)]
    draws, entries, resampled = Draws(options), {}, {}
    for model in models:
        entries[model.name], resampled[model.name] = _one_model(model, draws)
    by_name = {m.name: m for m in models}
    references = [by_name[name] for name in CONTROLS if name in by_name]
    pairs = [
        (a, b) for a in models for b in references if a.name != b.name and (b.name == REFERENCE or not _is_control(a))
    ]
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
        "models": entries,
        "comparisons": [_difference(a, b, entries, resampled, options["level"]) for a, b in pairs],
        "redrawn": draws.redrawn,
        "confounding": confounding(models, entries, options["seed"]),
        "contamination": contamination or {},
    }
    result["verdict"] = verdict(result)
    curves = {m.name: _curves(m, entries[m.name]["calibration"]) for m in models}
    return result, {"of": entries[first.name]["calibration"]["of"], "positive": result["positive"], "models": curves}


def _is_control(p: Predictions) -> bool:
    return p.name in CONTROLS


def metrics_table(result: dict[str, Any]) -> str:
    """metrics.csv, tidy: one row per model, scope and metric; an undefined figure is empty, with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    number = lambda value: "" if value is None else f"{value:.6g}"  # noqa: E731
    for model, entry in result["models"].items():
        for scope, body in entry["scopes"].items():
            size = (body["n"], "" if body["positives"] is None else body["positives"])
            if not body["metrics"]:
                writer.writerow((model, "auroc", scope, "", "", "", *size, body["reason"]))
            for metric, m in body["metrics"].items():
                figures = (number(m["value"]), number(m["low"]), number(m["high"]))
                writer.writerow((model, metric, scope, *figures, *size, m["reason"] or ""))
    return text.getvalue()


def evaluate(
    predictions: list[str | Path],
    names: list[str],
    options: dict[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
    contamination: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Read the predictions of every model of a task and write metrics.json, metrics.csv and curves.json."""
    if len(predictions) != len(names):
        raise RunError(f"evaluate: {len(predictions)} prediction files for {len(names)} model names")
    models = [read_predictions(path, name) for path, name in zip(predictions, names, strict=True)]
    result, points = evaluate_models(models, options, contamination)
    write_text(table, metrics_table(result))
    write_json(curves, points)
    write_json(metrics, {**result, "files": file_sums(table.parent, [table.name])})
    return result
