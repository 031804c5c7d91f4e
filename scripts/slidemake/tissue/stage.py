"""The tissue stage: one slide's overview becomes a mask, its outline as GeoJSON, a preview and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage as ndi
from shapely import affinity
from shapely.geometry import Polygon

from slidemake.core.failures import SlideFailure
from slidemake.core.files import (
    check_file,
    file_sha256,
    file_sums,
    files_are_whole,
    fingerprint,
    read_json_if_whole,
    read_slide_record,
    write_image,
    write_json,
    write_text,
)
from slidemake.tissue.detection import (
    UNSURE,
    Pieces,
    TissueResult,
    check_options,
    describe_mask,
    detect_tissue,
    flags_of,
)
from slidemake.tissue.focus import focus
from slidemake.tissue.geometry import mask_polygons, polygons_geojson, polygons_mask, read_geojson
from slidemake.tissue.models import Finer, weights_files, weights_mark
from slidemake.tissue.pixels import shrink
from slidemake.tissue.preview import draw_preview

# What the stage adds to the options of `detect_tissue`.
DEFAULTS: dict[str, Any] = {
    "overview_mpp": 8.0,  # um per px of the overview and of tissue.png
    "focus_samples": 48,  # regions read at about 0.5 um/px to see what is out of focus; 0: none
}
MAX_OVERVIEW_PX = 8_000_000  # bounds the memory (100 bytes per px): larger slides get a coarser overview
FOCUS_REGION_PX, FOCUS_MPP = 256, 0.5
BLURRED = 0.15  # of the slide's own sharp reference (the upper quartile of its samples)
FILES = ("tissue.png", "tissue.geojson", "tissue.jpg", "tissue.json")


def process_slide(
    record: dict[str, Any], results: str | Path, options: dict[str, Any], geojson: str | Path | None = None
) -> dict[str, Any]:
    """Detect the tissue of one slide (or take the outline given) and write its four files, tissue.json last.

    record: what screening found (slide_id, path, reader, mpp, fingerprint, ...). options: `DEFAULTS` here and in
    `tissue`. Returns the figures of tissue.json, with `reused: True` when finished results carry the same
    fingerprint. Raises SlideFailure: `no_tissue` (after the files were written), `no_mpp`, or what the reader and the
    outline's file say.
    """
    folder = Path(results) / "slides" / record["slide_id"]
    settings = {**DEFAULTS, **options}
    detection = {key: value for key, value in settings.items() if key not in DEFAULTS}
    detection = check_options(detection)
    if geojson is not None and not Path(geojson).is_file():
        read_geojson(geojson)  # says what is wrong
    outline = file_sha256(geojson) if geojson is not None else None
    told: dict[str, Any] = {**settings, **detection}
    files = weights_files(detection["method"], detection["weights"])
    if files and all(file.is_file() for file in files):
        told["weights"] = weights_mark(detection["method"], detection["weights"])  # one name may hold other weights
    mark = fingerprint("tissue", slide=record["fingerprint"], options=told, outline=outline)
    done = read_json_if_whole(folder / "tissue.json")
    if done and done.get("fingerprint") == mark and "files" in done and files_are_whole(folder, done):
        return _verdict({**done, "reused": True}, geojson)
    if not record.get("mpp"):
        raise SlideFailure("no_mpp", "the resolution is unknown, so tissue cannot be measured in um")
    return _verdict(_make(record, folder, settings, detection, geojson, mark), geojson)


def _make(
    record: dict[str, Any],
    folder: Path,
    settings: dict[str, Any],
    detection: dict[str, Any],
    geojson: str | Path | None,
    mark: str,
) -> dict[str, Any]:
    from slidemake.slides.opening import open_screened

    with open_screened(record) as slide:
        mpp = float(record["mpp"])
        mpp_x, mpp_y = slide.mpp_xy or (mpp, mpp)
        width, height = slide.dimensions
        coarsest = math.sqrt(mpp_x * mpp_y * width * height / MAX_OVERVIEW_PX)
        rgb, sx, sy = slide.overview(max(settings["overview_mpp"], mpp_x, mpp_y, coarsest))
        mask_mpp = (mpp_x * sx + mpp_y * sy) / 2
        confidence: list[float] = []
        if geojson is None:
            found = detect_tissue(rgb, mask_mpp, detection, finer_pixels(slide, (sx, sy)))
            polygons = mask_polygons(found.mask, (sx, sy))
            confidence = piece_confidence(found.pieces, polygons, (sx, sy))
        else:
            polygons = read_geojson(geojson)
            drawn = polygons_mask(polygons, rgb.shape[:2], (sx, sy))
            found = describe_mask(rgb, mask_mpp, drawn, detection)
        samples = sample_focus(slide, found.mask, (sx, sy), mpp, settings["focus_samples"])
    qc = {**found.qc, **samples}
    pixel_mm2 = (mpp_x * sx) * (mpp_y * sy) / 1e6
    figures = {
        "slide_id": record["slide_id"],
        "fingerprint": mark,
        "method": "geojson" if geojson is not None else detection["method"],
        "options": {**settings, **detection},
        "mask_mpp": mask_mpp,
        "mask_width": found.mask.shape[1],
        "mask_height": found.mask.shape[0],
        "level0_per_mask_px": [sx, sy],
        "area_mm2": round(float(found.mask.sum()) * pixel_mm2, 6),
        "slide_area_mm2": round(width * height * mpp_x * mpp_y / 1e6, 6),
        "components": int(ndi.label(found.mask, structure=np.ones((3, 3)))[1]),
        "threshold": found.threshold,
        "qc": qc,
        "flags": sorted({*found.flags, *flags_of(qc), *(["unreadable"] if samples["unreadable_samples"] else [])}),
    }
    outline = polygons_geojson(polygons, math.sqrt(mpp_x * mpp_y))
    for feature, value in zip(outline["features"], confidence, strict=False):  # none for an outline that was given
        feature["properties"] |= {"confidence": round(value, 3), "unsure": value < UNSURE}
    _write(folder, rgb, found, outline, mask_mpp, figures)
    return figures


def finer_pixels(slide: Any, scale: tuple[float, float]) -> Finer:
    """Reads squares of the slide; scale: level-0 px per px of the overview. White beyond the slide."""
    from slidemake.slides.reader import best_level

    def read(x: float, y: float, width: float, side: int) -> np.ndarray:
        wanted = [width * factor / side for factor in scale]  # level-0 px per px that is asked for
        level = best_level(slide, min(wanted))
        fine = slide.levels[level].downsample
        w, h = (max(1, round(side * factor / fine)) for factor in wanted)
        region = slide.read(x * scale[0], y * scale[1], level, w, h)
        return np.asarray(Image.fromarray(region).resize((side, side), Image.Resampling.BOX))

    return read


def _write(
    folder: Path,
    rgb: np.ndarray,
    found: TissueResult,
    outline: dict[str, Any],
    mask_mpp: float,
    figures: dict[str, Any],
) -> None:
    write_image(folder / "tissue.png", Image.fromarray(found.mask.astype(np.uint8) * 255), format="PNG")
    write_text(folder / "tissue.geojson", json.dumps(outline, separators=(",", ":")) + "\n")
    write_image(folder / "tissue.jpg", draw_preview(rgb, found.mask, mask_mpp), format="JPEG", quality=88)
    figures["files"] = file_sums(folder, FILES[:-1])
    write_json(folder / "tissue.json", figures)


def read_mask(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Mask (h, w) bool and tissue.json of a slide's folder; `damaged` when they are not as they were written."""
    described = read_slide_record(folder, "tissue.json")
    check_file(folder / "tissue.png", described)
    with Image.open(folder / "tissue.png") as mask:
        return np.asarray(mask.convert("L")) > 127, described


