"""The stain stage: pooled tissue pixels of one slide become stain.json; the cohort's reference; a slide's transform."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage as ndi

from slidemake.core.failures import SlideFailure
from slidemake.core.files import fingerprint, read_json_if_whole, read_slide_record, write_json
from slidemake.slides.opening import open_screened
from slidemake.slides.reader import SlideReader, best_level
from slidemake.stain.fit import (
    StainRefused,
    StainTransform,
    estimate_white_point,
    fit_stain,
)
from slidemake.stain.judgement import columns_of, describe_pixels, fit_reasons, judged_transform
from slidemake.stain.targets import no_target, pool_targets, target_from_image
from slidemake.tissue.stage import read_mask

DEFAULTS: dict[str, Any] = {
    "method": "none",  # macenko, vahadane, reinhard, ruifrok or none; `auto` is resolved before
    "white_point": "estimate",  # or 255, as TIAToolbox has it
    "max_pixels": 100_000,  # tissue pixels pooled per slide
}
FIT_MPP = 1.0  # um/px at which pixels are pooled: the next finer level, averaged in whole steps, whatever the pyramid
REGION_PX = 64  # side of a pooled region at FIT_MPP
MIN_REGIONS = 50
OVERVIEW_PX = 1024


def stain_file(method: str | None = None) -> str:
    """Name of the file of a slide's fit: stain.json, and stain_<method>.json of methods that models take instead."""
    return f"stain_{method}.json" if method else "stain.json"


