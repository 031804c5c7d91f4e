"""What an evaluation reads and writes, for tasks of all types: predictions; metrics.json, metrics.csv, curves.json."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slidemake.core.csv_cells import write_rows
from slidemake.core.failures import RunError
from slidemake.core.files import file_sums, placed, write_json, write_text
from slidemake.core.tables import read_table
from slidemake.evaluation.subgroups import as_scopes
from slidemake.tasks.base import Predictions
from slidemake.tasks.controls import CONTROLS, REFERENCE
from slidemake.tasks.prediction_table import read_predictions, read_validation

FIGURES, FACTS = ("model", "metric", "scope", "value", "low", "high", "n", "positives"), ("prevalence",)


def read_models(
    paths: Sequence[str | Path], names: Sequence[str], kind: str, splits: str | Path | None
) -> list[Predictions]:
    """The predictions of every model of a task of type `kind`. With splits.csv those of validation patients are read,
    too, but of controls: only the linear one has conformal sets and can be chosen. RunError for paths and names that do
    not pair.
    """
    if len(paths) != len(names):
        raise RunError(f"evaluate: {len(paths)} prediction files for {len(names)} model names")
    tables = [read_predictions(path, name, kind) for path, name in zip(paths, names, strict=True)]
    if splits is None:
        return tables
    truth = {row["patient_id"]: row["label"] for row in read_table(splits)}
    return [
        table if table.name in CONTROLS and table.name != REFERENCE else read_validation(path, table, truth)
        for path, table in zip(paths, tables, strict=True)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def metrics_table(result: Mapping[str, Any]) -> str:
    """metrics.csv, tidy: one row per model, scope and metric; an undefined figure is empty, with its reason.

    result: the contents of metrics.json. Only classes have a column `prevalence`.
    """
    primary, scopes = result["primary"], next(iter(result["models"].values()))["scopes"]
    further = [name for name in FACTS if name in scopes["pooled"]]
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
