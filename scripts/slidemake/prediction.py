"""Predictions as rows: out-of-fold ones from training, and those of a bundle on slides never seen."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.bags import Bags, load_bags, open_embeddings
from slidemake.bundle import Bundle, check_features, decide, load_bundle, predict
from slidemake.failures import RunError
from slidemake.provenance import write_text


def number(value: float | None) -> str:
    """Nine significant digits, so that equal predictions are equal bytes; empty for None."""
    return "" if value is None else format(float(value), ".9g")


def prediction_columns(classes: Sequence[str], level: str) -> list[str]:
    """Columns of predictions_slides.csv (level slide) and predictions_patients.csv (level patient)."""
    first = ["slide_id", "patient_id"] if level == "slide" else ["patient_id"]
    figures = [f"{kind}_{name}" for kind in ("prob", "logit") for name in classes]
    return [*first, "site", "label", "repeat", "fold", *figures, "threshold", "predicted", "tiles"]


def prediction_row(
    classes: Sequence[str], logits: np.ndarray, prob: np.ndarray, threshold: float | None, tiles: int, **about: Any
) -> dict[str, Any]:
    """One row: calibrated probabilities, raw logits, the threshold and the class it decides for."""
    # decided on the number that is written, so that a reader of the file decides the same
    written = np.array([float(number(p)) for p in prob])
    limit = None if threshold is None else float(number(threshold))
    row = {**about, "tiles": tiles, "threshold": number(limit), "predicted": decide(written, classes, limit)}
    row |= {f"prob_{name}": number(p) for name, p in zip(classes, prob, strict=True)}
    return row | {f"logit_{name}": number(v) for name, v in zip(classes, logits, strict=True)}


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def predict_bags(
    bundle: Bundle, bags: Bags, patients: Iterable[str], **about: Mapping[str, str] | int | str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(rows of slides, rows of patients, patients without a prediction) of `patients`, sorted.

    A patient is predicted from all tiles of all slides together. Slides without tiles get no row; a patient without any
    tile gets none and is listed. `about` goes into every row; a mapping is looked up by patient.
    """
    slides, people, without = [], [], []
    for patient in sorted(patients):
        facts: dict[str, Any] = {k: v.get(patient, "") if isinstance(v, Mapping) else v for k, v in about.items()}
        bag = bags.bag(patient)
        if len(bag) == 0:
            without.append(patient)
            continue
        whole = predict(bundle, bag, bags.sizes(patient))
        args = (bundle.classes, whole.logits, whole.prob, bundle.threshold, len(bag))
        people.append(prediction_row(*args, patient_id=patient, **facts))
        first, last = bags.where[patient]
        for i in range(first, last):
            tiles = bags.slide(i)
            if len(tiles) == 0:
                continue
            one = whole if len(tiles) == len(bag) else predict(bundle, tiles)
            args = (bundle.classes, one.logits, one.prob, bundle.threshold, len(tiles))
            slides.append(prediction_row(*args, slide_id=bags.slides[i], patient_id=patient, **facts))
        bags.forget()
    return slides, people, without


def apply_bundle_to_stores(
    bundle_folder: str | Path,
    embeddings: str | Path,
    slides: Sequence[Mapping[str, Any]],
    device: str = "cpu",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], tuple[str, ...]]:
    """Apply a bundle to slides never seen: (rows of slides, rows of patients, patients without tiles, classes).

    slides: mappings with slide_id and, optionally, patient_id, site, label. The stores `embeddings/{slide_id}.zarr` are
    read one patient at a time, so memory does not grow with the cohort, and each must carry the encoder and stain that
    the bundle was trained on (RunError with what differs otherwise).
    """
    bundle = load_bundle(bundle_folder, device)
    by_patient: dict[str, list[Mapping[str, Any]]] = {}
    for row in slides:
        by_patient.setdefault(row.get("patient_id") or row["slide_id"], []).append(row)
    if not by_patient:
        raise RunError("No slide is left to predict on; see cohort/failures.csv for why.")
    for row in slides:  # all are checked before the first is computed
        _, attrs = open_embeddings(Path(embeddings) / f"{row['slide_id']}.zarr")
        check_features(bundle.info, attrs.get("encoder", {}), attrs.get("stain"), f"slide {row['slide_id']}")
    slide_rows, patient_rows, without = [], [], []
    for patient, rows in sorted(by_patient.items()):
        bags = load_bags(embeddings, [(row["slide_id"], patient) for row in rows])
        facts = {key: "+".join(sorted({str(r.get(key) or "") for r in rows} - {""})) for key in ("site", "label")}
        found = predict_bags(bundle, bags, [patient], **facts, repeat="", fold="")
        slide_rows += found[0]
        patient_rows += found[1]
        without += found[2]
    return slide_rows, patient_rows, without, bundle.classes
