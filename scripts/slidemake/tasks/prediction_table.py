"""Reading `predictions_patients.csv`: one row per patient and repeat, out of fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from slidemake.core.bundle_place import check_bundle_place
from slidemake.core.failures import RunError
from slidemake.core.files import read_json_if_whole
from slidemake.core.tables import read_columns

NEEDED = ("patient_id", "label", "repeat", "fold")


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions of one model; n patients in order of their id, R repeats, C classes."""

    name: str
    classes: tuple[str, ...]  # with two classes the second is the positive one
    patients: tuple[str, ...]
    sites: tuple[str, ...]  # (n,) "" where the sheet names none
    labels: np.ndarray  # (n,) int, index into classes
    repeats: tuple[int, ...]
    prob: np.ndarray  # (R, n, C) float, NaN where a repeat has no prediction for a patient
    predicted: np.ndarray  # (R, n) int, the decision at the row's own threshold, -1 where missing
    fold: np.ndarray  # (R, n) int, -1 where missing
    logits: np.ndarray | None = None  # (R, n, C) before temperature, where the file has them
    # (repeat, fold) -> P (m, C) and labels (m,) of validation patients, predicted by members not fitted to them
    validation: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    of_folds: bool = False  # each fold's model knows how common the classes are among the patients of the other folds

    @cached_property
    def ranks(self) -> np.ndarray:
        """(R, n, C) what patients are ranked by, see `without_prevalence`."""
        return without_prevalence(self.prob, self.labels, self.fold) if self.of_folds else self.prob

    def cohort(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """What two models must share to be compared patient by patient."""
        return self.patients, tuple(int(v) for v in self.labels)


def without_prevalence(prob: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(R, n, C) probabilities p / q, divided by their sum over classes; q: share of a class in the other folds.

    A model's probabilities rest on the prevalence of its training patients. That is lower where the tested fold's is
    higher, so that probabilities of different folds rank patients the wrong way round: a model that knows nothing else
    has an AUROC far below 0.5. Within a fold of two classes the order does not change. prob (R, n, C), labels (n,)
    class indices, fold (R, n) with -1 where a patient was not tested; a class without any counts half of one patient. A
    repeat of a single fold is left as it is.
    """
    found = np.array(prob, float)
    for r, of in enumerate(fold):
        names = sorted(set(of.tolist()) - {-1})
        for name in names if len(names) > 1 else ():
            others = np.maximum(np.bincount(labels[(of >= 0) & (of != name)], minlength=prob.shape[2]), 0.5)
            at = of == name
            found[r, at] /= others / others.sum()
            found[r, at] /= found[r, at].sum(1, keepdims=True)
    return found


def _number(row: dict[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        raise RunError(f"{where}: {column} is {row[column]!r}, not a number") from None
    if not math.isfinite(value):
        raise RunError(f"{where}: {column} is {row[column]}; a prediction must be a finite number")
    return value


def _decision(row: dict[str, str], prob: list[float], classes: tuple[str, ...], where: str) -> int:
    """Class decided for this row: by its own threshold (two classes), else as written, else the most probable."""
    if len(classes) == 2 and row.get("threshold"):
        return int(prob[1] >= _number(row, "threshold", where))
    if row.get("predicted"):
        if row["predicted"] not in classes:
            raise RunError(f"{where}: predicted is {row['predicted']!r}, not one of {', '.join(classes)}")
        return classes.index(row["predicted"])
    return int(np.argmax(prob))


def _probabilities(row: dict[str, str], classes: tuple[str, ...], where: str) -> list[float]:
    prob = [_number(row, f"prob_{name}", where) for name in classes]
    if min(prob) < -1e-6 or abs(sum(prob) - 1) > 1e-3:
        raise RunError(f"{where}: the class probabilities {prob} do not sum to 1")
    total = sum(max(0.0, p) for p in prob)
    return [max(0.0, p) / total for p in prob]


def read_predictions(path: str | Path, name: str) -> Predictions:
    """Predictions of model `name`; classes are the `prob_<class>` columns in their order.

    Raises RunError (with the row) for missing columns, values that are no probabilities, a label without a column, a
    patient with two rows in one repeat, or with two labels or sites.
    """
    columns, rows = read_columns(path)
    classes = tuple(column.removeprefix("prob_") for column in columns if column.startswith("prob_"))
    missing = [column for column in NEEDED if column not in columns]
    if missing or len(classes) < 2:
        raise RunError(f"{path}: columns missing: {', '.join(missing) or 'prob_<class> for two or more classes'}")
    if not rows:
        raise RunError(f"{path}: no predictions; see the log of train_aggregator for why no patient was tested")
    patients = tuple(sorted({row["patient_id"] for row in rows}))
    repeats = tuple(sorted({int(_number(row, "repeat", str(path))) for row in rows}))
    at_patient = {patient: i for i, patient in enumerate(patients)}
    at_repeat = {repeat: i for i, repeat in enumerate(repeats)}
    shape = (len(repeats), len(patients))
    prob = np.full((*shape, len(classes)), np.nan)
    logits = prob.copy() if all(f"logit_{name}" in columns for name in classes) else None
    predicted, fold = np.full(shape, -1), np.full(shape, -1)
    labels, sites = np.full(len(patients), -1), [""] * len(patients)
    for number, row in enumerate(rows, start=2):
        where = f"{path}, row {number} (patient {row['patient_id']})"
        if row["label"] not in classes:
            raise RunError(f"{where}: label {row['label']!r} has no column prob_{row['label']}")
        label, site = classes.index(row["label"]), row.get("site") or ""
        i, r = at_patient[row["patient_id"]], at_repeat[int(float(row["repeat"]))]
        if fold[r, i] >= 0:
            raise RunError(f"{where}: the patient is tested twice in repeat {row['repeat']}: it leaks between folds")
        if labels[i] not in (-1, label) or (labels[i] >= 0 and sites[i] != site):
            raise RunError(f"{where}: the patient has another label or site in an earlier row")
        labels[i], sites[i] = label, site
        fold[r, i] = int(_number(row, "fold", where))
        prob[r, i] = _probabilities(row, classes, where)
        predicted[r, i] = _decision(row, list(prob[r, i]), classes, where)
        if logits is not None:
            logits[r, i] = [_number(row, f"logit_{name}", where) for name in classes]
    about = (name, classes, patients, tuple(sites), labels, repeats)
    return Predictions(*about, prob, predicted, fold, logits, of_folds=True)


def read_validation(path: str | Path, p: Predictions, truth: Mapping[str, str]) -> Predictions:
    """The same predictions with those of validation patients, which the folds' bundles beside the file carry.

    truth: {patient: label}. Patients without a label, and folds without a bundle, are left out.
    """
    kept = validation_of_folds(path, p.repeats, p.fold, "validation_probability", lambda q: truth.get(q) in p.classes)
    found = {
        where: (np.array([*values.values()], float), np.array([p.classes.index(truth[patient]) for patient in values]))
        for where, values in kept.items()
    }
    return replace(p, validation=found or None)


def validation_of_folds(
    path: str | Path, repeats: Sequence[int], fold: np.ndarray, key: str, wanted: Callable[[str], bool]
) -> dict[tuple[int, int], dict[str, list[float]]]:
    """{(repeat, fold): {patient: values}} of the validation patients that are `wanted`, sorted; folds without any are
    left out. They are in the folds' bundles beside the predictions `path`; fold (R, n) is -1 where a patient was not
    tested; key: `validation_probability` or, where the outcome has no classes, `validation_values`.
    """
    found = {}
    for repeat, row in zip(repeats, fold, strict=True):
        for number in sorted(set(row.tolist()) - {-1}):
            folder = Path(path).with_name("bundles") / f"repeat{repeat}_fold{number}"
            info = read_json_if_whole(folder / "bundle.json")
            check_bundle_place(folder, info or {}, of_run=True)
            kept = ((info or {}).get("training") or {}).get(key) or {}
            if known := {patient: kept[patient] for patient in sorted(kept) if wanted(patient)}:
                found[repeat, number] = known
    return found
