"""Predicting a bag with a trained aggregator, and what each of its tiles adds to the prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slidemake.mil.aggregators.base import Aggregator
from slidemake.tasks.classes import log_odds

CHUNK = 8192  # tiles that are encoded at once at inference; bounds memory on slides with 1e5 tiles
REPEATED = 64  # predictions spent on a bag by leave-one-out without a closed form


@torch.inference_mode()
def encode_bag(
    model: Aggregator,
    features: np.ndarray,
    chunk: int = CHUNK,
    domains: Tensor | None = None,
    places: np.ndarray | None = None,
) -> tuple[Tensor, ...]:
    """(N, D) features of one bag -> the tensors (N, *) of `model.encode`, chunk by chunk; model in eval mode.

    domains (N,): number of each tile's scanner or site, which models that harmonise features look at. places (N, 2):
    come last of the tensors where the model asks for them.
    """
    device, dtype = model.feature_mean.device, model.feature_mean.dtype
    parts = []
    for i in range(0, len(features), chunk):
        x = torch.as_tensor(np.asarray(features[i : i + chunk], np.float32), device=device, dtype=dtype)
        parts.append(model.encode(x if domains is None else model.harmonise(x, domains[i : i + chunk])))
    encoded = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if not model.placed or places is None:
        return encoded
    return (*encoded, torch.as_tensor(np.asarray(places, np.int64), device=device))


def slide_numbers(sizes: Sequence[int]) -> Tensor:
    """(N,) number of each tile's slide, for slides of so many tiles one after the other."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(np.asarray(sizes, np.int64)))


@torch.inference_mode()
def predict_bag(
    model: Aggregator,
    features: np.ndarray,
    sizes: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    places: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features, N >= 1 -> logits (O,) and attention (N,), float64.

    sizes: tiles of each of the bag's slides, in order; None: one slide. domains: of each slide, for models that
    harmonise features; -1, or None, leaves them as they are. places (N, 2): row and column of each tile, for models
    that look at neighbours (`Bags.places`).
    """
    if len(features) == 0:
        raise ValueError("a bag without tiles has no prediction")
    was_training = model.training
    model.eval()
    numbers = slide_numbers([len(features)] if sizes is None else sizes)
    of_tiles = None if domains is None else torch.as_tensor(domains)[numbers]
    encoded = tuple(e[None] for e in encode_bag(model, features, domains=of_tiles, places=places))
    slides = None if sizes is None else numbers[None].to(encoded[0].device)
    pooled, attention = model.represent(encoded, None, slides)
    logits = model.logits(pooled)
    model.train(was_training)
    return logits[0].double().cpu().numpy(), attention[0].double().cpu().numpy()


@torch.inference_mode()
def leave_one_out(
    model: Aggregator,
    features: np.ndarray,
    target: int | Callable[[Tensor], Tensor] = 1,
    domain: int = -1,
    places: np.ndarray | None = None,
) -> np.ndarray:
    """How much each tile adds to the log-odds of class `target`: with all tiles minus without that tile, (N,) float64.

    target: a class, or any score of outputs (..., O) -> (...). Positive = the tile speaks for it. Exact and in one
    pass for methods with a closed form (all but TransMIL, DTFD and ILRA), whose few tiles that it does not hold for are
    taken away one by one. A bag of one tile is compared with the empty bag, whose pooled vector is 0. Without a closed
    form, bags up to 64 tiles are exact too; of larger ones the 32 tiles with most attention are taken away one by one
    and the others in 32 runs of neighbours, each tile with an equal part of its run's effect. domain: of the slide,
    and places, as in `predict_bag`. Computed in float64.
    """
    score = target if callable(target) else partial(log_odds, target=target)
    exact = copy.deepcopy(model).double().eval()
    encoded = encode_bag(exact, features, domains=torch.full((len(features),), domain), places=places)
    pooled, attention = exact.pool(*(e[None] for e in encoded))
    whole = score(exact.logits(pooled[0]))
    n = len(features)
    if n == 1:
        return (whole - score(exact.logits(torch.zeros_like(pooled[0])))).reshape(1).cpu().numpy()

    def without(gone: Tensor) -> Tensor:
        """Score of the bag without the tiles `gone`."""
        kept = torch.ones(n, dtype=torch.bool, device=encoded[0].device)
        kept[gone] = False
        rest, _ = exact.pool(*(e[kept][None] for e in encoded))
        return score(exact.logits(rest[0]))

    if exact.removed(encoded, slice(0, 1)) is None:
        return _by_repetition(n, attention[0], whole, without)
    left = torch.empty(n, device=whole.device, dtype=torch.float64)
    # a wide pooled vector, such as DSMIL's, gets shorter chunks
    step = max(1, min(CHUNK, 2**24 // pooled.shape[1]))
    for i in range(0, n, step):
        removed = exact.removed(encoded, slice(i, i + step))
        assert removed is not None
        left[i : i + step] = score(exact.logits(removed))
    for i in exact.removed_by_hand(encoded).tolist():
        left[i] = without(torch.tensor([i]))
    return (whole - left).cpu().numpy()


def _by_repetition(n: int, attention: Tensor, whole: Tensor, without: Callable[[Tensor], Tensor]) -> np.ndarray:
    order = attention.argsort(descending=True, stable=True)
    alone = order if n <= REPEATED else order[: REPEATED // 2]
    effect = np.empty(n)
    for i in alone.tolist():
        effect[i] = float(whole - without(torch.tensor([i])))
    if n > REPEATED:
        rest = np.sort(order[REPEATED // 2 :].cpu().numpy())
        for run in np.array_split(rest, REPEATED - len(alone)):
            if len(run):
                effect[run] = float(whole - without(torch.from_numpy(run))) / len(run)
    return effect
