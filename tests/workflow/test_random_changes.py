"""A slice of `make soak`: random changes, kills and damage, all taken back, end with the results of a fresh run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

from changes import run

pytestmark = [pytest.mark.workflow, pytest.mark.long]


def test_what_was_changed_and_taken_back_leaves_nothing_behind(tmp_path: Path):
    done = run(2, seed=7, folder=tmp_path, finals=({},))
    assert [
        [*sequence.steps, *sequence.lost, *sequence.wrong] for sequence in done if sequence.lost or sequence.wrong
    ] == []
    assert all(len(sequence.steps) > 2 for sequence in done)
