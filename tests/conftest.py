"""What tests of several folders share. Cohorts are drawn, and run to the report, once for all of them."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "workflow"))

from drawn_slides import draw
from snakemake_run import CONFIG, Project


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take many minutes run with `make soak`, which sets SLIDEMAKE_LONG_TESTS."""
    if not os.environ.get("SLIDEMAKE_LONG_TESTS"):
        reason = "takes many minutes: `make soak` runs it, or SLIDEMAKE_LONG_TESTS=1"
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A test that runs a job in its own process leaves the job's handlers to nobody."""
    log = logging.getLogger("slidemake")
    kept, propagate, level = list(log.handlers), log.propagate, log.level
    yield
    for handler in [handler for handler in log.handlers if handler not in kept]:
        log.removeHandler(handler)
    log.propagate = propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides; tests that need it are skipped where SLIDEMAKE_TEST_DATA does not name one."""
    folder = os.environ.get("SLIDEMAKE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SLIDEMAKE_TEST_DATA does not name a folder with real slides")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared_cohorts"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def once(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process is the first to get here, and so has to make it; the others wait until it is made."""
    done = folder / f"{name}.done"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = not done.exists()
        yield first
        if first:
            done.touch()


def cohort_rows() -> list[dict[str, str]]:
    """Eight patients of three sites, four of each class; one has two slides, three more slides are spoilt."""
    from slidemake.demo.cohort import demo_rows

    rows = [row | {"mishap": ""} for row in demo_rows(8) if row["slide_id"].endswith("-A")]
    for number, row in enumerate(rows):
        row["diagnosis"] = ("tumour", "benign")[number % 2]
    spoilt = [(1, ""), (2, "no_mpp"), (5, "blank"), (6, "truncated")]
    extra = [{**rows[at], "slide_id": f"{rows[at]['patient_id']}-B", "mishap": mishap} for at, mishap in spoilt]
    return sorted([*rows, *extra], key=lambda row: row["slide_id"])


@pytest.fixture(scope="session")
def sheet_rows(shared: Path) -> list[dict[str, str]]:
    """Rows of the drawn cohort's sheet: P03-B has no mpp, P06-B is blank, P07-B is truncated."""
    rows = cohort_rows()
    with once(shared, "slides") as first:
        if first:
            (shared / "slides").mkdir()
            return draw(shared / "slides", rows, seed=0)
    for row in rows:
        row["path"] = str(shared / "slides" / f"{row['slide_id']}.tiff")
        del row["mishap"]
    return rows


@pytest.fixture(scope="session")
def finished(shared: Path, sheet_rows: list[dict[str, str]]) -> Project:
    """The cohort run to its report, undisturbed. Never change it: take a copy (`project`)."""
    project = Project(shared / "finished")
    with once(shared, "finished") as first:
        if first:
            project.folder.mkdir()
            project.configure(**CONFIG)
            project.write_sheet(sheet_rows)
            outcome = project.succeed()
            (project.folder / "terminal.txt").write_text(outcome.text)
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A finished run of this test's own."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def new_project(tmp_path: Path, sheet_rows: list[dict[str, str]]) -> Callable[..., Project]:
    """Makes a project that has not run: `new_project(**configuration)`, with the good slides of three patients."""

    def make(name: str = "new", slides: int | None = None, **changes: object) -> Project:
        made = Project(tmp_path / name)
        made.folder.mkdir()
        made.configure(**changes)
        made.write_sheet(sheet_rows[:slides])
        return made

    return make
