"""Checksums of stores, and `slidemake verify`: whatever is damaged is named, with what to delete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slidemake.core.currency import write_record
from slidemake.core.failures import SlideFailure
from slidemake.core.files import file_sums, placed, read_json, write_json
from slidemake.core.tables import seal_tables, write_table
from slidemake.mil.bundle import save_bundle
from slidemake.stores.arrays import write_array
from slidemake.stores.integrity import check_store, problems, seal
from slidemake.stores.tile_store import (
    TileCodec,
    TileStore,
    create_store,
    shard_path,
    store_fingerprint,
    write_shard,
)
from slidemake.workflow.verify import main, verify

GRID = "8px_1mpp"


def make_store(path: Path, slide_id: str, mark: str) -> None:
    codec, tiles = TileCodec("zstd"), np.random.default_rng(len(slide_id)).integers(0, 255, (3, 8, 8, 3), np.uint8)
    group = create_store(path, 3, 8, codec, 2)
    for shard, start in enumerate((0, 2)):
        write_shard(shard_path(path, shard), [codec.encode(tile) for tile in tiles[start : start + 2]], 2)
    write_array(path, "coords", np.arange(6, dtype=np.int32).reshape(3, 2))
    write_array(path, "tissue", np.ones(3, np.float32))
    write_array(path, "quality", np.zeros((3, 1), np.float32))
    attributes = {"format": "slidemake-tiles", "format_version": 1, "tile_px": 8, "shard_tiles": 2, "store": "pixels"}
    group.attrs.update({**attributes, "codec": codec.as_dict(), "slide_id": slide_id, "fingerprint": mark})
    seal(path)


@pytest.fixture
def results(tmp_path) -> Path:
    """Two slides with slide.json, tissue.json and its mask, tile stores and manifests; one bundle."""
    folder = tmp_path / "results"
    write_json(folder / "slidemake.json", {"format": "slidemake-results", "format_version": 1})
    for stage, where in (("screen", "screen"), ("tissue", "tissue"), ("tiles", f"tiles/{GRID}")):
        records = [{"slide_id": s, "status": "ok", "failure": None, "fingerprint": f"{stage} {s}"} for s in "ab"]
        records.append({"slide_id": "c", "status": "failed", "failure": {"code": "no_mpp"}})
        write_json(folder / "manifests" / where / "r00000.json", {"stage": stage, "rack": "r00000", "slides": records})
    for slide in "ab":
        place = folder / "slides" / slide
        write_json(place / "slide.json", {"slide_id": slide, "fingerprint": f"screen {slide}", "mpp": 0.5})
        (place / "tissue.png").write_bytes(b"a mask of " + slide.encode())
        files = file_sums(place, ["tissue.png"])
        write_json(place / "tissue.json", {"slide_id": slide, "fingerprint": f"tissue {slide}", "files": files})
        make_store(folder / "tiles" / GRID / f"{slide}.zarr", slide, f"tiles {slide}")
    save_bundle(folder / "tasks/t/m/bundles/repeat0_fold0", {"fingerprint": "x", "classes": ["n", "p"]}, [])
    write_table(folder / "cohort" / "slides.csv", [{"slide_id": "a"}])
    seal_tables(folder / "cohort" / "tables.json", [folder / "cohort" / "slides.csv"])
    (folder / "cohort" / "notes.txt").write_text("of somebody")
    (folder / "logs").mkdir()
    report = folder / "report"
    (report / "stain").mkdir(parents=True)
    (report / "index.html").write_text("a page")
    (report / "stain" / "a.jpg").write_bytes(b"a picture")
    write_json(report / "report.json", {"files": file_sums(report, ["index.html", "stain/a.jpg"])})
    plan_of(folder, "cohort_table", ["cohort/slides.csv", "cohort/tables.json"])
    plan_of(folder, "write_report", ["report/index.html", "report/report.json"])
    plan_of(folder, "tile_slides", [f"manifests/tiles/{GRID}/r00000.json"])
    return folder


def plan_of(results: Path, rule: str, files: list[str]) -> None:
    """Add a finished job to what the last run wanted."""
    plan = read_json(results / "plan.json") if (results / "plan.json").exists() else {"format": 1, "outcomes": []}
    about = {"rule": rule, "wildcards": {}, "files": files, "digest": "d", "settings": {}, "read": {}, "after": ""}
    plan["outcomes"].append(about)
    write_json(results / "plan.json", plan)
    write_record(results, about)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_whole_results_are_whole(results, capsys):
    findings, counts = verify(results)
    assert findings == []
    assert counts == {"manifests": 3, "stores": 2, "bundles": 1, "other files": 11, "planned files": 5}
    assert main([str(results)]) == 0
    shown = capsys.readouterr().out
    assert "All is there, and as it was written: 3 manifests, 2 stores, 1 bundles, 11 other files, 5 planned" in shown
    assert "Not looked at: logs (what jobs said)" in shown
    assert "Not looked at: 1 files that no JSON lists, such as " in shown
    assert "cohort/notes.txt" in shown


def test_a_record_whose_checksum_is_gone_is_named(results):
    """As when a byte of the key itself was lost: the rest may be as it was, and nobody can tell."""
    paths = [results / "slides" / "a" / "tissue.json", results / "manifests" / "screen" / "r00000.json"]
    for path in paths:
        path.write_text(path.read_text().replace('"checksum"', '"checkum"'))
    findings, _ = verify(results)
    assert [finding.path for finding in findings] == sorted(paths)
    assert all("carries no checksum" in finding.what for finding in findings)


def test_a_store_is_sealed_byte_by_byte(results):
    """Every byte of every file of a store, one at a time: each flip is found, and the file named."""
    store = results / "tiles" / GRID / "a.zarr"
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            flip(path, at)
            found = list(problems(store, every_byte=True))
            # a flip may turn one space between two JSON tokens into another; the content is the same then
            same = path == store / "zarr.json" and json_or_none(path) == json.loads(whole)
            assert same or (len(found) == 1 and path.name in found[0]), (path, at, found)
            path.write_bytes(whole)
    assert list(problems(store, every_byte=True)) == []


def json_or_none(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("spoil", "named", "says"),
    [
        (lambda r: flip(shard_path(r / f"tiles/{GRID}/a.zarr", 1), 5), f"tiles/{GRID}/a.zarr", "pixels/c/1/0/0/0"),
        (lambda r: shard_path(r / f"tiles/{GRID}/a.zarr", 0).unlink(), f"tiles/{GRID}/a.zarr", "lacks its file"),
        (lambda r: (r / f"tiles/{GRID}/a.zarr/odd").touch(), f"tiles/{GRID}/a.zarr", "does not belong to it"),
        (lambda r: shutil.rmtree(r / f"tiles/{GRID}/a.zarr"), f"tiles/{GRID}/a.zarr", "is missing"),
        (lambda r: flip(r / "slides/a/slide.json", 30), "slides/a/slide.json", ""),
        (lambda r: flip(r / "slides/a/tissue.png"), "slides/a/tissue.png", "does not match its checksum"),
        (lambda r: (r / "slides/a/tissue.json").unlink(), "slides/a/tissue.json", "is missing"),
        (lambda r: flip(r / "manifests/tissue/r00000.json", 40), "manifests/tissue/r00000.json", ""),
        (lambda r: flip(r / "tasks/t/m/bundles/repeat0_fold0/weights.safetensors"), "weights.safetensors", "checksum"),
    ],
)
def test_what_is_damaged_is_named_with_what_to_delete(results, capsys, spoil, named, says):
    spoil(results)
    assert main([str(results)]) == 1
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("DAMAGED")]
    assert len(lines) == 1, shown
    assert named in lines[0]
    assert says in lines[0]
    deletions = [line.removeprefix("  rm -r ") for line in shown.splitlines() if line.startswith("  rm -r ")]
    assert any(path.endswith(named.replace("tissue.png", "tissue.json")) or "bundles" in path for path in deletions)
    if not named.startswith(("manifests", "weights")):  # what vouches for it goes too, so that it is made again
        assert any("manifests" in path for path in deletions), shown


@pytest.mark.parametrize(
    ("spoil", "named", "says"),
    [
        (lambda r: flip(r / "cohort/slides.csv"), "cohort/slides.csv", "does not match its checksum"),
        (lambda r: flip(r / "report/index.html"), "report/index.html", "does not match its checksum"),
        (lambda r: flip(r / "report/stain/a.jpg"), "report/stain/a.jpg", "does not match its checksum"),
        (lambda r: flip(r / "slidemake.json", 30), "slidemake.json", ""),
        (lambda r: flip(r / "plan.json", 30), "plan.json", ""),
        (lambda r: flip(r / "digests/report/index.html.json", 30), "digests/report/index.html.json", ""),
    ],
)
def test_tables_reports_and_records_of_the_run_are_looked_at(results, capsys, spoil, named, says):
    spoil(results)
    assert main([str(results)]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("DAMAGED", "ABSENT"))]
    assert named in line
    assert says in line


@pytest.mark.parametrize("file", ["cohort/slides.csv", "report/index.html", f"manifests/tiles/{GRID}/r00000.json"])
def test_what_the_last_run_wanted_and_is_absent_is_named(results, capsys, file):
    """Also where nothing else would know: the manifest itself is gone, or the table with its seal."""
    (results / file).unlink()
    for other in ("cohort/tables.json", "report/report.json"):
        if other.split("/")[0] == file.split("/")[0]:
            (results / other).unlink()
    assert main([str(results)]) == 1
    shown = capsys.readouterr().out
    assert f"ABSENT   {results / file} is absent, and the last run wanted it" in shown
    assert "give the same snakemake command as before; whatever is finished is kept\n" in shown
    assert "rm -r" not in shown


def test_what_a_job_did_not_leave_is_named_though_nothing_seals_it(results):
    (results / "cohort" / "tables.json").unlink()
    with open(results / "cohort" / "slides.csv", "a") as handle:
        handle.write("b\n")
    found = {finding.path.name: finding.what for finding in verify(results)[0]}
    assert found["slides.csv"] == "has 13 bytes instead of 11 (cohort_table)"


def test_whole_folders_that_changed_places_are_found(results):
    """Two models, each whole in itself."""
    for model in ("m", "n"):
        folder = results / "tasks" / "t" / model
        write_json(folder / "train.json", placed(folder / "train.json"))
    save_bundle(results / "tasks/t/n/bundle", {"fingerprint": "y", "classes": ["n", "p"]}, [])
    assert verify(results)[0] == []
    one, two = results / "tasks" / "t" / "m", results / "tasks" / "t" / "n"
    one.rename(results / "x")
    two.rename(one)
    (results / "x").rename(two)
    found = {finding.path.relative_to(results).as_posix(): finding for finding in verify(results)[0]}
    assert "was written as tasks/t/n/train.json" in found["tasks/t/m/train.json"].what
    assert "was written as tasks/t/n/bundle/bundle.json" in found["tasks/t/m/bundle/bundle.json"].what
    assert found["tasks/t/m/bundle/bundle.json"].delete == (one / "bundle", one / "train.json")


def test_what_a_task_keeps_of_slides_has_its_place(results):
    """In folders that are not the slides' own."""
    one, two = (results / "tasks" / "t" / "stain" / f"{name}.json" for name in ("hash1", "hash2"))
    for number, path in enumerate((one, two)):
        write_json(path, {"slide_id": "ab"[number], "vectors": {}, **placed(path)})
    assert verify(results)[0] == []
    one.rename(results / "x.json")
    two.rename(one)
    (results / "x.json").rename(two)
    assert {finding.path for finding in verify(results)[0]} == {one, two}


