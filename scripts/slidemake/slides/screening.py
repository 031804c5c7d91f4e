"""Screening: what each slide is, and whether it can be processed at all, before any real work is spent on it.

For every slide: identity by content, the reader that serves it, levels, um per px and where that came from, or a typed
reason why not. A few regions over the slide and at every level are read; of a TIFF the positions of all tiles are
compared with the size of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from slidemake.core.content import content_identity, files_of, trace_of
from slidemake.core.failures import SlideFailure
from slidemake.core.files import (
    file_sha256,
    file_sums,
    files_are_whole,
    fingerprint,
    read_json_if_whole,
    write_image,
    write_json,
)
from slidemake.jobs import isolation
from slidemake.jobs.racks import Record
from slidemake.slides.files import check_file, no_permission
from slidemake.slides.formats.levels import aligned_levels
from slidemake.slides.formats.tiff_index import check_rgb, check_whole, read_tiff_index
from slidemake.slides.opening import choose_reader, open_slide, slide_file
from slidemake.slides.reader import SQUARE, SlideReader, square_mpp
from slidemake.slides.remote import arrive, size_of

if TYPE_CHECKING:
    from slidemake.cohort.sheet import SlideRow

MOST_PIXELS = 400e9  # at level 0: the whole of a glass slide (75 x 25 mm) at 0.07 um per px
SLOWEST_READING = 5e6  # bytes per s that a whole file may take to be read
PLAUSIBLE_MPP = (0.05, 10.0)  # um per px at level 0; a resolution tag of 72 dpi says 353
OVERVIEW_MPP = 100.0  # scans of a whole glass slide in one picture (macro, overview, flatbed) have 10 to 100 um per px
GLASS_UM = 160e3  # longest side of anything on a glass slide, large formats included
PRINT_DPI = (72, 96, 100, 120, 144, 150, 180, 200, 240, 250, 300, 350, 360, 400, 600, 720, 1200)  # no microscope's
THUMBNAIL = 512  # px, longer side
OVERVIEW = 1200  # px; kept of slides that will not stay on the disk, for the pictures of the explanation
PROBE = 256  # px, side of the regions read


def screen_slide(row: SlideRow, options: dict[str, Any], results: Path, remote: dict[str, Any] | None = None) -> Record:
    """Screen one slide: writes `slides/{id}/thumbnail.jpg` and, last, `slide.json` under `results`.

    `options`: `reader` ("auto", or one name for all slides), `default_mpp` (um per px for slides that have none, or
    None). `remote`: of a slide that was fetched, what the fetching stage recorded; `row.path` is its local copy,
    which may be gone later. Returns the figures of slide.json, with `reused: True` when they were found finished.
    Raises SlideFailure with the reason; slide.json then holds it, with status "failed".
    """
    path = Path(row.path)
    target = results / "slides" / row.slide_id / "slide.json"
    known = read_json_if_whole(target)
    postponed = remote is not None and bool(remote.get("postponed")) and known is not None and "identity" in known
    remote = {key: value for key, value in remote.items() if key != "postponed"} if remote else None
    wanted = {key: options.get(key) for key in ("reader", "default_mpp")}
    checked = {"sha256": row.sha256} if row.sha256 else {}

    def mark_of(identity: str) -> str:
        return fingerprint("screen", identity=identity, slide_id=row.slide_id, mpp=row.mpp, options=wanted, **checked)

    if not postponed:
        arrive(path)
        try:
            check_file(path)
        except SlideFailure:
            target.unlink(missing_ok=True)
            raise
    trace = None if remote else _reading(trace_of, path)  # a fetched slide has a new time every time
    if known is not None and "identity" in known and (postponed or (trace and known.get("trace") == trace)):
        identity = known["identity"]
    else:
        identity = slide_identity(path)
    pictures = [target.with_name("thumbnail.jpg"), *([target.with_name("overview.jpg")] if remote else [])]
    if known is not None and known.get("fingerprint") == mark_of(identity) and _has_pictures(known, pictures):
        about = {"path": str(path), "remote": remote, "trace": trace}
        if {key: known.get(key) for key in about} != about:  # it moved, or was written again
            known |= about
            write_json(target, known)
        return {**known, "reused": True}
    try:
        arrive(path)
        if row.sha256:
            check_sha256(path, row.sha256, identity)
        found = _examine(row, path, options, pictures)
    except SlideFailure as failure:
        reason = failure.record(row.slide_id, "screen").as_dict()
        write_json(target, {"slide_id": row.slide_id, "status": "failed", "path": str(path), "failure": reason})
        raise
    record = {"slide_id": row.slide_id, "status": "ok", "path": str(path), "identity": identity, **found}
    files = file_sums(target.parent, [picture.name for picture in pictures])
    record |= {"remote": remote, "trace": trace, "fingerprint": mark_of(identity), "files": files}
    write_json(target, record)
    return record


def _has_pictures(known: dict[str, Any], pictures: list[Path]) -> bool:
    """Whether the pictures that a slide.json lists are those that are wanted, and are there as they were written."""
    listed = all(picture.name in known.get("files", {}) for picture in pictures)
    return listed and files_are_whole(pictures[0].parent, known)


def check_sha256(path: Path, wanted: str, identity: str) -> None:
    """Compare a slide with the checksum that the sheet gives. Raises SlideFailure wrong_checksum or unsupported.

    identity: of its content, which of a single file is half of its checksum, so that it need not be read again.
    """
    if path.is_dir():
        raise SlideFailure("unsupported", f"{path} is a folder, which has no sha256", "Leave the cell empty.")
    if list(files_of(path)) == [""] and wanted.startswith(identity):
        return
    isolation.allow(size_of(path) / SLOWEST_READING)
    found = file_sha256(path)
    if found != wanted:
        raise SlideFailure("wrong_checksum", f"{path} has sha256 {found}, and the sheet says {wanted}")


def slide_identity(path: Path) -> str:
    """Content identity of a slide, of all of its files. Raises SlideFailure unreadable where one may not be read."""
    isolation.allow(sum(file.stat().st_size for file in files_of(path).values()) / SLOWEST_READING)
    return _reading(content_identity, path)


def _reading(how: Callable[[Path], str], path: Path) -> str:
    """What `how` finds in the files of a slide. One that may not be read is the slide's own failure."""
    try:
        return how(path)
    except PermissionError as error:
        raise no_permission(path, error) from error


