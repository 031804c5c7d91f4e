"""A job's work in a process of its own: a reader that dies, eats the memory or never ends costs its slide, not the run.

`supervised` forks before any slide is opened. The child does the job's work; the parent waits, passes signals on and
watches memory and clock. The child marks the slides that it is busy with on a board of shared memory, which survives
it. When it dies, each of these suspects is tried alone, in a fresh process; one that dies there too is condemned: the
next child writes a failure record for it (`crashed` or `out_of_memory`) and goes on with the others, finding finished
slides finished. A slide that is in work for longer than it may be (`slide_seconds`, and what `allow` adds) needs no
second trial: the child is stopped, and the slide is condemned as `too_slow`. Forking costs some milliseconds. On Linux
only: elsewhere the work runs in the process itself, and a crash ends the job.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from slidemake.core.failures import SlideFailure
from slidemake.jobs.memory import MemoryWatch

log = logging.getLogger("slidemake")

SLOTS, SLOT = 1024, 256  # slides that can be in work at once; bytes of each
NAME = SLOT - 16  # bytes for an id (at most 200 characters); behind it, when its work began and when it must have ended
TICK = 0.1  # s between two looks at the memory and the clock
UNHURRIED = 1e9  # s
PAUSE = 5.0  # s between two looks, from which on it is clear that the job was suspended
SECONDS = (
    "SLIDEMAKE_SLIDE_SECONDS"  # the environment tells jobs how long a slide may take, because it changes no result
)
GRACE = 8.0  # s that the work has to end after SIGTERM
DEATHS = 3  # a slide that was in work at this many deaths is condemned, even if it survives alone
HINTS = {
    "crashed": "The file is damaged in a way that a library does not survive, or the library has a defect. Copy it "
    "again from the scanner, try another reader (screening.reader), or set exclude. The last lines of Python are in "
    "{log}.",
    "out_of_memory": "Give the job more memory (--set-resources {rule}:mem_mb=...) or fewer threads and run again with "
    "--forcerun {rule}, or set exclude for the slide.",
    "too_slow": "Look at the file with another viewer; a slide without smaller levels is quicker as a pyramidal TIFF "
    "(vips tiffsave --tile --pyramid). If disk or machine were slow, raise slide_seconds and run again with --forcerun "
    "{rule}. Or set exclude for the slide.",
}


class Board:
    """Shared memory in which the working process says what it is busy with. Slot 0 tells that it ended in order."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOTS * SLOT)
        self._free = list(range(SLOTS - 1, 0, -1))
        self._lock = threading.Lock()

    @contextmanager
    def working_on(self, slide_id: str, seconds: float = 0.0) -> Iterator[int]:
        """Mark `slide_id` as in work, for `seconds` at most (0: for as long as it takes). Yields its slot."""
        text = slide_id.encode()[:NAME]
        with self._lock:
            slot = self._free.pop()
        at = slot * SLOT
        began = time.monotonic()
        self._memory[at + NAME : at + SLOT] = struct.pack("dd", began, began + seconds if seconds else float("inf"))
        self._memory[at : at + len(text)] = text
        try:
            yield slot
        finally:
            self._memory[at : at + SLOT] = bytes(SLOT)
            with self._lock:
                self._free.append(slot)

    def postpone(self, slot: int, seconds: float) -> None:
        """Let the slide in a slot take so much longer."""
        at = slot * SLOT
        began, until = struct.unpack("dd", self._memory[at + NAME : at + SLOT])
        self._memory[at + NAME : at + SLOT] = struct.pack("dd", began, until + seconds)

    def _slots(self) -> Iterator[tuple[int, str, float, float]]:
        for slot in range(1, SLOTS):
            text = self._memory[slot * SLOT : slot * SLOT + NAME].rstrip(b"\0")
            if text:
                times = struct.unpack("dd", self._memory[slot * SLOT + NAME : (slot + 1) * SLOT])
                yield slot, text.decode(errors="replace"), *times

    def in_work(self) -> list[str]:
        """Slides that were in work, sorted."""
        return sorted({slide_id for _, slide_id, _, _ in self._slots()})

    def overdue(self) -> dict[str, float]:
        """{slide: seconds in work} of the slides that are in work for longer than they may."""
        now = time.monotonic()
        return {slide_id: now - began for _, slide_id, began, until in self._slots() if began and now > until}

    def resume(self, pause: float) -> None:
        """The job was suspended: that time does not count."""
        for slot, *_ in list(self._slots()):
            self.postpone(slot, pause)

    def end(self) -> None:
        self._memory[0] = 1

    @property
    def ended(self) -> bool:
        return self._memory[0] == 1


