"""Paths of a sheet that lead to no slide, to what has no end, or to what this user may not read."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slidemake.cohort.sheet import SlideRow
from slidemake.core.failures import SlideFailure
from slidemake.jobs.racks import run_rack
from slidemake.slides.files import check_file
from slidemake.slides.formats.tiff_index import read_tiff_index
from slidemake.slides.opening import open_slide
from slidemake.slides.screening import screen_slide

OPTIONS = {"reader": "auto", "default_mpp": None}


def screened(path: str | Path, results: Path) -> dict:
    """The record of a rack with this slide, as the stage writes it."""
    row = SlideRow.for_screening(slide_id="a", path=str(path), mpp=None, stain=None, exclude=False)
    [record] = run_rack(
        "screen", results / "manifest.json", [{"slide_id": "a"}], lambda _: screen_slide(row, OPTIONS, results)
    )
    return record


def failure_of(path: str | Path, results: Path) -> dict:
    record = screened(path, results)
    assert record["status"] == "failed"
    return record["failure"]


@pytest.mark.parametrize("path", ["nothing.svs", "no/such/folder/a.svs", "/no/such/a.svs"])
def test_a_missing_slide_is_missing_however_its_path_is_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    failure = failure_of(path, tmp_path / "results")
    assert (failure["code"], failure["message"]) == ("missing_file", f"{path} does not exist")
    assert "relative paths start at the sheet's own folder" in failure["hint"]
    with pytest.raises(SlideFailure, match="does not exist"):
        open_slide(path)


@pytest.mark.parametrize("path", [r"C:\data\a.svs", "C:/data/a.svs", r"\\server\slides\a.svs", r"slides\a.svs"])
def test_a_path_of_windows_is_told_as_one(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    failure = failure_of(path, tmp_path / "results")
    assert failure["code"] == "missing_file"
    assert "/mnt/c/data/a.svs" in failure["hint"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_files_and_folders_are_opened(tmp_path, kind):
    """A pipe into which nobody writes would keep its reader for ever; a device may have no end."""
    path = tmp_path / "a.svs"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert failure_of(path, tmp_path / "results")["code"] == "unsupported"
    with pytest.raises(SlideFailure, match="no file and no folder"):
        open_slide(path)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights: what may be read is then what the file's mode says."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("kind", ["file", "folder", "folder above", "file in folder"])
def test_a_slide_without_permission_is_its_own_failure(tmp_path_factory, kind):
    base = tmp_path_factory.mktemp("open")
    for folder in base.parents:  # pytest's folders are for their owner alone, as many as there are workers
        if folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    base.chmod(0o755)
    results = base / "results"
    results.mkdir(mode=0o777)
    results.chmod(0o777)
    path = base / "slides" / "a.dcm"
    path.parent.mkdir()
    path.write_bytes(b"x")
    shut, sheet = {
        "file": (path, path),
        "folder": (path.parent, path.parent),
        "folder above": (path.parent, path),
        "file in folder": (path, path.parent),
    }[kind]
    shut.chmod(0)
    try:
        with nobody():
            failure = failure_of(sheet, results)
    finally:
        shut.chmod(0o755)
    assert failure["code"] == "unreadable"
    assert "no permission to read" in failure["message"]
    assert "chmod a+r" in failure["hint"]


# -- files that claim too much ---------------------------------------------------------------------------------------


def tiff(path: Path, side: int, tile: int, images: int = 1, repeat: int = 1) -> Path:
    """A TIFF whose index is whole and whose tiles are all the same 100 bytes; `repeat`: entries with the offsets."""
    count = math.ceil(side / tile) ** 2
    single = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 2), (277, 3, 3), (322, 3, tile)]
    entries = sorted([*single, (323, 3, tile), *[(324, 4, None)] * repeat, (325, 4, None)], key=lambda entry: entry[0])
    size = 2 + 12 * len(entries) + 4
    offsets = 8 + images * size
    body = b""
    for number in range(images):
        body += struct.pack("<H", len(entries))
        for tag, kind, value in entries:
            where = offsets + (4 * count if tag == 325 else 0)
            body += struct.pack("<HHII", tag, kind, count if value is None else 1, where if value is None else value)
        body += struct.pack("<I", 8 + (number + 1) * size if number + 1 < images else 0)
    data = offsets + 8 * count
    arrays = struct.pack("<I", data) * count + struct.pack("<I", 100) * count
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + arrays + bytes(100))
    return path


def test_a_slide_of_a_million_pixels_is_refused_before_it_is_decoded(tmp_path):
    failure = failure_of(tiff(tmp_path / "a.tiff", 1_000_000, 16_384), tmp_path / "results")
    assert failure["code"] == "unsupported"
    assert "1000000 x 1000000 px" in failure["message"]


def test_an_index_that_tells_the_same_again_and_again_is_not_read_to_its_end(tmp_path):
    path = tiff(tmp_path / "a.tiff", 320_000, 256, repeat=200)  # 1.25 GB of offsets in a file of 12.5 MB
    with pytest.raises(SlideFailure, match="its index is larger than 512 MB"):
        read_tiff_index(path)


def test_thousands_of_images_in_a_file(tmp_path):
    with pytest.raises(SlideFailure, match="more than 5000 images"):
        read_tiff_index(tiff(tmp_path / "a.tiff", 256, 256, images=5001))
    assert len(read_tiff_index(tiff(tmp_path / "b.tiff", 256, 256, images=300)).pages) == 300


def test_check_file_passes_what_can_be_read(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    check_file(tmp_path / "a")
    check_file(tmp_path)
