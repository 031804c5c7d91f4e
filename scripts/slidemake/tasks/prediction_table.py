"""Reading `predictions_patients.csv`: one row per patient and repeat, out of fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slidemake.core.bundle_place import check_bundle_place
from slidemake.core.failures import RunError
from slidemake.core.files import read_json_if_whole
from slidemake.core.tables import read_columns
from slidemake.tasks.base import Outcome, Predictions, number_in
from slidemake.tasks.registry import outcome_of_columns

NEEDED = ("patient_id", "label", "repeat", "fold")


def read_predictions(path: str | Path, name: str, kind: str) -> Predictions:
    """Predictions of model `name` for a task of type `kind`, out of fold; RunError as `parse_predictions`."""
    columns, rows = read_columns(path)
    outcome = outcome_of_columns(kind, columns)
    wanted = outcome.value_columns()
    missing = [column for column in (*NEEDED, *wanted, *outcome.decision_columns()) if column not in columns]
    if missing or not wanted or len(outcome.classes) == 1:
        listed = ", ".join(missing) or "prob_<name>"
        raise RunError(f"{path}: columns missing for a {kind} task: {listed}")
    if not rows:
        raise RunError(f"{path}: no predictions; see the log of train_aggregator for why no patient was tested")
    return parse_predictions(rows, name, outcome, path)


def parse_predictions(rows: Sequence[Mapping[str, str]], name: str, outcome: Outcome, path: str | Path) -> Predictions:
    """Rows of `predictions_patients.csv` (at least one) as predictions of `outcome`; `path` is for messages.

    Raises RunError (with the row) for cells that are no finite numbers, no probabilities or no such class, a patient
    with two rows in one repeat, or with two labels or sites.
    """
    patients = tuple(sorted({row["patient_id"] for row in rows}))
    repeats = tuple(sorted({int(number_in(row, "repeat", str(path))) for row in rows}))
    at_patient = {patient: i for i, patient in enumerate(patients)}
    at_repeat = {repeat: r for r, repeat in enumerate(repeats)}
    shape = (len(repeats), len(patients))
    # a model of the site alone has no logits and leaves the cells empty
    of_logits = [c for c in outcome.logit_columns() if all(row.get(c) for row in rows)]
    of_logits = of_logits if len(of_logits) == len(outcome.logit_columns()) else []
    values, raw = np.full((*shape, len(outcome.value_columns())), np.nan), np.full((*shape, len(of_logits)), np.nan)
    fold, sites = np.full(shape, -1), [""] * len(patients)
    decided: dict[tuple[int, int], list[float]] = {}
    truth: dict[int, tuple[list[float], str]] = {}
    for number, row in enumerate(rows, start=2):
        where = f"{path}, row {number} (patient {row['patient_id']})"
        i, r = at_patient[row["patient_id"]], at_repeat[int(float(row["repeat"]))]
        if fold[r, i] >= 0:
            raise RunError(f"{where}: the patient is tested twice in repeat {row['repeat']}: it leaks between folds")
        if outcome.classes and row["label"] not in outcome.classes:
            raise RunError(f"{where}: label {row['label']!r} has no column prob_{row['label']}")
        fold[r, i] = int(number_in(row, "fold", where))
        values[r, i] = of_row = outcome.values_in(row, where)
        raw[r, i] = [number_in(row, column, where) for column in of_logits]
        try:
            label = outcome.truth_of(row["label"])
            decided[r, i] = outcome.decisions_in(row, of_row, where)
        except (ValueError, KeyError) as error:
            raise RunError(f"{where}: not a prediction of a {outcome.kind} task ({error})") from None
        site = row.get("site") or ""
        if truth.setdefault(i, (label, site)) != (label, site):
            raise RunError(f"{where}: the patient has another label or site in an earlier row")
        sites[i] = site
    decisions = np.full((*shape, len(next(iter(decided.values())))), np.nan)
    for at, cells in decided.items():
        decisions[at] = cells
    labels = np.array([truth[i][0] for i in range(len(patients))], float)
    about = (name, outcome, patients, tuple(sites), labels, repeats)
    return Predictions(*about, values, decisions, fold, raw=raw if of_logits else None, of_folds=True)


def read_validation(path: str | Path, table: Predictions, truth: Mapping[str, str]) -> Predictions:
    """The same with those of validation patients, which the bundles of the folds beside the file `path` carry.

    truth: {patient: label}. Patients without a label that the model knows, and folds without a bundle, are left out.
    """
    classes = table.outcome.classes
    key = "validation_probability" if classes else "validation_values"

    def wanted(patient: str) -> bool:
        label = truth.get(patient)
        return bool(label) and (not classes or label in classes)

    kept = validation_of_folds(path, table.repeats, table.fold, key, wanted)
    found = {
        where: (
            np.array([*values.values()], float),
            np.array([table.outcome.truth_of(truth[patient]) for patient in values], float),
        )
        for where, values in kept.items()
    }
    return replace(table, validation=found or None)


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
