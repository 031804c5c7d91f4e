"""The files around `drift`: new slides' stores and tables in, drift.json and drift.csv out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.files import file_sums, placed, read_json, write_json
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.core.tables import read_table, write_table
from slidemake.drift.judgement import Sample, judge
from slidemake.drift.reference import (
    QUALITY,
    class_probabilities,
    patient_means,
    patient_scores,
    read_reference,
    sketched,
    slide_quality,
)
from slidemake.mil.bags import load_bags
from slidemake.tasks.base import Outcome
from slidemake.tasks.registry import load_outcome

COLUMNS = (
    "group",
    "name",
    "measure",
    "level",
    "value",
    "expected",
    "limit",
    "p",
    "p_corrected",
    "reference",
    "new",
    "reason",
)


def _month(row: Mapping[str, str]) -> str:
    return (row.get("scan_date") or "")[:7]


def collect_sample(
    reference: Mapping[str, Any],
    outcome: Outcome,
    cohort: Sequence[Mapping[str, str]],
    predictions: Sequence[Mapping[str, str]],
    embeddings: str | Path,
    results: str | Path,
) -> Sample:
    """New slides as `drift.judge` takes them; stores are read one patient at a time.

    cohort: rows of cohort/slides.csv; predictions: rows of predictions/patients.csv. A patient whose slides are of
    several sites or months counts for the first.
    """
    slides = [row for row in cohort if row["status"] != "excluded"]
    scores = patient_scores(predictions, outcome)
    prob = class_probabilities(predictions, outcome)
    centre = np.array(reference["centre"])
    facts: dict[str, dict[str, str]] = {}
    stores: dict[str, list[tuple[str, str]]] = {}
    for row in slides:
        patient = row.get("patient_id") or row["slide_id"]
        facts.setdefault(patient, {"site": row.get("site", ""), "month": _month(row)})
        if row["status"] == "ok":
            stores.setdefault(patient, []).append((row["slide_id"], patient))
    patients = [p for p in sorted(scores) if p in stores]
    means = [patient_means(load_bags(embeddings, stores[p]), [p])[0] for p in patients]
    projected = sketched(np.array(means).reshape(len(means), len(centre)), centre)
    quality = [slide_quality(results, row["slide_id"]) if row["status"] == "ok" else {} for row in slides]
    return Sample(
        tuple(patients),
        tuple(facts[p]["site"] for p in patients),
        tuple(facts[p]["month"] for p in patients),
        projected,
        {name: np.array([scores[p].get(name, np.nan) for p in patients]) for name in reference["scores"]},
        np.array([prob[p] for p in patients]) if prob else np.zeros((len(patients), 0)),
        tuple(row.get("patient_id") or row["slide_id"] for row in slides),
        tuple((row.get("site", ""), _month(row)) for row in slides),
        np.array([row["status"] == "failed" for row in slides], bool),
        {name: np.array([q.get(name, np.nan) for q in quality]) for name in QUALITY},
    )


def watch_drift(
    bundle: str | Path,
    cohort: str | Path,
    predictions: str | Path,
    embeddings: str | Path,
    results: str | Path,
    out: str | Path,
    table: str | Path,
) -> dict[str, Any]:
    """Compare the predicted slides with the bundle's training slides; writes drift.json and drift.csv."""
    reference = read_reference(bundle)
    outcome = load_outcome(read_json(Path(bundle) / "bundle.json"))
    sample = collect_sample(reference, outcome, read_table(cohort), read_table(predictions), embeddings, results)
    found = judge(reference, sample)
    write_table(table, drift_rows(found), COLUMNS)
    about = {"format": "slidemake-drift", "format_version": 1, "version": STAGE_VERSIONS["drift"]}
    about |= placed(out)
    about["files"] = file_sums(Path(table).parent, [Path(table).name])
    training = {key: reference[key] for key in ("patients", "slides", "failed")}
    write_json(out, {**about, "bundle": reference["bundle"], "training": training, **found})
    return found


def drift_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of drift.csv: one per group and measure; a group that is not judged has one row with its reason."""
    rows = []
    for group in found["groups"]:
        first = {
            "group": group["kind"],
            "name": group["name"],
            "level": group["level"],
            "reason": group["reason"] or "",
        }
        if not group["measures"]:
            rows.append(first)
        for measure, figures in group["measures"].items():
            numbers = {key: f"{figures[key]:.6g}" for key in COLUMNS[4:9]}
            counts = {key: figures[key] for key in ("reference", "new")}
            rows.append({**first, "measure": measure, "level": figures["level"], **numbers, **counts})
    return rows
