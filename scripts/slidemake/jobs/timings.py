"""When each job did what, as JSON lines beside its log: `logs/<rule>/.../<rack>.jsonl`.

A job writes its own file and no other, so no two jobs share one; a job that is run again (after a kill, by a twin)
appends to it, a line at a time. Whoever reads skips what is no whole line: a record of what happened decides nothing.
`job_runs` makes of the lines what the report shows; `progress` follows them while a run goes on.

Events, all with `run` (which of the runs of the job) and `time` (s since 1970):
start: rule, wildcards, host, threads, mem_mb (declared). rack: stage, slides (how many there are to look at).
begin: slide_id (its work begins).
slide: slide_id, outcome (ok, reused, failed), seconds, and of failures code, message, stage.
end: code (exit code), cpu_seconds, max_rss_mb (of the largest process that worked).
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger("slidemake")

OUTCOMES = ("failed", "ok", "reused")  # of a slide at a stage; over several stages the first of them counts
LARGEST = 4 << 20  # bytes; a file that has grown beyond this by runs of years begins anew
_RULE = re.compile(r"[A-Za-z_][\w.]*")  # embed_tiles_224px_0.5mpp is one
_MB = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss


@dataclass
class _Diary:
    """The open file of this job, and which of its runs this is."""

    file: int
    run: str


_diary: _Diary | None = None  # of this process and of those that it forks


def start(log_file: Path | None, rule: str, wildcards: Mapping[str, Any], threads: int, mem_mb: int | None) -> None:
    """Begin the record of a job's run, beside its log file; without a log file nothing is recorded."""
    global _diary
    if log_file is None:
        return
    path = log_file.with_suffix(".jsonl")
    try:
        anew = os.O_TRUNC if path.exists() and path.stat().st_size > LARGEST else 0
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | anew, 0o666)
    except OSError as error:
        log.warning("%s cannot be written (%s): the times of this job are not recorded", path, error)
        return
    _diary = _Diary(file, f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}")
    about = {"rule": rule, "wildcards": dict(wildcards), "threads": threads, "mem_mb": mem_mb}
    # Imports took time and CPU before this line.
    event("start", time=psutil.Process().create_time(), host=socket.gethostname(), **about)


def event(kind: str, **facts: Any) -> None:
    """Append one line. A line that cannot be written is told once and ends the record, not the job."""
    global _diary
    if _diary is None:
        return
    line = json.dumps({"event": kind, "run": _diary.run, "time": round(time.time(), 3), **facts})
    try:
        # One call, so that lines of threads and twins do not mix; a start opens a line, whatever a killed job left.
        os.write(_diary.file, f"{chr(10) if kind == 'start' else ''}{line}\n".encode())
    except OSError as error:
        _diary = None
        log.warning("the times of this job are no longer recorded: %s", error)


def end(code: int, *, forked: bool) -> None:
    """Close the record of this run: exit code, CPU time, largest memory. `forked`: children did the work."""
    global _diary
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    largest = children.ru_maxrss if forked else max(own.ru_maxrss, children.ru_maxrss)
    event("end", code=code, cpu_seconds=round(cpu, 2), max_rss_mb=round(largest / _MB))
    if _diary is not None:
        os.close(_diary.file)
        _diary = None


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass
class JobRun:
    """One run of a job, as far as its lines tell. `ended` is the time of its last line; `code` None: it was killed, or
    goes on. Memory in MB, `cpu` in seconds."""

    rule: str
    wildcards: dict[str, str]
    started: float
    ended: float
    threads: int = 1
    declared_mb: int | None = None
    code: int | None = None
    cpu: float | None = None
    mb: float | None = None
    slides: int = 0  # that the rack has
    outcomes: dict[str, str] = field(default_factory=dict)  # {slide: one of OUTCOMES, at this stage}
    in_work: dict[str, float] = field(default_factory=dict)  # {slide: when its work began}

    @property
    def seen(self) -> set[str]:
        return set(self.outcomes)

    @property
    def reused(self) -> int:
        return sum(outcome == "reused" for outcome in self.outcomes.values())

    @property
    def failed(self) -> int:
        return sum(outcome == "failed" for outcome in self.outcomes.values())

    @property
    def seconds(self) -> float:
        return max(0.0, self.ended - self.started)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, by slides."""
        return 1.0 if self.code == 0 else min(1.0, len(self.outcomes) / self.slides) if self.slides else 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a later line; raises ValueError, TypeError or KeyError, with nothing changed, if it is damaged."""
        moment = _moment(line)
        if line["event"] == "rack":
            self.slides = max(self.slides, int(line["slides"]))
        elif line["event"] == "begin":
            self.in_work[str(line["slide_id"])] = moment
        elif line["event"] == "slide":
            if line["outcome"] not in OUTCOMES:
                raise ValueError(f"a slide that is {line['outcome']}")
            self.in_work.pop(str(line["slide_id"]), None)
            self.outcomes.setdefault(str(line["slide_id"]), str(line["outcome"]))
        elif line["event"] == "end":
            self.code, self.cpu, self.mb = int(line["code"]), float(line["cpu_seconds"]), float(line["max_rss_mb"])
        self.ended = max(self.ended, moment)


def _moment(line: Mapping[str, Any]) -> float:
    """The time of an event; ValueError for one that cannot be."""
    moment = float(line["time"])
    if not 0 <= moment < time.time() + 86400:  # a day for clocks that differ; NaN is refused, too
        raise ValueError(f"an event at {moment}")
    return moment


def lines(text: str) -> Iterator[dict[str, Any]]:
    """The events in a text; what is no whole event is passed over."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("event"), str):
            yield found


def fold(runs: dict[str, JobRun], events: Iterable[Mapping[str, Any]]) -> None:
    """Take events into `runs` (by their run); those of no known run, or with odd values, are passed over."""
    for line in events:
        try:
            if line["event"] == "start":
                began, wildcards = _moment(line), {str(k): str(v) for k, v in line["wildcards"].items()}
                declared = None if line.get("mem_mb") is None else int(line["mem_mb"])
                if not _RULE.fullmatch(line["rule"]):
                    continue
                about = (line["rule"], wildcards, began, began, int(line["threads"]), declared)
                runs[line["run"]] = JobRun(*about)
            elif line.get("run") in runs:
                runs[line["run"]].add(line)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue


def job_runs(results: Path) -> list[JobRun]:
    """All runs of all jobs that left lines in a folder of results, by their start."""
    found: list[JobRun] = []
    for path in sorted((results / "logs").rglob("*.jsonl")):
        runs: dict[str, JobRun] = {}
        fold(runs, lines(path.read_text(errors="replace")))
        found += runs.values()
    return sorted(found, key=lambda run: (run.started, run.rule))
