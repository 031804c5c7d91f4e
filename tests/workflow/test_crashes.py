"""A slide whose bytes kill the process that reads it costs that slide: with a real crash.

The crash comes from a `sitecustomize` on PYTHONPATH: the process dies when it commits the result of a given slide.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from snakemake_run import GRID, Project

pytestmark = pytest.mark.workflow

CRASHES = {  # what is committed at the moment of death -> signal
    "P01-A/slide.json": 11,
    "P02-A/tissue.json": 6,
    f"tiles/{GRID}/P03-A.zarr": 11,
    f"tiles/{GRID}/P04-A.zarr": 9,
}
HOOK = """
import ctypes, os
def deadly(rename):
    def replaced(source, target, **options):
        for end, number in CRASHES.items():
            if str(target).endswith(end):
                {11: lambda: ctypes.string_at(0), 6: os.abort, 9: lambda: os.kill(os.getpid(), 9)}[number]()
        return rename(source, target, **options)
    return replaced
os.replace, os.rename = deadly(os.replace), deadly(os.rename)
"""


def test_slides_that_kill_their_reader_are_failure_records(new_project: Callable[..., Project]):
    project = new_project(slides=6, tasks=None)
    hook = project.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(f"CRASHES = {CRASHES!r}\n{HOOK}")
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcome = project.succeed("tiles", PYTHONPATH=path)
    assert "Traceback" not in outcome.text
    failed = {r["slide_id"]: r["failure"] for r in project.manifest("tiles", GRID) if r["status"] == "failed"}
    assert {slide: (failure["stage"], failure["code"]) for slide, failure in failed.items()} == {
        "P01-A": ("screen", "crashed"),
        "P02-A": ("tissue", "crashed"),
        "P03-A": ("tiles", "crashed"),
        "P03-B": ("screen", "no_mpp"),
        "P04-A": ("tiles", "out_of_memory"),
    }
    assert "SIGSEGV" in failed["P03-A"]["message"]
    assert f"logs/tile_slides/{GRID}/r00000.log" in failed["P03-A"]["hint"]
    assert "replaced" in (project.results / f"logs/tile_slides/{GRID}/r00000.log").read_text()  # where it died
    assert [path.stem for path in (project.results / "tiles" / GRID).glob("*.zarr")] == ["P02-B"]