def test_without_a_plan_verify_says_what_it_cannot_know(results, capsys):
    (results / "plan.json").unlink()
    assert main([str(results)]) == 0
    assert "what is absent: plan.json is not there or damaged" in capsys.readouterr().out


def test_bags_without_their_index_are_named(results):
    bags = results / "cohort" / "bags"
    bags.mkdir(parents=True)
    (bags / "enc.npy").write_bytes(b"features")
    write_json(bags / "enc.json", {"files": file_sums(bags, ["enc.npy"])})
    assert verify(results)[0] == []
    (bags / "enc.json").unlink()
    [finding] = verify(results)[0]
    assert finding.path == bags / "enc.json"
    assert finding.delete == (bags / "enc.npy",)


def test_swapped_stores_and_records_are_found(results):
    one, two = (results / "tiles" / GRID / f"{slide}.zarr" for slide in "ab")
    one.rename(results / "x")
    two.rename(one)
    (results / "x").rename(two)
    findings, _ = verify(results)
    assert {f.path for f in findings} == {one, two}
    assert all("another fingerprint" in f.what for f in findings)


def test_a_reader_refuses_a_damaged_store(results):
    store = results / "tiles" / GRID / "a.zarr"
    check_store(store)
    assert store_fingerprint(store) == "tiles a"
    flip(shard_path(store, 1), 5)
    assert store_fingerprint(store) == "tiles a"  # lengths are looked at, pixels when they are read
    with pytest.raises(SlideFailure, match="damaged in shard 1, tile 2") as caught:
        TileStore(store).read(0, 3)
    assert caught.value.code == "damaged"
    assert "python -m slidemake verify" in caught.value.hint
    shard_path(store, 1).write_bytes(b"")
    assert store_fingerprint(store) is None
    with pytest.raises(SlideFailure, match="of 0 bytes instead of"):
        TileStore(store)


def test_attributes_cannot_be_changed_unnoticed(results):
    store = results / "tiles" / GRID / "a.zarr" / "zarr.json"
    store.write_text(store.read_text().replace('"tile_px": 8', '"tile_px": 9'))
    with pytest.raises(SlideFailure, match="does not match its checksum"):
        TileStore(store.parent)
    assert store_fingerprint(store.parent) is None


def test_hostile_names_are_shown_harmless(results, capsys):
    flip(results / "slides/a/tissue.png")
    (results / "slides/a").rename(results / "slides/\x1b[31m;rm -rf ~")
    assert main([str(results)]) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "'" in next(line for line in shown.splitlines() if "rm -rf ~" in line and line.startswith("  rm -r "))


def test_a_folder_that_is_no_results_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "slidemake", "verify", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "scripts")},
    )
    assert done.returncode == 2
    assert "no folder of slidemake results" in done.stderr
