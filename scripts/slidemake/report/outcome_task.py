"""The report's section of a task that is no plain classes: its titles, pictures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidemake.core.tables import read_table
from slidemake.report import figures as report_figures
from slidemake.report import outcome_figures as report_figures_outcomes
from slidemake.report.calibration import probabilities_section, survival_section
from slidemake.report.task import comparable_section

TITLES: dict[str, dict[str, str]] = {
    "regression": {
        "r2": "R²",
        "mae": "mean absolute error",
        "rmse": "RMSE",
        "pearson": "correlation",
        "slope": "slope of truth on prediction",
    },
    "survival": {
        "c_index": "C-index (Harrell)",
        "c_uno": "C-index (Uno)",
        "td_auc": "time-dependent AUC",
        "ibs": "integrated Brier",
    },
    "ordinal": {
        "kappa": "quadratic kappa",
        "mae": "grades off, mean",
        "c_index": "order right",
        "balanced_accuracy": "balanced accuracy",
        "accuracy": "accuracy",
    },
    "multilabel": {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "balanced_accuracy": "balanced accuracy",
        "f1": "F1",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "brier": "Brier",
    },
}
QUANTITY = {
    "regression": "predicted",
    "survival": "risk",
    "ordinal": "expected grade (from 0)",
    "multilabel": "probability",
}
HEADLINES = 4


def outcome_section(
    folder: Path, metrics: dict[str, Any], curves: dict[str, Any], splits: dict[str, Any], main: str
) -> dict[str, Any]:
    """What the section of a task in `folder` shows of a metrics.json that `evaluation.evaluate_outcomes` wrote."""
    kind, titles = metrics["type"], TITLES[metrics["type"]]
    unit = _unit(folder / main)
    wide = report_figures.forest(metrics, metrics["primary"], titles[metrics["primary"]], metrics["chance"])
    pictures = [("Every model and control", wide, "wide")]
    entry, curve = metrics["models"][main], curves["models"][main]
    if kind == "survival":
        drawn = report_figures_outcomes.kaplan_meier(curve["groups"], unit)
        pictures.append((f"Kaplan-Meier curves by predicted risk: {_log_rank(entry['log_rank'])}", drawn, "wide"))
    if kind == "regression":
        pictures.append(("Prediction and truth", report_figures_outcomes.scatter(curve["points"], unit, main), ""))
    if kind == "ordinal":
        table = report_figures_outcomes.confusion(entry["confusion"], metrics["classes"], main)
        pictures.append(("Predicted and true grade", table, ""))
    section = comparable_section(metrics, splits, main, metrics["primary"], titles[metrics["primary"]])
    if kind in ("ordinal", "multilabel"):
        section |= probabilities_section(entry)
    if kind == "survival":
        section["survival"] = survival_section(entry["calibration"], unit)
    learning = folder / main / "curves.csv"
    if learning.exists() and (trained := report_figures.training(read_table(learning), main)):
        pictures.append(("Training", trained, ""))
    return {
        "titles": titles,
        "headline": list(titles)[:HEADLINES],
        "positives": "with the event" if kind == "survival" else "positive",
        "quantity": QUANTITY[kind],
        "pictures": pictures,
        "evaluation": section,
        "tables": _tables(metrics, main, unit),
        "undefined": _undefined(metrics, titles),
    }


def _unit(folder: Path) -> str:
    from slidemake.core.files import read_json_if_whole

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
    if metrics["type"] == "multilabel":
        titles = TITLES["multilabel"]
        rows = [[name, *(found[f"{key}:{name}"] for key in titles)] for name in metrics["names"]]
        return [{"caption": f"By label ({main})", "head": ["label", *titles.values()], "rows": rows}]
    if metrics["type"] != "survival":
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
