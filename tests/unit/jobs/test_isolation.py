"""A job's process that dies: who is tried alone, who is condemned, and what the job's exit code and words are.

The jobs are small scripts in processes of their own, with real signals, real crashes and real memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slidemake.jobs import isolation
from slidemake.jobs.memory import Cgroup, MemoryWatch, machine_mb, own_cgroup, private_mb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs have a supervisor on Linux only")

SCRIPT = """
import ctypes, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from slidemake.jobs import isolation
from slidemake.jobs import memory
from slidemake.jobs.job import job
from slidemake.core.failures import RunError, SlideFailure
from slidemake.jobs.racks import run_rack
from slidemake.slides.reader import SlideReader, make_levels

here = Path(sys.argv[1])
snakemake = SimpleNamespace(log=[here / "log.txt"], rule="a_rule", resources={"mem_mb": 50})

class CrashingReader(SlideReader):
    def _read_inside(self, lx, ly, level, w, h):
        ctypes.string_at(0)

def note(record):
    with open(here / "tried.txt", "a") as handle:
        handle.write(record["slide_id"] + "\\n")
    return {"fingerprint": "f"}

def rack(work, names="abcd", threads=1):
    with job(snakemake):
        records = [{"slide_id": name, "status": "ok", "failure": None} for name in names]
        run_rack("tissue", here / "manifest.json", records, work, rack="r0", threads=threads)
"""


class Done:
    """What a script of the tests left."""

    def __init__(self, folder: Path, code: int, text: str):
        self.folder, self.code, self.text = folder, code, text
        self.log = (folder / "log.txt").read_text()

    @property
    def records(self) -> dict[str, dict]:
        return {r["slide_id"]: r for r in json.loads((self.folder / "manifest.json").read_text())["slides"]}

    def codes(self) -> dict[str, str | None]:
        return {name: (r["failure"] or {}).get("code") for name, r in self.records.items()}

    def tried(self) -> list[str]:
        return (self.folder / "tried.txt").read_text().split()


@pytest.fixture
def run(tmp_path):
    def started(body: str, **env: str) -> subprocess.Popen:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT + body)
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "scripts"), "OMP_NUM_THREADS": "1", **env},
        )

    def to_its_end(body: str, **env: str) -> Done:
        process = started(body, **env)
        text, _ = process.communicate(timeout=120)
        return Done(tmp_path, process.returncode, text)

    to_its_end.started = started
    return to_its_end


@pytest.mark.parametrize("threads", [1, 3])
def test_a_segmentation_fault_costs_its_slide(run, threads):
    done = run(f"""
def work(record):
    if record["slide_id"] == "b":
        CrashingReader(Path("b.svs"), make_levels([(100, 100)])).read(0, 0, 0, 8, 8)
    return note(record)
rack(work, threads={threads})
""")
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "crashed", "c": None, "d": None}
    failure = done.records["b"]["failure"]
    assert "SIGSEGV" in failure["message"]
    assert "alone" in failure["message"]
    assert "screening.reader" in failure["hint"]
    assert "log.txt" in failure["hint"]
    assert "_read_inside" in done.log  # the last lines of Python
    assert "Traceback" not in done.text


@pytest.mark.parametrize("threads", [1, 3])
def test_a_slide_without_end_costs_its_slide(run, threads):
    """Python that goes round, and a call into C that does not return, which no signal handler would interrupt."""
    done = run(
        f"""
def work(record):
    if record["slide_id"] == "b":
        ctypes.CDLL(None).pause()
    if record["slide_id"] == "c":
        isolation.allow(600)
        time.sleep(4)
    if record["slide_id"] == "d":
        with isolation.unhurried():
            time.sleep(4)
    return note(record)
