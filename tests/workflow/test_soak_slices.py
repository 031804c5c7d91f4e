"""A few moments of the long harnesses (`make soak` runs all): kills at random, and disks that are spoilt."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from snakemake_run import Project

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

import faults
import kill
from cohort import EXCEPT_FILES, EXCEPT_KEYS, differences

pytestmark = [pytest.mark.workflow, pytest.mark.skipif(sys.platform != "linux", reason="looks for jobs in /proc")]


def seed_without(stage: str) -> int:
    """A seed whose first odd trial begins without the results of a stage and of those that follow."""
    for seed in range(1000):
        cut = int(np.random.default_rng([seed, 1]).integers(1, len(kill.STAGES)))
        if kill.STAGES[cut][0] == stage:
            return seed
    raise AssertionError(stage)


def test_killed_at_random_moments(finished: Project, tmp_path: Path):
    trial = kill.run_trial(1, seed_without("explain"), tmp_path, finished, moments=3)
    assert trial.moments
    assert (trial.lost, trial.wrong) == ([], [])


@pytest.mark.skipif(not faults.may_mount(), reason="needs the right to mount in a namespace of its own")
@pytest.mark.parametrize(
    ("stage", "kind"), [("report", "full"), ("splits", "read-only"), ("cohort check", "forbidden")]
)
def test_spoilt_disks(finished: Project, tmp_path: Path, stage: str, kind: str):
    (spoilt,) = [found for found in faults.STAGES if found.name == stage]
    fault = faults.inject(spoilt, kind, finished, tmp_path)
    assert (fault.lost, fault.wrong) == ([], [])


def test_the_page_lists_all_exceptions():
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    table = page.split("<!-- exceptions -->")[1].split("<!-- /exceptions -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert {name.strip("`"): why for name, why in rows} == EXCEPT_FILES | EXCEPT_KEYS


def test_the_harness_sees_what_is_lost_and_what_differs(finished: Project, tmp_path: Path):
    project = finished.copy(tmp_path / "project")
    assert differences(finished, project) == []
    (project.results / "cohort" / "failures.csv").unlink()
    store = next(path for path in (project.results / "embeddings").rglob("c/0/0"))
    store.write_bytes(store.read_bytes()[:-1] + b"\0")
    (project.results / "tasks" / "stray.csv").touch()
    found = {difference.path: difference.lost for difference in differences(finished, project)}
    name = store.relative_to(project.results).as_posix()
    assert found == {"cohort/failures.csv": True, name: False, "tasks/stray.csv": False}
