"""Grades: classes in an order (`ordinal`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy

from slidemake.statistics import ordinal_metrics
from slidemake.statistics.survival_metrics import concordance
from slidemake.statistics.temperature import fit_intercepts, probabilities
from slidemake.tasks.base import (
    Figures,
    Options,
    Predictions,
    Threshold,
    as_written,
    best_temperature,
    number,
    task_type,
)
from slidemake.tasks.class_predictions import OfClasses
from slidemake.tasks.classes import named
from slidemake.tasks.labels import class_names


def stages(outputs: np.ndarray) -> np.ndarray:
    """Log-probabilities (..., K) from the K - 1 logits of h_k = P(y = k | y >= k): log h_k + sum_{j<k} log(1 - h_j)."""
    past = np.cumsum(scipy.special.log_expit(-outputs), axis=-1)
    first = np.concatenate([np.zeros_like(past[..., :1]), past], axis=-1)
    return first + np.concatenate([scipy.special.log_expit(outputs), np.zeros_like(past[..., :1])], axis=-1)


def median_grade(prob: np.ndarray) -> np.ndarray:
    """(...,) the lowest grade whose cumulated probability (..., K) reaches a half."""
    total = np.cumsum(prob, axis=-1)
    return (total < 0.5 * total[..., -1:] - 1e-12).sum(-1)


@task_type("ordinal")
class OrdinalOutcome(OfClasses):
    """Grades in order by continuation ratios: one logit for each grade but the last, of P(y = k | y >= k).

    The probabilities of all grades follow and sum to 1 (Fienberg 1980; the conditional form of CORN, Shi et al. 2023);
    the link multiplies each grade's by a factor of its own, since grades are weighted in training, and divides by their
    sum. The grade predicted is the median of the distribution, which minimises the expected number of grades it is off.
    """

    score = "c_index"  # of the expected grade: needs no calibrated decisions
    rises = False
    kind, primary, chance = "ordinal", "kappa", 0.0
    few, lower_is_better = "of the rarest grade", ordinal_metrics.LOWER_IS_BETTER
    quantity, name_is = "expected grade (from 0)", "grade"
    titles: ClassVar[dict[str, str]] = {
        "kappa": "quadratic kappa",
        "mae": "grades off, mean",
        "c_index": "order right",
        "balanced_accuracy": "balanced accuracy",
        "accuracy": "accuracy",
    }

    def __init__(self, classes: Sequence[str]):
        super().__init__(classes)
        self.outputs = len(self.classes) - 1

    @classmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> OrdinalOutcome:
        return OrdinalOutcome(class_names(labels.values(), task))

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> OrdinalOutcome:
        return OrdinalOutcome(about["classes"])

    @classmethod
    def of_columns(cls, columns: Sequence[str]) -> OrdinalOutcome:
        return OrdinalOutcome(named(columns, "prob_"))

    def scale(self, labels: Sequence[int]) -> dict[str, Any]:
        return {"outputs": self.outputs}

    def loss(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> float:
        return float(-stages(outputs)[np.arange(len(labels)), np.asarray(labels, int)].mean())

    def score_of(self, outputs: np.ndarray, labels: Sequence[int]) -> float | None:
        expected = np.exp(stages(outputs)) @ np.arange(len(self.classes))
        return concordance(np.asarray(labels, float), np.ones(len(labels), bool), -expected)

    def settled(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> tuple[float, float]:
        def loss_at(t: float) -> float:
            logits = self._shifted(stages(outputs / t), labels)
            return float(
                -scipy.special.log_softmax(logits, axis=1)[np.arange(len(labels)), np.asarray(labels, int)].mean()
            )

        t = best_temperature(loss_at, 1 / len(labels))
        return t, loss_at(t)

    def link(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> dict[str, Any]:
        if not len(labels):
            return {"temperature": 1.0, "intercept": [0.0] * len(self.classes)}
        t, _ = self.settled(outputs, labels, scale)
        return {"temperature": t, "intercept": fit_intercepts(stages(outputs / t), np.asarray(labels, int)).tolist()}

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        logits = stages(np.asarray(outputs, float) / link["temperature"])
        return probabilities(logits, intercept=link.get("intercept", 0.0))

    def threshold(self, values: np.ndarray, labels: Sequence[int]) -> Threshold:
        return None

    def columns(self) -> list[str]:
        raw = [f"logit_{name}" for name in self.classes[:-1]]
        return [*(f"prob_{name}" for name in self.classes), *raw, "threshold", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        written = np.array([as_written(p) for p in values])
        row = {"threshold": "", "predicted": self.classes[int(median_grade(written))]}
        row |= {f"prob_{name}": number(p) for name, p in zip(self.classes, values, strict=True)}
        return row | {f"logit_{name}": number(v) for name, v in zip(self.classes[:-1], outputs, strict=True)}

    def direction(self, outputs: Any) -> Any:
        return -outputs.sum(-1)

    def headline(self, values: np.ndarray) -> float:
        return float(values @ np.arange(len(values)))

    # -- tables of predictions and evaluation -----------------------------------------------------------------------

    def logit_columns(self) -> list[str]:
        return [f"logit_{name}" for name in self.classes[:-1]]

    def decisions_in(self, row: Mapping[str, str], values: list[float], where: str) -> list[float]:
        return [float(self.classes.index(row["predicted"]))]

    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        truth = table.truth[chosen, 0].astype(int)
        expected = table.ranks[repeat, chosen] @ np.arange(len(self.classes))
        decided = table.decisions[repeat, chosen, 0].astype(int)
        return ordinal_metrics.metrics_over(truth, expected, decided, len(self.classes), weights)

    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        decided = table.decisions[repeat, chosen, 0].astype(int)
        return ordinal_metrics.why_undefined(metric, table.truth[chosen, 0].astype(int), decided, self.classes)

    def decide_mean(self, values: np.ndarray, decisions: np.ndarray) -> np.ndarray:
        return median_grade(values)[..., None].astype(float)

    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = np.array(list(self.counts(truth).values())) / len(truth)
        return share, median_grade(share)[None].astype(float)

    def logits(self, raw: np.ndarray | None) -> np.ndarray | None:
        return None if raw is None else stages(raw)  # log-probabilities: their softmax is the probability
