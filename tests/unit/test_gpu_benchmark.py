"""The benchmark of the GPU path runs, on the CPU and tiny: when a GPU is at hand, nothing of its time is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_section_runs(rows):
    sections = {row["section"] for row in rows}
    assert sections == {"machine", "uni", "virchow2", "h_optimus_1", "memory", "fault", "stain", "training"}
    assert [row for row in rows if row["name"] in ("error", "left out")] == []


def test_nothing_that_a_cpu_can_show_is_below_its_bar(rows):
    judged = [row for row in rows if row["ok"] is not None]
    assert [row for row in judged if not row["ok"]] == []
    assert {row["section"] for row in judged} == {"uni", "virchow2", "h_optimus_1", "memory", "fault", "stain"}
    (fault,) = (row for row in rows if row["section"] == "fault")
    assert "device-side assert" in fault["value"]
