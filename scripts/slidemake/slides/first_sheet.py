"""A first sample sheet from a folder of slides: ids from file names, what the files say of scanner and date.

What only the lab knows (patients, sites, labels) stays empty for the user to fill in.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from slidemake.core import csv_cells
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.marker import MARKER
from slidemake.core.words import safe_id
from slidemake.slides.formats.dicom_files import is_dicom, read_dicom, slide_series

log = logging.getLogger("slidemake")

COLUMNS = ("slide_id", "path", "patient_id", "site", "scanner", "scan_date", "mpp", "label")
# Plain images (PNG, JPEG) are left out: beside slides they are masks and previews. They can be written in by hand.
SUFFIXES = frozenset(
    (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".tif", ".tiff", ".svslide", ".vms", ".vmu", ".czi", ".dcm", ".jp2")
)
_TCGA = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})(-.*)?", re.IGNORECASE)
_DATES = (
    ("aperio.Date", ("%m/%d/%y", "%m/%d/%Y")),
    ("hamamatsu.Created", ("%Y/%m/%d",)),
    ("mirax.GENERAL.SLIDE_CREATIONDATETIME", ("%d/%m/%Y %H:%M:%S",)),
    ("dicom.AcquisitionDateTime", ("%Y%m%d",)),
    ("dicom.StudyDate", ("%Y%m%d",)),
    ("tiff.DateTime", ("%Y:%m:%d %H:%M:%S",)),
)
_SCANNERS = (
    "aperio.ScanScope ID",
    "hamamatsu.Product",
    "leica.device-model",
    "ventana.ScannerModel",
    "philips.DICOM_MA",
)


def find_slides(folder: str | Path) -> list[Path]:
    """Slides below `folder`, sorted: files by suffix, OME-Zarr folders, and one path per DICOM series.

    A DICOM series is its folder when it is alone there, else its first file. Hidden files, the data folders of MRXS
    slides, and results and stores of slidemake are left out. Links to folders are followed, each folder once.
    """
    found: list[Path] = []
    for here, folders, files in _walk(Path(folder)):
        zarrs = [name for name in folders if name.lower().endswith(".zarr")]
        found += [here / name for name in zarrs if not _is_ours(here / name)]
        mrxs = {Path(name).stem for name in files if name.lower().endswith(".mrxs")}
        folders[:] = [name for name in folders if name not in {*zarrs, *mrxs}]
        seen = [here / name for name in sorted(files) if not name.startswith(".")]
        found += [path for path in seen if path.suffix.lower() in SUFFIXES - {".dcm"}]
        found += _series(here, [path for path in seen if _may_be_dicom(path)], alone=here != Path(folder))
    return sorted(found)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk, which may be told by what is left of the folders where to go. Links come last, so that a folder has
    its own name where it has one below `folder`, and a link that leads back or around ends there.
    """
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        start = waiting.pop(0)
        for where, folders, files in os.walk(start):
            here = Path(where)
            if here.resolve() in seen or (here / MARKER).exists():
                folders[:] = []
                continue
            seen.add(here.resolve())
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield here, folders, files
            waiting += [here / name for name in folders if (here / name).is_symlink()]


