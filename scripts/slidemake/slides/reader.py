"""One small protocol for reading slides, and the choice of the implementation that serves a file.

`open_slide` returns a `SlideReader`: level geometry, um per pixel, and `read`, safe from several threads. Four
implementations: `openslide` (every format that it opens), `pyvips` (tiled TIFFs on which it is proven pixel-equal: a
few times as fast), `tifffile` (OME-TIFF, and tiled TIFFs that OpenSlide does not open), `tiatoolbox` (JPEG 2000,
OME-Zarr, plain images, DICOM variants). `choose_reader` decides once per slide, at screening; the name is recorded and
later stages pass it back.

Conventions. Positions are level-0 pixels, sizes are pixels of the level read. A position is rounded to the nearest
pixel of the level (downsamples such as 3.9998 are never truncated). What lies outside the slide, or is transparent, is
white. Corrupt data raises `OSError`: garbage is never returned silently where the decoder knows better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from slidemake.slides.formats.tiff_index import TileMap, read_tiff_index, tile_map

if TYPE_CHECKING:
    from slidemake.slides.formats.jpeg_tiles import JpegTiles

BLOCK = 1024  # px of the level read at once for an overview: bounds its memory
SQUARE = 0.01  # pixels whose sides differ by less are square


@dataclass(frozen=True)
class Level:
    """One level of the pyramid. `downsample`: level-0 px per px of this level, mean of x and y, never rounded.

    `number`: of the level in the file, as its decoder counts them.
    """

    width: int
    height: int
    downsample: float
    number: int = 0


Mpp = float | tuple[float, float] | None  # um per px, of x and y where they differ


def make_levels(sizes: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from (width, height) pairs, finest first. Downsample: mean of the ratios of x and y, as OpenSlide."""
    w0, h0 = sizes[0]
    return tuple(Level(int(w), int(h), (w0 / w + h0 / h) / 2, number) for number, (w, h) in enumerate(sizes))


