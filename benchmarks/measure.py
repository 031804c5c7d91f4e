"""Timing things beside each other: in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """A figure beside its limit, or beside a peer, measured in the same run.

    `ratio` is figure / limit. `cpu_ratio` compares the CPU time of the two: it hardly moves on a busy machine. `bar`
    is what the ratio, or, with `absolute`, the figure itself must reach ("<=0.05": stay below).
    """

    section: str
    name: str
    figure: float
    unit: str
    beside: str
    limit: float
    ratio: float
    cpu_ratio: float | None = None
    bar: str = ""
    absolute: bool = False
    figures: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Whether the bar is met or missed: where the interval of the median lies on one side of it, otherwise
        "unclear"; empty without a bar."""
        if not self.bar:
            return ""
        values = self.figures if self.absolute else self.ratios
        below, bar = self.bar.startswith("<="), float(self.bar[2:])
        reached = {value <= bar if below else value >= bar for value in median_interval(values)}
        return "unclear" if len(reached) > 1 else "met" if reached == {True} else "missed"

    @property
    def ratios(self) -> list[float]:
        """Turn by turn."""
        return [a / b for a, b in zip(self.figures, self.limits, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Two of the values between which the median of what they are drawn from lies with at least `level`.

    The interval of order statistics, which assumes no distribution: the k-th smallest and largest, with the largest k
    for which 2 P(Binomial(n, 1/2) < k) <= 1 - level. Below six values not even the extremes reach 95 %: they are given.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 2 * 0.5**n, 1
    while k < n // 2 and outside + 2 * math.comb(n, k) * 0.5**n <= 1 - level:
        outside += 2 * math.comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[n - k]


@dataclass
class Timed:
    """What was measured of one thing: units per second of wall clock and per second of CPU, one per repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def first(self, turns: int) -> Timed:
        return Timed(self.wall[:turns], self.cpu[:turns])

    def add(self, other: Timed) -> None:
        self.wall += other.wall
        self.cpu += other.cpu


def cpu_seconds() -> float:
    """CPU time of this process with all its threads, and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def in_turns(tasks: Mapping[str, Callable[[], float]], repeats: int, warm: bool = True) -> dict[str, Timed]:
    """Run all tasks one after the other, `repeats` times. A task returns how many units (tiles, bags) it did.

    With `warm` there is a first turn that does not count.
    """
    results = {name: Timed() for name in tasks}
    gc.collect()
    for turn in range(repeats + warm):
        for name, task in tasks.items():
            cpu, started = cpu_seconds(), time.perf_counter()
            units = task()
            seconds, busy = time.perf_counter() - started, cpu_seconds() - cpu
            if turn >= warm:
                results[name].wall.append(units / max(seconds, 1e-9))
                results[name].cpu.append(units / max(busy, 1e-6))
    return results


def compare(
    section: str,
    name: str,
    unit: str,
    figure: Timed,
    beside: str,
    limit: Timed,
    *,
    bar: str = "",
    absolute: bool = False,
    clock: str = "wall",
) -> Row:
    """The row of two things measured `in_turns`: medians, and the median of the ratios turn by turn."""
    turns = min(len(figure.wall), len(limit.wall))  # peers take fewer turns: pair by pair as far as both go
    figure, limit = figure.first(turns), limit.first(turns)
    figures, limits = (figure.wall, limit.wall) if clock == "wall" else (figure.cpu, limit.cpu)
    return Row(
        section=section,
        name=name,
        figure=statistics.median(figures),
        unit=unit,
        beside=beside,
        limit=statistics.median(limits),
        ratio=statistics.median(a / b for a, b in zip(figures, limits, strict=True)),
        cpu_ratio=statistics.median(a / b for a, b in zip(figure.cpu, limit.cpu, strict=True)),
        bar=bar,
        absolute=absolute,
        figures=figures,
        limits=limits,
    )
