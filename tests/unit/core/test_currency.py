"""What is kept of an outcome, and what a plan says of one that is not what is wanted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from slidemake.core import currency
from slidemake.core.currency import Outcome, Tree, begin, identity, record_file, settings_of, why_stale, write_plan
from slidemake.core.failures import HINTS, RunError
from slidemake.core.files import read_json, write_json

MANIFEST = "manifests/tiles/224px_0.5mpp/r00000.json"
SCREEN = "manifests/screen/r00000.json"


@pytest.fixture(autouse=True)
def _forget() -> None:
    """A process looks at a file once; a test is many plans."""
    currency.identity.cache_clear()
    currency.content.cache_clear()


def outcome(**changes: object) -> Outcome:
    settings = settings_of({"options": {"codec": "jpeg"}, "version": 1, "results": "results"})
    known = Outcome("tile_slides", {"rack": "r00000"}, [MANIFEST], settings, {"/slides/a.svs": "5 6"}, "before")
    return replace(known, **changes)


def manifest(results: Path, name: str = MANIFEST, **record: object) -> None:
    slides = [{"slide_id": "A", "status": "ok", "failure": None, **record}, {"slide_id": "B", "status": "failed"}]
    slides[1]["failure"] = {"stage": "screen", "code": "no_mpp"}
    write_json(results / name, {"stage": name.split("/")[1], "rack": "r00000", "slides": slides})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A results folder with one outcome, whose manifest vouches for a store."""
    results = tmp_path / "results"
    write_plan(results, [outcome()])
    ticket = begin([str(results / MANIFEST)], {"options": {"codec": "jpeg"}, "version": 1, "results": "elsewhere"})
    (results / "tiles/224px_0.5mpp/A.zarr").mkdir(parents=True)
    manifest(results)
    ticket.done()
    return results


def why(results: Path, wanted: Outcome | None = None) -> str | None:
    return why_stale(wanted or outcome(), results, Tree(results))