rack(work, threads={threads})
""",
        SLIDEMAKE_SLIDE_SECONDS="3",
    )
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "too_slow", "c": None, "d": None}
    failure = done.records["b"]["failure"]
    assert "a_rule was still at work" in failure["message"]
    assert "slide_seconds" in failure["hint"]


def test_time_in_which_a_job_was_suspended_does_not_count(monkeypatch):
    board, now = isolation.Board(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with board.working_on("a", 10), board.working_on("b", 0):
        now += 11
        assert board.overdue() == {"a": 11}
        board.resume(5)
        assert board.overdue() == {}
        assert board.in_work() == ["a", "b"]
    assert board.in_work() == []


def test_two_killers_in_one_rack_are_both_found(run):
    done = run("""
def work(record):
    if record["slide_id"] == "a":
        os.abort()
    if record["slide_id"] == "c":
        os.kill(os.getpid(), 7)  # SIGBUS
    return note(record)
rack(work)
""")
    assert done.code == 0, done.text
    assert done.codes() == {"a": "crashed", "b": None, "c": "crashed", "d": None}
    assert "SIGABRT" in done.records["a"]["failure"]["message"]
    assert "SIGBUS" in done.records["c"]["failure"]["message"]


def test_a_slide_that_survives_alone_is_innocent(run):
    """It dies only the first time, as when a neighbour had taken the memory."""
    done = run("""
def work(record):
    if record["slide_id"] == "b" and not (here / "once").exists():
        (here / "once").touch()
        os.kill(os.getpid(), 9)
    return note(record)
rack(work)
""")
    assert done.code == 0, done.text
    assert set(done.codes().values()) == {None}
    assert "was killed (SIGKILL)" in done.text


def test_a_slide_that_dies_only_in_company_is_condemned_in_the_end(run):
    done = run("""
def work(record):
    if record["slide_id"] == "b" and isolation.tried_alone() is None:
        ctypes.string_at(0)
    return note(record)
rack(work)
""")
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "crashed", "c": None, "d": None}
    assert "3 times" in done.records["b"]["failure"]["message"]


def test_a_library_that_calls_exit_is_no_success(run):
    done = run("""
def work(record):
    if record["slide_id"] == "b":
        os._exit(0)
    return note(record)
rack(work)
""")
    assert done.codes()["b"] == "crashed"
    assert "ended without a word" in done.records["b"]["failure"]["message"]


def test_a_crash_without_a_slide_ends_the_job_with_a_message(run):
    done = run("""
with job(snakemake):
    ctypes.string_at(0)
""")
    assert done.code == 1
    assert "rule a_rule stopped: its process died of SIGSEGV" in done.text
    assert "log.txt" in done.text
    assert "Traceback" not in done.text


def test_a_run_error_of_a_suspect_alone_ends_the_job(run):
    done = run("""
def work(record):
    if isolation.tried_alone():
        raise RunError("No space left")
    ctypes.string_at(0)
rack(work)
""")
    assert done.code == 1
    assert "No space left" in done.text
    assert not (done.folder / "manifest.json").exists()


EATER = """
def eat(record):
    note(record)
    kept = []
    while record["slide_id"] == "b":
        kept.append(np.ones(1 << 20))
        time.sleep(0.02)
    return {"fingerprint": "f"}
"""


def test_memory_that_runs_out_is_seen_in_time(run):
    """The watch is told of a control group of 300 MB; its usage is what the working process has."""
    done = run(
        EATER
        + """
class Group(memory.Cgroup):
    def used_mb(self):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return sum(memory.private_mb(int(pid)) for pid in children)
