"""Labels of every type: from cells to text, strata, and what the sheet's checks say about them."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from slidemake.cohort.sheet import read_sheet
from slidemake.core.failures import RunError
from slidemake.splits.make import make_splits, permuted_control
from slidemake.tasks.labels import (
    LabelError,
    canonical,
    class_names,
    join_cells,
    parse_multilabel,
    parse_survival,
    strata,
    summary,
    why_untrainable,
)
from slidemake.tasks.registry import load_outcome

SURVIVAL = {"type": "survival", "label": "os"}
SEVERAL = {"type": "multilabel", "labels": ["er", "pr"]}
NUMBER = {"type": "regression", "label": "age"}
GRADES = {"type": "ordinal", "label": "grade", "order": ["low", "high"]}


def test_cells_become_labels():
    assert join_cells(SURVIVAL, {"os_time": canonical(SURVIVAL, "os_time", "31.50"), "os_event": "0"}) == "31.5+"
    assert join_cells(SURVIVAL, {"os_time": "31.5", "os_event": canonical(SURVIVAL, "os_event", "Yes")}) == "31.5"
    assert join_cells(SURVIVAL, {"os_time": "31.5", "os_event": ""}) == ""
    assert (parse_survival("31.5+"), parse_survival("2")) == ((31.5, False), (2.0, True))
    assert join_cells(SEVERAL, {"er": "1", "pr": ""}) == "er=1;pr=?"
    assert join_cells(SEVERAL, {"er": "", "pr": ""}) == ""
    assert parse_multilabel("er=1;pr=?;a=b=0") == {"er": 1, "pr": -1, "a=b": 0}
    assert canonical(NUMBER, "age", " 1e2 ") == "100"
    assert canonical(GRADES, "grade", "low") == "low"


@pytest.mark.parametrize(
    ("task", "column", "cell", "text"),
    [
        (NUMBER, "age", "61,5", "write 61.5"),
        (NUMBER, "age", "inf", "not a finite number"),
        (NUMBER, "age", "old", "is not a number; write a number, or leave it empty"),
        (SURVIVAL, "os_time", "-3", "before the start"),
        (SURVIVAL, "os_event", "dead", "write 1 where the event was seen, 0 for censored"),
        (SEVERAL, "er", "2", "write 1, 0 or leave it empty"),
    ],
)
def test_cells_that_are_no_labels(task, column, cell, text):
    with pytest.raises(LabelError, match=text):
        canonical(task, column, cell)


def test_order_of_grades():
    assert class_names(["10", "2", "2"], {"type": "ordinal"}) == ["2", "10"]
    assert class_names(["high", "low"], GRADES) == ["low", "high"]
    assert class_names(["b", "a"], {"type": "multiclass"}) == ["a", "b"]


def test_strata():
    numbers = {f"P{i}": str(i) for i in range(12)}
    assert Counter(strata(numbers, "regression").values()) == {f"quarter {k}": 3 for k in (1, 2, 3, 4)}
    times = {f"P{i}": f"{i}{'+' if i % 2 else ''}" for i in range(12)}
    assert Counter(strata(times, "survival").values()) == {
        f"{kind}, third {k}": 2 for kind in ("event", "censored") for k in (1, 2, 3)
    }
    assert strata({"a": "x"}, "ordinal") == {"a": "x"}
    assert set(strata({f"P{i}": "7" for i in range(5)}, "regression").values()) == {"quarter 1"}


def test_what_cannot_be_learned():
    assert why_untrainable(["1+", "2+"], "survival").startswith("all 2 patients are censored")
    assert why_untrainable(["1", "1"], "survival") == "all 2 patients have the same time"
    assert why_untrainable(["1", "2+"], "survival") is None
    assert why_untrainable(["4", "4"], "regression") == "all 2 patients have the same value, 4"
    assert why_untrainable(["er=1;pr=?", "er=1;pr=0"], "multilabel") == "no label has patients of both values"
    assert why_untrainable(["er=1;pr=?", "er=0;pr=0"], "multilabel") is None
    assert why_untrainable([], "regression") == "there is no patient at all"


def test_summary():
    found = summary({"a": "1", "b": "2+", "c": "2"}, "survival")
    assert (found["events"], found["censored"], found["ties"], found["longest"]) == (2, 1, 1, 2.0)
    known = summary({"a": "er=1;pr=?", "b": "er=0;pr=0"}, "multilabel")["labels"]
    assert known == {"er": {"yes": 1, "no": 1, "not known": 0}, "pr": {"yes": 0, "no": 1, "not known": 1}}
    assert summary({"a": "1", "b": "3"}, "regression")["mean"] == 2


def rows(n=20):
    return [
        {"slide_id": f"S{i}", "patient_id": f"P{i:02d}", "site": f"s{i % 2}", "os_time": str(1 + i), "os_event": "1"}
        for i in range(n)
    ]


def test_patients_without_time_or_event_are_left_out_and_named():
    table = rows()
    table[3]["os_time"] = ""
    table[5]["os_event"] = ""
    for row in table[10:]:
        row["os_event"] = "0"
    splits = make_splits(table, SURVIVAL, {"folds": 5})
    assert {x["patient_id"]: x["reason"] for x in splits.report["left_out"]} == {
        "P03": "no os_time",
        "P05": "no os_event",
    }
    assert splits.report["outcome"]["events"] == 8
    for fold in splits.tested(0):  # events and times are spread: no fold is without one
        assert 1 <= sum(parse_survival(splits.labels[p])[1] for p in splits.parts(0, fold)[2]) <= 2


def test_shuffled_survival_keeps_the_labels_and_says_nothing_of_the_truth():
    splits = make_splits(rows(60), SURVIVAL, {"folds": 3})
    control = permuted_control(splits, 0, "survival")
    assert Counter(control.labels.values()) == Counter(splits.labels.values())
    pairs = np.array([[float(splits.labels[p]), float(control.labels[p])] for p in splits.labels])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.3


def sheet(tmp_path, table):
    path = tmp_path / "slides.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def cells(n=12, **columns):
    return [
        {"slide_id": f"S{i}", "path": f"S{i}.svs", "patient_id": f"P{i}", **{k: v(i) for k, v in columns.items()}}
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("task", "columns", "texts"),
    [
        (
            NUMBER,
            {"age": lambda i: "61,5" if i == 2 else str(i)},
            ['row 4, column age: "61,5" is not a number; write 61.5'],
        ),
        (NUMBER, {"age": lambda i: "7"}, ["all 12 patients have the same value, 7"]),
        (
            SURVIVAL,
            {"os_time": lambda i: str(i), "os_event": lambda i: "0"},
            ["columns os_time and os_event: all 12 patients are censored"],
        ),
        (SURVIVAL, {"os_time": lambda i: str(i)}, ["there is no column os_event"]),
        (
            SURVIVAL,
            {"os_time": lambda i: str(i), "os_event": lambda i: str(int(i == 4))},
            ["1 patient has an event"],
        ),
        (
            SEVERAL,
            {"er": lambda i: str(i % 2), "pr": lambda i: "1"},
            ["column pr has one value only (1); leave it out"],
        ),
        (
            GRADES,
            {"grade": lambda i: ["low", "high", "hihg"][i % 3]},
            ["grade hihg of column grade is not in order; did you mean high?"],
        ),
        (
            {"type": "ordinal", "label": "grade"},
            {"grade": lambda i: ["low", "high"][i % 2]},
            ["have no order of their own"],
        ),
    ],
)
def test_sheet_says_what_is_wrong_before_a_slide_is_opened(tmp_path, task, columns, texts):
    path = sheet(tmp_path, cells(**columns))
    with pytest.raises(RunError) as error:
        read_sheet(path, tasks={"t": {**task, "splits": {"method": "kfold", "folds": 3}}})
    for text in texts:
        assert text in str(error.value)


def test_three_patients_cannot_be_dealt_to_five_folds(tmp_path):
    path = sheet(tmp_path, cells(3, age=str))
    with pytest.raises(RunError, match="5 folds need 5 patients with a label, and there are 3; set folds: 3"):
        read_sheet(path, tasks={"t": {**NUMBER, "splits": {"method": "kfold", "folds": 5}}})
    assert len(read_sheet(path, tasks={"t": {**NUMBER, "splits": {"method": "kfold", "folds": 3}}})) == 3


def test_slides_of_a_patient_that_disagree(tmp_path):
    table = cells(12, age=lambda i: str(i // 2))
    for i, row in enumerate(table):
        row["patient_id"] = f"P{i // 2}"
    table[5]["age"] = "2.0"  # the same number
    tasks = {"t": {**NUMBER, "splits": {"method": "kfold", "folds": 3}}}
    assert read_sheet(sheet(tmp_path, table), tasks=tasks)
    table[5]["age"] = "9"
    with pytest.raises(RunError, match='row 7, column age: patient P2 has "9" here and "2" in row 6'):
        read_sheet(sheet(tmp_path, table), tasks=tasks)


def test_a_bundle_that_calls_its_type_classes_is_one_of_classes():
    about = {"type": "classes", "classes": ["n", "t"]}
    assert load_outcome({"target": about}).about() == load_outcome({"classes": ["n", "t"]}).about()
    assert load_outcome({"target": about}).kind == "binary"
