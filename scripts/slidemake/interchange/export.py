"""The target `export`: features, labels, folds, predictions and heatmaps of a run in the layouts of other tools.

Each format is a folder of its own below `exports/`, written whole or not at all; nothing of the run is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import committed, placed, read_json, write_json
from slidemake.core.tables import read_table
from slidemake.interchange import export_tables as tables
from slidemake.interchange.export_features import PER_SLIDE
from slidemake.interchange.stored import read_slide
from slidemake.stores.arrays import StoredArray

FORMATS = (*PER_SLIDE, "anndata", "qupath")
Task = Mapping[str, Any]


def export_run(
    results: Path,
    formats: Sequence[str],
    encoders: Sequence[str],
    tasks: Mapping[str, Task],
    manifest: Path,
    said: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write every format, and the manifest last.

    encoders: folders below embeddings/. tasks: {task: {"models": [...], "explained": model or None}}. Returns the
    manifest's content: {format: {"folder", "files", "slides"}}.
    """
    slides = [row for row in read_table(results / "cohort" / "slides.csv") if row["status"] == "ok"]
    if not slides:
        raise RunError("There is no slide to export; cohort/failures.csv says why.")
    splits = {task: read_table(results / "tasks" / task / "splits.csv") for task in tasks}
    labels = {task: {row["patient_id"]: row["label"] for row in rows} for task, rows in splits.items()}
    done: dict[str, Any] = {}
    for name in formats:
        with committed(manifest.parent / name) as work:
            work.mkdir(parents=True)
            if name == "anndata":
                _anndata(work, results, encoders, tasks, slides, splits)
            elif name == "qupath":
                _qupath(work, results, tasks)
            else:
                _per_slide(work, name, results, encoders, slides)
                _tables(work, name, encoders, slides, splits, labels)
            files = sum(path.is_file() for path in work.rglob("*"))
        said(f"{name}: {files} files")
        done[name] = {"folder": name, "files": files, "slides": len(slides)}
    write_json(manifest, {"format": "slidemake-export", **placed(manifest), "formats": done})
    return done


def _per_slide(work: Path, name: str, results: Path, encoders: Sequence[str], slides: list[dict[str, str]]) -> None:
    for encoder in encoders:
        for row in slides:
            slide = read_slide(results / "embeddings" / encoder / f"{row['slide_id']}.zarr")
            PER_SLIDE[name](slide, encoder.removesuffix("-imported"), work)


def _tables(
    work: Path,
    name: str,
    encoders: Sequence[str],
    slides: list[dict[str, str]],
    splits: Mapping[str, list[dict[str, str]]],
    labels: Mapping[str, Mapping[str, str]],
) -> None:
    if name == "clam":
        for task, rows in splits.items():
            tables.clam_tables(work, slides, task, labels[task], rows)
    elif name == "stamp":
        for encoder in encoders:
            tables.stamp_tables(work, encoder.removesuffix("-imported"), slides, labels)
        for task, rows in splits.items():
            tables.stamp_splits(work, task, rows)


def _qupath(work: Path, results: Path, tasks: Mapping[str, Task]) -> None:
    """The tiles of every explained slide with their attention, as the explanation drew them."""
    for task, about in tasks.items():
        if not about["explained"]:
            continue
        for source in sorted((results / "explain" / task / about["explained"]).glob("[!.]*/heatmap.geojson")):
            target = work / task / f"{source.parent.name}.geojson"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _anndata(
    work: Path,
    results: Path,
    encoders: Sequence[str],
    tasks: Mapping[str, Task],
    slides: list[dict[str, str]],
    splits: Mapping[str, list[dict[str, str]]],
) -> None:
    """A file per encoder: mean vector of every slide, the cohort's columns, folds and out-of-fold predictions."""
    extra = _predicted(results, tasks, splits)
    used = [name for name in slides[0] if any(row.get(name) for row in slides)]
    rows = [{**{name: row.get(name, "") for name in used}, **extra.get(row["patient_id"], {})} for row in slides]
    for encoder in encoders:
        stores = [results / "embeddings" / encoder / f"{row['slide_id']}.zarr" for row in slides]
        vectors = np.stack([StoredArray(store, "features").read().astype(np.float64).mean(0) for store in stores])
        about = read_json(stores[0] / "zarr.json")["attributes"]
        told = {"encoder": about["encoder"], "stain": about["stain"], "X": "mean over the tiles of a slide"}
        tables.write_h5ad(work / f"{encoder.removesuffix('-imported')}.h5ad", vectors, rows, told)


def _predicted(
    results: Path, tasks: Mapping[str, Task], splits: Mapping[str, list[dict[str, str]]]
) -> dict[str, dict[str, Any]]:
    """{patient: {<task>_fold of the first repeat, <task>_<model>_<column>: mean over repeats}}."""
    found: dict[str, dict[str, Any]] = {}
    for task, about in tasks.items():
        for row in splits[task]:
            if row["repeat"] == "0":
                found.setdefault(row["patient_id"], {})[f"{task}_fold"] = f"fold {row['fold']}"
        for model in about["models"]:
            values: dict[tuple[str, str], list[float]] = {}
            for row in read_table(results / "tasks" / task / model / "predictions_patients.csv"):
                for column in (c for c in row if c.startswith(("prob", "value", "risk")) and row[c]):
                    values.setdefault((row["patient_id"], column), []).append(float(row[column]))
            for (patient, column), numbers in values.items():
                found.setdefault(patient, {})[f"{task}_{model}_{column}"] = float(np.mean(numbers))
    return found
