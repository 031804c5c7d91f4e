"""Several labels that are each yes or no, or not known (`multilabel`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy

from slidemake.statistics import class_metrics
from slidemake.statistics.temperature import auroc, fit_intercepts, fit_temperature, youden_threshold
from slidemake.tasks.base import Figures, Options, Outcome, Predictions, Threshold, as_written, number, task_type
from slidemake.tasks.class_predictions import ClassPredictions, without_prevalence
from slidemake.tasks.classes import FURTHER, TITLES, named
from slidemake.tasks.labels import parse_multilabel

LABEL_METRICS = (
    *("auroc", "auprc", "balanced_accuracy", "f1", "sensitivity", "specificity"),
    *("sensitivity_at_specificity", "brier"),
)


def _two(logit: np.ndarray) -> np.ndarray:
    """(n, 2) logits of no and yes, from that of yes (n,)."""
    return np.stack([np.zeros_like(logit), logit], axis=1)


@task_type("multilabel")
class MultilabelOutcome(Outcome):
    """Several yes/no labels, one logit each; a label that is not known counts neither in the loss nor in a metric."""

    kind, form, primary = "multilabel", "labels", "auroc"
    few, lower_is_better = "of the rarest label's rarer value", ("brier",)
    titles: ClassVar[dict[str, str]] = {key: TITLES[key] for key in LABEL_METRICS}
    further = FURTHER
    called: ClassVar[dict[str, str]] = {"auroc": "macro AUROC"}

    def __init__(self, labels: Sequence[str]):
        self.labels = self.names = tuple(labels)
        self.outputs = len(self.labels)

    @classmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> MultilabelOutcome:
        return MultilabelOutcome(task["labels"])

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> MultilabelOutcome:
        return MultilabelOutcome(about["labels"])

    @classmethod
    def of_columns(cls, columns: Sequence[str]) -> MultilabelOutcome:
        return MultilabelOutcome(named(columns, "prob_"))

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "labels": list(self.labels)}

    def encode(self, label: str) -> np.ndarray:
        parsed = parse_multilabel(label)
        return np.array([parsed[name] for name in self.labels])

    def _known(self, labels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        truth = np.asarray(labels, int).reshape(-1, self.outputs)
        return truth, truth >= 0

    def loss(self, outputs: np.ndarray, labels: Sequence[np.ndarray], scale: Mapping[str, Any]) -> float:
        truth, known = self._known(labels)
        losses = -scipy.special.log_expit(np.where(truth == 1, outputs, -outputs))
        return float(losses[known].mean()) if known.any() else 0.0

    def score_of(self, outputs: np.ndarray, labels: Sequence[np.ndarray]) -> float | None:
        truth, known = self._known(labels)
        areas = [auroc(outputs[known[:, k], k], truth[known[:, k], k] == 1) for k in range(self.outputs)]
        found = [area for area in areas if area is not None]
        return float(np.mean(found)) if found else None

    def _shifted(self, outputs: np.ndarray, labels: Sequence[np.ndarray]) -> np.ndarray:
        truth, known = self._known(labels)
        shifted = np.array(outputs, float)
        for k in range(self.outputs):
            if known[:, k].any():
                two = _two(outputs[known[:, k], k])
                shifted[:, k] += np.diff(fit_intercepts(two, truth[known[:, k], k]))[0]
        return shifted

    def link(self, outputs: np.ndarray, labels: Sequence[np.ndarray], scale: Mapping[str, Any]) -> dict[str, Any]:
        truth, known = self._known(labels)
        found = [fit_temperature(_two(outputs[at, k]), truth[at, k]) for k, at in enumerate(known.T)]
        return {"temperature": [t for t, _ in found], "intercept": [float(b[1] - b[0]) for _, b in found]}

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        scaled = np.asarray(outputs, float) / np.asarray(link["temperature"], float)
        return scipy.special.expit(scaled + np.asarray(link.get("intercept", 0.0), float))

    def threshold(self, values: np.ndarray, labels: Sequence[np.ndarray]) -> Threshold:
        truth, known = self._known(labels)
        return [youden_threshold(values[known[:, k], k], truth[known[:, k], k] == 1) for k in range(self.outputs)]

    def columns(self) -> list[str]:
        return [f"{kind}_{name}" for kind in ("prob", "logit", "threshold", "predicted") for name in self.labels]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        limits = [as_written(t) for t in np.atleast_1d(np.asarray(threshold, float))]
        row: dict[str, str] = {}
        for name, raw, value, limit in zip(self.labels, outputs, values, limits, strict=True):
            row |= {f"prob_{name}": number(value), f"logit_{name}": number(raw), f"threshold_{name}": number(limit)}
            row[f"predicted_{name}"] = str(int(as_written(value) >= limit))
        return row

    def headline(self, values: np.ndarray) -> float:
        return float(values[0])

    # -- tables of predictions and evaluation: every label by itself on the patients of whom it is known, and the mean
    # over labels (macro) -------------------------------------------------------------------------------------------

    def value_columns(self) -> list[str]:
        return [f"prob_{name}" for name in self.labels]

    def logit_columns(self) -> list[str]:
        return [f"logit_{name}" for name in self.labels]

    def decision_columns(self) -> list[str]:
        return [f"predicted_{name}" for name in self.labels]

    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        weights = np.ones((1, len(chosen))) if weights is None else weights
        by_label: dict[str, Figures] = {}
        for k, name in enumerate(self.labels):
            known = table.truth[chosen, k] >= 0
            inside = chosen[known]
            truth, prob = table.truth[inside, k].astype(int), table.values[repeat, inside, k]
            decided = table.decisions[repeat, inside, k].astype(int)
            two, ranks = (np.stack([1 - p, p], axis=1) for p in (prob, table.ranks[repeat, inside, k]))
            by_label[name] = class_metrics.metrics_over(
                truth, two, decided, weights=weights[:, known], specificity=options["specificity"], ranks=ranks
            )
        found: Figures = {}
        for metric in LABEL_METRICS:
            each = [by_label[name][metric] for name in self._both(table.truth[chosen])]
            found[metric] = np.mean(each, axis=0) if each else np.full(len(weights), np.nan)
        for name, figures in by_label.items():
            found |= {f"{metric}:{name}": figures[metric] for metric in LABEL_METRICS}
        return found

    def _both(self, truth: np.ndarray) -> list[str]:
        """Labels with patients of both values."""
        columns = zip(self.labels, truth.T, strict=True)
        return [name for name, column in columns if {0.0, 1.0} <= set(column.tolist())]

    def proper_loss(self, values: np.ndarray, truth: np.ndarray) -> float:
        known = truth >= 0
        return class_metrics.log_loss(np.where(truth == 1, values, 1 - values)[known]) if known.any() else np.nan

    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        metric, _, name = metric.partition(":")
        if not name:
            return "no label has patients of both values"
        column = table.truth[chosen, self.labels.index(name)]
        known = column[column >= 0].astype(int)
        if not len(known):
            return f"{name} is known of no patient"
        return class_metrics.why_undefined(metric, known, [f"{name} 0", f"{name} 1"])

    def ranks(self, table: Predictions) -> np.ndarray:
        found = table.values.copy()
        for k, truth in enumerate(table.truth.astype(int).T):
            told = truth >= 0
            two = np.stack([1 - found[:, told, k], found[:, told, k]], axis=-1)
            found[:, told, k] = without_prevalence(two, truth[told], table.fold[:, told])[..., 1]
        return found

    def labels_by_site(self, truth: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.labels, truth.astype(int).T, strict=True))

    def counts(self, truth: np.ndarray) -> dict[str, int]:
        columns = zip(self.labels, truth.T, strict=True)
        return {f"{name} of {int((c >= 0).sum())} known": int((c == 1).sum()) for name, c in columns}

    def rare(self, truth: np.ndarray) -> int:
        return min(int(min((c == 1).sum(), (c == 0).sum())) for c in truth.T)

    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = np.array([(c == 1).sum() / max(1, (c >= 0).sum()) for c in truth.T])
        return share, (share >= 0.5).astype(float)

    def as_classes(self, table: Predictions) -> dict[str, tuple[np.ndarray, ClassPredictions]]:
        told = {name: np.flatnonzero(table.truth[:, k] >= 0) for k, name in enumerate(self.labels)}
        views = {name: (known, self._label(table, k, known)) for k, (name, known) in enumerate(told.items())}
        return {name: (known, view) for name, (known, view) in views.items() if len(known)}

    def _label(self, table: Predictions, label: int, known: np.ndarray) -> ClassPredictions:
        """One label as two classes, of the patients of whom it is known."""

        def two(values: np.ndarray) -> np.ndarray:
            return np.stack([1 - values, values], axis=-1)

        validation = None
        if table.validation is not None:
            validation = {}
            for at, (values, truth) in table.validation.items():
                told = truth[:, label] >= 0
                validation[at] = (two(values[told, label]), truth[told, label].astype(int))
        logits = None
        if table.raw is not None:
            logits = np.stack([np.zeros_like(table.raw[:, known, label]), table.raw[:, known, label]], axis=-1)
        return ClassPredictions(
            name=table.name,
            classes=(f"no {self.labels[label]}", self.labels[label]),
            patients=tuple(table.patients[i] for i in known),
            sites=tuple(table.sites[i] for i in known),
            labels=table.truth[known, label].astype(int),
            repeats=table.repeats,
            prob=two(table.values[:, known, label]),
            predicted=np.nan_to_num(table.decisions[:, known, label], nan=-1).astype(int),
            fold=table.fold[:, known],
            logits=logits,
            validation=validation,
        )
