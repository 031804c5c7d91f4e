"""A bundle on an external cohort whose outcomes are known: the metrics of a model with everything frozen.

Nothing is fitted here: weights, standardisation, temperature, threshold and conformal limit are the bundle's, all from
its own training cohort. Patients that the bundle was trained on stop the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.bundle_place import check_external, trained_on
from slidemake.core.failures import RunError
from slidemake.core.tables import read_table
from slidemake.core.words import some
from slidemake.evaluation.evaluate import evaluate_tables
from slidemake.evaluation.files import write_metrics
from slidemake.evaluation.subgroups import groups_of
from slidemake.tasks.base import Predictions
from slidemake.tasks.labels import LabelError, canonical, join_cells, label_columns, label_task
from slidemake.tasks.prediction_table import parse_predictions
from slidemake.tasks.registry import load_outcome


def true_labels(
    slides: Iterable[Mapping[str, Any]], task: Mapping[str, Any], classes: Sequence[str] = ()
) -> dict[str, str]:
    """{patient: label as text} from the rows of slides.csv; patients without a label are left out.

    RunError for a column that is not there, a cell that is no label of the task, a class that the bundle does not know,
    and a patient of two.
    """
    columns = label_columns(task)
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in slides:
        for column in columns:
            if column not in row:
                raise RunError(f"bundle_label: the cohort has no column {column!r}; it has {', '.join(map(str, row))}.")
            try:
                text = canonical(task, column, row[column])
            except LabelError as error:
                raise RunError(f"bundle_label: slide {row['slide_id']}, column {column}: {error}.") from None
            if text:
                found[row.get("patient_id") or row["slide_id"]][column].add(text)
    for column in columns:
        values = {p: of[column] for p, of in sorted(found.items()) if of[column]}
        unknown = sorted(set().union(*values.values()) - set(classes)) if classes and values else []
        if unknown:
            raise RunError(
                f"bundle_label: column {column} has {some(unknown)}, and the bundle tells {' from '.join(classes)}. "
                "Write the bundle's classes into the sheet, and leave the cells of other patients empty."
            )
        torn = [f"{p} ({', '.join(sorted(texts))})" for p, texts in values.items() if len(texts) > 1]
        if torn:
            raise RunError(f"bundle_label: a patient has one {column}, and these have more: {some(torn)}.")
    labels = {p: join_cells(task, {c: next(iter(of[c]), "") for c in columns}) for p, of in found.items()}
    return {patient: label for patient, label in labels.items() if label}


def _known_patients(
    rows: Sequence[Mapping[str, str]], truth: Mapping[str, str], bundle: Mapping[str, Any]
) -> list[Mapping[str, str]]:
    """Rows of predictions/patients.csv of the patients of known outcome, sorted.

    RunError when there is none, and when the bundle was trained on one of them.
    """
    known = sorted((row for row in rows if row["patient_id"] in truth), key=lambda row: row["patient_id"])
    if not known:
        raise RunError(f"bundle_label: none of {len(rows)} predicted patients has a label.")
    check_external((row["patient_id"] for row in known), bundle)
    return known


def external_predictions(
    rows: Sequence[Mapping[str, str]], truth: Mapping[str, str], bundle: Mapping[str, Any]
) -> Predictions:
    """Rows of predictions/patients.csv as predictions of one repeat and one fold, for the patients of known outcome,
    with the bundle's validation patients.

    RunError when the bundle was trained on one of the patients, or no patient has a label.
    """
    known = [
        {**row, "label": truth[row["patient_id"]], "repeat": "0", "fold": "0"}
        for row in _known_patients(rows, truth, bundle)
    ]
    made = parse_predictions(known, str(bundle.get("model") or "bundle"), load_outcome(bundle), "predictions")
    kept = bundle["training"].get("validation") or {}
    if not kept.get("labels"):
        return made
    # one cohort of validation patients, whatever the fold that they were held out in: the bundle is the mean
    labels = np.array(kept["labels"], float)
    return replace(made, validation={(0, 0): (np.array(kept["values"], float), labels.reshape(len(labels), -1))})


def evaluate_external(
    predictions: Path,
    slides: Path,
    bundle: Mapping[str, Any],
    label: str,
    options: Mapping[str, Any],
    metrics: Path,
    table: Path,
    curves: Path,
) -> dict[str, Any]:
    """Write metrics.json, metrics.csv and curves.json of a bundle's predictions, as `evaluation.evaluate` does.

    `external` in metrics.json says which bundle, which column, and how many predicted patients had no label.
    """
    rows, cohort = read_table(predictions), read_table(slides)
    truth = true_labels(cohort, label_task(bundle, label), bundle.get("classes") or ())
    p = external_predictions(rows, truth, bundle)
    result, points = evaluate_tables([p], options, None, groups_of(cohort, options.get("subgroups")), None)
    result["external"] = {
        "bundle": bundle["fingerprint"],
        "model": p.name,
        "label": label,
        "threshold": bundle.get("threshold"),
        "trained_on": len(trained_on(bundle)),
        "without_label": len(rows) - len(p.patients),
    }
    write_metrics(result, points, metrics, table, curves)
    return result
