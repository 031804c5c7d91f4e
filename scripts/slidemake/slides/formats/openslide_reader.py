"""Reading through OpenSlide: every format that it knows."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import numpy as np
import openslide

from slidemake.core.failures import SlideFailure
from slidemake.slides.formats.tiff_index import is_imagej, read_tiff_index
from slidemake.slides.reader import Level, Mpp, SlideReader

CACHE_BYTES = 32 << 20  # decoded tiles kept per slide


def opens_with_openslide(path: Path) -> str | None:
    """None if OpenSlide opens the file, else its reason."""
    if path.is_dir():
        return "a folder"
    try:
        openslide.OpenSlide(str(path)).close()
    except openslide.OpenSlideError as error:
        return str(error)
    return None


class OpenSlideReader(SlideReader):
    """OpenSlide. Alpha is flattened on white.

    On a level whose downsample is not an integer OpenSlide interpolates (its positions are integer level-0 pixels);
    the window asked for is then the one nearest to the level's grid, less than 0.5 / downsample px beside it.
    """

    name = "openslide"

    def __init__(self, path: Path, mpp: Mpp = None):
        self._lock = threading.Lock()
        try:
            self._slide = _open(path)
        except openslide.OpenSlideError as error:
            raise SlideFailure("unsupported", f"OpenSlide does not open {path.name}: {error}") from error
        slide = self._slide
        sizes = zip(slide.level_dimensions, slide.level_downsamples, strict=True)
        properties = dict(sorted(slide.properties.items()))
        description = properties.get("tiff.ImageDescription", "")
        super().__init__(
            path,
            tuple(Level(w, h, float(downsample), number) for number, ((w, h), downsample) in enumerate(sizes)),
            mpp=mpp,
            file_mpp=_imagej_mpp(path) if is_imagej(description) else _file_mpp(properties),
            vendor=properties.get("openslide.vendor", ""),
            properties=properties,
            bounds=_bounds(properties),
        )
        self._associated = sorted(slide.associated_images)

    def close(self) -> None:
        self._slide.close()

    def associated(self) -> list[str]:
        return list(self._associated)

    def subpixel_offset(self, position: int, level: int) -> float:
        """How far beside the level's grid a window at `position` (px of the level, one axis) is read, in px."""
        downsample = self.stored[level].downsample
        offset = _level0(position, downsample) / downsample - position
        return 0.0 if abs(offset) < 1 / 512 else offset  # what cairo takes for a whole number of pixels

    def _read_inside(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        downsample = self.stored[level].downsample
        corner = (_level0(lx, downsample), _level0(ly, downsample))
        slide = self._slide
        try:
            image = slide.read_region(corner, level, (w, h))
        except openslide.OpenSlideError:
            image = self._read_again(slide, corner, level, w, h)
        rgba = np.asarray(image)
        alpha = rgba[..., 3]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        weight = alpha[..., None].astype(np.uint16)
        return ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)

    def _read_again(self, broken: openslide.OpenSlide, corner: tuple[int, int], level: int, w: int, h: int):
        """A handle that failed once fails for ever, for all threads: replace it, and try this region on its own one.

        The region may be sound (another thread broke the shared handle) or corrupt: then OSError.
        """
        with self._lock:
            if self._slide is broken:
                self._slide = _open(self.path)
        with contextlib.closing(_open(self.path)) as slide:
            try:
                return slide.read_region(corner, level, (w, h))
            except openslide.OpenSlideError as error:
                what = f"{self.path.name}: level {level}, {w} x {h} px at level-0 position {corner}"
                raise OSError(f"{what} does not decode: {error}") from error


def _open(path: Path) -> openslide.OpenSlide:
    slide = openslide.OpenSlide(str(path))
    slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
    return slide


def _level0(position: int, downsample: float) -> int:
    return int(np.floor(position * downsample + 0.5))


def _imagej_mpp(path: Path) -> tuple[float, float] | None:
    """um per px by ImageJ's own unit, which OpenSlide does not read."""
    index = read_tiff_index(path)
    return index.pages[0].resolution if index is not None and index.pages else None


def _file_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    try:
        x, y = float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None
    return (x, y) if np.isfinite([x, y]).all() and min(x, y) > 0 else None


def _bounds(properties: dict[str, str]) -> tuple[int, int, int, int] | None:
    try:
        x, y, w, h = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return x, y, w, h
