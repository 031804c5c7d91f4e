"""The run as a whole, in Snakemake's own process: one at a time on a folder of results, stopped in order by SIGTERM.

Snakemake locks a working directory, and its lock outlives a run that was killed. Beside it a run holds a `flock` on
`run.lock` in the results folder: it ends with the process that holds it, so it tells an active run from one that was
killed, and it keeps a second working directory from the same results.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import IO, Any

from slidemake.core.failures import RunError

LOCK = "run.lock"  # in the results folder: held while a run is active; says who holds, or last held, it
SHELLS = {"bash", "sh", "dash"}  # between Snakemake and a job; a signal is for the job
# of Snakemake's options those that look or tidy up, and run no job
NOT_A_RUN = {
    "--dry-run",
    "--dryrun",
    "--unlock",
    "--report",
    "--summary",
    "--detailed-summary",
    "--dag",
    "--rulegraph",
    "--filegraph",
    "--d3dag",
    "--lint",
    "--containerize",
    "--cleanup-metadata",
    "--archive",
    "--nolock",
    "--print-compilation",
    "--help",
    "--version",
}
_held: IO[str] | None = None  # kept open for as long as the run lasts


def check_writable(files: Iterable[str | Path]) -> None:
    """RunError that names the folders in which this run has to write `files` and may not.

    Before the first job, because Snakemake itself removes and makes such files, and shows no more than a traceback.
    """
    folders = {Path(file).parent for file in files}
    existing = {next(f for f in (folder, *folder.parents) if f.exists()) for folder in folders}
    refused = sorted(str(folder) for folder in existing if not os.access(folder, os.W_OK | os.X_OK))
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise RunError(
            f"No permission to write in {', '.join(refused[:5])}{more}, where this run has to (a file system that is "
            "mounted read-only, or a folder of another user's). Nothing was changed. Give this user access, or choose "
            "another `output`; then run the same command again: whatever is finished is kept."
        )


def claim_results(output: Path, patience: float = 2.0) -> None:
    """Hold the results folder for this run, until the process ends. RunError when another run holds it.

    Where the file system knows no locks, nothing is held and Snakemake's own lock has to do.
    """
    global _held
    if _is_ours(output):
        return
    output.mkdir(parents=True, exist_ok=True)
    handle = open(output / LOCK, "a+")  # noqa: SIM115 (held until the process ends)
    until = time.monotonic() + patience  # somebody who only looks holds it for an instant
    while _lock(handle, fcntl.LOCK_EX) is False:
        if time.monotonic() > until:
            raise RunError(_active(output, _holder(handle)))
        time.sleep(0.05)
    handle.truncate(0)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "folder": os.getcwd()}
    handle.write(json.dumps({**about, "started": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    handle.flush()
    _held = handle


def refusal(output: Path, locks: Path, arguments: list[str]) -> str | None:
    """Why Snakemake, called with `arguments`, must not start now, and the way out; None when it may.

    `locks` is the folder of Snakemake's own locks (.snakemake/locks of the working directory).
    """
    unlocking = "--unlock" in arguments
    if (not unlocking and not is_run(arguments)) or _is_ours(output):
        return None
    try:
        with open(output / LOCK, "r+") as handle:
            free, last = _lock(handle, fcntl.LOCK_SH), _holder(handle)
    except OSError:  # there never was a run, or this user may not write here, which is said elsewhere
        free, last = None, {}
    if free is False:
        return _active(output, last)
    if unlocking or not _locked(output, locks):
        return None
    left = f" by the run that was started {last['started']} on {last['host']}" if "started" in last else ""
    why = "no run is active: that run was killed, or its machine went down"
    if not free:
        why = "whether a run is active cannot be told here. If none is, the last one was killed"
    return (
        f"{output} is locked{left}, and {why}. Everything that it finished is kept, and jobs that it left behind do no "
        f"harm. Take the lock away with\n  {unlock_command(arguments)}\nand give the same command again."
    )


def is_run(arguments: list[str]) -> bool:
    """Whether Snakemake's arguments ask for jobs to be run."""
    for argument in arguments:
        word = argument.split("=")[0]
        if word in NOT_A_RUN or word.startswith("--list") or word in ("-l", "-S", "-D", "-h", "-v"):
            return False
        if re.fullmatch(r"-[npqFRk]*n[npqFRk]*", word):
            return False
    return True


def unlock_command(arguments: list[str]) -> str:
    """What the user has to type: the command that was given, with --unlock."""
    called = Path(sys.argv[0])
    name = "snakemake"
    if called.name == name and called.is_absolute() and called.is_relative_to(Path.cwd()):
        name = str(called.relative_to(Path.cwd()))  # an environment in this folder, which need not be active
    return shlex.join([name, "--unlock", *arguments])


def stop_jobs_on_sigterm() -> None:
    """From now on SIGTERM to this process (preemption, `kill`) stops its jobs, in order, and then the run.

    Snakemake by itself would wait for running jobs to end, which may take hours. Jobs get SIGTERM, for as long as new
    ones turn up, and clean up behind themselves; then Snakemake ends as it does on Ctrl-C, and releases its lock.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("slidemake: received SIGTERM: stopping; what is finished is kept", file=sys.stderr, flush=True)
        threading.Thread(target=_stop_jobs, daemon=True).start()
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _stop_jobs(pause: float = 0.2) -> None:
    """SIGTERM, once, to every job of this process, until the process has ended."""
    import psutil

    told: set[int] = set()
    while True:
        for job in _jobs(psutil.Process()):
            if job.pid not in told:
                told.add(job.pid)
                try:
                    job.send_signal(signal.SIGTERM)
                except psutil.NoSuchProcess:
                    continue
        time.sleep(pause)


def _jobs(process: Any) -> list[Any]:
    """The nearest descendants of a process that are not shells: a job's own children are its own affair."""
    import psutil

    found = []
    for child in process.children():
        try:
            found += _jobs(child) if child.name() in SHELLS else [child]
        except psutil.NoSuchProcess:
            continue
    return found


def _is_ours(output: Path) -> bool:
    """Whether this process holds the folder already: a module, of which rules are taken twice, is read twice."""
    if _held is None or _held.closed:
        return False
    try:  # the file itself, not its name: a relative one means another file in another folder
        return os.path.samestat(os.fstat(_held.fileno()), os.stat(output / LOCK))
    except OSError:
        return False


def _lock(handle: IO[str], how: int) -> bool | None:
    """Try to get a lock; None where the file system has none."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _holder(handle: IO[str]) -> dict[str, Any]:
    handle.seek(0)
    try:
        found = json.loads(handle.read())
    except ValueError:  # not written yet
        return {}
    return found if isinstance(found, dict) else {}


def _active(output: Path, holder: dict[str, Any]) -> str:
    who, way_out = "", "stop it"
    if {"pid", "host", "folder", "started"} <= set(holder):
        who = (
            f" (process {holder['pid']} on {holder['host']}, started {holder['started']} in the folder "
            f"{holder['folder']})"
        )
        way_out = f"stop it with `kill {holder['pid']}` on {holder['host']}"
    return (
        f"Another run is active on {output}{who}. Two runs at once would do everything twice. Wait until it has ended, "
        f"or {way_out}: what is finished is kept. Or choose another `output`."
    )


def _locked(output: Path, locks: Path) -> bool:
    """Whether Snakemake holds a lock on files of this results folder."""
    for path in sorted(locks.glob("*.lock")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        if any(line.startswith(f"{output}/") for line in lines):
            return True
    return False
