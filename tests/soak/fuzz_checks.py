"""What the fuzzer compares: with the undamaged results, with `slidemake verify`, and with independent readers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import openslide
import zarr
from PIL import Image
from slidemake.cohort.sheet import read_sheet
from slidemake.core.failures import RunError
from slidemake.core.files import read_json
from slidemake.workflow.verify import verify
from workshop import ENCODER, GRID, Workshop

CLOSE = 40  # of 255: tiles whose pixels differ less from a reference on 99 % are the same picture


class Wrong(Exception):
    """A case that did not end as it must."""


def cause(text: str) -> str | None:
    """Name of the exception of a line `rule x stopped: Name: ...`, None when it is no exception's."""
    found = re.search(r" stopped: (\w+(?:Error|Exception|Interrupt|Warning)): ", text)
    return found[1] if found else None


def same_store(one: Workshop, two: Workshop, slide: str) -> bool:
    """Whether both have the same tile store of a slide, byte by byte (or both none)."""
    folders = [shop.results / "tiles" / GRID / f"{slide}.zarr" for shop in (one, two)]
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    return files[0] == files[1]


def embeddings_of(shop: Workshop, slide: str) -> np.ndarray:
    return np.asarray(zarr.open_group(shop.results / "embeddings" / ENCODER / f"{slide}.zarr", mode="r")["features"][:])


def verify_finds(good: Workshop, shop: Workshop, path: Path, told: str) -> None:
    """`verify` must name a damaged artefact, unless it says the same as before (a space in JSON)."""
    findings, _ = verify(shop.results)
    named = any(path == f.path or path in f.path.parents or f.path in path.parents for f in findings)
    if named or path.is_dir() != (good.results / path.relative_to(shop.results)).is_dir():
        return
    before = good.results / path.relative_to(shop.results)
    pairs = [(before, path)]
    if path.is_dir():
        names = {p.relative_to(f) for f in (before, path) for p in f.rglob("*") if p.is_file()}
        pairs = [(before / name, path / name) for name in names]
    for one, two in pairs:
        if not two.is_file() or not _same_content(one, two):
            raise Wrong(f"{told}: verify does not name it")


def _same_content(one: Path, two: Path) -> bool:
    if one.read_bytes() == two.read_bytes():
        return True
    try:
        return json.loads(one.read_text()) == json.loads(two.read_text())
    except ValueError:
        return False


def pixels_are_true(good: Workshop, shop: Workshop, name: str) -> str:
    """Every stored tile must be the undamaged slide's, or what an independent reader finds in the damaged file."""
    store = zarr.open_group(shop.results / "tiles" / GRID / f"{name}.zarr", mode="r")
    slide = read_json(shop.results / "slides" / name / "slide.json")
    known = {}
    if (before_path := good.results / "tiles" / GRID / f"{name}.zarr").is_dir():
        before = zarr.open_group(before_path, mode="r")
        known = {tuple(at): tile for at, tile in zip(before["coords"][:].tolist(), before["pixels"][:], strict=True)}
    differing = 0
    for at, tile in zip(store["coords"][:].tolist(), store["pixels"][:], strict=True):
        if tuple(at) in known and _close(tile, known[tuple(at)]):
            continue
        differing += 1
        reference = _independent(Path(slide["path"]), at, store.attrs)
        if reference is None or not _close(tile, reference):
            what = "which OpenSlide does not read" if reference is None else "of which OpenSlide reads other pixels"
            raise Wrong(f"{name}: the tile at {at} was stored, {what}")
    return "true" if differing or store["coords"].shape[0] != len(known) else "same"


def _close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(np.quantile(np.abs(one.astype(int) - two.astype(int)), 0.99) <= CLOSE)


def _independent(path: Path, at: list[int], attrs: dict) -> np.ndarray | None:
    """The tile as OpenSlide and Pillow give it: from its stored corner, of its exact size."""
    w, h = attrs["tile_level0_px"]
    file = min(path.glob("*.dcm")) if path.is_dir() else path
    try:
        with openslide.OpenSlide(file) as slide:
            region = slide.read_region((at[0], at[1]), 0, (math.ceil(w) + 2, math.ceil(h) + 2))
    except openslide.OpenSlideError:
        return None
    white = Image.new("RGBA", region.size, (255, 255, 255, 255))
    white.alpha_composite(region)
    side = attrs["tile_px"]
    return np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=(0, 0, w, h)))


def sheet_is_true(sheet: Path, told: str) -> str:
    """The sheet is refused by a RunError, or its rows are those that the csv module reads."""
    task = {"label": "diagnosis", "type": "binary", "level": "patient", "splits": {"method": "kfold", "folds": 2}}
    try:
        rows = read_sheet(sheet, tasks={"t": task})
    except RunError as error:
        if sheet.name not in str(error):
            raise Wrong(f"{told}: the message does not name the sheet: {error}") from error
        return "message"
    text = sheet.read_bytes().decode("utf-8-sig")
    table = [row for row in csv.DictReader(io.StringIO(text)) if any(row.values())]
    for row, given in zip(rows, table, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", row.slide_id) or row.slide_id != (given["slide_id"] or "").strip():
            raise Wrong(f"{told}: slide_id {row.slide_id!r} from {given['slide_id']!r}")
        if Path(row.path).name != Path((given["path"] or "").strip()).name:
            raise Wrong(f"{told}: path {row.path!r} from {given['path']!r}")
        if row.mpp is not None and not 0.05 <= row.mpp <= 10:
            raise Wrong(f"{told}: mpp {row.mpp} was accepted")
        label = (given["diagnosis"] or "").strip()
        if row.labels["diagnosis"] not in (label, ""):
            raise Wrong(f"{told}: label {row.labels['diagnosis']!r} from {label!r}")
    return "same" if len(rows) == 8 else "true"