def find_duplicates(records: list[Record]) -> dict[str, str]:
    """{slide_id: slide_id of the first slide with the same content}, for all but the first of each scan.

    Over the records of all racks, in sheet order; records without an identity (failed ones) are passed over.
    """
    first: dict[str, str] = {}
    duplicates: dict[str, str] = {}
    for record in records:
        identity = record.get("identity")
        if identity is None:
            continue
        original = first.setdefault(identity, record["slide_id"])
        if original != record["slide_id"]:
            duplicates[record["slide_id"]] = original
    return duplicates


def _examine(row: SlideRow, path: Path, options: dict[str, Any], pictures: list[Path]) -> Record:
    """Open the slide and look at it: the figures of slide.json, its thumbnail and, where asked for, its overview."""
    index = read_tiff_index(slide_file(path))
    if index is not None:
        for page in index.pages[:1]:
            if page.width * page.height > MOST_PIXELS:  # before anything is decoded to choose a reader
                raise _too_large(path, page.width, page.height)
        check_whole(index)
        if index.pages and not index.is_ome:
            check_rgb(index.pages[0], path.name)
    name = options.get("reader") or "auto"
    if name == "openslide" and index is not None and index.mirrored_by_openslide:
        why = f"{path.name} has a tag of orientation, by which OpenSlide mirrors every tile in itself"
        raise SlideFailure("unsupported", why, "Set reader: auto, which takes another reader for it.")
    with open_slide(path, choose_reader(path) if name == "auto" else name, row.mpp) as slide:
        width, height = slide.dimensions
        if width * height > MOST_PIXELS:
            raise _too_large(path, width, height)
        flags = _check_modality(slide) + _probe(slide)
        mpp, source = _resolve_mpp(slide, row.mpp, options.get("default_mpp"))
        flags += _mpp_flags(slide, mpp, source) + (["several_images"] if slide.several_images else [])
        xy = (square_mpp(slide.file_mpp) if source == "file" else None) or (mpp, mpp)
        slide.levels, changed = aligned_levels(slide, index)
        flags += ["levels_not_aligned"] if changed else []
        flags += ["orientation_not_applied"] if index and index.pages and index.pages[0].orientation > 1 else []
        picture = slide.thumbnail(THUMBNAIL)
        flags += _check_light(picture, path.name)
        write_image(pictures[0], Image.fromarray(picture), format="JPEG", quality=85)
        for overview in pictures[1:]:
            write_image(overview, Image.fromarray(slide.thumbnail(OVERVIEW)), format="JPEG", quality=90)
        return {
            "vendor": slide.vendor,
            "reader": slide.name,
            "width": slide.dimensions[0],
            "height": slide.dimensions[1],
            "levels": [vars(level) for level in slide.levels],
            "bounds": list(slide.bounds) if slide.bounds else None,
            "mpp": mpp,
            "mpp_xy": list(xy),
            "mpp_source": source,
            "mpp_file": list(slide.file_mpp) if slide.file_mpp else None,
            "objective": _objective(slide),
            "associated": slide.associated(),
            "flags": sorted(set(flags)),
        }


