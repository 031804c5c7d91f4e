"""The report's part on folds, comparisons and subgroups of a task; what is of probabilities is `calibration`."""

from __future__ import annotations

from typing import Any

from slidemake.report.calibration import probabilities_section
from slidemake.tasks.controls import SHUFFLED

FOLDS_SHOWN = 30


def evaluation_section(metrics: dict[str, Any], splits: dict[str, Any], main: str) -> dict[str, Any]:
    """What report_evaluation.html.j2 shows of a task; `metrics` is metrics.json, `splits` splits.json."""
    section = comparable_section(metrics, splits, main, "auroc", "AUROC")
    return {**section, **probabilities_section(metrics["models"][main]), "delong": True, "prevalence": True}


def comparable_section(
    metrics: dict[str, Any], splits: dict[str, Any], main: str, metric: str, title: str
) -> dict[str, Any]:
    """What tasks of all types show: folds, comparisons of models by `metric` (called `title`), subgroups; nothing of
    what is of probabilities."""
    rows = splits.get("table", [])
    first = [row for row in rows if row["repeat"] == rows[0]["repeat"]] if rows else []
    return {
        "main": main,
        "parts": [],
        "labels_left_out": 0,
        "survival": None,
        "delong": False,
        "prevalence": False,
        "metric": metric,
        "title": title,
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
        "subgroups": metrics["models"][main]["subgroups"],
        "intervals": metrics["models"][main].get("intervals"),
    }