@dataclass(frozen=True)
class Orders:
    """What a working process was told: the only slide to work on (None: all), and the slides that are condemned."""

    board: Board
    alone: str | None
    condemned: dict[str, SlideFailure]


_orders: Orders | None = None  # of this process; None where nobody supervises
_own = threading.local()  # `slot` of the slide that the thread is working on


def slide_seconds() -> float:
    """How long a stage may take for a slide, in s; 0: as long as it takes."""
    return float(os.environ.get(SECONDS) or 0)


@contextmanager
def working_on(slide_id: str) -> Iterator[None]:
    """Mark a slide as in work by the calling thread: should the process die now, it is a suspect. It may take
    `slide_seconds`, and what `allow` adds.
    """
    if _orders is None:
        yield
        return
    before = getattr(_own, "slot", None)
    with _orders.board.working_on(slide_id, slide_seconds()) as slot:
        _own.slot = slot
        try:
            yield
        finally:
            _own.slot = before


def allow(seconds: float) -> None:
    """Let the slide that this thread is working on take longer: for what is known to be much."""
    if _orders is not None and getattr(_own, "slot", None) is not None:
        _orders.board.postpone(_own.slot, seconds)


@contextmanager
def unhurried() -> Iterator[None]:
    """While work goes on that has limits of its own (a transfer), or none (a model), its time does not count."""
    started = time.monotonic()
    allow(UNHURRIED)
    try:
        yield
    finally:
        allow(time.monotonic() - started - UNHURRIED)


def condemned(slide_id: str) -> SlideFailure | None:
    """Why this slide must not be touched: it killed the process that worked on it."""
    return None if _orders is None else _orders.condemned.get(slide_id)


def tried_alone() -> str | None:
    """The only slide that this process is to work on, without writing a manifest; None: the whole rack."""
    return None if _orders is None else _orders.alone


def wanted(slide_id: str) -> bool:
    """Whether this process may work on the slide."""
    return condemned(slide_id) is None and tried_alone() in (None, slide_id)


@dataclass(frozen=True)
class Job:
    """What messages tell of a job: the rule, its log file (or None), the memory it declares in MB (or None)."""

    rule: str
    log_file: Path | None
    declared_mb: int | None


@dataclass
class Death:
    """How a working process ended: exit code, or the signal that killed it, and its memory when it was stopped."""

    code: int = 0
    signal: int = 0
    orderly: bool = False  # it said that it ended
    suspects: list[str] = field(default_factory=list)
    stopped_at_mb: int | None = None  # the supervisor stopped it because memory ran out
    overdue: dict[str, float] = field(default_factory=dict)  # {slide: seconds}: it was stopped because of these
    asked: bool = False  # somebody asked for the end (SIGTERM)

    @property
    def sudden(self) -> bool:
        """Neither did the process end by itself, nor did anybody ask for it."""
        return not self.orderly and not self.asked

    @property
    def out_of_memory(self) -> bool:
        return self.signal == signal.SIGKILL

    @property
    def how(self) -> str:
        if self.stopped_at_mb is not None:
            return f"was stopped at {self.stopped_at_mb} MB, because the memory ran out"
        if self.signal == signal.SIGKILL:
            return "was killed (SIGKILL), as the system does when memory runs out"
        if self.signal:
            return f"died of {signal.Signals(self.signal).name}"
        return f"ended without a word (exit status {self.code})"


def supervised(job: Job, watch: MemoryWatch | None = None) -> bool:
    """Go on in a process of its own. Returns True there; the supervising process ends here with the job's exit code.

    Returns False where processes cannot be supervised (not Linux): the caller works in this process.
    """
    if sys.platform != "linux":
        return False
    watch = watch or MemoryWatch.here(job.declared_mb)
    verdicts: dict[str, SlideFailure] = {}
    deaths: dict[str, int] = {}
    while True:
        death = _attempt(job, watch, None, verdicts)
        if death is None:
            return True
        if not death.sudden:
            sys.exit(death.code)
        if death.overdue:
            _condemn_overdue(job, death, verdicts)
            continue
        if not death.suspects:
            log.error("%s", _job_message(job, death))
            sys.exit(1)
        names = ", ".join(death.suspects)
        log.warning(
            "rule %s: its process %s with %s in work; trying what was in work alone", job.rule, death.how, names
        )
        for slide_id in death.suspects:
            deaths[slide_id] = deaths.get(slide_id, 0) + 1
            alone = _attempt(job, watch, slide_id, verdicts)
            if alone is None:
                return True
            if not alone.sudden and alone.code:
                sys.exit(alone.code)
            if alone.overdue:
                _condemn_overdue(job, alone, verdicts)
            elif alone.sudden or deaths[slide_id] >= DEATHS:
                verdicts[slide_id] = _failure(job, alone if alone.sudden else death, alone=alone.sudden)
                log.warning("slide %s: %s", slide_id, verdicts[slide_id])


