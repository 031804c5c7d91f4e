"""Predictions as rows: out-of-fold ones from training, and those of a bundle on slides never seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.mil.bags import Bags, load_bags, open_embeddings
from slidemake.mil.bundle import Bundle, check_features, load_bundle, predict
from slidemake.tasks.base import Outcome, Threshold


def prediction_columns(outcome: Outcome, level: str) -> list[str]:
    """Columns of predictions_slides.csv (level slide) and predictions_patients.csv (level patient)."""
    first = ["slide_id", "patient_id"] if level == "slide" else ["patient_id"]
    return [*first, "site", "label", "repeat", "fold", *outcome.columns(), "tiles"]


def prediction_row(
    outcome: Outcome, outputs: np.ndarray, values: np.ndarray, threshold: Threshold, tiles: int, **about: Any
) -> dict[str, Any]:
    """One row: predicted values, raw outputs, the threshold and what it decides."""
    return {**about, "tiles": tiles, **outcome.cells(outputs, values, threshold)}


def predict_bags(
    bundle: Bundle, bags: Bags, patients: Iterable[str], **about: Mapping[str, str] | int | str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(rows of slides, rows of patients, patients without a prediction) of `patients`, sorted.

    A patient is predicted from all tiles of all slides together. Slides without tiles get no row; a patient without any
    tile gets none and is listed. `about` goes into every row; a mapping is looked up by patient. Rows of patients have
    the members' scores (M,) besides (`member_scores`), which are not written.
    """
    slides, people, without = [], [], []
    for patient in sorted(patients):
        facts: dict[str, Any] = {k: v.get(patient, "") if isinstance(v, Mapping) else v for k, v in about.items()}
        bag = bags.bag(patient)
        if len(bag) == 0:
            without.append(patient)
            continue
        first, last = bags.where[patient]
        domains = [bags.domains.get(slide, "") for slide in bags.slides[first:last]]
        whole = predict(bundle, bag, bags.sizes(patient), domains, bags.places(patient))
        args = (bundle.outcome, whole.logits, whole.values, bundle.threshold, len(bag))
        people.append(prediction_row(*args, patient_id=patient, member_scores=whole.members, **facts))
        for i in range(first, last):
            tiles = bags.slide(i)
            if len(tiles) == 0:
                continue
            places = None if bags.cells is None else bags.cells[bags.offsets[i] : bags.offsets[i + 1]]
            one = whole if len(tiles) == len(bag) else predict(bundle, tiles, None, [domains[i - first]], places)
            args = (bundle.outcome, one.logits, one.values, bundle.threshold, len(tiles))
            slides.append(prediction_row(*args, slide_id=bags.slides[i], patient_id=patient, **facts))
        bags.forget()
    return slides, people, without


def apply_bundle_to_stores(
    bundle_folder: str | Path,
    embeddings: str | Path,
    slides: Sequence[Mapping[str, Any]],
    device: str = "cpu",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], Outcome]:
    """Apply a bundle to slides never seen: (rows of slides, rows of patients, patients without tiles, outcome).

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
        if bundle.domain:
            bags = bags.with_domains({row["slide_id"]: str(row.get(bundle.domain) or "") for row in rows})
        facts = {key: "+".join(sorted({str(r.get(key) or "") for r in rows} - {""})) for key in ("site", "label")}
        found = predict_bags(bundle, bags, [patient], **facts, repeat="", fold="")
        slide_rows += found[0]
        patient_rows += found[1]
        without += found[2]
    return slide_rows, patient_rows, without, bundle.outcome