def test_the_record_of_a_job_that_a_twin_overtook_is_of_the_files_that_are_there(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between a job's look at its manifest and its record, its twin on another node writes the same manifest, with
    another time, and is then gone (or has written its own record: the same)."""
    written = []

    def overtaken(path: Path, value: object) -> None:
        if not written:
            manifest(made, seconds=12.25)
        written.append(path)
        write_json(path, value)

    monkeypatch.setattr(currency, "write_json", overtaken)
    currency.write_record(made, read_json(made / "plan.json")["outcomes"][0])
    assert len(written) == 2
    assert why(made) is None


def test_a_job_that_another_run_overtook_keeps_no_digest_and_stops(made: Path):
    """Snakemake was killed alone, the change taken back, and the next run planned while the job still works."""
    params = {"options": {"codec": "jpeg"}, "version": 1}
    write_plan(made, [outcome(after="changed")])
    orphan = begin([str(made / MANIFEST)], params)
    currency.check_wanted(made / MANIFEST)
    write_plan(made, [outcome()])
    with pytest.raises(RunError, match="wants something else of tile_slides"):
        currency.check_wanted(made / MANIFEST)
    assert not orphan.done()
    assert why(made) == currency.NO_RECORD
    # the same is wanted: a run that was killed, and begun again
    twin = begin([str(made / MANIFEST)], params)
    write_json(made / "plan.json", {**read_json(made / "plan.json"), "format": 2})
    currency.check_wanted(made / MANIFEST)
    (made / "plan.json").unlink()
    assert twin.done()
    assert why(made) is None


def test_what_was_made_from_another_run_s_files_is_looked_at_again(made: Path):
    """While a job reads a manifest, a job that another run left behind writes it."""
    after = Outcome("embed_tiles", {"rack": "r00000"}, ["manifests/embed/toy/r00000.json"], {}, {}, outcome().digest)
    write_plan(made, [outcome(), after])
    for digest, expected in ((None, True), ("another", False), ("none", False)):
        made_from = begin([str(made / MANIFEST)], {"options": {"codec": "jpeg"}, "version": 1})
        made_from.done()
        ticket = begin([str(made / after.files[0])], {}, [str(made / MANIFEST), "/slides/a.svs"])
        manifest(made, after.files[0])
        kept = record_file(made, MANIFEST)
        if digest == "another":
            write_json(kept, {**read_json(kept), "digest": digest})
        elif digest:
            kept.unlink()  # it has begun
        assert ticket.done() is expected
        assert record_file(made, after.files[0]).exists() is expected


def test_what_is_as_it_was_made_is_current(made: Path):
    assert why(made) is None
    moved = made.with_name("moved")
    shutil.copytree(made, moved)  # other times, another place
    assert why(moved) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": settings_of({"options": {"codec": "zstd"}, "version": 1})}, "other settings: options"),
        (
            {"settings": settings_of({"options": {"codec": "jpeg"}, "version": 2})},
            "other settings: the version of tile_slides",
        ),
        ({"read": {"/slides/a.svs": "5 5"}}, "another file: /slides/a.svs"),
        ({"read": {"/slides/a.svs": "5 6", "/slides/b.svs": "absent"}}, "another file: /slides/b.svs"),
        ({"after": "others"}, currency.DERIVED),
        ({"made": ("/no/such/slide.tiff",)}, "/no/such/slide.tiff is absent"),
    ],
)
def test_what_is_wanted_otherwise_is_named(made: Path, change: dict[str, object], told: str):
    assert why(made, outcome(**change)) == told


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (MANIFEST, f"{MANIFEST} is absent"),
        ("tiles/224px_0.5mpp/A.zarr", "tiles/224px_0.5mpp/A.zarr is absent"),
        (f"digests/{MANIFEST}", currency.NO_RECORD),
    ],
)
def test_what_is_absent_is_named(made: Path, path: str, told: str):
    found = made / path
    shutil.rmtree(found) if found.is_dir() else found.unlink()
    assert why(made) == told


def test_what_was_written_over_is_named_whatever_its_time(made: Path):
    times = (made / MANIFEST).stat()
    text = (made / MANIFEST).read_text()
    (made / MANIFEST).write_text(text.replace('"A"', '"C"'))
    os.utime(made / MANIFEST, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert why(made) == f"{MANIFEST} is not as it was written"
    record = record_file(made, MANIFEST)
    record.write_text(record.read_text().replace("tile_slides", "tile_slide"))
    assert why(made) == f"{record} is damaged"


def test_a_job_that_starts_takes_the_digest_away(made: Path):
    """So that one that is killed, in whatever state its files are, is looked at again."""
    begin([str(made / MANIFEST)], {"options": {"codec": "jpeg"}, "version": 1})
    assert why(made) == currency.NO_RECORD


def test_a_job_with_settings_that_were_not_planned_keeps_no_digest(made: Path):
    assert begin([str(made / MANIFEST)], {"options": {"codec": "none"}, "version": 1}) is None
    assert begin([str(made / SCREEN)], {"version": 1}) is None  # of no plan
    assert begin([str(made.parent / "table.csv")], {}) is None  # of no results folder
    assert begin([], {}) is None


def test_slides_that_could_not_be_fetched_are_tried_again(tmp_path: Path):
    wanted = Outcome("screen_slides", {"rack": "r00000"}, [SCREEN], settings_of({"version": 1}))
    write_plan(tmp_path, [wanted])
    for code, stage, again in (
        ("unreachable", "fetch", "A could not be fetched and is tried again"),
        ("missing_file", "fetch", "A could not be fetched and is tried again"),
        ("wrong_checksum", "fetch", "A could not be fetched and is tried again"),  # there may be another file by now
        ("unsupported", "fetch", None),
        ("missing_file", "screen", None),  # of the disk: a file that is there now is another identity
    ):
        manifest(tmp_path, SCREEN, status="failed", failure={"stage": stage, "code": code})
        begin([str(tmp_path / SCREEN)], {"version": 1}).done()
        assert why(tmp_path, wanted) == again, code


def test_what_memory_and_machine_decide_is_run_again_by_name(tmp_path: Path):
    """No plan sees that a job has more memory now, or a library is mended: the hint names the way."""
    wanted = Outcome("screen_slides", {"rack": "r00000"}, [SCREEN], settings_of({"version": 1}))
    write_plan(tmp_path, [wanted])
    for code in ("out_of_memory", "too_slow", "crashed"):
        manifest(tmp_path, SCREEN, status="failed", failure={"stage": "screen", "code": code})
        begin([str(tmp_path / SCREEN)], {"version": 1}).done()
        assert why(tmp_path, wanted) is None
        assert "run again with --forcerun" in HINTS[code]


def test_identity_of_a_file_is_its_size_and_time_older_or_newer(tmp_path: Path):
    file, found = tmp_path / "a.svs", set()
    for text, time in (("one", 10**18), ("one", 10**18 + 1), ("one", 10**18 - 1), ("more", 10**18)):
        file.write_text(text)
        os.utime(file, ns=(time, time))
        identity.cache_clear()
        found.add(identity(str(file)))
    file.unlink()
    identity.cache_clear()
    assert identity(str(file)) == "absent"
    assert len(found) == 4


def test_identity_of_a_folder_and_of_mirax_is_that_of_its_files(tmp_path: Path):
    (tmp_path / "m.mrxs").write_text("")
    inside = tmp_path / "m" / "deep" / "Data0001.dat"
    inside.parent.mkdir(parents=True)
    inside.write_text("pixels")
    before = identity(str(tmp_path / "m.mrxs")), identity(str(tmp_path / "m"))
    inside.write_text("others")
    os.utime(inside, ns=(10**18, 10**18))
    identity.cache_clear()
    after = identity(str(tmp_path / "m.mrxs")), identity(str(tmp_path / "m"))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_settings_leave_out_where_results_are_and_how_paths_are_spelled(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {"output": "results", "sheet": "slides.csv", "seed": 1}
    one = settings_of({"config": shown, "results": "results", "fetching": {"attempts": 3}, "files": ["a"]})
    (tmp_path / "link").symlink_to(tmp_path)
    other = {**shown, "output": f"{tmp_path}/link/results/", "sheet": f"{tmp_path}/slides.csv"}
    two = settings_of({"config": other, "results": f"{tmp_path}/results", "fetching": {"attempts": 4}, "files": []})
    assert one == two
    assert settings_of({"config": {**shown, "seed": 2}}) != settings_of({"config": shown})
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path / "moved")  # with everything
    assert settings_of({"config": shown}) == {"config": one["config"]}


def test_the_plan_is_written_again_only_when_it_is_another(made: Path):
    written = (made / "plan.json").stat().st_mtime_ns
    write_plan(made, [outcome()])
    assert (made / "plan.json").stat().st_mtime_ns == written
    write_plan(made, [outcome(after="others")])
    plan = json.loads((made / "plan.json").read_text())
    assert [entry["digest"] for entry in plan["outcomes"]] == [outcome(after="others").digest]
    assert (plan["format"], plan["outcomes"][0]["files"]) == (1, [MANIFEST])
