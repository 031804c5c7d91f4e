"""Tiles out of a slide: each stored tile decoded once, resampled to the exact mpp, and corrupt ones told apart.

Where the file's own JPEG tiles can be had (`SlideReader.jpeg_tiles`), regions are put together from those; every other
reader is asked for runs of neighbours. A tile starts at the nearest pixel of the level that is read.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slidemake.core.failures import SlideFailure
from slidemake.tiles.grid import Window

if TYPE_CHECKING:
    from slidemake.slides.formats.jpeg_tiles import JpegTiles

log = logging.getLogger("slidemake")

RUN_TILES = 8  # tiles of one row that are read with one call, where the reader decodes what it is asked for anew
REGION_BYTES = 32 << 20  # of pixels of the level in memory at a time, before they are resampled
# 1/2 of a scan of 0.2525 um/px is 0.505, which is enlarged by 1 %: see docs/decisions/0010
REDUCED_SLACK = 0.02
_PREPARED = threading.local()


class Readable(Protocol):
    """The part of a slide reader that tiles need."""

    def read(self, x0: int, y0: int, level: int, w: int, h: int) -> np.ndarray: ...

    def jpeg_tiles(self, level: int, reduce: int = 1) -> JpegTiles | None: ...


def reduction(reader: Readable, window: Window) -> int:
    """How many times smaller than stored the JPEG tiles are decoded (1, 2, 4 or 8) before the rest is resampled."""
    from slidemake.slides.formats.jpeg_tiles import REDUCTIONS

    if window.finest_scale < 2 * (1 - REDUCED_SLACK) or reader.jpeg_tiles(window.level) is None:
        return 1
    return next(factor for factor in REDUCTIONS if window.finest_scale >= factor * (1 - REDUCED_SLACK))


def read_tiles(reader: Readable, coords: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Read tiles at `coords` ((n, 2) level-0 px, row-major).

    Returns (n, tile_px, tile_px, 3) uint8 and an (n,) bool that is False where the slide's data are corrupt; the
    pixels of those are zero and must not be used.
    """
    reduce = reduction(reader, window)
    stored = reader.jpeg_tiles(window.level, reduce)
    side = window.tile_px
    tiles, good = np.empty((len(coords), side, side, 3), np.uint8), np.zeros(len(coords), bool)
    wide, high = (_snapped(px / reduce) if window.resampled else float(side) for px in window.read_size)
    region = math.ceil(high - 1e-6), math.ceil(wide - 1e-6)
    as_stored = (wide, high) == (side, side)
    corners = np.floor(coords / (window.downsample * reduce) + 0.5).astype(int)
    step = max(1, REGION_BYTES // (region[0] * region[1] * 3))
    for start in range(0, len(coords), step):
        part = slice(start, min(start + step, len(coords)))
        target = tiles[part] if as_stored else np.empty((part.stop - start, *region, 3), np.uint8)
        if stored is not None:
            good[part] = _from_stored(stored, corners[part], target)
        else:
            good[part] = _from_reader(reader, corners[part], window, target)
        if not as_stored:
            tiles[part] = resample(target, (wide, high), side)
    tiles[~good] = 0
    return tiles, good


def _snapped(px: float) -> float:
    """A size that is a whole number but for rounding, as that number."""
    return float(round(px)) if abs(px - round(px)) < 1e-6 else px


def _from_stored(stored: JpegTiles, corners: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Regions at `corners` (px of the level) into `out` (n, h, w, 3); (n,) bool, False where damaged."""
    good = np.ones(len(corners), bool)
    for index, (x, y) in enumerate(corners.tolist()):
        try:
            stored.read_into(out[index], x, y)
        except OSError as error:
            good[index] = False
            log.warning("the tile at (%d, %d) of its level does not decode: %s", x, y, error)
    return good


def _from_reader(reader: Readable, corners: np.ndarray, window: Window, out: np.ndarray) -> np.ndarray:
    """As `_from_stored`, in runs of neighbours with one read each; a run that fails is read tile by tile."""
    (high, side), good = out.shape[1:3], np.zeros(len(corners), bool)

    def read(start: int, stop: int) -> None:
        first, top = corners[start].tolist()
        wide = int(corners[stop - 1, 0]) - first + side
        x0, y0 = round(first * window.downsample), round(top * window.downsample)
        strip = reader.read(x0, y0, window.level, wide, high)
        for index in range(start, stop):
            offset = int(corners[index, 0]) - first
            out[index] = strip[:, offset : offset + side]
        good[start:stop] = True

    for start, stop in _runs(corners, side):
        try:
            read(start, stop)
        except (OSError, SlideFailure) as error:
            if stop - start == 1:
                log.warning("the tile at %s of its level does not decode: %s", corners[start].tolist(), error)
                continue
            for index in range(start, stop):
                try:
                    read(index, index + 1)
                except (OSError, SlideFailure) as single:
                    log.warning("the tile at %s of its level does not decode: %s", corners[index].tolist(), single)
    return good


def _runs(corners: np.ndarray, side: int) -> Iterator[tuple[int, int]]:
    """Index ranges of tiles that follow each other in one row without a gap."""
    start = 0
    for index in range(1, len(corners) + 1):
        follows = (
            index < len(corners)
            and index - start < RUN_TILES
            and corners[index, 1] == corners[index - 1, 1]
            and 0 < corners[index, 0] - corners[index - 1, 0] <= side + 1
        )
        if not follows:
            yield start, index
            start = index


def resample(regions: np.ndarray, read_size: tuple[float, float], side: int) -> np.ndarray:
    """What is `read_size` (w, h; fractional) at the corner of regions (n, h, w, 3) uint8 as (n, side, side, 3).

    Antialiased bicubic as Pillow's, at a fifth of its time: PyTorch has the vectorised form of the same filter. The two
    differ by one grey level here and there, by two at most.
    """
    import torch
    import torch.nn.functional as F

    if not getattr(_PREPARED, "done", False):
        torch.set_num_threads(1)  # the callers are threads themselves
        _PREPARED.done = True
    batch = torch.from_numpy(regions).permute(0, 3, 1, 2)
    # The scale is given, because the region is larger than what is read by the rest of its last pixel. The tiny excess
    # keeps the size that PyTorch computes from it, floor(h * scale), from falling to side - 1 where h is what is read.
    small = F.interpolate(
        batch,
        scale_factor=tuple(side / px * (1 + 1e-9) for px in reversed(read_size)),
        mode="bicubic",
        antialias=True,
        align_corners=False,
        recompute_scale_factor=False,
    )
    return small.permute(0, 2, 3, 1)[:, :side, :side].numpy()
