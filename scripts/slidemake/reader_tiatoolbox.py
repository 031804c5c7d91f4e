"""What OpenSlide does not open, through TIAToolbox's readers: OME-TIFF, JPEG 2000, OME-Zarr, plain images, DICOM.

TIAToolbox opens the file and knows its levels; windows are taken from its level arrays on their own pixel grid, without
its resampling, so that the conventions of `reader` hold. Its guesses are not taken over: a um per px derived from the
objective power is not the file's. Importing TIAToolbox takes seconds and a gigabyte: only slides that need it pay.
Reads are serialised by a lock.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.failures import SlideFailure
from slidemake.reader import Level, SlideReader, make_levels
from slidemake.reader_tiff import UM_PER_UNIT, TiffIndex, check_rgb, ome_mpp, read_tiff_index

MAX_DECODED_BYTES = 512 << 20  # a plain image is held in memory as a whole: 13,000 x 13,000 px
logging.getLogger("pyvips").setLevel(logging.ERROR)  # TIAToolbox turns everybody's chatter on
FLUORESCENCE = re.compile(r"DAPI|Hoechst|FITC|Cy[357]\b|EmissionWavelength=|<Fluor|Fluor=", re.IGNORECASE)

Window = Callable[[int, int, int, int, int], np.ndarray]  # level, x0, y0, x1, y1 -> (h, w, 3 or 4)


class TiatoolboxReader(SlideReader):
    """A slide that a TIAToolbox reader opened; `window` takes pixels from it."""

    name = "tiatoolbox"

    def __init__(
        self, path: Path, levels: tuple[Level, ...], window: Window, closing: Callable[[], Any] | None, **meta
    ):
        super().__init__(path, levels, **meta)
        self._window, self._closing, self._lock = window, closing, threading.Lock()
        self._check_colour()

    def _check_colour(self) -> None:
        pixels = self._raw(0, 0, 0, 1, 1)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
            channels = pixels.shape[2] if pixels.ndim == 3 else 1
            message = f"{self.path.name} has {channels} channel(s) of {pixels.dtype}, not 8-bit RGB"
            raise SlideFailure("not_brightfield", message)

    def close(self) -> None:
        if self._closing is not None:
            self._closing()
            self._closing = None

    def _raw(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        try:
            with self._lock:
                return np.asarray(self._window(level, x0, y0, x1, y1))
        except MemoryError:
            raise
        except Exception as error:  # each decoder has its own exceptions for damaged data
            detail = f"{type(error).__name__}: {error}"
            raise OSError(f"{self.path.name}: level {level}, window ({x0}, {y0}) does not decode: {detail}") from error

    def _read_inside(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        pixels = self._raw(level, lx, ly, lx + w, ly + h)
        if pixels.shape[:2] != (h, w):
            raise OSError(f"{self.path.name}: level {level} gave {pixels.shape[:2]} px instead of {(h, w)}")
        if pixels.shape[2] == 4:
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return np.ascontiguousarray(pixels, np.uint8)


def open_tiatoolbox(path: Path, mpp: float | None = None) -> SlideReader:
    """Open what OpenSlide does not. The kind of file is told by its content, not by its name.

    Raises SlideFailure: `unsupported` (with what the decoder said), `not_brightfield`.
    """
    kind = file_kind(path)
    if kind is None:
        raise SlideFailure("unsupported", f"{path.name} is not in a format that any reader knows")
    index = read_tiff_index(path)
    opener: Callable[..., SlideReader] = {
        "tiff": _open_tiff, "jp2": _open_jp2, "zarr": _open_zarr, "dicom": _open_dicom, "plain": _open_plain
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
        return "dicom" if any(p.suffix.lower() == ".dcm" for p in path.iterdir()) else None
    with open(path, "rb") as handle:
        head = handle.read(132)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or head[:4] == b"\xff\x4f\xff\x51":
        return "jp2"
    if head[128:132] == b"DICM":
        return "dicom"
    return "plain" if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff" else None


def check_rgb_or_planes(index: TiffIndex) -> None:
    """`not_brightfield` unless the first image is 8-bit RGB; an OME-TIFF may hold R, G and B as three planes."""
    if not index.pages:
        raise SlideFailure("unsupported", f"{index.path.name} is a TIFF file without images")
    page = index.pages[0]
    if index.is_ome and page.samples == 1 and page.bits == 8:
        channels = re.search(r'\bSizeC="(\d+)"', page.description)
        number = int(channels.group(1)) if channels else 1
        dye = FLUORESCENCE.search(page.description)
        if number == 3 and dye is None:
            return
        why = f" ({dye.group(0)})" if dye else ""
        raise SlideFailure("not_brightfield", f"{index.path.name} has {number} separate channel(s){why}, not RGB")
    check_rgb(page, index.path.name)


def _no_guess(reader: Any) -> Any:
    """Keep TIAToolbox from deriving a um per px from the objective power (and the other way round)."""
    reader._estimate_mpp_objective_power = lambda objective_power, mpp: (objective_power, mpp)
    return reader


def _pair(mpp: Any) -> tuple[float, float] | None:
    return (float(mpp[0]), float(mpp[1])) if mpp is not None and min(mpp) > 0 else None


def _power(info: Any) -> dict[str, str]:
    return {"openslide.objective-power": f"{info.objective_power:g}"} if info.objective_power else {}


def _planes(array: Any, axes: str) -> Callable[[int, int, int, int], np.ndarray]:
    """Window of an array with axes such as YXS, CYX or TCZYX, as (h, w, channels); first of all T and Z."""

    def window(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        where = {"Y": slice(y0, y1), "X": slice(x0, x1), "C": slice(None), "S": slice(None)}
        pixels = np.asarray(array[tuple(where.get(axis, 0) for axis in axes)])
        left = [axis for axis in axes if axis in "YXCS"]
        if len(left) == 2:
            return pixels[..., None]
        return np.moveaxis(pixels, [left.index("Y"), left.index("X")], [0, 1])

    return window


def _open_arrays(path: Path, arrays: list[Any], axes: str, closing: Any, **meta: Any) -> SlideReader:
    windows = [_planes(array, axes) for array in arrays]
    sizes = [(array.shape[axes.index("X")], array.shape[axes.index("Y")]) for array in arrays]
    return TiatoolboxReader(
        path, make_levels(sizes), lambda level, *window: windows[level](*window), closing, **meta
    )  # fmt: skip


def _open_tiff(path: Path, mpp: float | None) -> SlideReader:
    from tiatoolbox.wsicore.wsireader import TIFFWSIReader

    index = read_tiff_index(path)
    assert index is not None
    reader = _no_guess(TIFFWSIReader(path, post_proc=None, cache_size=32 << 20))
    views = [reader.level_arrays[key] for key in reader.level_arrays]
    file_mpp = ome_mpp(index.pages[0].description) if index.is_ome else index.pages[0].resolution
    return _open_arrays(
        path,
        [view.array for view in views],
        views[0].axes,
        reader.tiff.close,
        mpp=mpp,
        file_mpp=file_mpp,
        vendor="ome-tiff" if index.is_ome else "tiff",
        properties=_ome_power(index.pages[0].description),
    )


def _ome_power(description: str) -> dict[str, str]:
    power = re.search(r'\bNominalMagnification="([\d.]+)"', description)
    return {"openslide.objective-power": f"{float(power.group(1)):g}"} if power else {}


def _open_jp2(path: Path, mpp: float | None) -> SlideReader:
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

    return TiatoolboxReader(
        path, levels, window, None, mpp=mpp, file_mpp=_pair(info.mpp), vendor="jp2", properties=_power(info)
    )


def _open_zarr(path: Path, mpp: float | None) -> SlideReader:
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
    arrays = [group[dataset["path"]] for dataset in scales["datasets"]]
    return _open_arrays(path, arrays, axes, None, mpp=mpp, file_mpp=_zarr_mpp(scales), vendor="ome-zarr")


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


def _open_dicom(path: Path, mpp: float | None) -> SlideReader:
    from tiatoolbox.wsicore.wsireader import DICOMWSIReader

    slide = DICOMWSIReader(path, post_proc=None).wsi  # its `info` fails on files that name no manufacturer
    levels = make_levels([(level.size.width, level.size.height) for level in slide.levels])
    spacing = slide.levels.base_level.datasets[0].pixel_spacing  # mm
    file_mpp = _pair((spacing.width * 1e3, spacing.height * 1e3)) if spacing else None
    numbers = [level.level for level in slide.levels]

    def window(level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        return np.asarray(slide.read_region((x0, y0), numbers[level], (x1 - x0, y1 - y0)))

    return TiatoolboxReader(path, levels, window, slide.close, mpp=mpp, file_mpp=file_mpp, vendor="dicom")


def _open_plain(path: Path, mpp: float | None) -> SlideReader:
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

    held = VirtualWSIReader(pixels, mpp=(mpp, mpp) if mpp else None).img
    file_mpp = index.pages[0].resolution if index is not None else None
    return _open_arrays(path, [held], "YXS", None, mpp=mpp, file_mpp=file_mpp, vendor="plain image")
