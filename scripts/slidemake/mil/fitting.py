"""Fitting one aggregator: the loop over epochs, with early stopping on validation patients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from slidemake.mil.aggregators import Aggregator, Batch, build_aggregator, slide_numbers
from slidemake.mil.bags import Bags
from slidemake.mil.batches import cells_of, sample_batch
from slidemake.mil.invariance import OPTIONS, Robust, make_robust
from slidemake.mil.invariance.guard import choose
from slidemake.mil.losses import Objective
from slidemake.mil.members import Fitted
from slidemake.mil.optimisers import make_optimiser
from slidemake.mil.scaling import Scaling, every_tile, fit_scaling, spread

VALIDATION_TILES = 4096  # tiles per patient, evenly spaced, that the loss of an epoch is computed on ...
EARLY_TILES = 256  # ... and in epochs that may not be kept, where it is only drawn: an eighth of all time otherwise

# Chosen on cohorts of 24 patients (compose_cohort, three seeds) and plain enough to hold elsewhere: the outcome moves
# little within factors of two of each.
DEFAULTS: dict[str, Any] = {
    "aggregator": "abmil_gated",
    "scaling": "each",  # none, each, centred, principal or whitened: see `scaling.py`
    "components": None,  # of principal and whitened; None: `scaling.COMPONENTS`
    "pooling": "lse",  # of instance_linear, like the next three
    "sharpness": 3.0,
    "share": 0.1,
    "evidence": "both",
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
    "optimiser": "adamw",
    "clip": None,  # the norm that gradients are cut to
    "tile_fraction": None,  # of a bag's tiles are drawn anew in every epoch; None: `batches.TILE_FRACTION`, or all of
    # them for models that look at neighbours
    "min_tiles": 32,  # ... but at least these many
    "max_tiles": 1024,  # ... and at most (None: no limit): bounds memory on large bags
    "validation": 0.25,  # of the training patients are held out by each member
    "members": None,  # of a fold, each validated on another share; None: 1 / validation of them
    "refit": False,  # on all training patients, for as many epochs as the members took
    "class_weights": True,
    "seed": 0,
    "device": "cpu",
}


def fit_member(
    bags: Bags,
    objective: Objective,
    train: Sequence[str],
    val: Sequence[str],
    settings: Mapping[str, Any],
    seed: int,
    scaling: Scaling | None = None,
) -> Fitted:
    """Train one aggregator on patients `train` and keep the epoch with the lowest loss on patients `val`.

    scaling: `bags` hold features to which it was applied (`scaling.scaled_bags`), and the model that is returned takes
    them as they were; not for robust training. None: it is estimated on the tiles of `train`.

    Without validation patients no epoch can be chosen, and midway between `min_epochs` and `epochs` it ends. The result
    depends on the arguments only, not on threads or on what ran before.
    """
    robust = make_robust(bags, objective, train, settings, seed)
    if robust is None:
        return _fit(bags, objective, train, val, settings, seed, None, scaling)
    if scaling is not None:
        raise ValueError("robust training harmonises features, and takes them unscaled")
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
    scaling: Scaling | None = None,
) -> Fitted:
    device = torch.device(settings["device"])
    parameters = settings if scaling is None else {**settings, "components": None}
    model = build_aggregator(settings["aggregator"], bags.dim, objective.outputs, parameters, seed)
    if robust is not None:
        robust.prepare(model)
    if scaling is None:
        change = None if robust is None else partial(_harmonised, model, bags, robust)
        fit_scaling(bags, train, settings, change).install(model)
    model.to(device).seed_dropout(seed, device)
    rng = np.random.default_rng(seed)
    optimiser = make_optimiser([*model.parameters(), *(robust.attach(model) if robust else [])], settings)
    epochs = settings["epochs"] if val else (settings["epochs"] + settings["min_epochs"]) // 2
    best, kept, state = float("inf"), 0, None
    curve: list[dict[str, float | int | None]] = []
    for epoch in range(1, epochs + 1):
        order = [train[i] for i in rng.permutation(len(train))]
        loss = _one_epoch(model, optimiser, bags, objective, order, settings, rng, robust, (epoch - 1) / epochs)
        most = VALIDATION_TILES if epoch >= settings["min_epochs"] else EARLY_TILES
        # where no epoch is chosen, every fifth is drawn: most of the time of a linear model otherwise
        looked_at = bool(val) and (settings["min_epochs"] < epochs or epoch in (1, epochs) or epoch % 5 == 0)
        val_loss, score = _validate(model, bags, objective, val, most, device, robust) if looked_at else (None, None)
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
    model.eval().to("cpu")
    if scaling is not None:
        scaling.install(model)
    return Fitted(model, curve, kept or len(curve))


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
            drawn = sample_batch(bags, batch, settings, rng)
            mask, slides, places = (None if x is None else x.to(device) for x in drawn[1:])
            bag_loss = partial(objective.loss, patients=batch)
            bags_now = Batch(drawn.features.to(device), mask, objective.targets(batch), slides, places)
            loss = model.step(bags_now, bag_loss).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if settings["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
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
        places = None
        if model.placed and bags.cells is not None:
            places = cells_of(bags, spread(np.arange(*bags.rows(patient)), most))[None].to(device)
        rows.append(model(tiles[None].to(device), None, slides, places)[0])
        bags.forget()
    return objective.validation(torch.cat(rows), val)
