"""A clock that was set back or forward: files from the future or the distant past change nothing but what they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from snakemake_run import GRID, Project

pytestmark = pytest.mark.workflow

AHEAD, BEHIND = 4.1e9, 1e6  # in 2099 and in 1970


def date(paths: Iterable[Path], moment: float) -> None:
    """Files and folders, as if they had been written then."""
    for path in paths:
        os.utime(path, (moment, moment))


def test_results_of_any_time_are_current_and_are_worked_on(project: Project):
    """Snakemake by itself would run everything, and then fail every job whose inputs are newer than what it writes."""
    for moment in (AHEAD, BEHIND):
        date(project.results.rglob("*"), moment)
        assert project.planned() == {}
        date([project.folder / "slides.csv", project.folder / "config.yaml"], AHEAD + BEHIND - moment)
        assert project.planned() == {}
    date(project.results.rglob("*"), AHEAD)
    project.configure(evaluation={"bootstrap": 120})
    assert set(project.planned()) == {"evaluate", "compare_models", "write_report"}
    project.succeed()
    assert project.planned() == {}
    assert project.json("tasks/tumour/metrics.json")["options"]["bootstrap"] == 120


def test_slides_of_another_time_are_looked_at_and_found_finished(
    new_project: Callable[..., Project], sheet_rows: list[dict[str, str]]
):
    """Their time is part of what a plan knows them by; their bytes are what counts."""
    project = new_project(tasks=None, explain=None)
    rows = []
    for row in sheet_rows[:2]:
        path = project.folder / Path(row["path"]).name
        shutil.copy2(row["path"], path)
        rows.append(row | {"path": path.name})
    project.write_sheet(rows)
    project.succeed("tiles")
    for moment in (AHEAD, BEHIND):
        date([project.folder / row["path"] for row in rows], moment)
        assert set(project.planned("tiles")) == {"screen_slides", "detect_tissue", "tile_slides", "tiles"}
        project.succeed("tiles")
        for stage in (("screen",), ("tissue",), ("tiles", GRID)):
            assert [record["reused"] for record in project.manifest(*stage)] == [True, True]
        assert project.planned("tiles") == {}
