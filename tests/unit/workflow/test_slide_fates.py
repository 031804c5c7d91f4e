"""What a plan says of the slides of racks whose jobs are to run, before a store is opened."""

from __future__ import annotations

import pytest
from slidemake.core.currency import Outcome, Tree, settings_of
from slidemake.workflow.slide_fates import fates, fates_of_current, slide_digests

SLIDES = ("a", "b")
FILES = {"/slides/a.tiff": "100 5", "/slides/b.tiff": "200 5"}
OWNERS = {"/slides/a.tiff": "a", "/slides/b.tiff": "b"}


def rows(**of_a):
    return [
        {"slide_id": "a", "path": "/slides/a.tiff", "mpp": None, "stain": "", **of_a},
        {"slide_id": "b", "mpp": 0.5},
    ]


def digests(params, read=FILES, before=(), others=("target",)):
    outcome = Outcome("rule", {"rack": "r0"}, ["manifests/tissue/r0.json"], settings_of(params), dict(read))
    return slide_digests(outcome, params, SLIDES, OWNERS, before, others)


PARAMS = {
    "rows": rows(),
    "options": {"close": 1, "device": "auto"},
    "version": 3,
    "scheduler": "threads",
    "results": "x",
}
CHANGES = {
    "nothing": ({}, FILES, ("found", "found")),
    "where results are": ({"results": "elsewhere"}, FILES, ("found", "found")),
    "an option": ({"options": {"close": 2, "device": "auto"}}, FILES, ("computed", "computed")),
    "the version": ({"version": 4}, FILES, ("computed", "computed")),
    "the device": ({"options": {"close": 1, "device": "cpu"}}, FILES, ("looked at", "looked at")),
    "the scheduler": ({"scheduler": "synchronous"}, FILES, ("looked at", "looked at")),
    "mpp of a": ({"rows": rows(mpp=0.25)}, FILES, ("computed", "found")),
    "stain of a": ({"rows": rows(stain="IHC")}, FILES, ("looked at", "found")),
    "a touched": ({}, FILES | {"/slides/a.tiff": "100 6"}, ("looked at", "found")),
    "a replaced": ({}, FILES | {"/slides/a.tiff": "101 5"}, ("computed", "found")),
    "a gone": ({}, FILES | {"/slides/a.tiff": "absent"}, ("computed", "found")),
    "weights replaced": ({}, FILES | {"/weights.pt": "7 7"}, ("looked at", "looked at")),
}


@pytest.fixture
def tree(tmp_path):
    for name in SLIDES:
        (tmp_path / "slides" / name).mkdir(parents=True)
        (tmp_path / "slides" / name / "tissue.json").touch()
    return Tree(tmp_path)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_does_to_each_slide(tree, change):
    params, read, expected = CHANGES[change]
    record = {"slides": digests(PARAMS), "vouches": {"slides/{slide}/tissue.json": list(SLIDES)}}
    found = fates(digests(PARAMS | params, read), record, tree)
    assert tuple(found[slide] for slide in SLIDES) == expected


def test_changes_travel_down_the_stages_slide_by_slide(tree):
    before = digests(PARAMS)
    record = {"slides": digests({"version": 1}, {}, [before]), "vouches": {"slides/{slide}/tissue.json": list(SLIDES)}}
    for params, read, expected in CHANGES.values():
        now = digests({"version": 1}, {}, [digests(PARAMS | params, read)])
        assert tuple(fates(now, record, tree)[slide] for slide in SLIDES) == expected
    other = digests({"version": 1}, {}, [before], others=["another target"])
    assert set(fates(other, record, tree).values()) == {"looked at"}


def test_what_is_absent_failed_or_unknown(tree):
    (tree.folder / "slides/a/tissue.json").unlink()
    kept = {"slides": digests(PARAMS), "vouches": {"slides/{slide}/tissue.json": ["a"]}}
    assert fates(digests(PARAMS), kept, tree) == {"a": "computed", "b": "failed"}  # nothing is left of a; b never was
    assert fates(digests(PARAMS | {"scheduler": "x"}), kept, tree) == {"a": "computed", "b": "looked at"}
    for record in (None, {"vouches": {}}, {"slides": {}, "vouches": {"slides/{slide}/tissue.json": ["a"]}}):
        assert set(fates(digests(PARAMS), record, tree).values()) == {"looked at"}  # killed, or an older slidemake
    assert fates(digests(PARAMS), {"slides": {"b": digests(PARAMS)["b"]}, "vouches": {}}, tree)["a"] == "looked at"


def test_what_failed_at_an_earlier_stage_is_not_worked_on(tree):
    kept = {"slides": digests(PARAMS), "vouches": {"slides/{slide}/tissue.json": ["a"]}}
    before = fates_of_current(SLIDES, kept)
    assert before == {"a": "found", "b": "failed"}
    changed = digests(PARAMS | {"version": 4})
    assert fates(changed, kept, tree, [before]) == {"a": "computed", "b": "failed"}
    assert fates(changed, None, tree, [before, {"a": "computed"}]) == {"a": "looked at", "b": "failed"}