class SlideReader:
    """A slide that is open for reading; a context manager. Implementations supply `_read_inside`.

    Attributes: `name` (of the implementation), `path`, `dimensions` (w, h at level 0), `stored` (all levels as the file
    has them), `levels` (those that are used: `stored`, unless screening found otherwise), `mpp_xy` (um per level-0
    pixel in x and y; the caller's value before the file's; None if unknown) and `mpp`, its mean, `file_mpp` (mpp_x,
    mpp_y) | None, `vendor`, `properties`, `bounds` (x, y, w, h in level-0 px of the scanned area, None if the file has
    none).
    """

    name = ""

    def __init__(
        self,
        path: Path,
        levels: tuple[Level, ...],
        *,
        mpp: Mpp = None,
        file_mpp: tuple[float, float] | None = None,
        vendor: str = "",
        properties: dict[str, str] | None = None,
        bounds: tuple[int, int, int, int] | None = None,
    ):
        self.path, self.vendor, self.bounds = path, vendor, bounds
        self.stored = self.levels = levels
        self.dimensions = (levels[0].width, levels[0].height)
        self.properties = properties or {}
        self.file_mpp = file_mpp
        self.mpp_xy = square_mpp(file_mpp) if mpp is None else (mpp if isinstance(mpp, tuple) else (mpp, mpp))
        self.mpp = sum(self.mpp_xy) / 2 if self.mpp_xy else None
        self.several_images = False  # another image of the file could be as much of a slide as this one
        self.corrupt_blocks = 0  # blocks that `overview` and `thumbnail` could not read and left white

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back file handles and memory."""

    def associated(self) -> list[str]:
        """Names of the label, macro and thumbnail images in the file, sorted."""
        return []

    def _read_inside(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        """(h, w, 3) uint8 of a window that lies inside a stored level; lx, ly in pixels of the level."""
        raise NotImplementedError

    def _stored_tiles(self, level: int, reduce: int) -> JpegTiles | None:
        """As `jpeg_tiles`, of a stored level."""
        return None

    def read(self, x0: float, y0: float, level: int, w: int, h: int) -> np.ndarray:
        """Region of w x h px of `level` whose top-left corner is at level-0 position (x0, y0).

        Returns (h, w, 3) uint8 RGB, white outside the slide. Raises OSError when the data there is corrupt.
        """
        scale = self.levels[level].downsample
        return self.read_level(math.floor(x0 / scale + 0.5), math.floor(y0 / scale + 0.5), level, w, h)

    def read_level(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        """As `read`, with the corner (lx, ly) in pixels of `level`."""
        size = self.levels[level]
        left, top = max(lx, 0), max(ly, 0)
        right, bottom = min(lx + w, size.width), min(ly + h, size.height)
        if (left, top, right, bottom) == (lx, ly, lx + w, ly + h):
            return self._read_inside(lx, ly, size.number, w, h)
        out = np.full((h, w, 3), 255, np.uint8)
        if right > left and bottom > top:
            inside = self._read_inside(left, top, size.number, right - left, bottom - top)
            out[top - ly : bottom - ly, left - lx : right - lx] = inside
        return out

    def jpeg_tiles(self, level: int, reduce: int = 1) -> JpegTiles | None:
        """The JPEG tiles that the file stores for `level`, for reading many regions with each tile decoded once.

        `reduce` 2, 4 or 8 decodes them that much smaller. None where the file has no such tiles, or where they were
        not found to be pixel-equal to the reference reader.
        """
        return self._stored_tiles(self.levels[level].number, reduce)

    def thumbnail(self, max_px: int) -> np.ndarray:
        """The whole slide, area-averaged so that its longer side has at most `max_px` px: (h, w, 3) uint8."""
        return self.overview_of(max_px)[0]

    def overview_of(self, max_px: int) -> tuple[np.ndarray, float, float]:
        """As `overview`, with at most `max_px` px on the longer side; square px where the slide's mpp is known."""
        x, y = self.mpp_xy or (1.0, 1.0)
        wanted = max(self.dimensions[0] * x, self.dimensions[1] * y) / max_px
        return self.overview_at(wanted / x, wanted / y)

    def overview(self, mpp: float) -> tuple[np.ndarray, float, float]:
        """The whole slide at `mpp` um/px (never coarser; finer only where the slide itself ends).

        Area-averaged from the next finer level, block by block, so that memory is bounded by the result: first over
        whole numbers of pixels, then over the fraction that remains (exact below a factor of 2). Blocks that
        are corrupt stay white and are counted in `corrupt_blocks`. Returns (h, w, 3) uint8 and the exact level-0 px
        per overview px in x and y. Raises ValueError when the slide's mpp is not known.
        """
        if not self.mpp_xy:
            raise ValueError(f"{self.path}: overview(mpp) needs the slide's um per pixel; pass mpp= to open_slide")
        return self.overview_at(mpp / self.mpp_xy[0], mpp / self.mpp_xy[1])

    def overview_at(self, downsample: float, downsample_y: float | None = None) -> tuple[np.ndarray, float, float]:
        """As `overview`, with the level-0 px per overview px given: in x, and in y where that is another number."""
        asked = (downsample, downsample if downsample_y is None else downsample_y)
        level = best_level(self.levels, max(min(asked), 1.0))
        size = self.levels[level]
        factors = [max(value / size.downsample, 1.0) for value in asked]
        whole = [max(1, math.floor(factor * (1 + 1e-3))) for factor in factors]
        reduced = self._reduced(level, whole[0], whole[1])
        (w0, h0), (w, h) = self.dimensions, (size.width, size.height)
        if all(abs(factor / n - 1) <= 1e-3 for factor, n in zip(factors, whole, strict=True)):
            return reduced, whole[0] * w0 / w, whole[1] * h0 / h
        out_w, out_h = math.ceil(w / factors[0] - 1e-9), math.ceil(h / factors[1] - 1e-9)
        small = _area_resize(_area_resize(reduced, h / whole[1], out_h, 0), w / whole[0], out_w, 1)
        return np.clip(np.rint(small), 0, 255).astype(np.uint8), w0 / out_w, h0 / out_h

    def _tile_map(self, size: Level) -> TileMap | None:
        """Which tiles of a level the file holds, from its index alone; None where it has no such index."""
        index = read_tiff_index(self.path) if self.path.is_file() else None
        return None if index is None else tile_map(index, size.width, size.height)

    def _reduced(self, level: int, factor_x: int, factor_y: int) -> np.ndarray:
        """The whole level, averaged over factor_x x factor_y px (fewer at the right and bottom edges)."""
        size = self.levels[level]
        out = np.full((-(-size.height // factor_y), -(-size.width // factor_x), 3), 255, np.uint8)
        tiles = self._tile_map(size)
        wide, high = (factor * max(1, BLOCK // factor) for factor in (factor_x, factor_y))
        for y in range(0, size.height, high):
            for x in range(0, size.width, wide):
                w, h = min(wide, size.width - x), min(high, size.height - y)
                if tiles is not None and not tiles.any_in(x, y, w, h):
                    continue  # nothing was scanned here; reading it would take as long as pixels do
                block = self._read_or_white(x, y, size.number, w, h)
                if factor_x > 1 or factor_y > 1:
                    block = np.asarray(Image.fromarray(block).reduce((factor_x, factor_y)))
                top, left = y // factor_y, x // factor_x
                out[top : top + block.shape[0], left : left + block.shape[1]] = block
        return out

    def _read_or_white(self, lx: int, ly: int, level: int, w: int, h: int) -> np.ndarray:
        """Region in which only the parts that do not decode are white (an overview finds no tissue there)."""
        try:
            return self._read_inside(lx, ly, level, w, h)
        except OSError:
            if max(w, h) <= 128:
                self.corrupt_blocks += 1
                return np.full((h, w, 3), 255, np.uint8)
        out = np.empty((h, w, 3), np.uint8)
        half = -(-max(w, h) // 2)
        for y in range(0, h, half):
            for x in range(0, w, half):
                part = self._read_or_white(lx + x, ly + y, level, min(half, w - x), min(half, h - y))
                out[y : y + half, x : x + half] = part
        return out


def square_mpp(mpp: tuple[float, float] | None) -> tuple[float, float] | None:
    """um per px in x and y with a difference that scanners have by rounding (up to 1 %) taken out of it."""
    if mpp is None or abs(mpp[0] / mpp[1] - 1) > SQUARE:
        return mpp
    return (sum(mpp) / 2, sum(mpp) / 2)


def best_level(reader: SlideReader | Sequence[Level], downsample: float) -> int:
    """Index of the coarsest level that is not coarser than `downsample` (tolerance 0.1 %); 0 if all are."""
    levels = reader.levels if isinstance(reader, SlideReader) else reader
    fine = [i for i, level in enumerate(levels) if level.downsample <= downsample * (1 + 1e-3)]
    return max(fine, key=lambda i: levels[i].downsample, default=0)


def _area_resize(image: np.ndarray, extent: float, out: int, axis: int) -> np.ndarray:
    """Mean of `image` over `out` equal intervals of [0, extent] along `axis`, fractions of pixels included.

    `extent` may end inside the last pixel. Exact area averaging: differences of the interpolated running sum.
    """
    moved = np.moveaxis(image, axis, 0)
    result = np.empty((out, *moved.shape[1:]), np.float32)
    edges = np.linspace(0, extent, out + 1)
    for i in range(out):
        lo, hi = edges[i], edges[i + 1]
        first, last = int(lo), min(math.ceil(hi - 1e-12), moved.shape[0])
        weights = np.ones(last - first, np.float32)
        weights[0] -= lo - first
        weights[-1] -= last - hi
        result[i] = np.tensordot(weights / weights.sum(), moved[first:last].astype(np.float32), 1)
    return np.moveaxis(result, 0, axis)
