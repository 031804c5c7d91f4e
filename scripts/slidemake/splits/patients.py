"""Patients of a task, and who of them is tested in which fold. No torch here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slidemake.core.failures import RunError
from slidemake.tasks.labels import (
    LabelError,
    about_label,
    canonical,
    join_cells,
    label_columns,
    strata,
    task_type,
    why_missing,
)

TRAIN, VAL = "train", "val"
UNNAMED = ("kfold", "monte_carlo", "site_preserved", "file")  # methods whose folds have numbers only
_SYNONYMS = {"training": TRAIN, "validation": VAL, "valid": VAL, "testing": "test"}


@dataclass(frozen=True)
class Patient:
    """One patient of a task: its label, its site (sites of several slides joined by +) and its slides, sorted.

    `stratum` is what folds are balanced by, where that is not the label itself (quantiles of a number, event and time).
    """

    patient_id: str
    label: str
    site: str
    split: str
    slides: tuple[str, ...]
    stratum: str = ""  # the label, when left out

    def __post_init__(self) -> None:
        if not self.stratum:
            object.__setattr__(self, "stratum", self.label)


@dataclass(frozen=True)
class Splits:
    """Folds of a task: `folds[repeat][patient_id]` is the fold, "0", "1", ..., in which the patient is tested, or train
    or val for those who never are. `fold_names` maps "0", ... to the site or to the sheet's name, where folds have
    names.
    """

    folds: dict[int, dict[str, str]]
    labels: dict[str, str]
    sites: dict[str, str]
    report: dict[str, Any]
    fold_names: dict[str, str] = field(default_factory=dict)

    def tested(self, repeat: int) -> list[str]:
        """Names of the folds that are tested, sorted (numbers by value)."""
        return sorted(set(self.folds[repeat].values()) - {TRAIN, VAL}, key=fold_order)

    def parts(self, repeat: int, fold: str) -> tuple[list[str], list[str], list[str]]:
        """(train, val, test) patients of one fold, each sorted; val is empty unless the split was given with one."""
        of = self.folds[repeat]
        test = sorted(p for p, f in of.items() if f == fold)
        val = sorted(p for p, f in of.items() if f == VAL)
        train = sorted(p for p, f in of.items() if f not in (fold, VAL))
        return train, val, test


def fold_order(name: str) -> tuple[int, int, str]:
    """Sort key: folds 2 before 10, numbers before names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def as_task(label: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A task, or the task of the classes in a column."""
    return {"label": label, "type": "multiclass"} if isinstance(label, str) else label


def collect_patients(
    rows: Iterable[Mapping[str, Any]], label: str | Mapping[str, Any], column: str = "split"
) -> tuple[list[Patient], list[dict[str, str]]]:
    """Patients of a task from the rows of cohort/slides.csv.

    Read are slide_id, patient_id (slide_id where empty), site, status (ok, failed, excluded), failure_code, the columns
    of the label (`label`: a column of classes, or a task) and, for given splits, `column`. Returns the patients, sorted
    by id, and those left out as {patient_id, reason}: all slides failed, or no label. Two labels for one patient are a
    RunError that lists every such patient.
    """
    task, problems = as_task(label), []
    by_patient: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        for name in label_columns(task):
            if name not in row:
                raise RunError(f"The cohort has no column {name!r}; its columns are {', '.join(map(str, row))}.")
        if row.get("status", "ok") != "excluded":
            by_patient[row.get("patient_id") or row["slide_id"]].append(row)
    patients, left_out = [], []
    for patient_id, everything in sorted(by_patient.items()):
        cells, wrong = _label_cells(patient_id, everything, task)
        problems += wrong
        text = join_cells(task, cells)
        usable = sorted(r["slide_id"] for r in everything if r.get("status", "ok") == "ok")
        if not usable:
            why = ", ".join(f"{r['slide_id']}: {r.get('failure_code') or 'failed'}" for r in everything)
            left_out.append({"patient_id": patient_id, "reason": f"no usable slide ({why})"})
        elif not text:
            left_out.append({"patient_id": patient_id, "reason": why_missing(task, cells)})
        else:
            split = "+".join(sorted({fold_name(r.get(column)) for r in everything} - {""}))
            site = "+".join(sorted({r["site"] for r in everything if r.get("site")}))
            patients.append(Patient(patient_id, text, site, split, tuple(usable)))
    if problems:
        what = about_label(task)
        raise RunError(f"A patient has one {what}, and these have not: {'; '.join(problems)}. Correct the sheet.")
    groups = strata({p.patient_id: p.label for p in patients}, task_type(task))
    return [replace(p, stratum=groups[p.patient_id]) for p in patients], left_out


def _label_cells(
    patient: str, rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """A patient's label by column, and what is wrong with it."""
    cells, problems = {}, []
    for name in label_columns(task):
        try:
            found = {canonical(task, name, row[name]) for row in rows} - {""}
        except LabelError as error:
            problems.append(f"patient {patient}, {name}: {error}")
            continue
        if len(found) > 1:
            problems.append(f"patient {patient} has {name} = {' and '.join(sorted(found))}")
        cells[name] = min(found) if found else ""
    return cells, problems


def fold_name(value: str | None) -> str:
    text = (value or "").strip()
    return _SYNONYMS.get(text.lower(), text.lower() if text.lower() in (TRAIN, VAL, "test") else text)
