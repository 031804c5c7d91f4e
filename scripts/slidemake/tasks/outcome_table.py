"""Reading `predictions_patients.csv` of tasks that are no plain classes: a row per patient and repeat, out of fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.tables import read_columns
from slidemake.tasks.labels import parse_multilabel, parse_survival
from slidemake.tasks.prediction_table import NEEDED, Predictions, validation_of_folds, without_prevalence


@dataclass(frozen=True)
class OutcomeTable:
    """Predictions of one model; n patients in order of their id, R repeats.

    What truth, values and decisions are depends on the type of the task:

                truth (n, T)                    values (R, n, P)            decisions (R, n, Q)
    ordinal     grade                           probability of each grade   grade
    multilabel  1, 0 or -1 (not known)          probability of each label   1 or 0 of each label
    regression  the number                      the number                  none (Q = 0)
    survival    time; 1 event, 0 censored       risk, S at each horizon     1 high risk, 0 low
    """

    name: str
    kind: str
    names: tuple[str, ...]  # grades, labels, or horizons as text
    patients: tuple[str, ...]
    sites: tuple[str, ...]
    truth: np.ndarray
    repeats: tuple[int, ...]
    values: np.ndarray  # NaN where a repeat has no prediction for a patient
    decisions: np.ndarray  # NaN likewise
    fold: np.ndarray  # (R, n) int, -1 where missing
    # (repeat, fold) -> values (m, P) and truth (m, T) of validation patients, predicted by members not fitted to them
    validation: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    # (R, n, C) logits before temperature, of ordinal and multilabel tables that have them (see outcomes.py)
    raw: np.ndarray | None = None
    of_folds: bool = False  # each fold's model knows how common grades or labels are in the other folds

    @cached_property
    def ranks(self) -> np.ndarray:
        """(R, n, P) the values by which patients are ranked: of grades and labels without the prevalence of each fold's
        training patients (`without_prevalence`)."""
        if self.of_folds and self.kind == "ordinal":
            return without_prevalence(self.values, self.truth[:, 0].astype(int), self.fold)
        if not self.of_folds or self.kind != "multilabel":
            return self.values
        found = self.values.copy()
        for k, truth in enumerate(self.truth.astype(int).T):
            told = truth >= 0
            two = np.stack([1 - found[:, told, k], found[:, told, k]], axis=-1)
            found[:, told, k] = without_prevalence(two, truth[told], self.fold[:, told])[..., 1]
        return found

    def known(self, repeat: int) -> np.ndarray:
        """(n,) whether the repeat (its index) predicts a patient."""
        return self.fold[repeat] >= 0

    def cohort(self) -> tuple[Any, ...]:
        """What two models must share to be compared patient by patient."""
        return self.patients, self.truth.tolist()

    def mean(self) -> OutcomeTable:
        """The same with values averaged over repeats, as a single repeat; decisions by their majority."""
        values = np.nanmean(self.values, axis=0, keepdims=True)
        decisions = np.nanmean(self.decisions, axis=0, keepdims=True)
        if self.kind == "ordinal":
            from slidemake.tasks.outcomes import median_grade

            decisions = median_grade(values)[..., None].astype(float)
        else:
            decisions = (decisions >= 0.5).astype(float)
        fold = self.fold.max(0, keepdims=True)
        if len(self.repeats) > 1:  # patients of one fold in one repeat are of several in the others
            fold = np.where(fold >= 0, 0, -1)
        return replace(self, repeats=(0,), values=values, decisions=decisions, fold=fold, raw=None)


def _columns(kind: str, columns: list[str]) -> tuple[tuple[str, ...], list[str], list[str]]:
    """(names, columns of values, columns of decisions)."""
    if kind == "survival":
        at = [c for c in columns if c.startswith("survival_")]
        return tuple(c.removeprefix("survival_") for c in at), ["risk", *at], ["predicted"]
    if kind == "regression":
        return (), ["predicted"], []
    prob = [c for c in columns if c.startswith("prob_")]
    names = tuple(c.removeprefix("prob_") for c in prob)
    return names, prob, ["predicted"] if kind == "ordinal" else [f"predicted_{name}" for name in names]


def _truth(kind: str, names: tuple[str, ...], label: str) -> list[float]:
    if kind == "survival":
        time, event = parse_survival(label)
        return [time, float(event)]
    if kind == "regression":
        return [float(label)]
    if kind == "ordinal":
        return [names.index(label)]
    parsed = parse_multilabel(label)
    return [parsed[name] for name in names]


def _decision(kind: str, names: tuple[str, ...], cell: str) -> float:
    if kind == "survival":
        return {"low": 0.0, "high": 1.0}[cell]
    return float(names.index(cell)) if kind == "ordinal" else float(cell)


def read_outcomes(path: str | Path, name: str, kind: str) -> OutcomeTable:
    """Predictions of model `name` for a task of type `kind`, out of fold; RunError as `parse_outcomes`."""
    columns, rows = read_columns(path)
    return parse_outcomes(rows, name, kind, path, columns)


def parse_outcomes(
    rows: Sequence[Mapping[str, str]], name: str, kind: str, path: str | Path, columns: Sequence[str] = ()
) -> OutcomeTable:
    """Rows of `predictions_patients.csv` as a table; `path` is for messages, `columns` for a file without rows.

    Raises RunError (with the row) for missing columns, cells that are no finite numbers or no such class, a patient
    with two rows in one repeat, or with two labels.
    """
    columns = list(columns or rows[0])
    names, of_values, of_decisions = _columns(kind, columns)
    missing = [c for c in (*NEEDED, *of_values, *of_decisions) if c not in columns]
    if missing or not of_values:
        raise RunError(f"{path}: columns missing for a {kind} task: {', '.join(missing) or 'prob_<name>'}")
    if not rows:
        raise RunError(f"{path}: no predictions; see the log of train_aggregator for why no patient was tested")
    patients = tuple(sorted({row["patient_id"] for row in rows}))
    repeats = tuple(sorted({int(row["repeat"]) for row in rows}))
    shape = (len(repeats), len(patients))
    of_raw = [f"logit_{name}" for name in (names[:-1] if kind == "ordinal" else names)]
    # a model of the site alone has no logits and leaves the cells empty
    has_raw = kind in ("ordinal", "multilabel") and all(row.get(c) for row in rows for c in of_raw)
    of_raw = of_raw if has_raw else []
    values, raw = np.full((*shape, len(of_values)), np.nan), np.full((*shape, len(of_raw)), np.nan)
    decisions, fold = np.full((*shape, len(of_decisions)), np.nan), np.full(shape, -1)
    truth: dict[int, list[float]] = {}
    sites = [""] * len(patients)
    at_patient = {patient: i for i, patient in enumerate(patients)}
    for number, row in enumerate(rows, start=2):
        where = f"{path}, row {number} (patient {row['patient_id']})"
        i, r = at_patient[row["patient_id"]], repeats.index(int(row["repeat"]))
        if fold[r, i] >= 0:
            raise RunError(f"{where}: the patient is tested twice in repeat {row['repeat']}: it leaks between folds")
        try:
            label = _truth(kind, names, row["label"])
            values[r, i] = [float(row[c]) for c in of_values]
            raw[r, i] = [float(row[c]) for c in of_raw]
            decisions[r, i] = [_decision(kind, names, row[c]) for c in of_decisions]
            fold[r, i] = int(row["fold"])
        except (ValueError, KeyError) as error:
            raise RunError(f"{where}: not a prediction of a {kind} task ({error})") from None
        if not np.isfinite([*values[r, i], *raw[r, i]]).all():
            raise RunError(f"{where}: a prediction must be a finite number")
        if truth.setdefault(i, label) != label:
            raise RunError(f"{where}: the patient has another label in an earlier row")
        sites[i] = row.get("site") or ""
    table = np.array([truth[i] for i in range(len(patients))], float)
    about = (name, kind, names, patients, tuple(sites), table, repeats)
    return OutcomeTable(*about, values, decisions, fold, raw=raw if of_raw else None, of_folds=True)


def read_outcome_validation(path: str | Path, table: OutcomeTable, truth: Mapping[str, str]) -> OutcomeTable:
    """The table with the validation patients that the bundles beside the predictions `path` carry.

    truth: {patient: label}. Patients without a label, and folds without a bundle, are left out.
    """
    key = "validation_probability" if table.kind == "ordinal" else "validation_values"
    kept = validation_of_folds(path, table.repeats, table.fold, key, lambda patient: bool(truth.get(patient)))
    found = {
        where: (
            np.array([*values.values()], float),
            np.array([_truth(table.kind, table.names, truth[patient]) for patient in values], float),
        )
        for where, values in kept.items()
    }
    return replace(table, validation=found or None)


def grades_as_classes(table: OutcomeTable) -> Predictions:
    """Grades as classes, for what looks at them without their order (calibration, conformal sets, abstention)."""
    from slidemake.tasks.outcomes import stages

    validation = None
    if table.validation is not None:
        validation = {at: (values, truth[:, 0].astype(int)) for at, (values, truth) in table.validation.items()}
    grades = np.nan_to_num(table.decisions[..., 0], nan=-1).astype(int)
    truth = table.truth[:, 0].astype(int)
    about = (table.name, table.names, table.patients, table.sites, truth, table.repeats)
    logits = None if table.raw is None else stages(table.raw)  # log-probabilities: their softmax is the probability
    return Predictions(*about, table.values, grades, table.fold, logits, validation)


def label_as_classes(table: OutcomeTable, label: int) -> Predictions:
    """One label (its index) of a multi-label table as two classes, of the patients of whom it is known."""

    def two(values: np.ndarray) -> np.ndarray:
        return np.stack([1 - values, values], axis=-1)

    known = np.flatnonzero(table.truth[:, label] >= 0)
    validation = None
    if table.validation is not None:
        validation = {}
        for at, (values, truth) in table.validation.items():
            told = truth[:, label] >= 0
            validation[at] = (two(values[told, label]), truth[told, label].astype(int))
    decided = np.nan_to_num(table.decisions[:, known, label], nan=-1).astype(int)
    logits = None
    if table.raw is not None:
        logits = np.stack([np.zeros_like(table.raw[:, known, label]), table.raw[:, known, label]], axis=-1)
    return Predictions(
        name=table.name,
        classes=(f"no {table.names[label]}", table.names[label]),
        patients=tuple(table.patients[i] for i in known),
        sites=tuple(table.sites[i] for i in known),
        labels=table.truth[known, label].astype(int),
        repeats=table.repeats,
        prob=two(table.values[:, known, label]),
        predicted=decided,
        fold=table.fold[:, known],
        logits=logits,
        validation=validation,
    )