def piece_confidence(pieces: Pieces | None, polygons: list[Polygon], scale: tuple[float, float]) -> list[float]:
    """Confidence of each polygon (level-0 px), 0..1; scale: level-0 px per px of the mask. Empty without pieces."""
    if pieces is None:
        return []
    values = []
    for polygon in polygons:
        left, top, right, bottom = polygon.bounds
        x, y = int(left / scale[0]), int(top / scale[1])
        width, height = int(np.ceil(right / scale[0])) - x + 1, int(np.ceil(bottom / scale[1])) - y + 1
        window = pieces.labels[y : y + height, x : x + width]
        moved = affinity.translate(polygon, -x * scale[0], -y * scale[1])
        found = window[polygons_mask([moved], window.shape, scale)]
        found = found[found > 0]
        values.append(float(pieces.confidence[np.bincount(found).argmax()]) if found.size else 0.0)
    return values


def _verdict(figures: dict[str, Any], geojson: str | Path | None) -> dict[str, Any]:
    if figures["components"] > 0:
        return figures
    if geojson is None and "implausible_colours" in figures["flags"]:
        raise SlideFailure(
            "implausible_colours",
            f"no pixel is as bright as glass: what is flat and brightest has the colour {figures['qc']['white_point']} "
            "(RGB), which no glass has under transmitted light",
        )
    if geojson is not None:
        raise SlideFailure(
            "no_tissue",
            f"the outline {geojson} covers none of the slide ({figures['slide_area_mm2']:g} mm^2)",
            "Outlines are in level-0 pixels of this very slide; export them from it again.",
        )
    qc = figures["qc"]
    raise SlideFailure(
        "no_tissue",
        f"no tissue of {figures['options']['min_area_um2']:g} um^2 or more on {figures['slide_area_mm2']:.4g} mm^2 "
        f"(method {figures['method']}, threshold {_three(figures['threshold'])}, glass {qc['white_point']}, "
        f"pen {qc['pen_fraction']:.1%}, black {qc['black_fraction']:.1%})",
    )


