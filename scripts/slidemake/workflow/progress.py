"""How far a run is, and how long each stage still takes, told on the terminal while it goes on.

`Watch` hears what Snakemake logs (which jobs there are, which began, ended or failed) and follows the lines that
running jobs leave beside their logs (`timings`). The estimate of a stage is what its jobs took so far, in this run, for
the jobs that are left, divided by how many can run side by side; the range beside it is the 95 % prediction interval
for the mean of those jobs. A stage of which no slide is done has no estimate, and a run with such a stage has a lower
bound.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidemake.core.words import duration
from slidemake.jobs.racks import Machine
from slidemake.jobs.timings import OUTCOMES, JobRun, fold, lines

FIRST, LONGEST = 15.0, 300.0  # s between reports: doubles from one to the other
TICK = 2.0  # s between two looks at the lines of running jobs
LONG = 60.0  # s in work at one stage, after which a slide is named
# Quantiles of Student's t for 95 % two-sided, by degrees of freedom from 1: SciPy's statistics take longer to import
# than a small plan takes.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Estimate:
    """Seconds that are left, and a range that holds them in 95 of 100 cases (None: from one job, or nothing known)."""

    seconds: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = f"about {duration(self.seconds)} left"
        if self.low is None or self.high is None:
            return f"{text} (judged by one job)"
        low, high = duration(self.low), duration(self.high)
        return text if low == high else f"{text} ({low} to {high})"


@dataclass
class Job:
    """A job of this run: where its lines are, and what they say."""

    rule: str
    name: str
    threads: int
    lines: Path | None
    began: float  # s since 1970, as the process that watches knows it
    offset: int = 0
    runs: dict[str, JobRun] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    @property
    def run(self) -> JobRun | None:
        """The latest of its runs (a preempted job is started again)."""
        return next(reversed(self.runs.values()), None)


@dataclass
class Stage:
    """The jobs of one rule: how many this run has, those that run, and what those that are done took."""

    total: int = 0
    finished: int = 0
    failed: int = 0
    running: dict[int, Job] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each finished job
    threads: int = 1
    slides: int = 0  # looked at by finished jobs
    failed_slides: int = 0
    peak: int = 0  # jobs side by side

    def samples(self) -> list[tuple[float, float]]:
        """(share of a job that is done, seconds that it took) of every job of which something is."""
        found = [(1.0, seconds) for seconds in self.seconds]
        runs = [job.run for job in self.running.values()]
        return found + [(run.fraction, run.seconds) for run in runs if run is not None and run.fraction > 0]

    @property
    def left(self) -> float:
        """Jobs that are left, with the open part of those that run."""
        part = sum(min(1.0, share) for share, _ in self.samples()) - len(self.seconds)
        return max(0.0, self.total - self.finished - self.failed - part)


def estimate(samples: list[tuple[float, float]], left: float, side_by_side: int) -> Estimate | None:
    """Time for `left` jobs, of which `side_by_side` run at a time, from (share of a job, seconds for it) of others.

    None: unknown. The mean is all seconds over all shares, so that each slide counts alike. The range is that of a
    prediction: the spread of jobs over the root of how many were seen, and of how many are left.
    """
    share = sum(part for part, _ in samples)
    if left <= 0:
        return Estimate(0.0, 0.0, 0.0)
    if share <= 0:
        return None
    mean = sum(seconds for _, seconds in samples) / share
    if mean <= 0:
        return Estimate(0.0, 0.0, 0.0)
    parallel = min(side_by_side, max(1, math.ceil(left)))
    seconds = left * mean / parallel
    if len(samples) < 2:
        return Estimate(seconds)
    # Weighted by share: a job that has just begun tells little.
    spread = sum(part * (took / part - mean) ** 2 for part, took in samples) / share
    count = share**2 / sum(part**2 for part, _ in samples)  # of whole jobs that tell as much
    freedom = max(1, math.floor(count) - 1)
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom
    error = t * math.sqrt(spread * count / max(count - 1, 0.5) * (1 / count + 1 / max(left, 1.0)))
    return Estimate(seconds, max(0.0, seconds * (1 - error / mean)), seconds * (1 + error / mean))


class Watch(logging.Handler):
    """Collects from Snakemake's log records once it is attached, and reports from `begin` to `end`.

    every: s between reports; 0: none; "auto": 15 s at first, doubling to 5 min. On a cluster jobs do not print here, so
    that failures of slides are told by this process, as they happen.
    """

    def __init__(self, machine: Machine, every: float | str = "auto", tell: Callable[[str], None] | None = None):
        super().__init__(logging.INFO)
        self.machine, self.tell = machine, tell or _on_terminal
        self.every = None if every == "auto" else float(every)
        self.stages: dict[str, Stage] = {}
        self.jobs: dict[int, Job] = {}
        self.outcomes: dict[str, str] = {}  # {slide: what became of it in this run, over all stages}
        self.on_plan: Callable[[], str | None] | None = None  # what to say of a plan when Snakemake shows it
        self._failed: set[int] = set()  # jobs, which may be tried again
        self._guard = threading.RLock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._began: float | None = None
        self._last: list[str] = []

    def attach(self) -> None:
        """Hear what Snakemake logs."""
        logging.getLogger("snakemake.logging").addHandler(self)

    # -- what Snakemake says ----------------------------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        """A log record of Snakemake's; those that tell of jobs carry `event`. Never stops the run."""
        try:
            with self._guard:
                self._hear(str(getattr(record, "event", "") or ""), record.__dict__)
        except Exception:  # as every handler of logging does: said on the terminal, with its traceback
            self.handleError(record)

    def _hear(self, kind: str, about: dict[str, Any]) -> None:
        if kind == "run_info":
            if self.on_plan is not None and (said := self.on_plan()):
                self.tell(f"slidemake: {said}")
            self.stages = {rule: Stage(total=int(n)) for rule, n in about["stats"].items() if rule != "total"}
        elif self._began is None:
            return  # a dry run shows jobs, too
        elif kind == "job_info":
            self._start(about)
        elif kind == "job_finished":
            self._finish(int(about["job_id"]))
        elif kind == "job_error":
            self._finish(int(about["jobid"]), well=False)

    def _start(self, about: dict[str, Any]) -> None:
        rule, log_files = about["rule_name"], list(about["log"] or ())
        where = Path(str(log_files[0])).with_suffix(".jsonl") if log_files else None
        offset = where.stat().st_size if where is not None and where.exists() else 0
        name = " ".join([rule, *map(str, dict(about["wildcards"] or {}).values())])
        job = Job(rule, name, int(about["threads"] or 1), where, time.time(), offset)
        stage = self.stages.setdefault(rule, Stage())
        if int(about["jobid"]) in self._failed:
            self._failed.remove(int(about["jobid"]))
            stage.failed -= 1
        stage.running[int(about["jobid"])] = job
        stage.threads, stage.peak = job.threads, max(stage.peak, len(stage.running))
        self.jobs[int(about["jobid"])] = job

    def _finish(self, jobid: int, well: bool = True) -> None:
        job = self.jobs.pop(jobid, None)
        if job is None:
            return
        self._follow(job)
        stage, run = self.stages[job.rule], job.run
        stage.running.pop(jobid, None)
        if well:
            stage.finished += 1
            stage.seconds.append(run.seconds if run is not None else time.time() - job.began)
        else:
            stage.failed += 1
            self._failed.add(jobid)
        if run is not None:
            stage.slides += len(run.outcomes)
            stage.failed_slides += run.failed
            self._remember(run)

    def _remember(self, run: JobRun) -> None:
        for slide_id, outcome in run.outcomes.items():
            known = self.outcomes.get(slide_id, outcome)
            self.outcomes[slide_id] = min(known, outcome, key=OUTCOMES.index)

    # -- what running jobs say --------------------------------------------------------------------------------------

    def _follow(self, job: Job) -> None:
        """Read what a job has added since the last look."""
        if job.lines is None or not job.lines.exists():
            return
        with open(job.lines, "rb") as handle:
            if job.lines.stat().st_size < job.offset:  # it was begun anew
                job.offset = 0
            handle.seek(job.offset)
            new = handle.read()
        whole = new[: new.rfind(b"\n") + 1]
        job.offset += len(whole)
        found = list(lines(whole.decode(errors="replace")))
        fold(job.runs, found)
        for line in found if self.machine.cluster else ():
            slide_id = str(line.get("slide_id"))
            if line["event"] == "slide" and line.get("outcome") == "failed" and slide_id not in job.told:
                job.told.add(slide_id)
                why = f"slide {slide_id} failed ({line.get('code')}): {line.get('message')}"
                self.tell(f"slidemake: {_printable(f'{job.name}: {why}')}")

    def look(self) -> None:
        """Take in what all running jobs have written."""
        with self._guard:
            for job in list(self.jobs.values()):
                try:
                    self._follow(job)
                except OSError:  # a network file system on a bad day: the next look tells
                    continue

    # -- what is told -----------------------------------------------------------------------------------------------

    def side_by_side(self, rule: str) -> int:
        """How many jobs of a rule run at a time: on a cluster, as many as did."""
        stage, machine = self.stages[rule], self.machine
        if machine.cluster:
            return max(1, stage.peak)
        fit = max(1, machine.cores // stage.threads)
        return min(fit, machine.gpus) if machine.gpus and rule.startswith("embed_tiles") else fit

    def report(self) -> list[str]:
        """A line for each stage that is under way, below a line for the run; nothing when there is nothing to tell."""
        known: list[Estimate] = []
        unknown, told = [], []
        with self._guard:
            for rule, stage in self.stages.items():
                if stage.left <= 0:
                    continue
                found = estimate(stage.samples(), stage.left, self.side_by_side(rule))
                if found is None:
                    unknown.append(rule)
                else:
                    known.append(found)
                if found is not None or stage.running:
                    told.append(f"  {rule:17} {_counts(stage):32} {found or 'no estimate yet'}")
                told += [f"    {slide}" for slide in _long_in_work(stage, time.time())]
        return [f"slidemake: {line}" for line in (self._whole(known, unknown), *told)] if told else []

    def _whole(self, known: list[Estimate], unknown: list[str]) -> str:
        """All stages together. On one machine they share the cores, so their times add; on a cluster they overlap."""
        ran = f"running for {duration(time.monotonic() - (self._began or 0.0))}"
        seconds = (max if self.machine.cluster else sum)([e.seconds for e in known] or [0.0])
        first, more = unknown[:3], len(unknown) - 3
        missing = f"; not yet known: {', '.join(first)}{f' and {more} more' * (more > 0)}" if unknown else ""
        if not known:
            return f"{ran}{missing}"
        if unknown or self.machine.cluster:
            return f"{ran}, at least {duration(seconds)} left{missing}"
        if any(e.low is None or e.high is None for e in known):
            return f"{ran}, about {duration(seconds)} left"
        below = math.sqrt(sum((e.seconds - (e.low or 0.0)) ** 2 for e in known))
        above = math.sqrt(sum(((e.high or 0.0) - e.seconds) ** 2 for e in known))
        return f"{ran}, {Estimate(seconds, max(0.0, seconds - below), seconds + above)}"

    def begin(self, rules: Iterable[str]) -> None:
        """Report on these rules (in this order) from now on, in a thread of its own, until `end`."""
        with self._guard:
            self.stages = {rule: self.stages[rule] for rule in rules if rule in self.stages}
            self._began = time.monotonic()
        if self.every == 0 and not self.machine.cluster:
            return
        self._thread = threading.Thread(target=self._work, name="slidemake progress", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        pause = self.every or FIRST
        due = math.inf if self.every == 0 else time.monotonic() + pause
        while not self._over.wait(min(TICK, pause)):
            self.look()
            if time.monotonic() < due:
                continue
            told = self.report()
            if told[1:] != self._last:  # nothing new is not told again
                self._last = told[1:]
                self.tell("\n".join(told))
            pause = self.every or min(LONGEST, 2 * pause)
            due = time.monotonic() + pause

    def end(self) -> None:
        """Report no more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def summary(self, output: Path, slides: int) -> list[str]:
        """What to say at the end of a run on `slides` slides: what became of them, and where the report is, if this run
        wrote one.
        """
        self.look()
        with self._guard:
            for job in self.jobs.values():  # those that were stopped
                for run in job.runs.values():
                    self._remember(run)
            counts = Counter(self.outcomes.values())
            written = [rule for rule in self.stages if rule.endswith("write_report") and self.stages[rule].finished]
        said = []
        if self.outcomes:
            words = {"ok": "computed", "reused": "found finished", "failed": "failed"}
            told = [f"{counts[outcome]:,} {word}" for outcome, word in words.items() if counts[outcome]]
            told += [f"{left:,} not looked at"] if (left := slides - len(self.outcomes)) > 0 else []
            said.append(f"of {slides:,} slides {', '.join(told)}")
        return said + [f"the report is {output}/report/index.html" for _ in written]


def _long_in_work(stage: Stage, now: float) -> list[str]:
    """Slides of running jobs that have been in work for long, the longest first: at most three are named."""
    runs = [job.run for job in stage.running.values() if job.run is not None]
    began = sorted((at, slide_id) for run in runs for slide_id, at in run.in_work.items() if now - at >= LONG)
    return [f"slide {_printable(slide_id)} has been in work for {duration(now - at)}" for at, slide_id in began[:3]]


def _counts(stage: Stage) -> str:
    runs = [job.run for job in stage.running.values() if job.run is not None]
    slides = stage.slides + sum(len(run.outcomes) for run in runs)
    failed = stage.failed_slides + sum(run.failed for run in runs)
    parts = [f"{stage.finished}/{stage.total} jobs"]
    parts += [f"{slides:,} slides"] if slides else []
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{stage.failed} jobs failed"] if stage.failed else []
    return ", ".join(parts)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _on_terminal(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
