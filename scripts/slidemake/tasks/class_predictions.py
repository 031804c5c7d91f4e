"""Types whose label is the name of a class; and predictions of classes as such, without an order: what calibration,
conformal sets and abstention look at.

Classes are looked at so, grades without their order, and every label of several as two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidemake.statistics import class_metrics
from slidemake.statistics.temperature import fit_intercepts
from slidemake.tasks.base import Outcome, Predictions


@dataclass(frozen=True)
class ClassPredictions:
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


class OfClasses(Outcome):
    """What types share whose label is the name of a class, with an order or without."""

    form = "classes"

    def __init__(self, classes: Sequence[str]):
        self.classes = self.names = tuple(classes)

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "classes": list(self.classes)}

    def encode(self, label: str) -> int:
        return self.classes.index(label)

    def _shifted(self, outputs: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        return outputs + fit_intercepts(outputs, np.asarray(labels, int))

    def value_columns(self) -> list[str]:
        return [f"prob_{name}" for name in self.classes]

    def ranks(self, table: Predictions) -> np.ndarray:
        return without_prevalence(table.values, table.truth[:, 0].astype(int), table.fold)

    def proper_loss(self, values: np.ndarray, truth: np.ndarray) -> float:
        return class_metrics.log_loss(values[np.arange(len(values)), truth[:, 0].astype(int)])

    def strata(self, truth: np.ndarray) -> np.ndarray:
        return truth[:, 0].astype(int)

    def _class_counts(self, truth: np.ndarray) -> np.ndarray:
        return np.bincount(truth[:, 0].astype(int), minlength=len(self.classes))

    def counts(self, truth: np.ndarray) -> dict[str, int]:
        return dict(zip(self.classes, self._class_counts(truth).tolist(), strict=True))

    def rare(self, truth: np.ndarray) -> int:
        return int(self._class_counts(truth).min())

    def as_classes(self, table: Predictions) -> dict[str, tuple[np.ndarray, ClassPredictions]]:
        validation = None
        if table.validation is not None:
            validation = {at: (values, truth[:, 0].astype(int)) for at, (values, truth) in table.validation.items()}
        decided = np.nan_to_num(table.decisions[..., 0], nan=-1).astype(int)
        labels = table.truth[:, 0].astype(int)
        about = (table.name, self.classes, table.patients, table.sites, labels, table.repeats)
        found = ClassPredictions(*about, table.values, decided, table.fold, self.logits(table.raw), validation)
        return {"": (np.arange(len(table.patients)), found)}

    def logits(self, raw: np.ndarray | None) -> np.ndarray | None:
        """Logits of the classes, whose softmax are their probabilities, from those of a table."""
        return raw

    def extras(self, table: Predictions) -> dict[str, Any]:
        """Decisions (columns) against truth (rows), averaged over repeats."""
        total = np.zeros((len(self.classes),) * 2)
        for r in range(len(table.repeats)):
            known = table.known(r)
            truth, decided = table.truth[known, 0].astype(int), table.decisions[r, known, 0].astype(int)
            ones = np.ones((1, len(truth)))
            total += class_metrics.confusion(truth, decided, len(self.classes), ones)[0]
        return {"confusion": (total / len(table.repeats)).tolist()}