def _is_ours(store: Path) -> bool:
    """Whether a Zarr folder is a store of tiles or embeddings that slidemake wrote."""
    try:
        about = json.loads((store / "zarr.json").read_text())["attributes"]["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return str(about).startswith("slidemake-")


def _may_be_dicom(path: Path) -> bool:
    """By its name, or, without any (as PACS write them), by its first bytes."""
    return path.suffix.lower() == ".dcm" or (path.suffix.lower() not in SUFFIXES and path.is_file() and is_dicom(path))


def _series(folder: Path, files: list[Path], alone: bool) -> list[Path]:
    """One path per DICOM slide among `files`; the folder itself when `alone` and it holds one slide of many files.

    Labels, segmentations and annotations are left out; a file that cannot be told keeps its row.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        try:
            told = read_dicom(path) if is_dicom(path) else None
        except (SlideFailure, OSError):
            told = None
        if told is None or told.level:
            series[str(path) if told is None else told.series].append(path)
    if alone and len(series) == 1 and len(files) > 1:
        return [folder]
    return [paths[0] for paths in series.values()]


def slide_ids(paths: list[Path], folder: str | Path) -> list[str]:
    """An id for each path: its file name without suffix; with its folders in front where two would be the same."""
    stems = [re.sub(r"\.ome$", "", path.name if path.is_dir() and not path.suffix else path.stem) for path in paths]
    ids = [safe_id(stem) for stem in stems]
    counts = Counter(i.lower() for i in ids)
    for n, path in enumerate(paths):
        if counts[ids[n].lower()] > 1:
            ids[n] = safe_id("_".join([*path.relative_to(folder).parent.parts, stems[n]]))
    used: set[str] = set()
    for n, wanted in enumerate(ids):
        suffix = 2
        while ids[n].lower() in used:
            ids[n], suffix = f"{wanted}_{suffix}", suffix + 1
        used.add(ids[n].lower())
    return ids


def sheet_rows(folder: str | Path, sheet: str | Path) -> list[dict[str, str]]:
    """Rows (COLUMNS) of a first sheet at `sheet` for the slides below `folder`.

    Patient and site come from TCGA barcodes where file names are such; scanner and date from what OpenSlide reads. A
    slide that OpenSlide does not open keeps its row: screening says what it is. Raises RunError when there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"There is no folder {folder}. Give one: snakemake write_sheet --cores 1 --config slides_folder=DIR ..."
        )
    paths = find_slides(folder)
    if not paths:
        raise RunError(f"No slides in {folder} or below: no file ends with {' '.join(sorted(SUFFIXES))} or .zarr.")
    rows = []
    for slide_id, path in zip(slide_ids(paths, folder), paths, strict=True):
        row = dict.fromkeys(COLUMNS, "") | {"slide_id": slide_id, "path": _written(path, folder, Path(sheet))}
        barcode = _TCGA.fullmatch(slide_id)
        if barcode:
            row |= {"patient_id": barcode[1].upper(), "site": barcode[2].upper()}
        rows.append(row | _metadata(path))
    return rows


def _written(path: Path, folder: Path, sheet: Path) -> str:
    """Relative to the sheet, unless an absolute folder was given that does not lie beside or below it."""
    start = sheet.absolute().parent
    relative = os.path.relpath(path.absolute(), start)
    return str(path) if folder.is_absolute() and relative.startswith("..") else Path(relative).as_posix()


def _metadata(path: Path) -> dict[str, str]:
    """Scanner and scan date as far as OpenSlide finds them in the file."""
    import openslide

    try:
        file = slide_series(path)[0] if path.is_dir() and path.suffix.lower() != ".zarr" else path
        with openslide.OpenSlide(file) as slide:
            properties = dict(slide.properties)
    except (openslide.OpenSlideError, OSError, SlideFailure):
        return {}
    found = {}
    scanner = next((properties[key] for key in _SCANNERS if properties.get(key)), "")
    if scanner:
        found["scanner"] = " ".join(scanner.split())
    for key, forms in _DATES:
        taken = next(filter(None, (_date(properties.get(key, ""), form) for form in forms)), None)
        if taken:
            found["scan_date"] = taken
            break
    return found


def _date(text: str, form: str) -> str | None:
    length = 8 if form == "%Y%m%d" else None
    try:
        taken = datetime.strptime(text.strip()[:length], form)
    except ValueError:
        return None
    return taken.date().isoformat() if taken.year >= 1990 else None  # earlier: a clock that was never set


def write_sheet(folder: str | Path, sheet: str | Path) -> int:
    """Write a first sheet for the slides below `folder`; returns their number.

    Never touches a sheet that is there: RunError then, even when it appears while the folder is searched.
    """
    sheet = Path(sheet)
    _refuse_existing(sheet)
    rows = sheet_rows(folder, sheet)
    text = io.StringIO()
    writer = csv_cells.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(sheet, "x", encoding="utf-8", newline="") as handle:
            handle.write(text.getvalue())
    except FileExistsError:
        _refuse_existing(sheet)
    patients = sum(bool(row["patient_id"]) for row in rows)
    log.info("%s: %d slides. Now fill in:", sheet, len(rows))
    if patients < len(rows):
        log.info("  patient_id (all slides of a patient stay together; left empty, every slide is its own patient)")
    log.info("  label (or columns of your own names), site; mpp only where the file has none. The rest is optional.")
    if any(row["slide_id"].isdecimal() and row["slide_id"].startswith("0") for row in rows):
        log.info("  Ids begin with zeros: in a spreadsheet, open slide_id as text.")
    return len(rows)


def _refuse_existing(sheet: Path) -> None:
    if sheet.exists() or sheet.is_symlink():
        raise RunError(
            f"{sheet} is there already and is not overwritten. Give another name (--config sheet=NEW.csv), or move it."
        )
