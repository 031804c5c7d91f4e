"""What the training slides of a model were like: kept beside its bundle, for `drift` to compare new slides with.

It is of the patients that the model was trained on, not of those it was tested on: with an external, temporal or given
test set these are different people. Their scores are those of models that were not fitted to them: out of fold where
they were tested, else of the inner validation.

The reference holds no pixel and no patient's name: sketches of the mean embeddings, scores, quality figures and the
share of slides that failed. A sketch is a projection on random signs, which keeps distances (Achlioptas 2003, J Comput
Syst Sci 66:671) and knows no data. Principal directions of the reference would fit its own patients better than any new
ones, and a comparison in them finds a difference where there is none. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import read_json, read_json_if_whole, write_json
from slidemake.core.spacing import thinned
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.evaluation.probabilities.conformal import conformal_limit, prediction_sets
from slidemake.mil.bags import Bags
from slidemake.tasks.base import Outcome, number

FORMAT, FORMAT_VERSION = "slidemake-reference", 2
SKETCH = 128  # numbers that a patient's mean embedding is projected to
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


def sketched(means: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(P, D) means -> (P, SKETCH) projections of what is left of them without the centre (D,) on random signs.

    Squared distances are kept on average, with a relative standard deviation of about sqrt(2 / SKETCH). The signs are
    those of NumPy's legacy generator, whose stream is frozen: the same everywhere and for ever.
    """
    if means.shape[1] <= SKETCH:
        return means - centre
    signs = np.random.RandomState(0).randint(0, 2, (means.shape[1], SKETCH)) * 2.0 - 1.0
    return (means - centre) @ signs / np.sqrt(SKETCH)


def rounded(values: Iterable[float]) -> list[float]:
    """Six significant digits: what the file needs."""
    return [float(f"{value:.6g}") for value in values]


def value_cells(outcome: Outcome, values: Sequence[float]) -> dict[str, str]:
    """The scores among what a model predicts for a patient, values (P,), as a table of predictions has them."""
    if outcome.kind in ("survival", "regression"):
        return {score_columns(outcome)[0]: number(values[0])}
    names = [name for name in outcome.columns() if name.startswith("prob_")]
    return {name: number(value) for name, value in zip(names, values, strict=True)}


def training_predictions(
    outcome: Outcome,
    trained: Sequence[str],
    tested: Iterable[Mapping[str, str]],
    validation: Mapping[str, Sequence[Sequence[float]]],
    labels: Mapping[str, str],
) -> list[dict[str, str]]:
    """Rows of predictions of the patients `trained`, by models that were not fitted to them.

    tested: rows of predictions_patients.csv; validation: {patient: values (P,) of each inner validation that held the
    patient out}, for those never tested; labels: {patient: label}.
    """
    own = set(trained)
    rows = [dict(row) for row in tested if row["patient_id"] in own]
    missing = own - {row["patient_id"] for row in rows}
    rows += [
        {"patient_id": patient, "label": labels.get(patient, ""), **value_cells(outcome, values)}
        for patient in sorted(missing)
        for values in validation.get(patient, ())
    ]
    return rows


def validation_values(model: str | Path) -> dict[str, list[list[float]]]:
    """{patient: values of each inner validation that held it out} from the bundles of a model's folds."""
    found: dict[str, list[list[float]]] = {}
    for path in sorted((Path(model) / "bundles").glob("repeat*_fold*/bundle.json")):
        training = read_json(path)["training"]
        held = training.get("validation_probability") or training.get("validation_values") or {}
        for patient, values in held.items():
            found.setdefault(patient, []).append(values)
    return found


def make_reference(
    bags: Bags,
    outcome: Outcome,
    trained: Sequence[str],
    predictions: Sequence[Mapping[str, str]],
    cohort: Sequence[Mapping[str, str]],
    results: str | Path,
    tested_only: Iterable[str] = (),
) -> dict[str, Any]:
    """The reference of one model.

    bags         the cohort's embeddings
    outcome      what the model predicts
    trained      the patients that the model was trained on
    predictions  rows of `training_predictions`
    cohort       rows of cohort/slides.csv (failed slides count into the share that failed)
    results      the results folder, for the slides' tissue.json
    tested_only  patients of the cohort that the model was only tested on: their slides are left out
    """
    scores = patient_scores(predictions, outcome)
    sites = patient_sites(cohort)
    truth = {row["patient_id"]: row.get("label", "") for row in predictions}
    patients = thinned([p for p in sorted(trained) if bags.tiles(p)], MOST)
    if not patients:
        raise RunError("No patient of the training cohort has tiles: there is nothing to compare new slides with.")
    means = patient_means(bags, patients)
    centre = np.array(rounded(means.mean(0)))
    classes, prob = list(outcome.classes), class_probabilities(predictions, outcome)
    labelled = [p for p in sorted(prob) if truth[p] in classes]
    misfit = np.array([1 - prob[p][classes.index(truth[p])] for p in labelled])
    found = conformal_limit(misfit, 1 - COVERAGE)
    limit = found if classes and np.isfinite(found) else None  # too few patients: every class is in every set
    held = np.array([prob[p] for p in sorted(prob)]).reshape(len(prob), len(classes))
    others = set(tested_only)
    processed = [
        row
        for row in cohort
        if row["status"] != "excluded" and (row.get("patient_id") or row["slide_id"]) not in others
    ]
    scored = [scores[p] for p in patients if p in scores]
    return {
        "patients": len(trained),
        "scored": len(scores),
        "slides": len(processed),
        "failed": sum(row["status"] == "failed" for row in processed),
        "sites": [sites.get(p, "") for p in patients],
        "centre": centre.tolist(),
        "embeddings": [rounded(row) for row in sketched(means, centre)],
        "scores": {name: rounded(s[name] for s in scored) for name in (scored[0] if scored else ())},
        "conformal": {"coverage": COVERAGE, "limit": limit, "patients": len(labelled)} if classes else None,
        "abstained": int(abstains(held, limit).sum()) if classes else None,
        "quality": {
            name: rounded(thinned(values, MOST))
            for name, values in quality_table(
                results, [r["slide_id"] for r in processed if r["status"] == "ok"]
            ).items()
        },
    }


def patient_sites(cohort: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """{patient: site}, several joined by "+", from rows of cohort/slides.csv."""
    found: dict[str, set[str]] = {}
    for row in cohort:
        found.setdefault(row.get("patient_id") or row["slide_id"], set()).add(row.get("site") or "")
    return {patient: "+".join(sorted(sites - {""})) for patient, sites in found.items()}


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
        found = f"{reference.get('format')!r} version {reference.get('format_version')!r}"
        raise RunError(
            f"{path} is {found}; this slidemake reads {FORMAT} version {FORMAT_VERSION}. Delete it to predict without "
            "drift, train the model again, or use the slidemake that wrote it."
        )
    if reference["bundle"] != owner.get("fingerprint"):
        raise RunError(f"{path} belongs to another bundle. Copy the whole folder again, or delete {path}.")
    return reference
