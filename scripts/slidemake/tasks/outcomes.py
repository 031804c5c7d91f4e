"""Outcomes: how the raw outputs of an aggregator become the predictions of a task, one description for each type.

An outcome knows how many outputs a model has, what is learned from the training labels before training (`scale`), the
loss of held-out outputs, what is fitted on validation patients (`link`: temperature, baseline hazard), how outputs
become predictions (`predict`: a vector of values that an ensemble may average), the threshold, and the columns of the
tables. Training, bundles and the prediction of new slides know no task but through it. No torch: losses for training
are in `objectives.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, log_expit, log_softmax
from torch import Tensor

from slidemake.statistics.temperature import auroc, fit_intercepts, fit_temperature, probabilities, youden_threshold
from slidemake.tasks.labels import parse_multilabel, why_untrainable

Threshold = float | list[float] | None
SCORES = {"auroc": "AUROC", "pearson": "correlation", "c_index": "C-index"}  # what `Outcome.score` is called
NO_SKILL = {"auroc": 0.5, "pearson": 0.0, "c_index": 0.5}
LOG_TEMPERATURES = np.linspace(np.log(0.1), np.log(10.0), 200)


def number(value: float | None) -> str:
    """Nine significant digits, so that equal predictions are equal bytes; empty for None."""
    return "" if value is None else format(float(value), ".9g")


class Outcome:
    """What all outcomes share. Encoded labels are what `encode` makes of a label's text."""

    kind = ""
    score = "auroc"  # of held-out patients, shown beside the validation loss
    classes: tuple[str, ...] = ()
    outputs = 1  # of the aggregator
    rises = True  # whether outputs rise with the label

    def about(self) -> dict[str, Any]:
        """What `load_outcome` needs to make this outcome again; a part of bundle.json."""
        raise NotImplementedError

    def encode(self, label: str) -> Any:
        raise NotImplementedError

    def why_untrainable(self, labels: Sequence[str]) -> str | None:
        return why_untrainable(labels, self.kind)

    def scale(self, labels: Sequence[Any]) -> dict[str, Any]:
        """What training and prediction take from the encoded labels of training and validation patients."""
        return {}

    def loss(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> float:
        """Mean loss of held-out outputs (V, C)."""
        raise NotImplementedError

    def score_of(self, outputs: np.ndarray, labels: Sequence[Any]) -> float | None:
        """The score (attribute `score`) of held-out outputs (V, C); None where it is not defined."""
        return None

    def settled(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> tuple[float, float]:
        """(temperature, mean loss) of held-out outputs (V, C) once they are divided by it, and shifted where a link of
        this type shifts: what is left when neither confidence nor class weights count."""
        t = best_temperature(lambda t: self.loss(self._shifted(outputs / t, labels), labels, scale), 1 / len(labels))
        return t, self.loss(self._shifted(outputs / t, labels), labels, scale)

    def _shifted(self, outputs: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        return outputs

    def link(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> dict[str, Any]:
        """From the outputs (V, C) of validation patients: all that `predict` needs. Goes into the bundle."""
        return dict(scale)

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        """Values (..., P) from outputs (..., C)."""
        raise NotImplementedError

    def threshold(self, values: np.ndarray, labels: Sequence[Any]) -> Threshold:
        """From the values (V, P) of validation patients."""
        return None

    def columns(self) -> list[str]:
        """Columns of the tables of predictions that `cells` fills."""
        raise NotImplementedError

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        """One row's cells: values, raw outputs, threshold and what is decided by it."""
        raise NotImplementedError

    def direction(self, outputs: Any) -> Any:
        """The score that is explained (...), from outputs (..., C) as an array or a tensor."""
        return outputs[..., 0]

    def headline(self, values: np.ndarray) -> float:
        """The one figure of a prediction (P,) by which explained slides are sorted."""
        return float(values[-1])


class ClassOutcome(Outcome):
    """Classes without an order; with two of them the second is the positive one. Softmax over one logit each."""

    def __init__(self, classes: Sequence[str], kind: str | None = None):
        self.classes = tuple(classes)
        self.kind = kind or ("binary" if len(self.classes) == 2 else "multiclass")
        self.outputs = len(self.classes)

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "classes": list(self.classes)}

    def encode(self, label: str) -> int:
        return self.classes.index(label)

    def loss(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> float:
        return float(-log_softmax(outputs, axis=1)[np.arange(len(labels)), np.asarray(labels, int)].mean())

    def score_of(self, outputs: np.ndarray, labels: Sequence[int]) -> float | None:
        if len(self.classes) == 2:
            return auroc(outputs[:, 1] - outputs[:, 0], np.asarray(labels) == 1)
        p = probabilities(outputs)
        areas = [auroc(p[:, c], np.asarray(labels) == c) for c in range(p.shape[1])]
        found = [area for area in areas if area is not None]
        return float(np.mean(found)) if found else None

    def _shifted(self, outputs: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        return outputs + fit_intercepts(outputs, np.asarray(labels, int))

    def link(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> dict[str, Any]:
        temperature, intercept = fit_temperature(outputs, np.asarray(labels, int))
        return {"temperature": temperature, "intercept": intercept}

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        return probabilities(outputs, link["temperature"], link.get("intercept", 0.0))

    def threshold(self, values: np.ndarray, labels: Sequence[int]) -> Threshold:
        if len(self.classes) != 2:
            return None
        return youden_threshold(values[:, 1], np.asarray(labels, int) == 1)

    def columns(self) -> list[str]:
        return [*(f"{kind}_{name}" for kind in ("prob", "logit") for name in self.classes), "threshold", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        # decided on the number that is written, so that a reader of the file decides the same
        written = np.array([float(number(p)) for p in values])
        limit = None if threshold is None else float(number(threshold))  # type: ignore[arg-type]
        row = {"threshold": number(limit), "predicted": decide(written, self.classes, limit)}
        row |= {f"prob_{name}": number(p) for name, p in zip(self.classes, values, strict=True)}
        return row | {f"logit_{name}": number(v) for name, v in zip(self.classes, outputs, strict=True)}

    def direction(self, outputs: Any) -> Any:

        return log_odds(outputs, len(self.classes) - 1)


def decide(prob: np.ndarray, classes: Sequence[str], threshold: float | None) -> str:
    """The class predicted from probabilities (C,): by threshold for two classes, else the most probable."""
    if threshold is not None and len(classes) == 2:
        return classes[int(prob[1] >= threshold)]
    return classes[int(np.argmax(prob))]


def stages(outputs: np.ndarray) -> np.ndarray:
    """Log-probabilities (..., K) from the K - 1 logits of h_k = P(y = k | y >= k): log h_k + sum_{j<k} log(1 - h_j)."""
    past = np.cumsum(log_expit(-outputs), axis=-1)
    first = np.concatenate([np.zeros_like(past[..., :1]), past], axis=-1)
    return first + np.concatenate([log_expit(outputs), np.zeros_like(past[..., :1])], axis=-1)


def best_temperature(loss_at: Any, penalty: float) -> float:
    """The temperature 0.1 to 10 with the lowest `loss_at(T)` + penalty (log T)^2 / 2: a penalty worth one patient keeps
    a handful of validation patients, separated by chance, from sending T to its limits."""
    losses = [loss_at(float(np.exp(t))) + 0.5 * penalty * t * t for t in LOG_TEMPERATURES]
    return float(np.exp(LOG_TEMPERATURES[int(np.argmin(losses))]))


class OrdinalOutcome(ClassOutcome):
    """Grades in order by continuation ratios: one logit for each grade but the last, of P(y = k | y >= k).

    The probabilities of all grades follow and sum to 1 (Fienberg 1980; the conditional form of CORN, Shi et al. 2023);
    the link multiplies each grade's by a factor of its own, since grades are weighted in training, and divides by their
    sum. The grade predicted is the median of the distribution, which minimises the expected number of grades it is off.
    """

    score = "c_index"  # of the expected grade: needs no calibrated decisions
    rises = False

    def __init__(self, classes: Sequence[str]):
        super().__init__(classes, "ordinal")
        self.outputs = len(self.classes) - 1

    def scale(self, labels: Sequence[int]) -> dict[str, Any]:
        return {"outputs": self.outputs}

    def loss(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> float:
        return float(-stages(outputs)[np.arange(len(labels)), np.asarray(labels, int)].mean())

    def score_of(self, outputs: np.ndarray, labels: Sequence[int]) -> float | None:
        from slidemake.statistics.survival_metrics import concordance

        expected = np.exp(stages(outputs)) @ np.arange(len(self.classes))
        return concordance(np.asarray(labels, float), np.ones(len(labels), bool), -expected)

    def settled(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> tuple[float, float]:
        grades = ClassOutcome(self.classes)

        def loss_at(t: float) -> float:
            return grades.loss(self._shifted(stages(outputs / t), labels), labels, scale)

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
        written = np.array([float(number(p)) for p in values])
        row = {"threshold": "", "predicted": self.classes[int(median_grade(written))]}
        row |= {f"prob_{name}": number(p) for name, p in zip(self.classes, values, strict=True)}
        return row | {f"logit_{name}": number(v) for name, v in zip(self.classes[:-1], outputs, strict=True)}

    def direction(self, outputs: Any) -> Any:
        return -outputs.sum(-1)

    def headline(self, values: np.ndarray) -> float:
        return float(values @ np.arange(len(values)))


def _two(logit: np.ndarray) -> np.ndarray:
    """(n, 2) logits of no and yes, from that of yes (n,)."""
    return np.stack([np.zeros_like(logit), logit], axis=1)


def median_grade(prob: np.ndarray) -> np.ndarray:
    """(...,) the lowest grade whose cumulated probability (..., K) reaches a half."""
    total = np.cumsum(prob, axis=-1)
    return (total < 0.5 * total[..., -1:] - 1e-12).sum(-1)


class MultilabelOutcome(Outcome):
    """Several yes/no labels, one logit each; a label that is not known counts neither in the loss nor in a metric."""

    kind = "multilabel"

    def __init__(self, labels: Sequence[str]):
        self.labels = tuple(labels)
        self.outputs = len(self.labels)

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
        losses = -log_expit(np.where(truth == 1, outputs, -outputs))
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
        return expit(scaled + np.asarray(link.get("intercept", 0.0), float))

    def threshold(self, values: np.ndarray, labels: Sequence[np.ndarray]) -> Threshold:
        truth, known = self._known(labels)
        return [youden_threshold(values[known[:, k], k], truth[known[:, k], k] == 1) for k in range(self.outputs)]

    def columns(self) -> list[str]:
        return [f"{kind}_{name}" for kind in ("prob", "logit", "threshold", "predicted") for name in self.labels]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        limits = [float(number(t)) for t in threshold]  # type: ignore[union-attr]
        row: dict[str, str] = {}
        for name, raw, value, limit in zip(self.labels, outputs, values, limits, strict=True):
            row |= {f"prob_{name}": number(value), f"logit_{name}": number(raw), f"threshold_{name}": number(limit)}
            row[f"predicted_{name}"] = str(int(float(number(value)) >= limit))
        return row

    def headline(self, values: np.ndarray) -> float:
        return float(values[0])


class RegressionOutcome(Outcome):
    """A number: one output, in standard deviations of the training labels."""

    kind, score = "regression", "pearson"

    def __init__(self, unit: str = ""):
        self.unit = unit

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "unit": self.unit}

    def encode(self, label: str) -> float:
        return float(label)

    def scale(self, labels: Sequence[float]) -> dict[str, Any]:
        sd = float(np.std(labels))
        return {"mean": float(np.mean(labels)), "sd": sd if sd > 0 else 1.0}

    def loss(self, outputs: np.ndarray, labels: Sequence[float], scale: Mapping[str, Any]) -> float:
        target = (np.asarray(labels, float) - scale["mean"]) / scale["sd"]
        return float(((outputs[:, 0] - target) ** 2).mean())

    def score_of(self, outputs: np.ndarray, labels: Sequence[float]) -> float | None:
        if len(labels) < 3 or np.ptp(outputs[:, 0]) < 1e-12 or np.ptp(labels) < 1e-12:
            return None
        return float(np.corrcoef(outputs[:, 0], np.asarray(labels, float))[0, 1])

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(outputs, float) * link["sd"] + link["mean"]

    def columns(self) -> list[str]:
        return ["output", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        return {"output": number(outputs[0]), "predicted": number(values[0])}


# -- from a task or a bundle ---------------------------------------------------------------------------------------


def log_odds(logits: Tensor, target: int) -> Tensor:
    """Log-odds of class `target` from (..., C) logits: with two classes simply their difference. A single output is
    taken as it is."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    others = [c for c in range(logits.shape[-1]) if c != target]
    return logits[..., target] - torch.logsumexp(logits[..., others], -1)
