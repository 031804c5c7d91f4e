"""What the training slides of a model were like: kept beside its bundle, for `drift` to compare new slides with.

The reference holds no pixel and no patient's name: mean embeddings in a few principal directions, out-of-fold scores,
quality figures and the share of slides that failed. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.bags import Bags
from slidemake.conformal import conformal_limit, prediction_sets
from slidemake.failures import RunError, SlideFailure
from slidemake.outcomes import Outcome
from slidemake.provenance import STAGE_VERSIONS, read_json, read_json_if_whole, write_json

FORMAT, FORMAT_VERSION = "slidemake-reference", 1
DIRECTIONS = 16  # principal directions of the patients' mean embeddings
MOST = 500  # patients (and slides) kept, evenly spaced: enough for every comparison, small enough for a JSON file
COVERAGE = 0.9  # of the prediction sets that abstention is read from
QUALITY = (
    "area_mm2",
    "pen_fraction",
    "black_fraction",
    "bubble_fraction",
    "fold_fraction",
    "faint_fraction",
    "blur_fraction",
    "median_density",
    "focus_median",
)


def slide_quality(results: str | Path, slide_id: str) -> dict[str, float]:
    """The figures of a slide's tissue.json that `QUALITY` names; those that are not known are left out."""
    tissue = read_json_if_whole(Path(results) / "slides" / slide_id / "tissue.json") or {}
    known = {**tissue.get("qc", {}), "area_mm2": tissue.get("area_mm2")}
    return {name: float(known[name]) for name in QUALITY if known.get(name) is not None}


def quality_table(results: str | Path, slides: Iterable[str]) -> dict[str, list[float]]:
    """{figure: values of the slides that have it}, in the order of the slides."""
    table: dict[str, list[float]] = {name: [] for name in QUALITY}
    for slide in slides:
        for name, value in slide_quality(results, slide).items():
            table[name].append(value)
    return {name: values for name, values in table.items() if values}


def patient_means(bags: Bags, patients: Sequence[str]) -> np.ndarray:
    """(P, D) float64: the mean tile of each patient; all must have tiles."""
    means = np.empty((len(patients), bags.dim))
    for row, patient in zip(means, patients, strict=True):
        row[:] = bags.bag(patient).mean(0, dtype=np.float64)
        bags.forget()
    return means


def score_columns(outcome: Outcome) -> list[str]:
    """Columns of a prediction table that are scores: probabilities (of two classes the last), a number, or the risk."""
    if outcome.kind == "survival":
        return ["risk"]
    if outcome.kind == "regression":
        return ["predicted"]
    names = [name for name in outcome.columns() if name.startswith("prob_")]
    return names[-1:] if outcome.classes and len(names) == 2 else names


