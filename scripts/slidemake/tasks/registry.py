"""Which types of task there are: a task, or what a bundle says of it, becomes its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slidemake.core.failures import RunError
from slidemake.tasks.labels import class_names, task_type
from slidemake.tasks.outcomes import ClassOutcome, MultilabelOutcome, OrdinalOutcome, Outcome, RegressionOutcome


def class_order(labels: Mapping[str, str], positive: str | None = None) -> tuple[str, ...]:
    """Class names sorted; with two classes `positive` (default: the last) comes second."""
    classes = sorted(set(labels.values()))
    if positive is not None:
        if str(positive) not in classes:
            raise RunError(f"The positive class {positive!r} is not among the labels: {', '.join(classes)}.")
        classes.sort(key=lambda name: name == str(positive))
    return tuple(classes)


def make_outcome(task: Mapping[str, Any], labels: Mapping[str, str]) -> Outcome:
    """The outcome of a task for a cohort's labels (patient -> text)."""
    kind = task_type(task)
    if kind == "ordinal":
        return OrdinalOutcome(class_names(labels.values(), task))
    if kind == "multilabel":
        return MultilabelOutcome(task["labels"])
    if kind == "regression":
        return RegressionOutcome(str(task.get("unit") or ""))
    if kind == "survival":
        from slidemake.tasks.survival_outcome import make_survival

        return make_survival(task, labels)
    return ClassOutcome(class_order(labels, task.get("positive")))


def load_outcome(info: Mapping[str, Any]) -> Outcome:
    """The outcome that a bundle was trained for, from its bundle.json."""
    about = info.get("target") or {"type": "classes", "classes": info["classes"]}
    kind = about["type"]
    if kind == "ordinal":
        return OrdinalOutcome(about["classes"])
    if kind == "multilabel":
        return MultilabelOutcome(about["labels"])
    if kind == "regression":
        return RegressionOutcome(about["unit"])
    if kind == "survival":
        from slidemake.tasks.survival_outcome import load_survival

        return load_survival(about)
    return ClassOutcome(about["classes"])
