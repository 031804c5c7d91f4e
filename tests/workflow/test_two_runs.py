"""Two runs at once are refused with the way out; SIGTERM ends a run in order; what a killed run left does no harm."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from snakemake_run import GRID, PATIENCE, Outcome, Project, contents, environment, kill_group, stamps

pytestmark = pytest.mark.workflow

GATED = """
import os, re, time
def gated(rename):
    def patient(source, target, **options):
        while re.search(os.environ["TEST_GATED"], str(target)) and not os.path.exists(os.environ["TEST_GATE"]):
            time.sleep(0.05)
        return rename(source, target, **options)
    return patient
os.replace, os.rename = gated(os.replace), gated(os.rename)
"""
ALL_BUT_THE_FIRST = rf"tiles/{GRID}/P0[2-9][^/]*zarr$"


def start(project: Project, gate: Path) -> subprocess.Popen:
    """Start a run that commits one tile store, and the others when `gate` is there."""
    hook = project.folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(GATED)
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    return project.start("tiles", PYTHONPATH=path, TEST_GATED=ALL_BUT_THE_FIRST, TEST_GATE=str(gate))


def wait_until(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, "the run ended too early"
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    """A process whose parent was killed may stay as a zombie for ever."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stores(project: Project) -> dict[str, dict]:
    folder = project.results / "tiles" / GRID
    return {path.name: stamps(path) for path in folder.glob("[!.]*.zarr")}


def refused(outcome: Outcome, *words: str) -> str:
    assert outcome.code != 0
    assert "Traceback" not in outcome.text
    assert "slidemake cannot start." in outcome.text, outcome.text
    assert all(word in outcome.text for word in words), outcome.text
    return outcome.text


def waiting(project: Project) -> list[Path]:
    """Stores that are complete and not committed."""
    return list((project.results / "tiles" / GRID).glob(".*.tmp-*/coords"))


def test_two_runs_at_once(new_project: Callable[..., Project], finished: Project, tmp_path: Path):
    project, gate = new_project(slides=4, tasks=None), tmp_path / "gate"
    run = start(project, gate)
    try:
        wait_until(lambda: stores(project) and waiting(project), run)
        way_out = f"`kill {run.pid}`"
        refused(project.run("tiles"), "Another run is active on results", way_out)
        elsewhere = new_project("elsewhere", slides=4, tasks=None, output=str(project.results))
        refused(elsewhere.run("tiles"), "Another run is active", way_out)
        refused(project.run("--unlock"), "Another run is active")
        assert project.planned("tiles") == {"tile_slides": 1, "tiles": 1}  # to look is allowed

        run.send_signal(signal.SIGTERM)  # preemption, or `kill` as the message says
        assert run.wait(timeout=PATIENCE) == 1
        text = (project.folder / "terminal.txt").read_text()
        assert "received SIGTERM: stopping; what is finished is kept" in text
        assert "received SIGTERM: stopping; finished slides are kept" in text  # the job
        assert "Traceback" not in text
        assert not list(project.results.rglob(".*.tmp-*"))  # nothing is left in the middle

        run = start(project, gate)  # there is nothing to unlock
        before = stores(project)
        wait_until(lambda: waiting(project), run)
        left_behind = psutil.Process(run.pid).children(recursive=True)
        run.kill()  # this time Snakemake alone, and its job goes on
        run.wait()
    finally:
        if run.poll() is None:
            kill_group(run)
    text = refused(project.run("tiles"), "no run is active", "snakemake --unlock")
    command = shlex.split(re.search(r"^  snakemake (--unlock .*)$", text, re.MULTILINE)[1])
    unlock = [*project.command()[:3], *command]
    unlocked = subprocess.run(unlock, cwd=project.folder, env=environment(), capture_output=True, text=True)
    assert unlocked.returncode == 0, unlocked.stderr
    assert len(before) == len(waiting(project)) == 1
    project.succeed("tiles")
    after = stores(project)
    assert len(after) == 4
    assert after | before == after  # the very same files
    gate.touch()  # now the job that was left behind commits its slides
    assert any(map(alive, left_behind))
    wait_until(lambda: not any(map(alive, left_behind)))
    assert not list(project.results.rglob(".*.tmp-*"))
    assert stores(project) == after
    for name in after:
        path = Path("tiles") / GRID / name
        assert contents(project.results / path) == contents(finished.results / path)
    assert json.loads((project.results / "run.lock").read_text())["folder"] == str(project.folder)
