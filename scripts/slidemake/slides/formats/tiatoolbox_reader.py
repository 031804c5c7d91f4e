"""What OpenSlide does not open, through TIAToolbox's readers: JPEG 2000, OME-Zarr, plain images, DICOM.

TIAToolbox opens the file and knows its levels; windows are taken from its level arrays on their own pixel grid, without
its resampling, so that the conventions of `reader` hold. Its guesses are not taken over: a um per px derived from the
objective power is not the file's. Importing TIAToolbox takes seconds and a gigabyte: only slides that need it pay.
Reads are serialised by a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure
from slidemake.slides.formats.array_reader import ArrayReader, open_arrays
from slidemake.slides.formats.dicom_files import is_dicom, slide_series
from slidemake.slides.formats.ome_xml import FLUORESCENCE
from slidemake.slides.formats.tiff_index import UM_PER_UNIT, read_tiff_index
from slidemake.slides.formats.tifffile_reader import check_rgb_or_planes, open_tifffile
from slidemake.slides.reader import Mpp, SlideReader, make_levels

MAX_DECODED_BYTES = 512 << 20  # a plain image is held in memory as a whole: 13,000 x 13,000 px
logging.getLogger("pyvips").setLevel(logging.ERROR)  # TIAToolbox turns everybody's chatter on


def open_tiatoolbox(path: Path, mpp: Mpp = None) -> SlideReader:
    """Open what OpenSlide does not. The kind of file is told by its content, not by its name.

    Raises SlideFailure: `unsupported` (with what the decoder said), `not_brightfield`.
    """
    kind = file_kind(path)
    if kind is None:
        raise SlideFailure("unsupported", f"{path.name} is not in a format that any reader knows")
    index = read_tiff_index(path)
    opener: Callable[..., SlideReader] = {
        "tiff": open_tifffile, "jp2": _open_jp2, "zarr": _open_zarr, "dicom": _open_dicom, "plain": _open_plain
    }[kind]  # fmt: skip
    if index is not None:
        check_rgb_or_planes(index)
        tiled = index.pages[0].tiled
        if not tiled and not index.is_ome:
            opener = _open_plain
    try:
        return opener(path, mpp)
    except (SlideFailure, MemoryError):
        raise
    except ImportError as error:
        hint = "Install TIAToolbox (pip install 'slidemake[tiatoolbox]') or convert the slide to a pyramidal TIFF."
        raise SlideFailure("unsupported", f"{path.name} needs TIAToolbox, which is missing: {error}", hint) from error
    except Exception as error:  # TIAToolbox and the libraries below it raise anything
        message = f"No reader opens {path.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SlideFailure("unsupported", message) from error


def file_kind(path: Path) -> str | None:
    """tiff, jp2, zarr, dicom, plain (PNG, JPEG) or None, from the first bytes (for a folder: from what is in it)."""
    if path.is_dir():
        if (path / ".zattrs").exists() or (path / "zarr.json").exists():
            return "zarr"
        return "dicom" if any(is_dicom(file) for file in path.iterdir()) else None
    with open(path, "rb") as handle:
        head = handle.read(132)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or head[:4] == b"\xff\x4f\xff\x51":
        return "jp2"
    if head[128:132] == b"DICM":
        return "dicom"
    return "plain" if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff" else None


def _no_guess(reader: Any) -> Any:
    """Keep TIAToolbox from deriving a um per px from the objective power (and the other way round)."""
    reader._estimate_mpp_objective_power = lambda objective_power, mpp: (objective_power, mpp)
    return reader


def _pair(mpp: Any) -> tuple[float, float] | None:
    return (float(mpp[0]), float(mpp[1])) if mpp is not None and min(mpp) > 0 else None


def _power(info: Any) -> dict[str, str]:
    return {"openslide.objective-power": f"{info.objective_power:g}"} if info.objective_power else {}


def _open_jp2(path: Path, mpp: Mpp) -> SlideReader:
    from tiatoolbox.wsicore.wsireader import JP2WSIReader

    reader = _no_guess(JP2WSIReader(path, post_proc=None))
    info, image = reader.info, reader.glymur_jp2
    w, h = (int(v) for v in info.slide_dimensions)
    # A JPEG 2000 resolution has ceil(size / 2^n) px; those below 64 px serve nobody.
    numbers = [n for n in range(info.level_count) if n == 0 or min(w, h) / 2**n >= 64]
    levels = make_levels([(-(-w // 2**n), -(-h // 2**n)) for n in numbers])

    def window(level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        step = 2**level
        return image[y0 * step : min(y1 * step, h) : step, x0 * step : min(x1 * step, w) : step]

    told = {"file_mpp": _pair(info.mpp), "vendor": "jp2", "properties": _power(info)}
    return ArrayReader("tiatoolbox", path, levels, window, None, mpp=mpp, **told)


def _open_zarr(path: Path, mpp: Mpp) -> SlideReader:
    import zarr

    group = zarr.open_group(str(path), mode="r")
    attributes = group.attrs.asdict()
    attributes = attributes.get("ome", attributes)
    if not attributes.get("multiscales"):
        raise SlideFailure("unsupported", f"{path.name} is a Zarr group without OME multiscales")
    if group.metadata.zarr_format == 2 and isinstance(attributes.get("omero"), dict):
        from tiatoolbox.wsicore.wsireader import NGFFWSIReader

        group = NGFFWSIReader(path)._zarr_group  # OME-Zarr 0.4; 0.5 (Zarr v3) is beyond TIAToolbox 2.1
    scales = attributes["multiscales"][0]
    dye = FLUORESCENCE.search(str(attributes.get("omero", "")))
    if dye is not None:
        raise SlideFailure("not_brightfield", f"{path.name} has a fluorescence channel ({dye.group(0)})")
    axes = "".join(axis["name"].upper() for axis in scales["axes"])
    arrays = [_white_where_absent(group[dataset["path"]]) for dataset in scales["datasets"]]
    return open_arrays("tiatoolbox", path, arrays, axes, None, mpp=mpp, file_mpp=_zarr_mpp(scales), vendor="ome-zarr")


def _white_where_absent(array: Any) -> Any:
    """The array with 255 for chunks that are not stored: what was not scanned is white, whatever the fill value."""
    import zarr

    if array.dtype != np.uint8:
        return array
    described = replace(array.metadata, fill_value=np.uint8(255))
    return zarr.Array(zarr.AsyncArray(metadata=described, store_path=array.store_path))


def _zarr_mpp(scales: dict[str, Any]) -> tuple[float, float] | None:
    """um per px of the first dataset: its scale times that of the whole multiscale, by the axes' units."""
    found = []
    for name in "xy":
        axis = next(i for i, a in enumerate(scales["axes"]) if a["name"].lower() == name)
        um = UM_PER_UNIT.get(scales["axes"][axis].get("unit", "-"))
        steps = [
            *scales["datasets"][0].get("coordinateTransformations", ()),
            *scales.get("coordinateTransformations", ()),
        ]
        factors = [float(step["scale"][axis]) for step in steps if step.get("type") == "scale"]
        if um is None or not factors:
            return None
        found.append(um * float(np.prod(factors)))
    return _pair(found)


