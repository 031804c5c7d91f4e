"""Who opens a slide: the reader that screening recorded, or the one that fits the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure
from slidemake.slides.files import check_file
from slidemake.slides.reader import Level, Mpp, SlideReader
from slidemake.slides.remote import arrive

READERS = ("pyvips", "openslide", "tifffile", "tiatoolbox")
SAMPLE = 512  # px, side of the regions compared between two readers


def open_screened(slide: Mapping[str, Any], path: str | Path | None = None) -> SlideReader:
    """Open a slide as screening recorded it (slide.json): its reader, its um per px, the levels that fit together.

    `path`: where the file is now, when it is not where it was. Every stage after screening opens slides so.
    """
    x, y = slide.get("mpp_xy") or (slide["mpp"], slide["mpp"])
    reader = open_slide(path or slide["path"], slide.get("reader") or "auto", (x, y))
    if all("number" in level for level in slide.get("levels", ())):
        reader.levels = tuple(Level(**level) for level in slide.get("levels", ())) or reader.stored
    return reader


def open_slide(path: str | Path, reader: str = "auto", mpp: Mpp = None) -> SlideReader:
    """Open a slide file, or the folder of a multi-file DICOM or OME-Zarr.

    `reader`: the name recorded at screening, or "auto" (`choose_reader`, which reads some regions). `mpp`: um per
    pixel (or x and y) that stands before the file's own. Raises SlideFailure (missing_file, unsupported, ...).
    """
    arrive(path)
    if reader == "auto":
        reader = choose_reader(path)
    file = slide_file(path)
    if reader == "openslide":
        from slidemake.slides.formats.openslide_reader import OpenSlideReader

        return OpenSlideReader(file, mpp)
    if reader == "pyvips":
        from slidemake.slides.formats.vips_reader import VipsReader

        return VipsReader(file, mpp)
    if reader in ("tifffile", "tiatoolbox"):
        from slidemake.slides.formats.tiatoolbox_reader import open_tiatoolbox

        return open_tiatoolbox(Path(path), mpp)
    raise RunError(f"Unknown reader {reader!r}: one of auto, {', '.join(READERS)}.")


def slide_file(path: str | Path) -> Path:
    """The file to hand to a reader: of a DICOM slide (a folder, or a file) the first of its series that is a level;
    anything else as it is. Raises SlideFailure `missing_file`; `unsupported` for what is no slide."""
    from slidemake.slides.formats.dicom_files import is_dicom, slide_series

    path = Path(path)
    check_file(path)
    if path.is_dir() and not (path / ".zattrs").exists() and not (path / "zarr.json").exists():
        if not any(is_dicom(file) for file in path.iterdir()):
            raise SlideFailure("unsupported", f"{path} is a folder without DICOM files and not an OME-Zarr")
        return slide_series(path)[0]
    if is_dicom(path):
        files = slide_series(path)
        return path if path in files else files[0]
    return path


def choose_reader(path: str | Path) -> str:
    """Name of the reader for a slide: OpenSlide if it opens the file, else TIAToolbox; pyvips instead of either
    when it gives the same pixels on a fixed sample of regions at every level.

    Raises SlideFailure `unsupported` when nothing opens the file.
    """
    from slidemake.slides.formats.openslide_reader import opens_with_openslide
    from slidemake.slides.formats.tiff_index import read_tiff_index
    from slidemake.slides.formats.vips_reader import vips_may_read

    file = slide_file(path)
    index = read_tiff_index(file)
    problem = opens_with_openslide(file)
    # OpenSlide takes an OME-TIFF for a generic TIFF: it misses the sub-resolutions, the channels and the mpp.
    ome = index is not None and index.is_ome
    other = "tifffile" if index is not None and index.pages and (ome or index.pages[0].tiled) else "tiatoolbox"
    turned = index is not None and index.mirrored_by_openslide
    name = "openslide" if problem is None and not ome and not turned else other
    if index is not None and vips_may_read(index, ome) and (name == "openslide" or ome):
        with open_slide(path, name) as reference:
            if reference.vendor in ("aperio", "generic-tiff", "ome-tiff") and _vips_agrees(file, reference):
                return "pyvips"
        return name
    if name != "openslide":
        try:
            open_slide(path, name).close()
        except SlideFailure as failure:
            if failure.code != "unsupported" or problem is None:
                raise
            raise SlideFailure("unsupported", f"{failure}. OpenSlide says: {problem}", failure.hint) from failure
    return name


def _vips_agrees(file: Path, reference: SlideReader) -> bool:
    from slidemake.slides.formats.vips_reader import VipsReader

    try:
        with VipsReader(file) as candidate:
            return same_pixels(reference, candidate)
    except OSError:
        return False


def sample_regions(levels: Sequence[Level], per_level: int = 4, side: int = SAMPLE) -> list[tuple[int, int, int, int]]:
    """Fixed sample of regions (level, lx, ly, side): the first corner, one that crosses the far edge, others inside."""
    rng = np.random.default_rng(0)
    regions = []
    for number, level in enumerate(levels):
        px = min(side, max(level.width, level.height))
        regions.append((number, 0, 0, px))
        regions.append((number, level.width - px + 16, level.height - px + 16, px))
        for _ in range(per_level - 2):
            x = int(rng.integers(0, max(1, level.width - px + 1)))
            y = int(rng.integers(0, max(1, level.height - px + 1)))
            regions.append((number, x, y, px))
    return regions


def same_pixels(reference: SlideReader, candidate: SlideReader) -> bool:
    """Whether two readers agree on geometry and on the pixels of `sample_regions`.

    OpenSlide takes integer level-0 positions only, so on a level with a broken downsample its window lies a fraction
    of a pixel beside the level's grid and is interpolated: there the candidate's pixels are shifted alike and must
    agree within rounding (3 of 255 on 99 % of the values); everywhere else they must be equal. A region that fails in
    the reference must fail in the candidate, and one at least must succeed.
    """
    if [(v.width, v.height) for v in reference.levels] != [(v.width, v.height) for v in candidate.levels]:
        return False
    compared = 0
    offset = None if hasattr(candidate, "subpixel_offset") else getattr(reference, "subpixel_offset", None)
    for level, lx, ly, px in sample_regions(reference.levels):
        dx, dy = (offset(max(lx, 0), level), offset(max(ly, 0), level)) if offset else (0.0, 0.0)
        try:
            wanted = reference.read_level(lx, ly, level, px, px)
        except OSError:
            wanted = None
        try:
            got = _shifted(candidate, lx, ly, level, px, dx, dy)
        except OSError:
            got = None
        if wanted is None or got is None:
            if wanted is None and got is None:
                continue
            return False
        compared += 1
        difference = np.abs(wanted.astype(np.float32) - got)
        if (np.quantile(difference, 0.99) > 3) if dx or dy else difference.any():
            return False
    return compared > 0


def _shifted(reader: SlideReader, lx: int, ly: int, level: int, px: int, dx: float, dy: float) -> np.ndarray:
    """Region displaced by a fraction of a pixel, bilinear."""
    if not dx and not dy:
        return reader.read_level(lx, ly, level, px, px)
    bx, by = math.floor(dx), math.floor(dy)
    image = reader.read_level(lx + bx, ly + by, level, px + 1, px + 1).astype(np.float32)
    fx, fy = dx - bx, dy - by
    image = image[:, :-1] * (1 - fx) + image[:, 1:] * fx
    return np.rint(image[:-1] * (1 - fy) + image[1:] * fy)
