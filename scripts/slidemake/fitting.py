"""Fitting one aggregator: the loop over epochs, with early stopping on validation patients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from slidemake.aggregators import Aggregator, Batch, build_aggregator, slide_numbers
from slidemake.bags import Bags
from slidemake.batches import sample_batch
from slidemake.invariance import OPTIONS, Robust, make_robust
from slidemake.invariance.guard import choose
from slidemake.objectives import Objective

STATISTICS_TILES = 512  # tiles per patient, evenly spaced, for the mean and deviation of features
VALIDATION_TILES = 4096  # tiles per patient, evenly spaced, that the loss of an epoch is computed on ...
EARLY_TILES = 256  # ... and in epochs that may not be kept, where it is only drawn: an eighth of all time otherwise

# Chosen on cohorts of 24 patients (compose_cohort, three seeds) and plain enough to hold elsewhere: the outcome moves
# little within factors of two of each.
DEFAULTS: dict[str, Any] = {
    "aggregator": "abmil_gated",
    "slides": "pool",  # all tiles of a patient together, or "attention" over the patient's slides
    "invariance": dict(OPTIONS),
    "hidden": 128,
    "attention": 64,
    "dropout": 0.25,
    "epochs": 30,  # at most
    "min_epochs": 10,
    "patience": 8,  # epochs without a better validation loss
    "learning_rate": 1e-3,
    "weight_decay": 1e-2,
    "bags_per_step": 4,
    "tile_fraction": 0.25,  # of a bag's tiles are drawn anew in every epoch: regularises, and saves time
    "min_tiles": 32,  # ... but at least these many
    "max_tiles": 1024,  # ... and at most (None: no limit): bounds memory on large bags
    "validation": 0.25,  # of the training patients are held out by each member
    "members": None,  # of a fold, each validated on another share; None: 1 / validation of them
    "class_weights": True,
    "seed": 0,
    "device": "cpu",
}


@dataclass(frozen=True)
class Fitted:
    """A trained aggregator, its curve [{epoch, train_loss, val_loss, val_<score of the objective>}] and the epoch that
    was kept (from 1).
    """

    model: Aggregator
    curve: list[dict[str, float | int | None]]
    epoch: int
    invariance: dict[str, Any] | None = None  # what the guard of robust training found (`invariance.guard`)


def every_tile(bag: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spaced tiles of a bag (N, D) as float32."""
    return np.asarray(spread(bag, most), np.float32)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spaced rows."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def feature_statistics(
    bags: Bags, patients: Sequence[str], change: Callable[[np.ndarray, str], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of the tiles of these patients, patients weighing by their tiles (up to 512).

    change: (tiles, patient) -> tiles as the model sees them, where it harmonises them.
    """
    total, squares, n = np.zeros(bags.dim), np.zeros(bags.dim), 0
    shift = every_tile(bags.bag(patients[0]), 1)[0].astype(np.float64)  # keeps the difference of squares accurate
    for patient in patients:
        tiles = every_tile(bags.bag(patient), STATISTICS_TILES)
        if change is not None:
            tiles = change(tiles, patient)
        tiles = tiles - shift
        total += tiles.sum(0, dtype=np.float64)
        squares += np.einsum("nd,nd->d", tiles, tiles, dtype=np.float64)
        n += len(tiles)
        bags.forget()
    std = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    std[std < 1e-6] = 1.0  # a constant feature stays constant
    return total / n + shift, std


def fit_member(
    bags: Bags,
    objective: Objective,
    train: Sequence[str],
    val: Sequence[str],
    settings: Mapping[str, Any],
    seed: int,
) -> Fitted:
    """Train one aggregator on patients `train` and keep the epoch with the lowest loss on patients `val`.

    Without validation patients no epoch can be chosen, and midway between `min_epochs` and `epochs` it ends. The result
    depends on the arguments only, not on threads or on what ran before.
    """
    robust = make_robust(bags, objective, train, settings, seed)
    if robust is None:
        return _fit(bags, objective, train, val, settings, seed, None)
    plain = _fit(bags, copy.deepcopy(objective), train, val, settings, seed, None)
    fitted = _fit(bags, objective, train, val, settings, seed, robust)
    robust.complete(plain.model)
    constant = None
    if val:
        constant, _ = objective.validation(torch.zeros(len(val), objective.outputs, device=settings["device"]), val)
    kept, report = choose(fitted, plain, robust, [*train, *val], constant)
    return Fitted(kept.model, kept.curve, kept.epoch, report)


def _fit(
    bags: Bags,
    objective: Objective,
    train: Sequence[str],
    val: Sequence[str],
    settings: Mapping[str, Any],
    seed: int,
    robust: Robust | None,
) -> Fitted:
    device = torch.device(settings["device"])
    model = build_aggregator(settings["aggregator"], bags.dim, objective.outputs, settings, seed)
    change = None
    if robust is not None:
        robust.prepare(model)
        change = partial(_harmonised, model, bags, robust)
    mean, std = feature_statistics(bags, train, change)
    model.feature_mean.copy_(torch.from_numpy(mean))
    model.feature_std.copy_(torch.from_numpy(std))
    model.to(device).seed_dropout(seed, device)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(
        [*model.parameters(), *(robust.attach(model) if robust else [])],
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )  # fused: one call instead of a dozen per parameter, half of a step's time in models this small
    epochs = settings["epochs"] if val else (settings["epochs"] + settings["min_epochs"]) // 2
    best, kept, state = float("inf"), 0, None
    curve: list[dict[str, float | int | None]] = []
    for epoch in range(1, epochs + 1):
        order = [train[i] for i in rng.permutation(len(train))]
        loss = _one_epoch(model, optimiser, bags, objective, order, settings, rng, robust, (epoch - 1) / epochs)
        most = VALIDATION_TILES if epoch >= settings["min_epochs"] else EARLY_TILES
        val_loss, score = _validate(model, bags, objective, val, most, device, robust) if val else (None, None)
        curve.append({"epoch": epoch, "train_loss": loss, "val_loss": val_loss, f"val_{objective.score}": score})
        if val_loss is None or epoch < settings["min_epochs"]:
            continue
        if val_loss < best:
            best, kept = val_loss, epoch
            state = {k: v.clone() for k, v in model.state_dict().items()}
        elif epoch - kept >= settings["patience"]:
            break
    if state is not None:
        model.load_state_dict(state)
    return Fitted(model.eval().to("cpu"), curve, kept or len(curve))


def _one_epoch(
    model: Aggregator,
    optimiser: torch.optim.Optimizer,
    bags: Bags,
    objective: Objective,
    order: Sequence[str],
    settings: Mapping[str, Any],
    rng: np.random.Generator,
    robust: Robust | None,
    progress: float,
) -> float:
    model.train()
    device = settings["device"]
    total = 0.0
    for start in range(0, len(order), settings["bags_per_step"]):
        batch = order[start : start + settings["bags_per_step"]]
        if robust is not None:
            loss = robust.step(model, batch, progress, rng, objective.loss)
        else:
            features, mask, slides = sample_batch(bags, batch, settings, rng)
            mask, slides = (None if x is None else x.to(device) for x in (mask, slides))
            bag_loss = partial(objective.loss, patients=batch)
            bags_now = Batch(features.to(device), mask, objective.targets(batch), slides)
            loss = model.step(bags_now, bag_loss).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += float(loss.detach()) * len(batch)
        bags.forget()
    return total / len(order)


def _harmonised(model: Aggregator, bags: Bags, robust: Robust, tiles: np.ndarray, patient: str) -> np.ndarray:
    """Evenly spaced tiles of a patient as the model sees them."""
    rows = spread(np.arange(*bags.rows(patient)), len(tiles))
    domains = torch.from_numpy(robust.domain_of[bags.slide_of(rows)])
    x = torch.from_numpy(tiles).to(model.feature_mean.device)
    return model.harmonise(x, domains).cpu().numpy()


@torch.inference_mode()
def _validate(
    model: Aggregator,
    bags: Bags,
    objective: Objective,
    val: Sequence[str],
    most: int,
    device: torch.device,
    robust: Robust | None,
) -> tuple[float, float | None]:
    """Loss and score of the validation patients, each by `most` of their tiles at most."""
    model.eval()
    rows = []
    for patient in val:
        bag = every_tile(bags.bag(patient), most)
        tiles = torch.from_numpy(bag if robust is None else _harmonised(model, bags, robust, bag, patient))
        slides = None
        if model.slide_scores is not None:
            numbers = slide_numbers(bags.sizes(patient)).numpy()
            slides = torch.from_numpy(spread(numbers, most))[None].to(device)
        rows.append(model(tiles[None].to(device), None, slides)[0])
        bags.forget()
    return objective.validation(torch.cat(rows), val)