memory.MemoryWatch.here = classmethod(lambda cls, declared: cls(declared, Group(300, here)))
rack(eat)
"""
    )
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "out_of_memory", "c": None, "d": None}
    failure = done.records["b"]["failure"]
    assert "was stopped at" in failure["message"]
    assert "declares 50 MB" in failure["message"]
    assert "--set-resources a_rule:mem_mb" in failure["hint"]


@pytest.fixture
def small_group():
    """A real control group with 200 MB, where this user may make one (cgroups version 1, or a delegated version 2)."""
    root = Path("/sys/fs/cgroup")
    first, name = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    folder = first / f"slidemake-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(200 << 20))
    except OSError as error:
        pytest.skip(f"this user may not make a control group ({error})")
    yield folder
    folder.rmdir()


def test_the_system_kills_for_memory_and_the_slide_pays(run, small_group):
    """In a real control group: the kernel, or the watch just before it, ends the process; the rack goes on."""
    done = run(
        f"Path({str(small_group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        + EATER.replace("time.sleep(0.02)", "pass")
        + "rack(eat)\n"
    )
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "out_of_memory", "c": None, "d": None}


def test_an_address_space_limit_is_out_of_memory(run):
    """Where an allocation is refused, Python says so itself, and no process dies."""
    done = run("""
import resource
def work(record):
    if record["slide_id"] == "b":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        np.ones(1 << 27)
    return note(record)
rack(work, names="ab")
""")
    assert done.code == 0, done.text
    assert done.codes() == {"a": None, "b": "out_of_memory"}


WAITING = """
def work(record):
    (here / "busy").touch()
    time.sleep({nap})
    return note(record)
rack(work)
"""


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def worker_of(process: subprocess.Popen) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def test_sigterm_reaches_the_work(run, tmp_path):
    process = run.started(WAITING.format(nap=60))
    wait_for(tmp_path / "busy")
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "received SIGTERM" in text
    assert not (tmp_path / "manifest.json").exists()


def test_work_that_does_not_hear_sigterm_is_killed(run, tmp_path):
    body = "import signal\nisolation.GRACE = 0.5\n" + WAITING.format(nap=60).replace(
        "time.sleep", "signal.signal(15, signal.SIG_IGN); (here / 'busy').touch(); time.sleep"
    ).replace('    (here / "busy").touch()\n', "")
    process = run.started(body)
    wait_for(tmp_path / "busy")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_work_never_outlives_its_supervisor(run, tmp_path):
    process = run.started(WAITING.format(nap=600))
    wait_for(tmp_path / "busy")
    worker = worker_of(process)
    process.kill()
    process.communicate(timeout=60)
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_tightest_limit_above_a_process_counts(tmp_path):
    root, listing = tmp_path / "cgroup", tmp_path / "listing"
    job = root / "slurm" / "job_7"
    (job / "step").mkdir(parents=True)
    (root / "slurm" / "memory.max").write_text(f"{8 << 30}\n")
    (job / "memory.max").write_text(f"{2 << 30}\n")
    (job / "memory.stat").write_text(f"anon {1 << 30}\nfile {5 << 30}\n")
    (job / "step" / "memory.max").write_text("max\n")
    listing.write_text("0::/slurm/job_7/step\n")
    found = own_cgroup(root, listing)
    assert found == Cgroup(2048, job)
    assert found.used_mb() == 1024
    old = root / "memory" / "slurm" / "job_8"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(f"{1 << 30}\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    listing.write_text("4:memory:/slurm/job_8\n0::/\n")
    assert own_cgroup(root, listing) == Cgroup(1024, old)
    listing.write_text("0::/\n")
    assert own_cgroup(root, listing) is None


def test_a_job_is_not_stopped_for_what_others_take(monkeypatch):
    import slidemake.jobs.memory as memory

    total, available = machine_mb()
    assert 0 < available <= total
    assert private_mb(os.getpid()) > 10
    assert private_mb(2**22 + 1) == 0
    monkeypatch.setattr(memory, "machine_mb", lambda: (10_000, 100))  # nearly full
    monkeypatch.setattr(memory, "private_mb", lambda pid: 2000)
    assert MemoryWatch(3000, None).too_much(1) is None
    assert MemoryWatch(1500, None).too_much(1) == 2000
    monkeypatch.setattr(memory, "machine_mb", lambda: (10_000, 5000))
    assert MemoryWatch(1500, None).too_much(1) is None
