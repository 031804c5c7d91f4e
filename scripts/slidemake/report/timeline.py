"""The report's section on how the run went: which jobs ran when, and what they took of cores and memory.

Drawn from the lines that jobs leave beside their logs (`timings`). Times of several sessions are put side by side:
where nothing ran, the time is cut out.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.jobs.timings import JobRun, job_runs
from slidemake.report import figures

IDLE = 60.0  # s; longer pauses without any job are cut out of the drawing
POINTS = 600  # steps of a stage's curve at most
KILLED = "#D55E00"


def timeline_section(results: Path) -> dict[str, Any] | None:
    """What report_timeline.html.j2 shows; None where no job left a record."""
    runs = [run for run in job_runs(results) if not (run.rule == "write_report" and run.code is None)]  # this very job
    if not runs:
        return None
    stages: dict[str, list[JobRun]] = {}
    for run in runs:
        stages.setdefault(run.rule, []).append(run)
    sessions = busy_times(runs)
    return {
        "figure": timeline(stages, sessions),
        "stages": [stage_row(rule, of_stage) for rule, of_stage in stages.items()],
        "seconds": sum(end - start for start, end in sessions),
        "sessions": len(sessions),
        "cpu": sum(run.cpu or 0.0 for run in runs),
        "mb": max((run.mb or 0.0 for run in runs), default=0.0),
    }


def stage_row(rule: str, runs: list[JobRun]) -> dict[str, Any]:
    """Figures of one rule: seconds, CPU as a share of the threads that the jobs had, memory in MB (None: unknown)."""
    whole = [run for run in runs if run.code == 0]
    measured = [run for run in runs if run.cpu is not None]
    threads = sum(run.seconds * run.threads for run in measured)
    memory = [run.mb for run in measured if run.mb]
    declared = [run.declared_mb for run in runs if run.declared_mb]
    return {
        "rule": rule,
        "jobs": len(whole),
        "killed": sum(run.code is None for run in runs),
        "failed": sum(bool(run.code) for run in runs),
        "slides": sum(len(run.seen) - run.reused for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "median": statistics.median(run.seconds for run in whole) if whole else None,
        "longest": max((run.seconds for run in whole), default=None),
        "cpu": sum(run.cpu or 0.0 for run in measured) if measured else None,
        "use": sum(run.cpu or 0.0 for run in measured) / threads if threads > 0 else None,
        "mb": max(memory, default=None),
        "typical_mb": statistics.median(memory) if memory else None,
        "declared_mb": max(declared, default=None),
    }


def busy_times(runs: list[JobRun], idle: float = IDLE) -> list[tuple[float, float]]:
    """Spans (start, end) in which jobs ran, with pauses of up to `idle` seconds between them."""
    spans: list[list[float]] = []
    for run in sorted(runs, key=lambda run: run.started):
        if spans and run.started <= spans[-1][1] + idle:
            spans[-1][1] = max(spans[-1][1], run.ended)
        else:
            spans.append([run.started, run.ended])
    return [(start, end) for start, end in spans]


def working_time(moments: Any, sessions: list[tuple[float, float]]) -> np.ndarray:
    """Seconds of busy time before each moment."""
    starts = np.array([start for start, _ in sessions])
    before = np.concatenate([[0.0], np.cumsum([end - start for start, end in sessions])])
    moments = np.asarray(moments, float)
    at = np.clip(np.searchsorted(starts, moments, side="right") - 1, 0, None)
    lengths = np.diff(before)
    return before[at] + np.clip(moments - starts[at], 0.0, lengths[at])


def running(runs: list[JobRun], sessions: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(times, jobs): how many jobs ran from each time on, in busy seconds; of many jobs the mean over short spans."""
    starts = working_time([run.started for run in runs], sessions)
    ends = working_time([run.ended for run in runs], sessions)
    times = np.concatenate([starts, ends])
    change = np.concatenate([np.ones(len(runs)), -np.ones(len(runs))])
    order = np.lexsort((change, times))
    times, jobs = times[order], np.cumsum(change[order])
    if len(times) <= POINTS:
        return times, jobs
    edges = np.linspace(times[0], times[-1], POINTS + 1)
    area = np.concatenate([[0.0], np.cumsum(jobs[:-1] * np.diff(times))])
    return edges, np.append(np.diff(np.interp(edges, times, area)) / np.maximum(np.diff(edges), 1e-9), 0.0)


def timeline(stages: dict[str, list[JobRun]], sessions: list[tuple[float, float]]) -> str:
    """`data:` address of the drawing: a band for each rule, as high as jobs ran side by side."""
    figure, axes = figures.blank_figure(9.2, 0.8 + 0.34 * len(stages))
    total = sum(end - start for start, end in sessions)
    unit, name = (3600.0, "hours") if total >= 7200 else (60.0, "minutes") if total >= 120 else (1.0, "seconds")
    for place, runs in enumerate(reversed(stages.values())):
        colour = figures.COLOURS[(len(stages) - 1 - place) % len(figures.COLOURS)]
        times, jobs = running(runs, sessions)
        height = 0.78 * jobs / max(jobs.max(), 1.0)
        axes.fill_between(times / unit, place, place + height, step="post", color=colour, alpha=0.75, linewidth=0)
        ended_badly = [run.ended for run in runs if run.code != 0]
        if ended_badly:
            x = working_time(ended_badly, sessions) / unit
            axes.plot(x, np.full(len(x), place + 0.39), "x", color=KILLED, markersize=5)
        most = round(float(jobs.max()))
        beside = f"{most} at once" if most > 1 else ""
        axes.annotate(beside, (1.005, place + 0.2), xycoords=("axes fraction", "data"), fontsize=7)
    for start, _ in sessions[1:]:
        axes.axvline(float(working_time([start], sessions)[0]) / unit, color="#9aa0a6", linestyle=":", linewidth=1)
    axes.set_yticks([place + 0.39 for place in range(len(stages))], list(reversed(stages)))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.1, len(stages))
    axes.set_xlim(0, max(total / unit, 1e-9))
    axes.set_xlabel(f"{name} in which jobs ran (dotted: a pause, cut out; ×: a job that was killed or failed)")
    axes.grid(axis="y", visible=False)
    return figures.as_svg(figure)
