"""kill -9 in the middle of a rack, at every stage in turn: the next run goes on at the slide where it stopped.

One run is killed six times, once in every per-slide stage, and then finished. Its rack holds the whole cohort, so
every kill lands inside a job: after a few commits of the stage, those that follow wait to be killed, because a
`sitecustomize` on PYTHONPATH holds the rename that commits a result.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from snakemake_run import CONFIG, ENCODER, GRID, PATIENCE, Project, contents, kill_group, stamps

pytestmark = pytest.mark.workflow

HELD_COMMITS = """
import os, re, threading, time
pattern = re.compile(os.environ["TEST_HELD_COMMITS"])
free = threading.Semaphore(int(os.environ["TEST_FREE_COMMITS"]))
def held(rename):
    def patient(source, target, **options):
        if pattern.search(str(target)) and not free.acquire(blocking=False):
            time.sleep(86400)
        return rename(source, target, **options)
    return patient
os.replace, os.rename = held(os.replace), held(os.rename)
"""
# stage -> (folder below results, what a slide's result is called there, manifest below manifests/)
STAGES = {
    "screen": ("slides", "*/slide.json", "screen"),
    "tissue": ("slides", "*/tissue.json", "tissue"),
    "stain": ("slides", "*/stain.json", "stain"),
    "tiles": (f"tiles/{GRID}", "*.zarr", f"tiles/{GRID}"),
    "embed": (f"embeddings/{ENCODER}", "*.zarr", f"embed/{ENCODER}"),
    "explain": ("explain/tumour/abmil", "*/explain.json", "explain/tumour/abmil"),
}
KILL_AFTER = 2  # slides
FREE_COMMITS = KILL_AFTER + 3  # of the twelve slides three are spoilt, and have records, too


@dataclass
class Killed:
    """What there was when a stage was killed: finished results, with the stamps of their files."""

    finished: dict[str, Any]
    manifest_was_there: bool


def results_of(project: Project, stage: str) -> dict[str, Any]:
    """{slide: stamps of the files of its finished result}."""
    folder, pattern, _ = STAGES[stage]
    found = {}
    for path in (project.results / folder).glob(pattern):
        if path.name.startswith(".") or path.parent.name.startswith("."):
            continue
        slide = path.stem if path.suffix == ".zarr" else path.parent.name
        if path.is_dir():
            found[slide] = stamps(path)
        elif '"status": "failed"' not in path.read_text():  # a bad slide is looked at again by every job
            stat = path.stat()
            found[slide] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def run_and_kill(project: Project, stage: str, hook: Path) -> Killed:
    folder, pattern, manifest = STAGES[stage]
    held = re.escape(pattern.removeprefix("*/")) + "$" if "/" in pattern else f"{folder}/[^./][^/]*zarr$"
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    # up to this stage only: tiles need no stain fit, and their job beside it would be finished before its turn
    target = f"results/manifests/{manifest}/r00000.json"
    process = project.start(target, PYTHONPATH=path, TEST_HELD_COMMITS=held, TEST_FREE_COMMITS=str(FREE_COMMITS))
    deadline = time.monotonic() + PATIENCE
    try:
        while len(results_of(project, stage)) < KILL_AFTER:
            assert process.poll() is None, (project.folder / "terminal.txt").read_text()[-4000:]
            assert time.monotonic() < deadline, f"nothing of {stage} in {PATIENCE} s"
            time.sleep(0.05)
    finally:
        kill_group(process)
    written = project.results / "manifests" / manifest / "r00000.json"
    return Killed(results_of(project, stage), written.exists())


@pytest.fixture(scope="module")
def resumed(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Killed]]:
    """The cohort of `finished`, killed in every stage and then run to the end."""
    project = Project(tmp_path_factory.mktemp("resumed") / "project")
    project.folder.mkdir()
    project.configure(**CONFIG)
    project.write_sheet(finished.rows())
    hook = project.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HELD_COMMITS)
    killed = {}
    for stage in STAGES:
        killed[stage] = run_and_kill(project, stage, hook)
        if stage == "screen":
            project.succeed("--unlock")  # what a user does; below its quicker equal
        for lock in (project.folder / ".snakemake" / "locks").glob("*.lock"):
            lock.unlink()
    project.succeed()
    return project, killed


@pytest.mark.parametrize("stage", STAGES)
def test_finished_slides_survive_kill_9(resumed: tuple[Project, dict[str, Killed]], stage: str):
    project, killed = resumed
    before, after = killed[stage].finished, results_of(project, stage)
    assert not killed[stage].manifest_was_there, "the kill came too late to show anything"
    assert KILL_AFTER <= len(before) < len(after)
    assert {slide: after[slide] for slide in before} == before  # the very same files
    records = {record["slide_id"]: record for record in project.manifest(STAGES[stage][2])}
    assert all(records[slide]["reused"] for slide in before)
    assert any(record["status"] == "ok" and not record.get("reused") for record in records.values())


def test_results_are_those_of_an_undisturbed_run(resumed: tuple[Project, dict[str, Killed]], finished: Project):
    project, _ = resumed
    for folder in ("tiles", "embeddings"):
        assert contents(project.results / folder) == contents(finished.results / folder)
    for pattern in ("predictions_*.csv", "curves.csv", "splits.csv", "metrics.csv", "weights.safetensors"):
        mine = contents(project.results / "tasks", pattern)
        assert mine
        assert mine == contents(finished.results / "tasks", pattern), pattern
    for pattern in ("scores.csv", "heatmap.png", "heatmap.geojson"):
        mine = contents(project.results / "explain", pattern)
        assert mine
        assert mine == contents(finished.results / "explain", pattern), pattern
    assert contents(project.results / "cohort") == contents(finished.results / "cohort")
    how_fast = ("seconds", "tiles_per_second", "reused")
    for _, _, where in STAGES.values():
        mine, theirs = (
            [{k: v for k, v in record.items() if k not in how_fast} for record in of.manifest(where)]
            for of in (project, finished)
        )
        assert mine == theirs, where  # a result that was found says what one that was computed says


def test_nothing_half_written_is_left(resumed: tuple[Project, dict[str, Killed]]):
    project, _ = resumed
    left = [path.relative_to(project.results) for path in project.results.rglob(".*.tmp-*")]
    assert left == []


def test_damaged_store_is_made_again(project: Project):
    """A store that a full disk or a careless hand broke is not taken for finished when its job runs again."""
    import zarr

    slide = "P01-A"
    tiles, embedding = project.results / "tiles" / GRID / f"{slide}.zarr", project.results / "embeddings" / ENCODER
    good = np.asarray(zarr.open_group(embedding / f"{slide}.zarr", mode="r")["features"][:])
    (tiles / "zarr.json").unlink()
    (embedding / f"{slide}.zarr" / "zarr.json").write_text("{")
    project.succeed("embeddings", "--forcerun", "tile_slides")
    assert np.array_equal(zarr.open_group(embedding / f"{slide}.zarr", mode="r")["features"][:], good)
    reused = {record["slide_id"]: record.get("reused", False) for record in project.manifest("tiles", GRID)}
    assert not reused.pop(slide)
    assert any(reused.values())
