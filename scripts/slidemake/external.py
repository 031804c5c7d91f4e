"""A bundle on an external cohort whose outcomes are known: the metrics of a model with everything frozen.

Nothing is fitted here: weights, standardisation, temperature, threshold and conformal limit are the bundle's, all from
its own training cohort. Patients that the bundle was trained on stop the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.cohort_table import read_table
from slidemake.evaluation import evaluate_models, groups_of, metrics_table
from slidemake.failures import RunError
from slidemake.prediction_table import Predictions
from slidemake.provenance import file_sums, write_json, write_text
from slidemake.split_patients import some

CLASSES = ("binary", "multiclass", "ordinal")  # types of task whose predictions are one class of several


def true_labels(slides: Iterable[Mapping[str, Any]], column: str, classes: Sequence[str]) -> dict[str, str]:
    """{patient: class} from the rows of slides.csv; patients without a label are left out.

    RunError for a column that is not there, a class that the bundle does not know, and a patient of two classes.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for row in slides:
        if column not in row:
            raise RunError(f"bundle_label: the cohort has no column {column!r}; it has {', '.join(map(str, row))}.")
        if text := str(row[column] or "").strip():
            found[row.get("patient_id") or row["slide_id"]].add(text)
    unknown = sorted({text for texts in found.values() for text in texts} - set(classes))
    if unknown:
        raise RunError(
            f"bundle_label: column {column} has {some(unknown)}, and the bundle tells {' from '.join(classes)}. Write "
            "the bundle's classes into the sheet, and leave the cells of other patients empty."
        )
    torn = [f"{p} ({', '.join(sorted(texts))})" for p, texts in sorted(found.items()) if len(texts) > 1]
    if torn:
        raise RunError(f"bundle_label: a patient has one {column}, and these have more: {some(torn)}.")
    return {p: next(iter(texts)) for p, texts in found.items()}


def external_predictions(
    rows: Sequence[Mapping[str, str]], truth: Mapping[str, str], bundle: Mapping[str, Any]
) -> Predictions:
    """Rows of predictions/patients.csv as predictions of one repeat and one fold, for the patients of known outcome.

    RunError when the bundle predicts no classes, was trained on one of the patients, or no patient has a label.
    """
    classes = tuple(bundle.get("classes") or ())
    if (bundle.get("target") or {}).get("type") not in CLASSES:
        raise RunError("bundle_label: metrics of an external cohort are for bundles that predict classes.")
    known = sorted((row for row in rows if row["patient_id"] in truth), key=lambda row: row["patient_id"])
    if not known:
        raise RunError(f"bundle_label: none of {len(rows)} predicted patients has a label.")
    patients = tuple(row["patient_id"] for row in known)
    trained = sorted(set(patients) & set(bundle["training"].get("patients", ())))
    if trained:
        raise RunError(
            f"Leak: the bundle was trained on {some(trained)}. An external cohort has other patients; leave these out "
            "of the sheet, or look at the out-of-fold predictions of the run that made the bundle."
        )
    prob = np.array([[float(row[f"prob_{name}"]) for name in classes] for row in known])
    has_logits = all(row.get(f"logit_{name}") for row in known for name in classes)
    logits = np.array([[float(row[f"logit_{name}"]) for name in classes] for row in known]) if has_logits else None
    kept = bundle["training"].get("validation") or {}
    validation = None
    if kept.get("labels"):
        validation = {(0, 0): (np.array(kept["values"], float), np.array(kept["labels"], int))}
    return Predictions(
        str(bundle.get("model") or "bundle"),
        classes,
        patients,
        tuple(row.get("site") or "" for row in known),
        np.array([classes.index(truth[p]) for p in patients]),
        (0,),
        prob[None],
        np.array([[classes.index(row["predicted"]) for row in known]]),
        np.zeros((1, len(known)), int),
        None if logits is None else logits[None],
        validation,
    )


def evaluate_external(
    predictions: Path,
    slides: Path,
    bundle: Mapping[str, Any],
    column: str,
    options: Mapping[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
) -> dict[str, Any]:
    """Write metrics.json, metrics.csv and curves.json of a bundle's predictions, as `evaluation.evaluate` does.

    `external` in metrics.json says which bundle, which column, and how many predicted patients had no label.
    """
    rows, cohort = read_table(predictions), read_table(slides)
    p = external_predictions(rows, true_labels(cohort, column, bundle.get("classes") or ()), bundle)
    graded = bundle["target"]["type"] == "ordinal"
    result, points = evaluate_models([p], dict(options), None, groups_of(cohort, options.get("subgroups")), graded)
    result["external"] = {
        "bundle": bundle["fingerprint"],
        "model": p.name,
        "label": column,
        "threshold": bundle.get("threshold"),
        "trained_on": len(bundle["training"].get("patients", ())),
        "without_label": len(rows) - len(p.patients),
    }
    write_text(table, metrics_table(result))
    write_json(curves, points)
    write_json(metrics, {**result, "files": file_sums(table.parent, [table.name])})
    return result
