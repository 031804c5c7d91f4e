"""One run at a time on a folder of results; locks that were left are told from those that are held."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slidemake.core.failures import RunError
from slidemake.workflow import running

HOLD = """
import sys, time
from pathlib import Path
from slidemake.workflow.running import claim_results
claim_results(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(running, "_held", None)
    monkeypatch.chdir(tmp_path)
    return Path("results")


@pytest.fixture
def other_run(results):
    """Another process that holds the results, as a run does."""
    scripts = Path(running.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    command = [sys.executable, "-c", HOLD, str(results)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock_snakemake(name: str) -> Path:
    locks = Path(".snakemake") / "locks"
    locks.mkdir(parents=True)
    (locks / "0.input.lock").write_text("slides/a.svs\n")
    (locks / "0.output.lock").write_text(f"{name}/manifests/screen/r00000.json\n")
    return locks


def test_a_second_run_is_refused_and_told_who_runs(results, other_run):
    with pytest.raises(RunError, match=rf"process {other_run.pid} on .*`kill {other_run.pid}`"):
        running.claim_results(results, patience=0)
    text = running.refusal(results, lock_snakemake("results"), ["--cores", "2"])
    assert "Another run is active" in text
    assert str(other_run.pid) in text
    assert "Another run is active" in running.refusal(results, Path("locks"), ["--unlock"])
    assert running.refusal(results, Path("locks"), ["-n"]) is None


def test_a_run_that_was_killed_holds_nothing(results, other_run):
    locks = lock_snakemake("results")
    other_run.kill()
    other_run.wait()
    text = running.refusal(results, locks, ["--cores", "2", "--configfile", "my slides.yaml"])
    assert "no run is active" in text
    assert "\n  snakemake --unlock --cores 2 --configfile 'my slides.yaml'\n" in text
    assert running.refusal(results, locks, ["--unlock", "--cores", "2"]) is None
    running.claim_results(results)
    assert json.loads((results / running.LOCK).read_text())["pid"] == os.getpid()


def test_somebody_who_only_looks_refuses_nobody(results):
    running.claim_results(results)
    running._held.close()
    with open(results / running.LOCK, "r+") as looking:
        running._lock(looking, running.fcntl.LOCK_SH)
        with open(results / running.LOCK, "r+") as too:
            assert running._lock(too, running.fcntl.LOCK_SH)
        with pytest.raises(RunError):
            running.claim_results(results, patience=0)
    running.claim_results(results, patience=0)


def test_locks_of_other_results_are_none_of_this_runs(results):
    assert running.refusal(results, lock_snakemake("results_2"), ["--cores", "2"]) is None


def test_a_file_system_without_locks(results, monkeypatch):
    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(running.fcntl, "flock", unsupported)
    running.claim_results(results, patience=0)
    monkeypatch.setattr(running, "_held", None)  # as another process sees it
    text = running.refusal(results, lock_snakemake("results"), [])
    assert "cannot be told" in text
    assert "snakemake --unlock" in text


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        ("", True),
        ("embeddings --cores all --configfile mine.yaml", True),
        ("-c2 -k --config n=3", True),
        ("-n", False),
        ("-np", False),
        ("all --dry-run --cores 2", False),
        ("--report=out.zip", False),
        ("--list-rules", False),
        ("--unlock", False),
    ],
)
def test_what_runs_jobs(arguments, run):
    assert running.is_run(arguments.split()) is run


def test_the_environment_of_the_folder_is_named(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / ".venv/bin/snakemake")])
    assert running.unlock_command(["--cores", "all"]) == ".venv/bin/snakemake --unlock --cores all"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/python3/site-packages/snakemake/__main__.py"])
    assert running.unlock_command([]) == "snakemake --unlock"


STOP = """
import subprocess, sys, time
from slidemake.workflow.running import stop_jobs_on_sigterm
stop_jobs_on_sigterm()
job = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(7));"
job += " os.write(1, b'ready\\\\n'); time.sleep(600)"
jobs = [subprocess.Popen(["bash", "-c", f'"{sys.executable}" -c "$0"; echo ended $?', job]) for _ in range(2)]
try:
    time.sleep(600)
except KeyboardInterrupt:
    for process in jobs:
        process.wait()
    print("stopped", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for jobs as Linux shows them")
def test_sigterm_reaches_jobs_behind_their_shells():
    environment = {**os.environ, "PYTHONPATH": str(Path(running.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", STOP], stdout=subprocess.PIPE, text=True, env=environment)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.1)
    process.terminate()
    text, _ = process.communicate(timeout=120)
    assert text == "ended 7\nended 7\nstopped\n"
    assert process.returncode == 0


def test_folders_that_may_not_be_written_are_named_before_the_first_job(tmp_path, monkeypatch):
    (tmp_path / "results" / "logs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    files = ["results/logs/a.log", "results/tiles/g/r0.json", "results/tiles/g/r1.json"]
    running.check_writable(files)
    asked = []

    def access(path, mode):
        asked.append(str(path))
        return str(path) != "results/logs"

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(RunError, match="No permission to write in results/logs, where this run has to"):
        running.check_writable(files)
    assert sorted(asked) == ["results", "results/logs"]  # what is not there yet is made in what is
    running.check_writable(files[1:])
    running.check_writable([])
