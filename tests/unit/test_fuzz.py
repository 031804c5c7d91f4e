"""A few cases of the fuzzer (`make soak` runs hundreds): damage ends in a record, a message or no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "soak"
SLICE = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.environ.pop("SLIDEMAKE_TEST_DATA", None)  # drawn slides only
from fuzz import KINDS, run_case
from workshop import Workshop
folder = Path(sys.argv[2])
good = Workshop.make(folder / "good", drawn=2)
kinds = {"slide": 2, "artefact": 6, "rerun": 2, "manifest": 3, "bundle": 4, "sheet": 4}
cases = [run_case(good, number, 1, folder, kind) for kind, count in kinds.items() for number in range(count)]
print(json.dumps([asdict(case) for case in cases]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer forks")
def test_damage_ends_in_a_record_a_message_or_no_harm(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SLICE, str(SOAK), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOAK.parents[1] / "scripts"), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert len(cases) == 21
    assert [case for case in cases if case["outcome"] == "wrong"] == []
    assert {"record", "message", "same"} <= {case["outcome"] for case in cases}