def _too_large(path: Path, width: int, height: int) -> SlideFailure:
    message = f"{path.name} says that it is {width} x {height} px: no slide is so large"
    return SlideFailure("unsupported", message, "The file is damaged, or no scan. Export the slide again.")


def _resolve_mpp(slide: SlideReader, sheet: float | None, default: float | None) -> tuple[float, str]:
    """um per px and its source: sheet, then file, then the cohort's default."""
    file = sum(slide.file_mpp) / 2 if slide.file_mpp else None
    for value, source in ((sheet, "sheet"), (file, "file"), (default, "default")):
        if value is None:
            continue
        if not PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1]:
            if source == "file" and _is_overview(slide, value):
                raise SlideFailure(
                    "too_coarse",
                    f"{slide.path.name} says {value:.4g} um per pixel, an overview of the glass: no grid is so coarse",
                    "Give the scan itself; of a DICOM folder, the files of ImageType VOLUME.",
                )
            where = {"sheet": "The sheet", "file": "The file", "default": "The setting default_mpp"}[source]
            message = f"{where} says {value:.6g} um per pixel; between 0.05 and 10 is plausible"
            raise SlideFailure("implausible_mpp", message)
        return float(value), source
    raise SlideFailure("no_mpp", f"{slide.path.name} does not say its um per pixel, nor does the sheet")


def _is_overview(slide: SlideReader, mpp: float) -> bool:
    """Whether so coarse a value can be true: no resolution of printers and screens, and the picture fits on a glass."""
    dots = 25400.0 / mpp
    printed = any(abs(dots - dpi) < 0.002 * dpi for dpi in PRINT_DPI) and slide.vendor != "dicom"
    return PLAUSIBLE_MPP[1] < mpp <= OVERVIEW_MPP and max(slide.dimensions) * mpp <= GLASS_UM and not printed


def _objective(slide: SlideReader) -> float | None:
    try:
        return float(slide.properties["openslide.objective-power"])
    except (KeyError, ValueError):
        return None


def _mpp_flags(slide: SlideReader, mpp: float, source: str) -> list[str]:
    """What does not fit together: 10 um / objective is the usual um per px, within a factor 1.5 or so."""
    flags = []
    objective = _objective(slide)
    if objective and not 1 / 1.6 < mpp * objective / 10 < 1.6:
        flags.append("mpp_disagrees_with_objective")
    if slide.file_mpp:
        x, y = slide.file_mpp
        if abs(x / y - 1) > SQUARE and source == "file":
            flags.append("pixels_not_square")
        if source == "sheet" and abs(mpp / ((x + y) / 2) - 1) > 0.05:
            flags.append("mpp_of_sheet_differs_from_file")
    return flags


def _check_modality(slide: SlideReader) -> list[str]:
    """Refuse what the file itself calls fluorescence (Leica, 3DHISTECH, DICOM, ... each in its own property)."""
    for key, value in slide.properties.items():
        told = any(word in key.lower() for word in ("illumination", "slide_type", "slide-type", "modality"))
        if told and "fluor" in value.lower():
            raise SlideFailure("not_brightfield", f"{slide.path.name} is a fluorescence scan ({key} = {value})")
    return []


def _check_light(picture: np.ndarray, name: str) -> list[str]:
    """Refuse a slide that is dark nearly everywhere: transmitted light leaves the background bright."""
    brightest = picture.max(axis=2)
    padding = float((brightest <= 5).mean())
    seen = brightest[brightest > 5]
    if padding > 0.98 or (seen.size and np.median(seen) < 40):
        raise SlideFailure("not_brightfield", f"{name} is dark ({100 * padding:.0f} % black): not transmitted light")
    return ["black_padding"] if padding > 0.1 else []


def _probe(slide: SlideReader) -> list[str]:
    """Read regions spread over the slide at every level: `unreadable` when a level gives nothing at all."""
    lost = 0
    for number, level in enumerate(slide.levels):
        steps = (0.1, 0.5, 0.9) if number == 0 else (0.3, 0.7)
        failed, reason = 0, ""
        for fy in steps:
            for fx in steps:
                w, h = min(PROBE, level.width), min(PROBE, level.height)
                x, y = int(fx * (level.width - w)), int(fy * (level.height - h))
                try:
                    slide.read_level(x, y, number, w, h)
                except OSError as error:
                    failed, reason = failed + 1, str(error)
        if failed == len(steps) ** 2:
            raise SlideFailure("unreadable", f"Nothing at level {number} can be read: {reason}")
        lost += failed
    return ["corrupt_regions"] if lost else []