def process_slide(record: dict[str, Any], results: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fit the stain of one slide by the run's method, and by those that `options["also"]` names; returns the first fit.

    A fit that is finished is taken as it is: see `fit_slide`. The sample of pixels stays in the file: manifests are
    read for all slides at once.
    """
    for method in options.get("also", ()):
        fit_slide(record, results, {**options, "method": method}, stain_file(method))
    found = fit_slide(record, results, options, stain_file())
    return {key: value for key, value in found.items() if key != "tissue"}


def fit_slide(
    record: dict[str, Any], results: str | Path, options: dict[str, Any], name: str = "stain.json"
) -> dict[str, Any]:
    """Fit the stain of one slide and write results/slides/{slide_id}/{name}; returns its content.

    `record` is the tissue stage's (slide_id, fingerprint); path, reader and mpp come from slide.json, the mask from
    tissue.png. A stain that cannot be fitted is no failure: status none, with `reason` (a key of stain.REFUSALS) and
    `message`, and the slide goes on unnormalised. `tissue` is what a fit is judged by before it is used, `unfit` why it
    is of no use whatever the reference (`judgement`). Regions that do not decode are left out and counted. A
    finished stain.json with the same fingerprint is taken as it is (`reused`). Raises SlideFailure `unreadable` when no
    region decodes, and what the reader raises.
    """
    folder = Path(results) / "slides" / record["slide_id"]
    settings = {key: options.get(key, value) for key, value in DEFAULTS.items()}
    method = settings["method"]
    parts = {"method": "none"} if method == "none" else {"tissue": record["fingerprint"], "options": settings}
    mark = fingerprint("stain", slide=record["slide_id"], **parts)
    done = read_json_if_whole(folder / name)
    if done and done.get("fingerprint") == mark:
        return {**done, "reused": True}
    stain = {"slide_id": record["slide_id"], "fingerprint": mark, "method": method, "status": "ok", "reason": None}
    empty = ("white_point", "stain_matrix", "max_concentrations", "lab_mean", "lab_std")
    if method == "none":
        stain |= dict.fromkeys(empty) | {"status": "none", "reason": "method none", "pixels": 0, "tissue": None}
    else:
        slide = read_slide_record(folder, "slide.json")
        tissue, described = read_mask(folder)
        scale = tuple(described["level0_per_mask_px"])
        pixels, white, unreadable = pool_slide(slide, tissue, scale, settings)
        stain |= {"unreadable_regions": unreadable, "tissue": describe_pixels(pixels, white)}
        try:
            stain |= fit_stain(pixels, method, white).as_dict()
        except StainRefused as refused:
            stain |= dict.fromkeys(empty) | {"white_point": white, "pixels": len(pixels)}
            stain |= {"status": "none", "reason": refused.reason, "message": str(refused)}
        stain["unfit"] = fit_reasons(stain)
    write_json(folder / name, stain)
    return stain


def pool_slide(
    slide: dict[str, Any], tissue: np.ndarray, scale: tuple[float, float], settings: dict[str, Any]
) -> tuple[np.ndarray, tuple[float, ...], int]:
    """Pooled tissue pixels (n, 3) uint8, white point, and how many regions did not decode.

    `slide` is slide.json; `tissue` (h, w) bool with `scale` level-0 px per mask px in x and y.
    """
    with open_screened(slide) as reader:
        white = (255.0, 255.0, 255.0)
        if settings["white_point"] == "estimate":
            white = _white_point(reader, tissue, scale, slide.get("bounds"))
        found: list[np.ndarray] = []
        unreadable, wanted = 0, settings["max_pixels"]
        corners = regions(tissue, scale, REGION_PX * FIT_MPP / slide["mpp"], wanted)
        for pixels in _read_regions(reader, corners, tissue, scale, slide["mpp"]):
            if pixels is None:
                unreadable += 1
            else:
                found.append(pixels)
    if corners and not found:
        raise SlideFailure("unreadable", f"none of {len(corners)} regions of tissue decodes")
    pooled = np.concatenate(found) if found else np.empty((0, 3), np.uint8)
    keep = np.linspace(0, len(pooled) - 1, min(len(pooled), wanted)).round().astype(int)
    return pooled[keep], white, unreadable


def regions(tissue: np.ndarray, scale: tuple[float, float], side: float, wanted: int) -> list[tuple[float, float]]:
    """Top-left corners (level-0 px) of square regions of `side` level-0 px, spread evenly over the tissue.

    At least `MIN_REGIONS` where the tissue has as many, and twice as many as `wanted` pixels need. The slide is cut
    into cells; those with tissue are put along a Z-order curve, which keeps neighbours together, and taken at equal
    steps.
    """
    cell_x, cell_y = side / scale[0], side / scale[1]  # in mask px, not whole numbers
    ys, xs = np.nonzero(tissue)
    if len(ys) == 0:
        return []
    columns, rows = (xs / cell_x).astype(np.int64), (ys / cell_y).astype(np.int64)
    keys, counts = np.unique(_z_order(columns, rows), return_counts=True)
    most = counts >= 0.5 * cell_x * cell_y
    if most.sum() >= MIN_REGIONS:
        keys = keys[most]
    n = min(len(keys), max(MIN_REGIONS, math.ceil(2 * wanted / REGION_PX**2)))
    chosen = keys[np.linspace(0, len(keys) - 1, n).round().astype(int)]
    return [(_even_bits(key) * side, _even_bits(key >> 1) * side) for key in (int(k) for k in np.unique(chosen))]


def _z_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interleave the bits of x (even places) and y (odd places)."""
    out = np.zeros_like(x)
    for bit in range(24):
        out |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return out


def _even_bits(key: int) -> int:
    return sum(((key >> (2 * bit)) & 1) << bit for bit in range(24))


def _read_regions(
    reader: SlideReader, corners: list[tuple[float, float]], tissue: np.ndarray, scale: tuple[float, float], mpp: float
) -> Iterator[np.ndarray | None]:
    """Tissue pixels (n, 3) of each region at about FIT_MPP; None for a region that does not decode."""
    level = best_level(reader, max(1.0, FIT_MPP / mpp))
    downsample = reader.levels[level].downsample
    factor = max(1, int(FIT_MPP / (mpp * downsample) + 1e-3))
    side = max(1, round(REGION_PX * FIT_MPP / (mpp * downsample * factor)))
    step = factor * downsample
    for x0, y0 in corners:
        try:
            region = reader.read(round(x0), round(y0), level, side * factor, side * factor)
        except (OSError, SlideFailure):
            yield None
            continue
        mean = region.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
        at = (np.arange(side) + 0.5) * step
        ix = ((x0 + at) / scale[0]).astype(int)
        iy = ((y0 + at) / scale[1]).astype(int)
        inside = (iy < tissue.shape[0])[:, None] & (ix < tissue.shape[1])[None, :]
        mask = tissue[np.ix_(np.minimum(iy, tissue.shape[0] - 1), np.minimum(ix, tissue.shape[1] - 1))] & inside
        yield np.rint(mean[mask]).astype(np.uint8)


def _white_point(
    reader: SlideReader, tissue: np.ndarray, scale: tuple[float, float], bounds: list[int] | None
) -> tuple[float, float, float]:
    """Glass of the scanned part of the slide, clear of the tissue's edge."""
    overview = reader.thumbnail(OVERVIEW_PX)
    width, height = reader.dimensions
    x = (np.arange(overview.shape[1]) + 0.5) * width / overview.shape[1]  # level-0 px
    y = (np.arange(overview.shape[0]) + 0.5) * height / overview.shape[0]
    ix, iy = (x / scale[0]).astype(int), (y / scale[1]).astype(int)
    covered = tissue[np.ix_(np.minimum(iy, tissue.shape[0] - 1), np.minimum(ix, tissue.shape[1] - 1))]
    covered = ndi.binary_dilation(covered, iterations=2)
    if bounds:
        left, top, w, h = bounds
        covered |= ~(((y >= top) & (y < top + h))[:, None] & ((x >= left) & (x < left + w))[None, :])
    return estimate_white_point(overview, covered)


def make_target(
    results: str | Path, target: str, method: str, slide_ids: list[str], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Reference record: `target` is 'tiatoolbox', 'cohort' (median of the slides' fits) or an image file.

    `also`: further methods; the record then has their references under `also`. Raises RunError when the image is
    missing or no H&E. Method none needs no reference.
    """
    found = _target(results, target, method, slide_ids, None)
    if also:
        found = {**found, "also": {name: _target(results, target, name, slide_ids, name) for name in also}}
    return found


def _target(results: str | Path, target: str, method: str, slide_ids: list[str], suffix: str | None) -> dict[str, Any]:
    if method == "none":
        return no_target("method none")
    if target != "cohort":
        return target_from_image(target, method)
    folder = Path(results) / "slides"
    fits = [read_slide_record(folder / slide_id, stain_file(suffix)) for slide_id in slide_ids]
    return pool_targets([fit for fit in fits if not fit.get("unfit")], method)


def target_of(target: dict[str, Any], method: str | None = None) -> dict[str, Any]:
    """The reference of one method out of what `make_target` made; None: of the run's."""
    others = target.get("also", {})
    return others[method] if method in others else {key: value for key, value in target.items() if key != "also"}


def slide_transform(
    results: str | Path, slide_id: str, target: dict[str, Any], method: str | None = None
) -> dict[str, Any]:
    """Transform of one slide to the reference, JSON-able, with its `fingerprint`; by the run's method or another one.

    A slide without a fit, or with one that does not pass its judgement, gets the transform of its only stain or the
    one that leaves pixels as they are; method and target are the cohort's. Whatever applies a stain asks here.
    """
    name = stain_file(method if method in target.get("also", {}) else None)
    fit = read_slide_record(Path(results) / "slides" / slide_id, name)
    transform: StainTransform = judged_transform(fit, target_of(target, method))
    return transform.as_dict()


def judgement_columns(results: Path, target: dict[str, Any], slide_id: str) -> dict[str, Any]:
    """Columns of slides.csv of the run's stain method, and of each that models take instead (their names end in it)."""
    row = columns_of(slide_transform(results, slide_id, target)) if target["status"] != "none" else {}
    for method in target.get("also", {}):
        other = columns_of(slide_transform(results, slide_id, target, method))
        row |= {f"{column}_{method}": value for column, value in other.items()}
    return row
