"""Writing what an evaluation found: metrics.json, metrics.csv, curves.json, for tasks of all types."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slidemake.core.csv_cells import write_rows
from slidemake.core.files import file_sums, placed, write_json, write_text
from slidemake.evaluation.subgroups import as_scopes

FIGURES, OF_CLASSES = ("model", "metric", "scope", "value", "low", "high", "n", "positives"), ("prevalence",)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def metrics_table(result: Mapping[str, Any]) -> str:
    """metrics.csv, tidy: one row per model, scope and metric; an undefined figure is empty, with its reason.

    result: the contents of metrics.json. Types other than classes have no column `prevalence`.
    """
    further, primary = ((), result["primary"]) if "type" in result else (OF_CLASSES, "auroc")
    text, rows = io.StringIO(), [(*FIGURES, *further, "reason")]
    for model, entry in result["models"].items():
        for scope, body in {**entry["scopes"], **as_scopes(entry["subgroups"])}.items():
            positives = "" if body["positives"] is None else body["positives"]
            size = (body["n"], positives, *(_number(body[name]) for name in further))
            if not body["metrics"]:
                rows.append((model, primary, scope, "", "", "", *size, body["reason"]))
            for metric, m in body["metrics"].items():
                figures = (_number(m["value"]), _number(m["low"]), _number(m["high"]))
                rows.append((model, metric, scope, *figures, *size, m["reason"] or ""))
    write_rows(text, rows)
    return text.getvalue()


def write_metrics(
    result: Mapping[str, Any], points: Mapping[str, Any], metrics: Path, table: Path, curves: Path
) -> None:
    """Write the three files; metrics.json last, with the checksum of the table."""
    write_text(table, metrics_table(result))
    write_json(curves, {**points, **placed(curves)})
    write_json(metrics, {**result, **placed(metrics), "files": file_sums(table.parent, [table.name])})