def _open_dicom(path: Path, mpp: Mpp) -> SlideReader:
    from wsidicom import WsiDicom  # as TIAToolbox does, but with the files of one series

    slide = WsiDicom.open(slide_series(path))
    levels = make_levels([(level.size.width, level.size.height) for level in slide.levels])
    spacing = slide.levels.base_level.datasets[0].pixel_spacing  # mm
    file_mpp = _pair((spacing.width * 1e3, spacing.height * 1e3)) if spacing else None
    numbers = [level.level for level in slide.levels]

    def window(level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        return np.asarray(slide.read_region((x0, y0), numbers[level], (x1 - x0, y1 - y0)))

    return ArrayReader("tiatoolbox", path, levels, window, slide.close, mpp=mpp, file_mpp=file_mpp, vendor="dicom")


def _open_plain(path: Path, mpp: Mpp) -> SlideReader:
    """PNG, JPEG or strip TIFF: decoded whole, so its decoded size is capped. Only a TIFF's resolution is believed."""
    import pyvips

    index = read_tiff_index(path)
    try:
        image = pyvips.Image.new_from_file(str(path), fail_on="error")
        size = image.width * image.height * image.bands
        if size > MAX_DECODED_BYTES:
            message = f"{path.name} is {image.width} x {image.height} px in one piece, too large to hold in memory"
            raise SlideFailure("unsupported", message)
        if image.format != "uchar" or image.bands not in (3, 4) or image.interpretation not in ("srgb", "rgb"):
            message = f"{path.name} is a {image.interpretation} image of {image.bands} band(s), {image.format}: not RGB"
            raise SlideFailure("not_brightfield", message)
        pixels = image.numpy()
    except pyvips.Error as error:
        raise SlideFailure("unreadable", f"{path.name} does not decode: {' '.join(str(error).split())}") from error
    from tiatoolbox.wsicore.wsireader import VirtualWSIReader

    held = VirtualWSIReader(pixels).img
    file_mpp = index.pages[0].resolution if index is not None else None
    return open_arrays("tiatoolbox", path, [held], "YXS", None, mpp=mpp, file_mpp=file_mpp, vendor="plain image")
