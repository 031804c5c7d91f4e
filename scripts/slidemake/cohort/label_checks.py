"""What can be wrong with the labels of a sheet that are no plain classes: numbers, survival, several labels, grades."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slidemake.cohort.sheet_checks import disagreements
from slidemake.cohort.sheet_table import Problem
from slidemake.core.words import nearest
from slidemake.tasks.labels import (
    LabelError,
    canonical,
    is_number,
    join_cells,
    label_columns,
    parse_multilabel,
    parse_survival,
    task_type,
    why_untrainable,
)

Cells = tuple[int, str, Mapping[str, str]]  # number of the row, patient, cells of the label's columns


def cell_problems(rows: Sequence[Cells], task: Mapping[str, Any]) -> Iterator[Problem]:
    """Cells that are no label of this task, and patients whose slides disagree."""
    for column in label_columns(task):
        same = []
        for number, patient, cells in rows:
            try:
                same.append((number, {"patient_id": patient, column: canonical(task, column, cells[column])}))
            except LabelError as error:
                yield Problem(number, column, str(error))
        yield from disagreements(same, column)


def patient_labels(rows: Sequence[Cells], task: Mapping[str, Any]) -> dict[str, str]:
    """{patient: label (text)} of those who have one; cells that are none are taken for empty (they are reported)."""
    cells: dict[str, dict[str, str]] = {}
    for _, patient, row in rows:
        known = cells.setdefault(patient, {})
        for column in label_columns(task):
            try:
                text = canonical(task, column, row[column])
            except LabelError:
                text = ""
            known[column] = known.get(column) or text
    found = {patient: join_cells(task, row) for patient, row in cells.items()}
    return {patient: text for patient, text in found.items() if text}


def cohort_problems(labels: Mapping[str, str], task: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the labels (patient -> text) of a cohort as a whole."""
    kind, columns = task_type(task), " and ".join(label_columns(task))
    if not labels:
        both = " (a patient needs both)" if kind == "survival" else ""
        yield f"no patient has a value in {columns}{both}"
        return
    if why := why_untrainable(list(labels.values()), kind):
        yield f"column{'s' if kind == 'survival' else ''} {columns}: {why}"
        return
    splits = task.get("splits", {})
    folds = splits.get("folds", 5) if splits.get("method", "kfold") == "kfold" else 2
    if len(labels) < folds:
        remedy = f"set folds: {len(labels)}" if len(labels) >= 2 else "add patients"
        yield f"{folds} folds need {folds} patients with a label, and there are {len(labels)}; {remedy}"
    if kind == "survival" and (events := sum(parse_survival(text)[1] for text in labels.values())) < 2:
        yield f"{events} patient has an event; with fewer than two, the fold that tests it has none to learn from"
    if kind == "multilabel":
        parsed = [parse_multilabel(text) for text in labels.values()]
        for name in label_columns(task):
            values = {label[name] for label in parsed} - {-1}
            if len(values) < 2:
                only = f"has one value only ({values.pop()})" if values else "is empty"
                yield f"column {name} {only}; leave it out of labels"


def order_problems(classes: Sequence[str], task: Mapping[str, Any]) -> Iterator[str]:
    """Does the order of an ordinal task name every grade of its column?"""
    order = [str(name) for name in task.get("order") or ()]
    if not order:
        if not all(is_number(name) for name in classes):
            yield f"the grades {', '.join(classes[:8])} have no order of their own; list them in order, lowest first"
        return
    for name in classes:
        if name not in order:
            near = nearest(name, order)
            meant = f"did you mean {near}?" if near else f"order has {', '.join(order)}"
            yield f"grade {name} of column {task['label']} is not in order; {meant}"
    for name in order:
        if name not in classes:
            yield f"order names {name}, and no slide has it in column {task['label']}; remove it"
