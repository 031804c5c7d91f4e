"""An epoch of the project's trainer beside a plain PyTorch loop over tensors in memory, of the same architecture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import Row, Timed, compare, in_turns
from slidemake.bags import Bags, make_bags
from slidemake.fitting import DEFAULTS, fit_member
from slidemake.objectives import class_objective
from torch import Tensor, nn

DIM = 1280


class PlainABMIL(nn.Module):
    """Gated ABMIL as a paper's code has it, with the widths of the project's default."""

    def __init__(self) -> None:
        super().__init__()
        hidden, attention, drop = DEFAULTS["hidden"], DEFAULTS["attention"], DEFAULTS["dropout"]
        self.project = nn.Sequential(nn.Linear(DIM, hidden), nn.ReLU(), nn.Dropout(drop))
        self.tanh = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid())
        self.score = nn.Sequential(nn.Dropout(drop), nn.Linear(attention, 1))
        self.classifier = nn.Linear(hidden, 2)

    def forward(self, bag: Tensor) -> Tensor:
        h = self.project(bag)
        weight = self.score(self.tanh(h) * self.gate(h)).softmax(0)
        return self.classifier((weight * h).sum(0))


def plain_loop(tensors: Sequence[Tensor], labels: Sequence[int], epochs: int, threads: int) -> float:
    """Batch 1, AdamW, cross-entropy; returns the number of bags that went through."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = PlainABMIL().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(tensors)).tolist():
            loss = F.cross_entropy(model(tensors[index])[None], torch.tensor([labels[index]]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()
    return len(tensors) * epochs


def ours(bags: Bags, labels: dict[str, int], epochs: int, **changes: Any) -> float:
    """`fit_member` without validation: feature statistics, building, `epochs` epochs; returns the bags of all."""
    torch.set_num_threads(1)
    settings = {**DEFAULTS, "epochs": epochs, "min_epochs": epochs, **changes}
    objective = class_objective(labels, sorted(labels), 2, settings)
    fitted = fit_member(bags, objective, sorted(labels), [], settings, seed=0)
    return len(labels) * len(fitted.curve)


def later_epochs(all_of_them: Timed, first: Timed, epochs: int) -> Timed:
    """Rates of epochs 2 to the last: what is paid once per training (statistics of features) is in both and cancels."""

    def rate(whole: float, one: float) -> float:
        return (epochs - 1) / max(epochs / whole - 1 / one, 1e-9)

    return Timed(
        [rate(a, b) for a, b in zip(all_of_them.wall, first.wall, strict=True)],
        [rate(a, b) for a, b in zip(all_of_them.cpu, first.cpu, strict=True)],
    )


def two_members(work: Callable[[], float]) -> float:
    """Two at once on a thread each: how folds are trained on two cores."""
    with ThreadPoolExecutor(2, initializer=partial(torch.set_num_threads, 1)) as pool:
        return sum(future.result() for future in [pool.submit(work), pool.submit(work)])


def measure(count: int, tiles: int, epochs: int, repeats: int) -> list[Row]:
    """Rows for `count` bags of `tiles` tiles."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((count * tiles, DIM), np.float32)
    names = [f"{i:04d}" for i in range(count)]
    labels = {name: i % 2 for i, name in enumerate(names)}
    bags = make_bags(features, names, names, [tiles] * count, {"key": "benchmark"})
    tensors = [torch.from_numpy(bags.bag(name)) for name in names]
    with tempfile.TemporaryFile() as handle:
        mapped: np.ndarray = np.memmap(handle, np.float16, "w+", shape=features.shape)
    mapped[:] = features
    packed = make_bags(mapped, names, names, [tiles] * count, {"key": "benchmark"})

    whole = {"tile_fraction": 1.0, "max_tiles": None, "bags_per_step": 1}
    plain = partial(plain_loop, tensors, list(labels.values()), epochs)
    tasks = {
        "plain 1": partial(plain, 1),
        "first": partial(ours, bags, labels, 1, **whole),
        "whole": partial(ours, bags, labels, epochs, **whole),
        "mapped": partial(ours, packed, labels, epochs, **whole),
        "default": partial(ours, bags, labels, epochs),
        "plain 2": partial(plain, 2),
        "pair": partial(two_members, partial(ours, bags, labels, epochs, **whole)),
    }
    few = dict(list(labels.items())[:4])
    plain_loop(tensors[:4], [0, 1, 0, 1], 1, 1)  # what is paid once per process
    ours(bags, few, 1)
    times = in_turns(tasks, repeats, warm=False)
    size = f"{count} bags x {tiles} x {DIM}"
    row = partial(compare, "mil", unit="bags/s")
    epoch = later_epochs(times["whole"], times["first"], epochs)
    one, two = {"beside": "plain PyTorch, 1 thread"}, {"beside": "plain PyTorch, 2 threads"}
    return [
        row(f"{size}, every tile, per epoch", figure=epoch, limit=times["plain 1"], bar=">=1", **one),
        row(f"{size}, every tile, all in", figure=times["whole"], limit=times["plain 1"], **one),
        row(f"{size}, every tile, all in, from disk as float16", figure=times["mapped"], limit=times["plain 1"], **one),
        row(f"{size}, as configured by default, all in", figure=times["default"], limit=times["plain 1"], **one),
        row(f"{size}, every tile, all in, two members", figure=times["pair"], limit=times["plain 2"], **two),
    ]