def patient_scores(rows: Iterable[Mapping[str, str]], outcome: Outcome) -> dict[str, dict[str, float]]:
    """{patient: {score: value}}, the mean over repeats where a patient has several rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name in score_columns(outcome):
            if row[name] not in ("", None):
                found.setdefault(row["patient_id"], {}).setdefault(name, []).append(float(row[name]))
    return {p: {name: float(np.mean(v)) for name, v in scores.items()} for p, scores in found.items()}


def abstains(prob: np.ndarray, limit: float | None) -> np.ndarray:
    """(P,) bool: the prediction set {class: 1 - p <= limit} of (P, C) probabilities does not hold exactly one class."""
    if limit is None:
        return np.zeros(len(prob), bool)
    return prediction_sets(prob, limit).sum(1) != 1


def class_probabilities(rows: Iterable[Mapping[str, str]], outcome: Outcome) -> dict[str, np.ndarray]:
    """{patient: (C,) mean probability over repeats}; nobody where the task has no classes."""
    columns = [f"prob_{name}" for name in outcome.classes]
    sums: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if columns and all(row[name] for name in columns):
            sums.setdefault(row["patient_id"], []).append(np.array([float(row[name]) for name in columns]))
    return {p: np.mean(v, axis=0) for p, v in sums.items()}


def principal_directions(means: np.ndarray, most: int = DIRECTIONS) -> tuple[np.ndarray, np.ndarray]:
    """Centre (D,) and directions (k, D), scaled so that training patients have unit variance along the first one.

    k is at most `most`, and at most P - 1. One scale for all directions: small ones stay small, as they were.
    """
    centre = means.mean(0)
    _, singular, directions = np.linalg.svd(means - centre, full_matrices=False)
    kept = min(most, max(1, len(means) - 1), int((singular > singular[0] * 1e-6).sum()) if singular[0] > 0 else 1)
    scale = singular[0] / np.sqrt(max(1, len(means) - 1))
    signs = np.sign(directions[np.arange(kept), np.abs(directions[:kept]).argmax(1)])
    return centre, directions[:kept] * signs[:, None] / (scale or 1.0)


def thinned(values: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most `most` of the values, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).astype(int)]


def rounded(values: Iterable[float]) -> list[float]:
    """Six significant digits: what the file needs."""
    return [float(f"{value:.6g}") for value in values]


def make_reference(
    bags: Bags,
    outcome: Outcome,
    predictions: Sequence[Mapping[str, str]],
    cohort: Sequence[Mapping[str, str]],
    results: str | Path,
) -> dict[str, Any]:
    """The reference of one model.

    bags         the training cohort's embeddings
    outcome      what the model predicts
    predictions  rows of predictions_patients.csv, out of fold
    cohort       rows of cohort/slides.csv (failed slides count into the share that failed)
    results      the results folder, for the slides' tissue.json
    """
    scores = patient_scores(predictions, outcome)
    sites = {row["patient_id"]: row.get("site", "") for row in predictions}
    truth = {row["patient_id"]: row.get("label", "") for row in predictions}
    patients = thinned([p for p in sorted(scores) if bags.tiles(p)])
    if not patients:
        raise RunError("No predicted patient has tiles: there is nothing to compare new slides with.")
    means = patient_means(bags, patients)
    centre, directions = principal_directions(means)
    classes, prob = list(outcome.classes), class_probabilities(predictions, outcome)
    labelled = [p for p in sorted(prob) if truth[p] in classes]
    misfit = np.array([1 - prob[p][classes.index(truth[p])] for p in labelled])
    found = conformal_limit(misfit, 1 - COVERAGE)
    limit = found if classes and np.isfinite(found) else None  # too few patients: every class is in every set
    held = np.array([prob[p] for p in sorted(prob)]).reshape(len(prob), len(classes))
    processed = [row for row in cohort if row["status"] != "excluded"]
    return {
        "patients": len(scores),
        "slides": len(processed),
        "failed": sum(row["status"] == "failed" for row in processed),
        "sites": [sites[p] for p in patients],
        "centre": rounded(centre),
        "directions": [rounded(row) for row in directions],
        "embeddings": [rounded(row) for row in (means - centre) @ directions.T],
        "scores": {name: rounded(s[name] for s in map(scores.get, patients) if s) for name in scores[patients[0]]},
        "conformal": {"coverage": COVERAGE, "limit": limit, "patients": len(labelled)} if classes else None,
        "abstained": int(abstains(held, limit).sum()) if classes else None,
        "quality": {
            name: rounded(thinned(values))
            for name, values in quality_table(
                results, [r["slide_id"] for r in processed if r["status"] == "ok"]
            ).items()
        },
    }


def write_reference(reference: Mapping[str, Any], path: str | Path) -> None:
    """Write reference.json beside the bundle that it belongs to, whose fingerprint it names."""
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "version": STAGE_VERSIONS["drift"]}
    bundle = read_json(Path(path).with_name("bundle.json"))
    write_json(path, {**about, "bundle": bundle["fingerprint"], **reference})


def read_reference(bundle: str | Path) -> dict[str, Any]:
    """reference.json of a bundle. RunError when it is damaged, another format's, or of another bundle."""
    path = Path(bundle) / "reference.json"
    try:
        reference = read_json(path)
        owner = read_json(Path(bundle) / "bundle.json")
    except SlideFailure as failure:
        raise RunError(f"{failure}. Copy the bundle again, or delete {path} to predict without drift.") from failure
    if reference.get("format") != FORMAT or reference.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{path} is no {FORMAT} of version {FORMAT_VERSION}. Delete it, or use the slidemake that wrote it."
        )
    if reference["bundle"] != owner.get("fingerprint"):
        raise RunError(f"{path} belongs to another bundle. Copy the whole folder again, or delete {path}.")
    return reference
