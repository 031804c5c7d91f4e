"""Timing things beside each other: in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
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
        """Whether the bar is met or missed: only where all turns agree, otherwise "unclear"; empty without a bar."""
        if not self.bar:
            return ""
        values = self.figures if self.absolute else [a / b for a, b in zip(self.figures, self.limits, strict=True)]
        below, bar = self.bar.startswith("<="), float(self.bar[2:])
        reached = {value <= bar if below else value >= bar for value in values}
        return "unclear" if len(reached) > 1 else "met" if reached == {True} else "missed"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass
class Timed:
    """What was measured of one thing: units per second of wall clock and per second of CPU, one per repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def first(self, turns: int) -> Timed:
        return Timed(self.wall[:turns], self.cpu[:turns])


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
