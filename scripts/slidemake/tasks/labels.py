"""What a task predicts, from the cells of the sheet to the label of a patient.

A label travels as text, in splits.csv and in the tables of predictions, so that every stage and every reader of a file
sees the same:

binary, multiclass, ordinal   the class
regression                    the number
survival                      time to the event; a `+` behind it where the patient was censored then, as in `31.5+`
multilabel                    every label with 1, 0 or ? (not known), as in `er=1;pr=0;her2=?`

What happens with labels in training and prediction is told by an outcome (`outcomes.py`), one for each type. No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slidemake.core.failures import RunError

CLASSES = ("binary", "multiclass", "ordinal")  # types whose label is the name of a class
QUANTILES = 4  # bins of a number, for folds
TIMES = 3  # bins of times, of events and of censored patients apart
_YES, _NO = ("1", "1.0", "yes", "true", "positive", "pos"), ("0", "0.0", "no", "false", "negative", "neg")


class LabelError(ValueError):
    """A cell that is no label: what is wrong with it and what to write instead."""


def task_type(task: Mapping[str, Any]) -> str:
    return str(task.get("type") or "binary")


def label_columns(task: Mapping[str, Any]) -> list[str]:
    """Columns of the sheet that hold a task's label."""
    if task_type(task) == "multilabel":
        return list(task["labels"])
    if task_type(task) == "survival":
        return [f"{task['label']}_time", f"{task['label']}_event"]
    return [task["label"]]


