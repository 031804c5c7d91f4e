"""Objectives: the loss of a batch of patients, one for each type of outcome.

`fitting` draws batches and steps; what is minimised comes from here. An objective is made for one member: it knows the
labels of its training patients and what was computed from them (class weights, risk sets).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slidemake.statistics.survival import RiskSets, time_bins
from slidemake.tasks.base import Outcome
from slidemake.tasks.classes import ClassOutcome
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.ordinal import OrdinalOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import CoxOutcome, DiscreteOutcome


class Objective(Protocol):
    """What `fitting` needs of a task."""

    outputs: int  # of the aggregator
    score: str  # name of the second figure of `validation`

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        """Loss of the outputs (B, C) of a batch; its gradient is what a step follows."""

    def targets(self, patients: Sequence[str]) -> Tensor | None:
        """Class indices (B,) of a batch, for aggregators with a loss of their own on them; None without classes."""

    def validation(self, outputs: Tensor, patients: Sequence[str]) -> tuple[float, float | None]:
        """(loss that chooses the epoch, score that is shown) of the outputs (V, C) of held-out patients."""


def class_weights(labels: Sequence[int], classes: int) -> np.ndarray:
    """(C,) weights n / (C n_c): every class weighs the same in the loss."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)


def make_objective(
    outcome: Outcome, labels: Mapping[str, Any], train: Sequence[str], scale: Mapping[str, Any], settings: Mapping
) -> Objective:
    """labels: patient -> encoded label, of training and validation patients; scale: `Outcome.scale` of them."""
    makers: dict[type[Outcome], Any] = {
        ClassOutcome: ClassObjective,
        OrdinalOutcome: OrdinalObjective,
        MultilabelOutcome: MultilabelObjective,
        RegressionOutcome: RegressionObjective,
        CoxOutcome: CoxObjective,
        DiscreteOutcome: DiscreteObjective,
    }
    return makers[type(outcome)](outcome, labels, train, scale, settings)


def class_objective(labels: Mapping[str, int], train: Sequence[str], classes: int, settings: Mapping) -> Objective:
    """The objective of class indices, for a single fit outside of `training`."""
    return make_objective(ClassOutcome([str(c) for c in range(classes)]), labels, train, {}, settings)


class _Objective:
    def __init__(
        self, outcome: Any, labels: Mapping[str, Any], train: Sequence[str], scale: Mapping[str, Any], settings: Mapping
    ):
        self.outcome, self.labels, self.scale = outcome, labels, scale
        self.outputs, self.score = outcome.outputs, outcome.score
        self.device = torch.device(settings["device"])
        self.prepare([labels[p] for p in train], bool(settings["class_weights"]))

    def prepare(self, labels: list[Any], balanced: bool) -> None:
        pass

    def _of(self, patients: Sequence[str]) -> list[Any]:
        return [self.labels[p] for p in patients]

    def targets(self, patients: Sequence[str]) -> Tensor | None:
        return None

    def validation(self, outputs: Tensor, patients: Sequence[str]) -> tuple[float, float | None]:
        labels, held_out = self._of(patients), outputs.double().cpu().numpy()
        return self.outcome.loss(held_out, labels, self.scale), self.outcome.score_of(held_out, labels)


class ClassObjective(_Objective):
    """Cross-entropy, classes weighted by the inverse of their frequency where the settings say so."""

    def prepare(self, labels: list[int], balanced: bool) -> None:
        self.weights = torch.ones(self.outputs, device=self.device)
        if balanced:
            self.weights = torch.tensor(class_weights(labels, self.outputs), dtype=torch.float32, device=self.device)

    def targets(self, patients: Sequence[str]) -> Tensor:
        return torch.tensor(self._of(patients), device=self.device)

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        target = self.targets(patients)
        # weights average 1 over the training set: dividing by the number of bags keeps them effective in small batches
        return (F.cross_entropy(outputs, target, reduction="none") * self.weights[target]).mean()

    def validation(self, outputs: Tensor, patients: Sequence[str]) -> tuple[float, float | None]:
        target = self.targets(patients)
        loss = float(F.cross_entropy(outputs, target, weight=self.weights))
        area = None
        if self.outputs == 2:
            area = self.outcome.score_of(outputs.cpu().numpy(), target.cpu().numpy())
        return loss, area