def _condemn_overdue(job: Job, death: Death, verdicts: dict[str, SlideFailure]) -> None:
    for slide_id, seconds in death.overdue.items():
        message = f"rule {job.rule} was still at work on this slide after {seconds:.0f} s"
        verdicts[slide_id] = SlideFailure("too_slow", message, HINTS["too_slow"].format(rule=job.rule))
        log.warning("slide %s: %s", slide_id, verdicts[slide_id])


def _failure(job: Job, death: Death, *, alone: bool) -> SlideFailure:
    code = "out_of_memory" if death.out_of_memory else "crashed"
    how = "also when it worked on this slide alone" if alone else f"{DEATHS} times, though not with this slide alone"
    declared = f"; the rule declares {job.declared_mb} MB" if death.out_of_memory and job.declared_mb else ""
    hint = HINTS[code].format(log=job.log_file or "the log", rule=job.rule)
    return SlideFailure(code, f"the process of rule {job.rule} {death.how}, {how}{declared}", hint)


def _job_message(job: Job, death: Death) -> str:
    where = f" The last lines of Python are in {job.log_file}." if job.log_file and not death.out_of_memory else ""
    remedy = ""
    if death.out_of_memory:
        remedy = f" Give it more memory (--set-resources {job.rule}:mem_mb=...) or run fewer jobs at once (--cores)."
    return f"rule {job.rule} stopped: its process {death.how}.{where}{remedy} Run the same command again."


def _attempt(job: Job, watch: MemoryWatch, alone: str | None, verdicts: dict[str, SlideFailure]) -> Death | None:
    """Fork and wait. None in the child, which goes on to work; in the parent, how the child ended."""
    board = Board()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # so that collecting garbage in the child does not copy the pages of both
    read_end, write_end = os.pipe()  # closed by the child's end, whatever kind of end
    blocked = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # until somebody is there to handle them
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _become_worker(job, Orders(board, alone, dict(verdicts)), supervisor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        return None
    os.close(write_end)
    gc.unfreeze()
    try:
        return _wait(pid, read_end, watch, board, blocked)
    finally:
        os.close(read_end)


def _become_worker(job: Job, orders: Orders, supervisor: int) -> None:
    global _orders
    _orders = orders
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the supervisor
    if os.getppid() != supervisor:  # it has died already
        os._exit(137)
    with suppress(OSError):  # some containers forbid it; the system then chooses the largest process by itself
        Path("/proc/self/oom_score_adj").write_text("500")  # when memory runs out, this one is taken first
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if job.log_file:
        faulthandler.enable(open(job.log_file, "a"), all_threads=True)  # noqa: SIM115 (open for as long as it lives)


def leave(code: int) -> None:
    """End the working process. The interpreter is not taken down: libraries that crash at exit cannot spoil it."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if _orders is not None:
        _orders.board.end()
    os._exit(code)


def _wait(pid: int, ending: int, watch: MemoryWatch, board: Board, blocked: set[signal.Signals]) -> Death:
    death, kill_at = Death(), float("inf")

    def stop(signum: int, frame: object) -> None:
        nonlocal kill_at
        death.asked, kill_at = True, time.monotonic() + GRACE
        os.kill(pid, signal.SIGTERM)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    looked = time.monotonic()
    try:
        while True:
            ended = select.select([ending], [], [], TICK)[0]
            if (pause := time.monotonic() - looked) > PAUSE:
                board.resume(pause)
            looked = time.monotonic()
            done, status = os.waitpid(pid, 0 if ended else os.WNOHANG)
            if done:
                break
            if time.monotonic() > kill_at:
                os.kill(pid, signal.SIGKILL)
            elif death.stopped_at_mb is None and (size := watch.too_much(pid)) is not None:
                death.stopped_at_mb = size
                os.kill(pid, signal.SIGKILL)
            elif death.stopped_at_mb is None and not death.overdue and (late := board.overdue()):
                death.overdue = late
                os.kill(pid, signal.SIGKILL)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    code = os.waitstatus_to_exitcode(status)
    death.orderly = board.ended  # without it, exit status 0 means that a library called exit()
    death.signal, death.code = (-code, 128 - code) if code < 0 else (0, code)
    if death.asked and not death.orderly:
        death.code = 143
    death.suspects = board.in_work()
    return death
