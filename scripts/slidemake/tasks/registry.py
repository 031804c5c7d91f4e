"""Which types of task there are: a task, a bundle or a table of predictions becomes its outcome.

A type of task is a class in a file of its own, registered under its name (`base.task_type`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slidemake.core.failures import RunError
from slidemake.tasks import classes, multilabel, ordinal, regression, survival
from slidemake.tasks.base import TYPES, Outcome
from slidemake.tasks.labels import task_type

FILES = (classes, ordinal, multilabel, regression, survival)  # each registers its types when it is imported


def type_named(kind: str) -> type[Outcome]:
    """The type of task of this name."""
    if kind not in TYPES:
        raise RunError(f"There is no type of task {kind!r}; one of {', '.join(TYPES)}.")
    return TYPES[kind]


def make_outcome(task: Mapping[str, Any], labels: Mapping[str, str]) -> Outcome:
    """The outcome of a task for a cohort's labels (patient -> text)."""
    return type_named(task_type(task)).make(task, labels)


def load_outcome(info: Mapping[str, Any]) -> Outcome:
    """The outcome that a bundle was trained for, from its bundle.json."""
    about = info.get("target") or {"type": "binary", "classes": info["classes"]}
    return type_named(about["type"]).load(about)


def outcome_of_columns(kind: str, columns: Sequence[str]) -> Outcome:
    """The outcome of a table of predictions of a task of this type."""
    return type_named(kind).of_columns(columns)
