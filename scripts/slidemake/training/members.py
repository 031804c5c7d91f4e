"""The models of one fold: members of one aggregator, or of the candidates of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slidemake.mil.aggregators import Aggregator, predict_bag
from slidemake.mil.automatic import MIXTURES, Part, candidates, mixture
from slidemake.mil.bags import Bags
from slidemake.mil.fitting import fit_member
from slidemake.mil.invariance import active
from slidemake.mil.losses import make_objective
from slidemake.mil.scaling import PROJECTED, Components, Scaling, scaled_bags
from slidemake.training.plan import Fold, Plan, Work, fold_seed, resolved


@dataclass(frozen=True)
class Members:
    """Trained members of one aggregator; outputs (C,) of each validation patient, by members that did not see it."""

    models: list[Aggregator]
    outputs: dict[str, np.ndarray]
    curves: list[list[dict[str, Any]]]
    epochs: list[int]
    guards: list[dict[str, Any]]  # of robust training
    refitted: int | None  # epochs of the model that took the members' place


@dataclass(frozen=True)
class FoldModels:
    """What the group of a fold is made of, and what is told of it; curves: of the candidate that weighs most."""

    models: list[Aggregator]
    parts: tuple[Part, ...]
    outputs: dict[str, np.ndarray]
    curves: list[list[dict[str, Any]]]
    figures: dict[str, Any]


def train_fold_models(work: Work, fold: Fold, plan: Plan, scale: Mapping[str, Any]) -> FoldModels:
    """Train every member of `plan`; scale: `Outcome.scale` of the fold."""
    wanted = {
        name: resolved(settings, work.outcome)
        for name, settings in candidates(work.settings, work.outcome.kind).items()
    }
    scaled = FoldBags(work, fold, max(s["components"] or 0 for s in wanted.values()))
    trained = {name: train_members(plan, scale, s, scaled) for name, s in wanted.items()}
    if work.settings["aggregator"] not in MIXTURES:
        (only,) = trained.values()
        return FoldModels(only.models, (), only.outputs, only.curves, _figures(only))
    patients = sorted(next(iter(trained.values())).outputs)
    stacked = {
        name: np.array([found.outputs[p] for p in patients]).reshape(len(patients), work.outcome.outputs)
        for name, found in trained.items()
    }
    mixed = mixture(stacked, work.outcome, [work.labels[p] for p in patients], scale)
    outputs = sum(found.weight * found.scale * stacked[name] for name, found in mixed.items())
    best = trained[max(mixed, key=lambda name: mixed[name].weight)]
    parts = tuple(
        Part(c, len(trained[c].models), found.weight, found.scale) for c, found in mixed.items() if found.weight
    )
    shares = {name: asdict(found) | _figures(trained[name]) for name, found in mixed.items()}
    models = [model for part in parts for model in trained[part.candidate].models]
    of_patient = dict(zip(patients, np.asarray(outputs), strict=True))
    return FoldModels(models, parts, of_patient, best.curves, _figures(best) | {"mixture": shares})


def train_members(plan: Plan, scale: Mapping[str, Any], settings: dict[str, Any], scaled: FoldBags) -> Members:
    """One aggregator on every (training, validation) pair of `plan`."""
    work, fold = scaled.work, scaled.fold
    bags, scaling = scaled.of(settings)
    models, curves, epochs, guards = [], [], [], []
    outputs: dict[str, list[np.ndarray]] = {}
    for i, (train, val) in enumerate(plan):
        seed = fold_seed(settings["seed"], fold.repeat, fold.fold, i + 1)
        objective = make_objective(work.outcome, work.labels, train, scale, settings)
        fitted = fit_member(bags, objective, train, val, settings, seed, scaling)
        for patient in val:
            domains = work.domain_of[slice(*work.bags.where[patient])].tolist()
            outputs.setdefault(patient, []).append(
                predict_bag(
                    *(fitted.model, work.bags.bag(patient), work.bags.sizes(patient), domains),
                    places=work.bags.places(patient),
                )[0]
            )
            work.bags.forget()
        models.append(fitted.model)
        curves.append(fitted.curve)
        epochs.append(fitted.epoch)
        if fitted.invariance is not None:
            guards.append(fitted.invariance)
    refitted = None
    if settings["refit"] and outputs:
        everyone, refitted = sorted({*fold.train, *fold.val}), int(np.median(epochs))
        objective = make_objective(work.outcome, work.labels, everyone, scale, settings)
        seed = fold_seed(settings["seed"], fold.repeat, fold.fold, len(plan) + 1)
        as_long = {**settings, "epochs": refitted, "min_epochs": refitted}
        models = [fit_member(bags, objective, everyone, [], as_long, seed, scaling).model]
    means = {p: np.mean(rows, axis=0) for p, rows in outputs.items()}
    return Members(models, means, curves, epochs, guards, refitted)


def _figures(trained: Members) -> dict[str, Any]:
    figures: dict[str, Any] = {"epochs": trained.epochs}
    if trained.refitted is not None:
        figures["refitted_epochs"] = trained.refitted
    if trained.guards:
        figures["invariance"] = trained.guards
    return figures


class FoldBags:
    """A fold's bags on principal components, which are estimated once, on tiles of all its training patients.

    Labels take no part. Robust training scales inside the model instead, after it has harmonised the features.
    """

    def __init__(self, work: Work, fold: Fold, most: int):
        self.work, self.fold, self.most = work, fold, most
        self.patients = sorted({*fold.train, *fold.val})
        self.components: Components | None = None
        self.ready: dict[tuple[str, int], tuple[Bags, Scaling]] = {}

    def of(self, settings: Mapping[str, Any]) -> tuple[Bags, Scaling | None]:
        """(bags, scaling) as `fit_member` takes them."""
        if settings["scaling"] not in PROJECTED or active(settings):
            return self.work.bags, None
        if self.components is None:
            self.components = Components.fit(self.work.bags, self.patients, self.most)
        key = settings["scaling"], settings["components"]
        if key not in self.ready:
            scaling = self.components.scaling(*key)
            self.ready[key] = scaled_bags(self.work.bags, self.patients, scaling), scaling
        return self.ready[key]