def label_task(bundle: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The task that `bundle_label: label` describes for this bundle, as the sheet's labels are read.

    label: a column of the sheet; for survival what `<label>_time` and `<label>_event` begin with, as in a task; for a
    bundle of several labels the word `labels`, because the columns have the names of the bundle's labels.
    """
    target = bundle.get("target") or {}
    kind = target.get("type") or "binary"
    if kind != "multilabel":
        return {"type": kind, "label": label}
    if label != "labels":
        raise RunError(
            f"bundle_label: this bundle tells several labels ({', '.join(target['labels'])}). Write `bundle_label: "
            "labels`; the sheet's columns have those names."
        )
    return {"type": kind, "labels": target["labels"]}


def about_label(task: Mapping[str, Any]) -> str:
    """The label in words, for messages."""
    return " and ".join(label_columns(task)) if task_type(task) == "survival" else ", ".join(label_columns(task))


def canonical(task: Mapping[str, Any], column: str, cell: Any) -> str:
    """One spelling of a cell's value, "" for an empty one; LabelError where it cannot be a label of this task."""
    text = str(cell or "").strip()
    if not text or task_type(task) in CLASSES:
        return text
    if task_type(task) == "regression":
        return _number(text)
    if task_type(task) == "survival" and column.endswith("_time"):
        if float(time := _number(text)) < 0:
            raise LabelError(f'"{text}" is before the start; a time is 0 or more, counted from the start of follow-up')
        return time
    word = text.lower()
    if word in _YES or word in _NO:
        return "1" if word in _YES else "0"
    meaning = (
        "1 where the event was seen, 0 for censored" if task_type(task) == "survival" else "1, 0 or leave it empty"
    )
    raise LabelError(f'"{text}" is neither yes nor no; write {meaning}')


def _number(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        near = text.replace(",", ".")
        better = f"; write {near}" if is_number(near) else "; write a number, or leave it empty"
        raise LabelError(f'"{text}" is not a number{better}') from None
    if not math.isfinite(value):
        raise LabelError(f'"{text}" is not a finite number; leave it empty')
    return format(value, ".12g")


def is_number(text: str) -> bool:
    """Whether a cell holds a number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def join_cells(task: Mapping[str, Any], cells: Mapping[str, str]) -> str:
    """The label of a patient from its canonical cells, "" when there is none (or not all of it)."""
    values = [cells.get(column, "") for column in label_columns(task)]
    if task_type(task) == "survival":
        time, event = values
        return "" if not time or not event else time + ("" if event == "1" else "+")
    if task_type(task) == "multilabel":
        pairs = zip(label_columns(task), values, strict=True)
        return ";".join(f"{name}={value or '?'}" for name, value in pairs) if any(values) else ""
    return values[0]


def why_missing(task: Mapping[str, Any], cells: Mapping[str, str]) -> str:
    """Why a patient with these canonical cells has no label."""
    empty = [column for column in label_columns(task) if not cells.get(column)]
    return f"no {' and no '.join(empty)}"


def parse_survival(text: str) -> tuple[float, bool]:
    """(time, whether the event was seen) of a label such as `31.5` or `31.5+`."""
    return float(text.removesuffix("+")), not text.endswith("+")


def parse_multilabel(text: str) -> dict[str, int]:
    """{label: 1, 0 or -1 (not known)} of a label such as `er=1;pr=?`."""
    pairs = (part.rpartition("=") for part in text.split(";"))
    return {name: -1 if value == "?" else int(value) for name, _, value in pairs}


def class_names(labels: Iterable[str], task: Mapping[str, Any]) -> list[str]:
    """Classes in their order: as the task gives it, numbers by value for grades, else alphabetically."""
    present = sorted(set(labels))
    if task_type(task) == "ordinal":
        order = [str(name) for name in task.get("order") or ()]
        if not order and all(is_number(name) for name in present):
            return sorted(present, key=float)
        return [*order, *(name for name in present if name not in order)]
    return present


# -- strata ------------------------------------------------------------------------------------------------------


def strata(labels: Mapping[str, str], kind: str) -> dict[str, str]:
    """The stratum of every patient, by which folds are balanced and labels shuffled.

    labels: patient -> label (text); kind: the type of the task. Classes are their own strata, and so are combinations
    of several labels; numbers fall into quartiles; survival into event or censored, each by thirds of its times.
    """
    if kind == "regression":
        quarters = quantile_strata(np.array([float(text) for text in labels.values()]))
        return dict(zip(labels, [f"quarter {i + 1}" for i in quarters], strict=True))
    if kind == "survival":
        found = survival_strata(*survival_arrays(list(labels.values())))
        names = [f"{('event', 'censored')[i // TIMES]}, third {i % TIMES + 1}" for i in found]
        return dict(zip(labels, names, strict=True))
    return dict(labels)


def quantile_strata(values: np.ndarray, bins: int = QUANTILES) -> np.ndarray:
    """(n,) int: the quantile of the values (n,) that each falls into."""
    if not len(values):
        return np.zeros(0, int)
    return np.searchsorted(np.quantile(values, np.arange(1, bins) / bins), values, side="left")


def survival_strata(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """(n,) int: the third of the times (n,) of events, and after these that of the times of censored patients."""
    found = np.zeros(len(time), int)
    for first, members in ((0, event), (TIMES, ~event)):
        found[members] = first + quantile_strata(time[members], TIMES)
    return found


# -- can it be learned? -------------------------------------------------------------------------------------------


def why_untrainable(labels: Sequence[str], kind: str) -> str | None:
    """Why no model can be trained on patients with these labels; None when one can."""
    if not labels:
        return "there is no patient at all"
    if kind == "survival":
        events = sum(parse_survival(text)[1] for text in labels)
        if not events:
            return f"all {len(labels)} patients are censored: without an event there is nothing to learn from"
        return None if len(set(labels)) > 1 else f"all {len(labels)} patients have the same time"
    if kind == "multilabel":
        parsed = [parse_multilabel(text) for text in labels]
        both = [name for name in parsed[0] if {0, 1} <= {label[name] for label in parsed}]
        return None if both else "no label has patients of both values"
    found = sorted(set(labels))
    if len(found) > 1:
        return None
    what = "value" if kind == "regression" else "class"
    return f"all {len(labels)} patients have the same {what}, {found[0]}"


def summary(labels: Mapping[str, str], kind: str) -> dict[str, Any]:
    """What the cohort's labels are like: classes, spread, events and follow-up, known labels."""
    texts = list(labels.values())
    found: dict[str, Any] = {"type": kind, "patients": len(texts)}
    if kind == "regression":
        values = np.array([float(text) for text in texts])
        found |= {"mean": float(values.mean()), "sd": float(values.std()), "low": float(values.min())}
        return found | {"median": float(np.median(values)), "high": float(values.max())}
    if kind == "survival":
        from slidemake.statistics.survival import median_follow_up

        time, event = survival_arrays(texts)
        found |= {"events": int(event.sum()), "censored": int((~event).sum()), "ties": int(len(time) - len(set(time)))}
        return found | {"median_follow_up": median_follow_up(time, event), "longest": float(time.max())}
    if kind == "multilabel":
        parsed = [parse_multilabel(text) for text in texts]
        counts = {name: Counter(label[name] for label in parsed) for name in parsed[0]}
        return found | {"labels": {n: {"yes": c[1], "no": c[0], "not known": c[-1]} for n, c in counts.items()}}
    return found | {"classes": dict(sorted(Counter(texts).items()))}


def survival_arrays(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Times (n,) float and events (n,) bool of survival labels."""
    parsed = [parse_survival(text) for text in texts]
    return np.array([t for t, _ in parsed], float), np.array([e for _, e in parsed], bool)
