"""The cohort as its sample sheet describes it, checked before any slide is opened.

`read_sheet` reports every problem at once, with row, column and what to write instead; `task_problems` says whether the
labels can be learned as a task asks for it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidemake.cohort.label_checks import Cells, cell_problems, cohort_problems, order_problems, patient_labels
from slidemake.cohort.sheet_checks import (
    check_cells,
    check_rows,
    converted,
    disagreements,
    lost_zeros,
    resolve,
    unasked_features,
)
from slidemake.cohort.sheet_table import KNOWN, Problem, Table, check_columns, read_table
from slidemake.cohort.spellings import doubtful_names, number_problems, spelling_problems
from slidemake.core.failures import RunError
from slidemake.core.words import nearest
from slidemake.splits.methods import split_column
from slidemake.tasks.labels import CLASSES, is_number, label_columns, task_type

log = logging.getLogger("slidemake")

MAX_SHOWN = 50  # problems listed; the rest is counted


@dataclass(frozen=True)
class SlideRow:
    """One slide of the sheet. Text that the sheet leaves out is ""; `labels` holds every column that is not ours, and
    those that `read_sheet` was asked for ("" where a slide has no value).

    path: as a program opens it (resolved against the sheet's folder), or a URI. mpp: um per px of level 0, or None.
    tissue_geojson: resolved like path, or None. features: file of its features, resolved like path, or "". sha256: of
    the slide file, in small letters, or "". row: number in the file, the header being 1.
    """

    slide_id: str
    path: str
    patient_id: str = ""
    site: str = ""
    scanner: str = ""
    scan_date: str = ""
    split: str = ""
    mpp: float | None = None
    stain: str = ""
    exclude: bool = False
    tissue_geojson: str | None = None
    features: str = ""
    sha256: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    row: int = field(default=0, compare=False)

    @classmethod
    def for_screening(
        cls,
        slide_id: str,
        path: str,
        mpp: float | None = None,
        stain: str = "",
        exclude: bool = False,
        sha256: str = "",
    ) -> SlideRow:
        """A row of what screening looks at, for a slide outside a cohort or from a job's params."""
        return cls(slide_id, path, patient_id=slide_id, mpp=mpp, stain=stain, exclude=exclude, sha256=sha256)


def read_sheet(
    path: str | Path,
    columns: Iterable[str] = (),
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    features: bool = False,
) -> list[SlideRow]:
    """Rows of a sample sheet in file order, excluded ones too; all as text but for mpp and exclude.

    columns: label columns that must be there. tasks: the configuration's tasks; their labels are checked in the same
    go (`task_problems`). features: features are imported, so a slide needs no path. Ids that look as if a spreadsheet
    had taken their leading zeros are warned of in the log.
    Raises RunError that lists every problem (the first 50, and how many more there are).
    """
    path, tasks = Path(path), tasks or {}
    columns = list(dict.fromkeys([*columns, *(column for task in tasks.values() for column in label_columns(task))]))
    table = read_table(path)
    cells = [(number, converted(row)) for number, row in table.rows]
    if features:
        for _, row in cells:
            row["path"] = row.get("path") or None
    problems = [*table.problems, *check_columns(table.columns, columns, () if features else ("path",))]
    problems += check_cells(cells, columns, pathless=features)
    if not features:
        problems += unasked_features(cells)
    for _, row in cells:
        row["patient_id"] = row.get("patient_id") or str(row.get("slide_id") or "")
    problems += check_rows(cells, path)
    problems += _group_problems(cells, _grouping(columns, tasks))
    if "split" in table.columns:
        problems += disagreements(cells, "split")
    rows = [_slide_row(number, row, path, columns) for number, row in cells]
    for name, task in tasks.items():
        if not set(label_columns(task)) <= set(table.columns):
            continue  # said already
        seen = {(problem.row, problem.column) for problem in problems}
        found = task_problems(rows, task, f"task {name}")
        problems += [problem for problem in found if not problem.row or (problem.row, problem.column) not in seen]
    if problems:
        raise RunError(_message(table.name, problems))
    for column in _grouping(columns, tasks):
        warn_of_doubtful(table.name, column, Counter(str(row[column]) for _, row in cells if row.get(column)))
    for column in ("slide_id", "patient_id"):
        warning = lost_zeros(str(row[column]) for _, row in cells)
        if warning:
            log.warning("%s, column %s: %s", table.name, column, warning)
    return rows


def _grouping(columns: Iterable[str], tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Columns that put slides together: ours, and those that the configuration names, but for numbers and dates.

    Labels that are classes are looked at with their task (`task_problems`).
    """
    dates = {str(task.get("splits", {}).get("date_column", "")) for task in tasks.values()}
    labels = {column for task in tasks.values() for column in label_columns(task)}
    others = [column for column in columns if column not in {*labels, *dates, "scan_date"}]
    return list(dict.fromkeys(["patient_id", "site", "scanner", "split", *others]))


def _group_problems(cells: list[tuple[int, dict[str, Any]]], columns: Iterable[str]) -> Iterator[Problem]:
    included = [(number, row) for number, row in cells if row.get("exclude") is not True]
    for column in columns:
        named = [(number, str(row[column])) for number, row in included if row.get(column)]
        yield from spelling_problems(named, column)


def warn_of_doubtful(sheet: str, column: str, counts: Mapping[str, int]) -> None:
    """Say so when a column that groups has names that may mean that there is no value."""
    if found := doubtful_names(counts):
        listed = ", ".join(f"{name} ({count} slides)" for name, count in sorted(found.items()))
        log.warning("%s, column %s: %s: taken as a name; leave these cells empty if it is none", sheet, column, listed)


def _slide_row(number: int, row: dict[str, Any], sheet: Path, columns: list[str]) -> SlideRow:
    """A row as SlideRow; with problems it is good enough to find the others."""
    texts = {key: row.get(key) or "" for key in ("site", "scanner", "scan_date", "split", "stain")}
    mpp, outline = row.get("mpp"), row.get("tissue_geojson")
    labels = {key: value or "" for key, value in row.items() if key not in KNOWN}
    labels |= {key: str(row[key] or "") for key in columns if key in row and key in KNOWN}
    return SlideRow(
        slide_id=row.get("slide_id") or "",
        path=resolve(row["path"], sheet) if row.get("path") else "",
        patient_id=row["patient_id"],
        mpp=mpp if isinstance(mpp, float) else None,
        exclude=row.get("exclude") is True,
        tissue_geojson=resolve(outline, sheet) if outline else None,
        features=resolve(row["features"], sheet) if row.get("features") else "",
        sha256=(row.get("sha256") or "").lower(),
        labels=labels,
        row=number,
        **texts,
    )


def _message(name: str, problems: list[Problem]) -> str:
    unique = sorted(set(problems), key=lambda problem: (problem.row == 0, problem.row))
    count = "a problem" if len(unique) == 1 else f"{len(unique)} problems"
    lines = [f"{name} {problem}" if problem.row else f"{name}: {problem}" for problem in unique[:MAX_SHOWN]]
    if len(unique) > MAX_SHOWN:
        lines.append(f"... and {len(unique) - MAX_SHOWN} more")
    return "\n  ".join([f"The sample sheet has {count}:", *lines])


def sheet_records(path: str | Path) -> list[dict[str, str]]:
    """The sheet's cells as text, row by row, with patient_id filled in: what cohort/slides.csv starts from.

    Every spelling of a missing value is "" here, as in `read_sheet`.
    """
    table: Table = read_table(path)
    records = []
    for _, cells in table.rows:
        record = {
            "slide_id": cells["slide_id"],
            "path": cells.get("path", ""),
            "patient_id": cells.get("patient_id", ""),
        }
        record["patient_id"] = record["patient_id"] or record["slide_id"]
        records.append({**record, **{key: value for key, value in cells.items() if key not in record}})
    return records


# -- tasks ---------------------------------------------------------------------------------------------------------


def task_counts(rows: Iterable[SlideRow], task: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to learn from, of rows that fit the task; excluded slides do not count.

    Returns {"classes": {class: patients}, "patients", "slides", "unlabelled": slides without a label}; classes of types
    that have some.
    """
    included = [row for row in rows if not row.exclude]
    labels = patient_labels(_cells(included, task), task)
    labelled = [row for row in included if row.patient_id in labels and any(_label_cells(row, task).values())]
    classes = sorted(Counter(labels.values()).items()) if task_type(task) in CLASSES else []
    return {
        "classes": dict(classes),
        "patients": len(labels),
        "slides": len(labelled),
        "unlabelled": len(included) - len(labelled),
    }


def describe_tasks(rows: list[SlideRow], tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task: how many patients have which class, and how many slides have no label."""
    lines = []
    for name, task in tasks.items():
        found = task_counts(rows, task)
        classes = ", ".join(f"{label} {count}" for label, count in list(found["classes"].items())[:20])
        more = ", ..." if len(found["classes"]) > 20 else ""
        of = f": {classes}{more}" if classes else ""
        without = f"; {found['unlabelled']} slides have no label" if found["unlabelled"] else ""
        lines.append(f"task {name}: {found['patients']} patients, {found['slides']} slides{of}{without}")
    return lines


def _label_cells(row: SlideRow, task: Mapping[str, Any]) -> dict[str, str]:
    return {column: row.labels.get(column, "") for column in label_columns(task)}


def _cells(rows: Iterable[SlideRow], task: Mapping[str, Any]) -> list[Cells]:
    """Rows as `label_checks` wants them."""
    return [(row.row, row.patient_id, _label_cells(row, task)) for row in rows]


def patients_per_class(rows: Iterable[SlideRow], label: str) -> Counter[str]:
    """Number of patients in each class, over slides that are labelled and not excluded."""
    classes = {row.patient_id: row.labels[label] for row in rows if not row.exclude and row.labels.get(label)}
    return Counter(classes.values())


def task_problems(rows: list[SlideRow], task: Mapping[str, Any], name: str) -> list[Problem]:
    """All that stands between these rows and this task."""
    columns, included = label_columns(task), [row for row in rows if not row.exclude]
    if not included:
        return [Problem(0, "", f"{name}: every slide is excluded")] if rows else []
    missing = [column for column in columns if column not in included[0].labels]
    if missing:
        return [Problem(0, "", f"{name}: {_no_column(column, included[0])}") for column in missing]
    labelled = [row for row in included if any(_label_cells(row, task).values())]
    if not labelled:
        what = "each slide's class" if task_type(task) in CLASSES else "each patient's value"
        return [Problem(0, "", f"{name}: column {columns[0]} is empty; write {what} into it")]
    if task_type(task) in CLASSES:
        label = task["label"]
        problems = list(disagreements(_pairs(labelled, {label: lambda row: row.labels[label]}), label))
        problems += spelling_problems(((row.row, row.labels[label]) for row in labelled if row.labels[label]), label)
        texts = [*_class_problems(labelled, task), *_fold_problems(labelled, task)]
    else:
        cells = _cells(labelled, task)
        problems = list(cell_problems(cells, task))
        texts = list(cohort_problems(patient_labels(cells, task), task))
    problems += [Problem(0, "", f"{name}: {text}") for text in texts]
    return problems + _split_problems(included, task, name)


def _no_column(column: str, row: SlideRow) -> str:
    others = [name for name in row.labels if name not in KNOWN]
    near = nearest(column, others)
    known = (
        f"did you mean {near}?" if near else f"the columns that are not slidemake's own: {', '.join(others) or 'none'}"
    )
    return f"there is no column {column}; {known}"


def _pairs(rows: list[SlideRow], values: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Rows as `disagreements` wants them, with the given values."""
    return [(row.row, {"patient_id": row.patient_id, **{k: get(row) for k, get in values.items()}}) for row in rows]


def _class_problems(labelled: list[SlideRow], task: Mapping[str, Any]) -> Iterator[str]:
    label, counts = task["label"], patients_per_class(labelled, task["label"])
    classes = sorted(counts)
    shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    same = list(number_problems(classes, label))
    yield from same
    unsure = list(_doubtful_classes(counts, task))
    yield from unsure
    yield from _unnamed_classes(classes, task)
    if len(classes) == 1:
        yield f"column {label} has one class only ({shown}); a model needs slides of at least two"
    elif task.get("type", "binary") == "binary" and len(classes) > 2 and not same and not unsure:
        number = len(classes) > 20 and all(is_number(one) for one in classes)
        remedy = "it looks like a measurement, not a class: set type: regression" if number else "set type: multiclass"
        shown = ", ".join(f"{name} {counts[name]}" for name in classes[:8]) + (", ..." if len(classes) > 8 else "")
        yield f"column {label} has {len(classes)} classes ({shown} patients), and a binary task has two; {remedy}"
    if task_type(task) == "ordinal" and len(classes) > 1:
        yield from order_problems(classes, task)
    positive = task.get("positive")
    if positive is not None and positive not in classes:
        near = nearest(positive, classes)
        meant = f"did you mean {near}?" if near else f"its classes: {shown}"
        yield f"no slide has the positive class {positive} in column {label}; {meant}"


def _doubtful_classes(counts: Counter[str], task: Mapping[str, Any]) -> Iterator[str]:
    """Is `Unknown` a class? Only who made the table knows: asked, unless the configuration names all classes."""
    named = {str(name) for name in [*(task.get("classes") or ()), *(task.get("order") or ())]}
    found = {name: count for name, count in doubtful_names(counts).items() if name not in named}
    for name, count in found.items():
        key, rest = ("order", "grades") if task_type(task) == "ordinal" else ("classes", "classes")
        listed = ", ".join(f"{one} {number}" for one, number in sorted(counts.items())[:8])
        yield (
            f"column {task['label']} has {count} of {name} (patients: {listed}): is that a value, or none? If none, "
            f"leave those cells empty; if it is one, name all {rest} in {key}"
        )


def _unnamed_classes(classes: list[str], task: Mapping[str, Any]) -> Iterator[str]:
    """Names that `classes` does not have, and names of `classes` that no slide has."""
    named = [str(name) for name in task.get("classes") or ()]
    if not named:
        return
    for name in sorted(set(classes) - set(named)):
        near = nearest(name, named)
        meant = f"did you mean {near}?" if near else f"classes has {', '.join(named)}"
        yield f"class {name} of column {task['label']} is not in classes; {meant}"
    for name in sorted(set(named) - set(classes)):
        yield f"classes names {name}, and no slide has it in column {task['label']}; remove it"


def _fold_problems(labelled: list[SlideRow], task: Mapping[str, Any]) -> Iterator[str]:
    splits = task.get("splits", {})
    counts, folds = patients_per_class(labelled, task["label"]), splits.get("folds", 5)
    if splits.get("method", "kfold") == "kfold" and len(counts) > 1:
        few = {name: count for name, count in sorted(counts.items()) if count < folds}
        listed = ", ".join(f"{name} {count}" for name, count in list(few.items())[:8])
        if few:
            least = min(few.values())
            remedy = f"set folds: {least}" if least >= 2 else "add patients, or merge classes"
            yield f"{folds} folds need {folds} patients of each class, and there are {listed}; {remedy}"


def _split_problems(included: list[SlideRow], task: Mapping[str, Any], name: str) -> list[Problem]:
    """Given folds, cohorts, dates, sites: each labelled patient has one, there are at least two, none is in two."""
    method, column = task.get("splits", {}).get("method", "kfold"), split_column(task.get("splits", {}))
    if column is None:
        return []
    first = included[0]
    if column not in first.labels and column not in KNOWN:
        return [Problem(0, "", f"{name}: {_no_column(column, first)} (splits of method {method} need it)")]
    patients = {row.patient_id for row in included if any(_label_cells(row, task).values())}
    of_labelled = [row for row in included if row.patient_id in patients]
    rows = _pairs(of_labelled, {column: lambda row: row.labels.get(column) or getattr(row, column, "")})
    values = {row[column] for _, row in rows if row[column]}
    if not values:
        return [Problem(0, "", f"{name}: splits of method {method} need column {column}, which is missing or empty")]
    known = {row["patient_id"] for _, row in rows if row[column]}
    empty = [number for number, row in rows if row["patient_id"] not in known]
    problems = [Problem(number, column, f"is empty, and {name} splits by it") for number in empty]
    if len(values) == 1:
        problems.append(Problem(0, "", f"{name}: column {column} has one value only ({values.pop()}); two are needed"))
    if method == "temporal":
        return problems  # slides of one patient may be of different days
    problems += [
        Problem(problem.row, column, f"{problem.text}; a patient in two folds would be trained and tested on")
        for problem in disagreements(rows, column)
    ]
    return problems