def _three(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def sample_focus(slide: Any, mask: np.ndarray, scale: tuple[float, float], mpp: float, samples: int) -> dict[str, Any]:
    """Sharpness of up to `samples` regions of 256 px at about 0.5 um/px, spread over the tissue.

    The score is the variance of the Laplacian of green over the variance of green within the region, so that a region
    with few nuclei is not taken for a blurred one. Blurred is what stays below 0.15 of the slide's own upper quartile:
    on sharp H&E up to 5 % of regions do, after a Gaussian blur of sigma 0.5 um nearly all. A slide that is half out of
    focus is caught, one that is so throughout is not. Regions that do not decode
    are counted; tiling refuses them later.
    """
    none = {"blur_fraction": 0.0, "focus_median": None, "focus_samples": 0, "unreadable_samples": 0}
    if samples < 1 or not mask.any():
        return none
    fitting = [level for level in slide.levels if level.downsample * mpp <= FOCUS_MPP * 1.25]
    level = len(fitting) - 1 if fitting else 0
    side = FOCUS_REGION_PX * slide.levels[level].downsample  # level-0 px
    inner = shrink(mask, max(1, round(side / 2 / scale[0])))
    rows, columns = np.nonzero(inner if int(inner.sum()) >= samples else mask)
    # Evenly along the scan order, the same every time and on every machine.
    chosen = np.unique(np.linspace(0, len(rows) - 1, samples).round().astype(np.int64))
    scores, unreadable = [], 0
    for row, column in zip(rows[chosen], columns[chosen], strict=True):
        x, y = int((column + 0.5) * scale[0] - side / 2), int((row + 0.5) * scale[1] - side / 2)
        try:
            region = slide.read(max(x, 0), max(y, 0), level, FOCUS_REGION_PX, FOCUS_REGION_PX)
        except (OSError, SlideFailure):
            unreadable += 1
            continue
        grey = region[..., 1]
        spread = float(grey.astype(np.float32).var())
        if spread > 9:
            scores.append(focus(grey) / spread)
    if not scores:
        return {**none, "unreadable_samples": unreadable}
    values = np.asarray(scores)
    return {
        "blur_fraction": round(float((values < BLURRED * np.percentile(values, 75)).mean()), 4),
        "focus_median": round(float(np.median(values)), 4),
        "focus_samples": len(values),
        "unreadable_samples": unreadable,
    }
