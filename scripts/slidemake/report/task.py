"""The report's section of a task, whatever its type: titles, pictures, tables, folds, comparisons, subgroups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.files import read_json_if_whole
from slidemake.core.tables import read_table
from slidemake.report import figures
from slidemake.report.calibration import probabilities_section, survival_section
from slidemake.report.clinical import clinical_section
from slidemake.tasks.controls import SHUFFLED
from slidemake.tasks.registry import type_named

FOLDS_SHOWN, HEADLINES = 30, 4
Picture = tuple[str, str, str]  # caption, SVG, class


def measured_section(
    folder: Path, metrics: dict[str, Any], curves: dict[str, Any], splits: dict[str, Any], main: str
) -> dict[str, Any]:
    """What is shown of metrics.json and curves.json, of a task in `folder` or of a bundle on another cohort."""
    outcome, unit = type_named(metrics["type"]), _unit(folder / main)
    titles = titles_of(metrics, main)
    wide = figures.forest(metrics, outcome.primary, outcome.titles[outcome.primary], metrics["chance"])
    pictures = [("Every model and control", wide, "wide")]
    pictures += OF_FORM[outcome.form](folder, metrics, curves, main, unit)
    learning = folder / main / "curves.csv"
    if learning.exists() and (trained := figures.training(read_table(learning), main)):
        pictures.append(("Training", trained, ""))
    return {
        "titles": {key: title for key, title in titles.items() if key not in outcome.further},
        "further": {key: title for key, title in titles.items() if key in outcome.further},
        "headline": list(outcome.headlines or titles)[:HEADLINES],
        "positives": outcome.positives_are,
        "quantity": outcome.quantity,
        "pictures": pictures,
        "evaluation": evaluation_section(metrics, splits, main, unit),
        "clinical": clinical_section(metrics, main),
        "tables": _tables(metrics, main, unit),
        "undefined": _undefined(metrics, titles) if outcome.undefined else [],
    }


def titles_of(metrics: dict[str, Any], main: str) -> dict[str, str]:
    """{metric: head of its column}; AUPRC says what it would be without skill."""
    pooled = metrics["models"][main]["scopes"]["pooled"]
    titles = type_named(metrics["type"]).titles
    found = {key: title.format(**metrics["options"]) for key, title in titles.items() if key in pooled["metrics"]}
    if "prevalence" in pooled:
        found["auprc"] = f"AUPRC (prevalence {pooled['prevalence']:.2f})"
    return found


def _of_classes(folder: Path, metrics: dict[str, Any], curves: dict[str, Any], main: str, unit: str) -> list[Picture]:
    """Of two classes their curves and, of a task, its patients; of more, and of grades, decisions against truth."""
    if metrics["positive"] is None:
        table = figures.confusion(metrics["models"][main]["confusion"], metrics["classes"], main)
        return [(f"Predicted and true {type_named(metrics['type']).name_is}", table, "")]
    pictures = [
        ("Receiver operating characteristic", figures.roc(curves, metrics), ""),
        ("Precision and recall (dotted: prevalence)", figures.precision_recall(curves, metrics), ""),
    ]
    path = folder / main / "predictions_patients.csv"
    if path.exists():
        scores = figures.scores(read_table(path), metrics["positive"], main)
        pictures.append(("Predictions by site and truth", scores, ""))
    return pictures


def _of_labels(folder: Path, metrics: dict[str, Any], curves: dict[str, Any], main: str, unit: str) -> list[Picture]:
    return []


def _of_number(folder: Path, metrics: dict[str, Any], curves: dict[str, Any], main: str, unit: str) -> list[Picture]:
    points = curves["models"][main]["points"]
    return [("Prediction and truth", figures.scatter(points, unit, main), "")]


def _of_curve(folder: Path, metrics: dict[str, Any], curves: dict[str, Any], main: str, unit: str) -> list[Picture]:
    drawn = figures.kaplan_meier(curves["models"][main]["groups"], unit)
    test = _log_rank(metrics["models"][main]["log_rank"])
    return [(f"Kaplan-Meier curves by predicted risk: {test}", drawn, "wide")]


OF_FORM = {"classes": _of_classes, "labels": _of_labels, "number": _of_number, "curve": _of_curve}


def evaluation_section(metrics: dict[str, Any], splits: dict[str, Any], main: str, unit: str = "") -> dict[str, Any]:
    """What report_evaluation.html.j2 shows of a task: folds, comparisons of models, subgroups, probabilities.

    metrics: metrics.json; splits: splits.json; unit: of the label, or of time.
    """
    outcome, entry = type_named(metrics["type"]), metrics["models"][main]
    rows = splits.get("table", [])
    first = [row for row in rows if row["repeat"] == rows[0]["repeat"]] if rows else []
    section = {
        "main": main,
        "parts": [],
        "labels_left_out": 0,
        "survival": None,
        "delong": outcome.tests_auroc,
        "of_training": any((c["delong"] or {}).get("tested_to_trained") for c in metrics["comparisons"]),
        "prevalence": "prevalence" in entry["scopes"]["pooled"],
        "metric": outcome.primary,
        "title": outcome.titles[outcome.primary],
        "folds": first[:FOLDS_SHOWN],
        "folds_left_out": max(0, len(first) - FOLDS_SHOWN),
        "method": splits.get("method", ""),
        "about": splits.get("about", {}),
        # shuffled labels are another cohort: nothing to compare, and nothing to say
        "comparisons": [
            c
            for c in metrics["comparisons"]
            if (c["p_holm"] is not None or c["reason"]) and SHUFFLED not in (c["model"], c["reference"])
        ],
        "subgroups": entry["subgroups"],
        "intervals": entry.get("intervals"),
    }
    if outcome.form in ("classes", "labels"):
        section |= probabilities_section(entry)
    if outcome.form == "curve":
        section["survival"] = survival_section(entry["calibration"], unit)
    return section


def _unit(folder: Path) -> str:
    return str((read_json_if_whole(folder / "train.json") or {}).get("task", {}).get("unit") or "")


def _log_rank(test: dict[str, Any]) -> str:
    if test["p"] is None:
        return f"no log-rank test, because {test['reason']}"
    interval = f"{test['hazard_ratio']:.2f} ({test['low']:.2f} to {test['high']:.2f})"
    return f"log-rank p {test['p']:.2g}, hazard ratio {interval}"


def _tables(metrics: dict[str, Any], main: str, unit: str) -> list[dict[str, Any]]:
    """Further tables {caption, head, rows}; cells are text or metrics."""
    entry = metrics["models"][main]
    found = entry["scopes"]["pooled"]["metrics"]
    form = type_named(metrics["type"]).form
    if form == "labels":
        titles = titles_of(metrics, main)
        rows = [[name, *(found[f"{key}:{name}"] for key in titles)] for name in metrics["names"]]
        return [{"caption": f"By label ({main})", "head": ["label", *titles.values()], "rows": rows}]
    if form != "curve":
        return []
    models = [name for name in metrics["models"] if name != "site_only"]
    names = [f"{float(h):g}" for h in metrics["names"]]
    tables = []
    for key, title in (("td_auc", "Time-dependent AUC"), ("brier", "Brier score (IPCW)")):
        figures = [metrics["models"][m]["scopes"]["pooled"]["metrics"] for m in models]
        rows = [[m, *(f[f"{key}@{h}"] for h in names)] for m, f in zip(models, figures, strict=True)]
        head = ["model", *(f"{h} {unit}".strip() for h in names)]
        tables.append({"caption": f"{title} at each horizon", "head": head, "rows": rows})
    rows = [[str(test["repeat"]), _log_rank(test)] for test in entry["log_rank_by_repeat"]]
    caption = f"High against low risk in each repeat, divided at the median risk of validation patients ({main})"
    return [*tables, {"caption": caption, "head": ["repeat", "log-rank test"], "rows": rows}]


def _undefined(metrics: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """Every pooled figure without a value, and why."""
    return [
        f"{model}: {titles[key]} is {m['reason']}"
        for model, entry in metrics["models"].items()
        for key, m in entry["scopes"]["pooled"]["metrics"].items()
        if key in titles and m["value"] is None
    ]
