"""Which files of a folder are a DICOM slide, told by what they say of themselves and not by their names.

A folder may hold the levels of one slide, its label and overview, segmentations and annotations made on it, and other
slides. The slide is the series of whole-slide images with the flavour VOLUME (DICOM PS3.3, C.8.12.4.1.1).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from slidemake.core.failures import SlideFailure

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
OTHERS = {  # what else lies beside slides, by the beginning of its SOP class
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation (SEG)",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation (label map)",
    "1.2.840.10008.5.1.4.1.1.66.": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.91.1": "annotations (ANN)",
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report (SR)",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document",
}
FLAVOURS = {"LABEL": "the label image", "OVERVIEW": "the overview image", "THUMBNAIL": "the thumbnail"}
HINT = "Give the folder of one slide, or one file (ImageType VOLUME) of the slide's series."


@dataclass(frozen=True)
class DicomFile:
    """One DICOM file: its series, what it holds in words, and whether that is a level of a slide."""

    path: Path
    series: str
    what: str
    level: bool


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def read_dicom(path: Path) -> DicomFile:
    """What a DICOM file says of itself. Raises SlideFailure `unreadable` where its head is damaged."""
    import pydicom

    wanted = ["SOPClassUID", "SeriesInstanceUID", "ImageType", "Modality"]
    try:
        head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
        kind = str(head.get("SOPClassUID") or getattr(head.file_meta, "MediaStorageSOPClassUID", ""))
        series, flavours = str(head.get("SeriesInstanceUID", "")), [str(v) for v in head.get("ImageType") or []]
        modality = str(head.get("Modality", ""))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pydicom raises anything for damaged data
        message = f"{path.name}: its DICOM header is damaged: {type(error).__name__}: {error}"
        raise SlideFailure("unreadable", message) from error
    if kind == WHOLE_SLIDE:
        other = next((FLAVOURS[flavour] for flavour in flavours if flavour in FLAVOURS), None)
        return DicomFile(path, series, other or "a level of a slide", other is None)
    named = next((what for uid, what in OTHERS.items() if kind.startswith(uid)), None)
    return DicomFile(path, series, named or f"of another kind (modality {modality or 'unknown'})", False)


def dicom_files(folder: Path) -> list[DicomFile]:
    """All DICOM files directly in a folder, whatever their names, sorted by name; tables of contents are left out."""
    found = [read_dicom(path) for path in sorted(folder.iterdir()) if is_dicom(path) and path.name != "DICOMDIR"]
    return found


def slide_series(path: Path) -> list[Path]:
    """The files of the slide at `path`, a folder or one of its files, by name.

    Raises SlideFailure `unsupported` where there is no slide, or more than one, or the file is something else, which
    the message names.
    """
    if path.is_dir():
        files = dicom_files(path)
        series: dict[str, list[Path]] = defaultdict(list)
        for file in files:
            if file.level:
                series[file.series].append(file.path)
        if len(series) == 1:
            return next(iter(series.values()))
        if not series:
            holds = "; ".join(f"{file.path.name} is {file.what}" for file in files[:5]) or "no DICOM files"
            raise SlideFailure("unsupported", f"{path} holds no slide: {holds}", HINT)
        listed = ", ".join(f"{paths[0].name} ({len(paths)} files)" for paths in list(series.values())[:5])
        message = f"{path} holds {len(series)} slides (series that begin with {listed}), and a row is one slide"
        raise SlideFailure("unsupported", message, HINT)
    mine = read_dicom(path)
    beside = [file.path for file in _siblings(path) if file.level and file.series == mine.series]
    if not mine.level and not (beside and mine.what in FLAVOURS.values()):
        raise SlideFailure("unsupported", f"{path.name} is {mine.what}, not a slide", HINT)
    return beside or [path]


def _siblings(path: Path) -> list[DicomFile]:
    """DICOM files in the folder of a file; a damaged neighbour is no concern of this slide."""
    found = []
    for other in sorted(path.parent.iterdir()):
        try:
            if is_dicom(other):
                found.append(read_dicom(other))
        except (SlideFailure, OSError):
            continue
    return found
