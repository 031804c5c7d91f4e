"""What every rule's script does around its one call into the library: logging, clear errors, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from slidemake.core import currency
from slidemake.core.failures import RunError, SlideFailure, disk_trouble
from slidemake.jobs import isolation, timings


@contextmanager
def job(snakemake: Any) -> Iterator[Any]:
    """Run a rule's body: log to the rule's log file and to the terminal, end a `RunError` with its message alone.

    The body runs in a process of its own (`isolation`); the process that Snakemake started ends here, with the body's
    exit code. An unexpected exception keeps its traceback in the log file; the terminal gets one line that names the
    file.
    """
    log_file = Path(str(snakemake.log[0])) if snakemake.log else None
    try:
        _configure_logging(log_file)
    except OSError as error:
        sys.exit(str(disk_trouble(error, f"rule {snakemake.rule} opened its log") or error))
    declared = getattr(snakemake, "resources", {}).get("mem_mb")
    declared = declared if isinstance(declared, int) else None
    wildcards = dict(getattr(snakemake, "wildcards", {}).items())
    timings.start(log_file, snakemake.rule, wildcards, getattr(snakemake, "threads", 1), declared)
    try:
        apart = isolation.supervised(isolation.Job(snakemake.rule, log_file, declared))
    except SystemExit as end:  # this is the supervisor, and the work is over
        timings.end(end.code if isinstance(end.code, int) else 1, forked=True)
        raise
    _stop_on_sigterm()
    code = 1
    try:
        params = dict(getattr(snakemake, "params", {}).items())
        ticket = currency.begin(getattr(snakemake, "output", ()), params, getattr(snakemake, "input", ()))
        yield snakemake
        if ticket is not None and isolation.tried_alone() is None and not ticket.done():
            logging.getLogger("slidemake").warning("another run takes part here: the next run looks at this again")
        code = 0
    except Exception as error:
        _tell(error, snakemake.rule, log_file)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    if apart:
        isolation.leave(code)
    timings.end(code, forked=False)
    if code:
        sys.exit(code)


def _stop_on_sigterm() -> None:
    """Preemption ends the job within seconds, with temporary files removed and finished slides kept."""

    def stop(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the tidying up
        log = logging.getLogger("slidemake")
        log.warning("received SIGTERM: stopping; finished slides are kept and the next run goes on from here")
        sys.exit(143)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _tell(error: Exception, rule: str, log_file: Path | None) -> None:
    log = logging.getLogger("slidemake")
    if isinstance(error, RunError):
        log.error("%s", error)
        return
    if isinstance(error, SlideFailure):  # where no slide is worked on alone
        log.error("rule %s stopped: %s. %s", rule, error, error.hint)
        return
    if trouble := disk_trouble(error, f"rule {rule} worked"):
        log.error("%s", trouble)
        return
    text, where = "".join(traceback.format_exception(error)), f" (traceback in {log_file})"
    try:
        if log_file is None:
            raise FileNotFoundError("there is no log file")
        with open(log_file, "a") as handle:
            handle.write(text)
    except OSError:
        where = ""
        sys.stderr.write(text)
    log.error("rule %s stopped: %s: %s%s", rule, type(error).__name__, error, where)


def _configure_logging(log_file: Path | None) -> None:
    log = logging.getLogger("slidemake")
    log.setLevel(logging.DEBUG)  # a line for every slide: in the log file
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if log_file:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("")
        to_file = _LogFile(log_file, mode="a")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
    logging.captureWarnings(True)


class _LogFile(logging.FileHandler):
    """A log that cannot be written (a full disk) is told of once, and does not stop the work."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging calls it so)
        if not self.told:
            self.told = True
            print(f"the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def available_cpus() -> int:
    """CPUs this process may use: its affinity and the quotas of its cgroups, not what the machine has."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(cpus), *cgroup_quotas()])))


def cgroup_quotas(mounted: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[float]:
    """CPUs' worth of time that this process's cgroup and those around it may use, of each that has a limit.

    Both versions of cgroups; a container sees its own as the root, a service or a job of a batch system is deeper.
    """
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return []  # no Linux
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path(mounted, controllers or ".")
        inside = PurePosixPath(place.lstrip("/"))
        for folder in (root / part for part in (inside, *inside.parents)):
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # -1: no limit
                    found.append(float(quota) / float(period))
            except (OSError, ValueError):
                continue  # no such file here (the path is the host's), or `max`
    return found
