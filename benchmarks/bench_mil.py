"""An epoch of the project's trainer beside a plain PyTorch loop over tensors in memory, of the same architecture."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers as peer_programs
import torch
import torch.nn.functional as F
from measure import Row, Timed, compare, in_turns
from slidemake.mil.bags import Bags, make_bags
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.training.plan import member_plan
from torch import Tensor, nn

DIM = 1280
FEW_TURNS = 3  # of everything; then only of what a bar is on
MANY_TURNS = ("plain 1", "first", "whole")


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


def job_minutes(bags: Bags, labels: dict[str, int], members: int) -> tuple[Timed, Timed]:
    """Minutes that 5 folds and 5 seeds take on two threads: with one member a fold, and with the four that it has
    by default. From `members` of them, trained as configured by default to their early stop (test predictions and
    calibration, a matter of seconds, are not in it).
    """
    objective, names = class_objective(labels, sorted(labels), 2, DEFAULTS), sorted(labels)
    plan = member_plan(names[: len(names) * 4 // 5], [], labels, DEFAULTS["validation"], 0)
    jobs = [(*plan[i % len(plan)], i) for i in range(members)]

    def one(job: tuple[list[str], list[str], int]) -> int:
        train, val, seed = job
        return len(fit_member(bags, objective, train, val, DEFAULTS, seed).curve)

    def all_of_them() -> float:
        with ThreadPoolExecutor(2, initializer=partial(torch.set_num_threads, 1)) as pool:
            list(pool.map(one, jobs))
        return members

    rate = in_turns({"job": all_of_them}, 1, warm=False)["job"]

    def minutes(fits: int) -> Timed:
        return Timed([fits / rate.wall[0] / 60], [fits / rate.cpu[0] / 60])

    return minutes(25), minutes(25 * len(plan))


def memory(folder: Path, count: int, tiles: int, dim: int) -> float:
    """MB that an epoch over `count` bags of `tiles` tiles in a file of float16 needs, beyond what training on eight
    small bags took (the features are zeros, so that the file is sparse).
    """
    path = str(folder / "features.npy")
    code = f"""
import json, resource, sys
sys.path[:0] = {sys.path[:2]!r}
import numpy as np, torch, bench_mil
from slidemake.mil.bags import make_bags
torch.set_num_threads(1)
count, tiles, dim = {count}, {tiles}, {dim}
names = [f"{{i:05d}}" for i in range(count)]
def largest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = make_bags(np.zeros((8 * 64, dim), np.float32), names[:8], names[:8], [64] * 8, {{"key": "b"}})
labels = {{name: i % 2 for i, name in enumerate(names)}}
bench_mil.ours(small, dict(list(labels.items())[:8]), 1)
before = largest()
np.lib.format.open_memmap({path!r}, "w+", np.float16, (count * tiles, dim))
bags = make_bags(np.load({path!r}, mmap_mode="r"), names, names, [tiles] * count, {{"key": "b"}})
bench_mil.ours(bags, labels, 1)
print(json.dumps(largest() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    Path(path).unlink()
    return float(json.loads(done.stdout.splitlines()[-1]))


def all_turns(
    tasks: dict[str, Any], turns: int, others: dict[str, Any], size: list[str]
) -> tuple[dict[str, Timed], Timed]:
    """Every task in turns, torchmil's program among them; after FEW_TURNS only the MANY_TURNS."""
    times, theirs = {name: Timed() for name in tasks}, Timed()
    for turn in range(turns):
        now = {name: task for name, task in tasks.items() if turn < FEW_TURNS or name in MANY_TURNS}
        for name, timed in in_turns(now, 1, warm=False).items():
            times[name].add(timed)
        if "torchmil" in others and len(theirs.wall) == turn:  # one that failed is not tried again
            try:
                peer_programs.measure_once(others, "torchmil", size, False, theirs)
            except peer_programs.PeerFailed as error:
                print(error, file=sys.stderr)
    return times, theirs


def measure(size: dict[str, Any], turns: int, folder: Path, others: dict[str, Any]) -> list[Row]:
    """Rows for the bags of `size`: an epoch beside a plain loop and torchmil, a whole job, memory of a large cohort."""
    count, tiles, epochs = size["bags"]
    many = size["many"]
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
    times, theirs = all_turns(tasks, turns, others, [str(count), str(tiles)])
    what = f"{count} bags x {tiles} x {DIM}"
    row = partial(compare, "mil", unit="bags/s")
    epoch = later_epochs(times["whole"], times["first"], epochs)
    one, two = {"beside": "plain PyTorch, 1 thread"}, {"beside": "plain PyTorch, 2 threads"}
    job = job_minutes(bags, labels, size["members"])
    extra = memory(folder, *many)
    rows = [
        row(f"{what}, every tile, per epoch", figure=epoch, limit=times["plain 1"], bar=">=1", **one),
        row(f"{what}, every tile, all in", figure=times["whole"], limit=times["plain 1"], **one),
        row(f"{what}, every tile, all in, from disk as float16", figure=times["mapped"], limit=times["plain 1"], **one),
        row(f"{what}, as configured by default, all in", figure=times["default"], limit=times["plain 1"], **one),
        row(f"{what}, every tile, all in, two members", figure=times["pair"], limit=times["plain 2"], **two),
    ]
    if theirs.wall:
        beside = "torchmil, own loop, 1 thread"
        rows.append(row(f"{what}, every tile, per epoch", figure=epoch, limit=theirs, beside=beside))
    for figure, fits in zip(job, ("one member a fold", "four members a fold, as by default"), strict=True):
        name = f"{what}: 5 folds, 5 seeds, {fits}; 2 threads, from {size['members']} members"
        ten = Timed([10.0], [20.0])
        rows.append(compare("mil", name, "min", figure, "10 minutes", ten, bar="<=10", absolute=True))
    batch = DEFAULTS["bags_per_step"] * min(many[1], DEFAULTS["max_tiles"]) * many[2] * 4 / 2**20
    rows.append(
        compare(
            "mil",
            f"memory of an epoch, {many[0]} bags x {many[1]} x {many[2]} in a file",
            "MB",
            Timed([extra], [extra]),
            "a batch's tiles as float32",
            Timed([batch], [batch]),
        )
    )
    return rows