class OrdinalObjective(_Objective):
    """Negative log-likelihood of continuation ratios, grades weighted like classes."""

    def prepare(self, labels: list[int], balanced: bool) -> None:
        grades = self.outputs + 1
        weights = class_weights(labels, grades) if balanced else np.ones(grades)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        target = torch.tensor(self._of(patients), device=self.device)
        at = torch.arange(self.outputs, device=self.device)
        passed = F.logsigmoid(-outputs) * (at < target[:, None])
        reached = F.logsigmoid(outputs) * (at == target[:, None])
        return -((passed + reached).sum(1) * self.weights[target]).mean()


class MultilabelObjective(_Objective):
    """Binary cross-entropy, mean over the labels that are known; both values of each label weighted alike."""

    def prepare(self, labels: list[np.ndarray], balanced: bool) -> None:
        truth = np.asarray(labels).reshape(-1, self.outputs)
        weights = np.ones((2, self.outputs))
        for k in range(self.outputs if balanced else 0):
            known = truth[truth[:, k] >= 0, k]
            weights[:, k] = class_weights(known, 2) if len(known) else 1.0
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        target = torch.tensor(np.asarray(self._of(patients)), device=self.device)
        weights = torch.where(target == 1, self.weights[1], self.weights[0]) * (target >= 0)
        losses = F.binary_cross_entropy_with_logits(outputs, target.clamp_min(0).to(outputs.dtype), reduction="none")
        return (losses * weights).mean()


class RegressionObjective(_Objective):
    """Squared error, in standard deviations of the training labels."""

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        values = (np.array(self._of(patients), float) - self.scale["mean"]) / self.scale["sd"]
        target = torch.tensor(values, dtype=outputs.dtype, device=self.device)
        return ((outputs[:, 0] - target) ** 2).mean()


class DiscreteObjective(_Objective):
    """Negative log-likelihood of discrete-time hazards: -(log S_{y-1} + log h_y), censored: -log S_y."""

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        time, event = self.outcome.arrays(self._of(patients))
        place = torch.tensor(time_bins(time, self.scale["edges"]), device=self.device)
        seen = torch.tensor(event, device=self.device)
        at = torch.arange(self.outputs, device=self.device)
        outlived = (at < place[:, None]) | ((at == place[:, None]) & ~seen[:, None])
        died = (at == place[:, None]) & seen[:, None]
        return -(F.logsigmoid(-outputs) * outlived + F.logsigmoid(outputs) * died).sum(1).mean()


class CoxObjective(_Objective):
    """Partial likelihood over the full risk sets of the training patients, in small batches.

    A batch knows its own log-hazards, and of all other training patients the last that were computed. The gradient of
    the full partial likelihood by the batch's log-hazards is then exact but for the age of the others (at most one
    epoch). The likelihood does not change when all log-hazards shift; their mean is pulled to 0, so that members agree.

    Held-out patients are judged by the cross-validated partial likelihood (Verweij and van Houwelingen 1993): that of
    training and held-out patients together, less that of the training patients, which says something even of one
    held-out event.
    """

    def __init__(
        self, outcome: Any, labels: Mapping[str, Any], train: Sequence[str], scale: Mapping[str, Any], settings: Mapping
    ):
        self.place = {p: i for i, p in enumerate(train)}
        self.known = np.zeros(len(train))
        super().__init__(outcome, labels, train, scale, settings)

    def prepare(self, labels: list[Any], balanced: bool) -> None:
        self.train_labels = labels
        self.sets = RiskSets(*self.outcome.arrays(labels))

    def loss(self, outputs: Tensor, patients: Sequence[str]) -> Tensor:
        here = np.array([self.place[p] for p in patients])
        self.known[here] = outputs[:, 0].detach().double().cpu().numpy()
        slope = self.sets.gradient(self.known)[here] + self.known.mean()
        value = self.sets.loss(self.known) / max(1, self.sets.events)
        pull = torch.tensor(slope, dtype=outputs.dtype, device=outputs.device)
        change = (outputs[:, 0] * pull).mean()
        return change - change.detach() + value  # the value that is reported, with the gradient that is wanted

    def validation(self, outputs: Tensor, patients: Sequence[str]) -> tuple[float, float | None]:
        held_out, labels = outputs.double().cpu().numpy(), self._of(patients)
        both = RiskSets(*self.outcome.arrays([*self.train_labels, *labels]))
        total = both.loss(np.concatenate([self.known, held_out[:, 0]]))
        events = max(1, both.events - self.sets.events)
        return (total - self.sets.loss(self.known)) / events, self.outcome.score_of(held_out, labels)
