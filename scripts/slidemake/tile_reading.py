"""Tiles out of a slide: neighbours are read together, resampled to the exact mpp, and corrupt ones are told apart."""

from __future__ import annotations

import logging
import math
from typing import Protocol

import numpy as np
from PIL import Image

from slidemake.failures import SlideFailure
from slidemake.grid import Window

log = logging.getLogger("slidemake")

RUN_TILES = 8  # tiles of one row that are read with one call
FILTER_RADIUS = 2.0  # support of the bicubic filter, in output px


class Readable(Protocol):
    """The part of a slide reader that tiles need."""

    def read(self, x0: int, y0: int, level: int, w: int, h: int) -> np.ndarray: ...


def read_tiles(reader: Readable, coords: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Read tiles at `coords` ((n, 2) level-0 px, row-major).

    Returns (n, tile_px, tile_px, 3) uint8 and an (n,) bool that is False where the slide's data are corrupt; the
    pixels of those are zero and must not be used.
    """
    count, side = len(coords), window.tile_px
    tiles = np.zeros((count, side, side, 3), np.uint8)
    good = np.zeros(count, bool)
    for start, stop in _runs(coords, window):
        try:
            tiles[start:stop] = _read_run(reader, coords[start:stop], window)
            good[start:stop] = True
        except (OSError, SlideFailure) as error:
            if stop - start == 1:
                log.warning("tile at %s does not decode: %s", coords[start].tolist(), error)
                continue
            for index in range(start, stop):
                try:
                    tiles[index] = _read_run(reader, coords[index : index + 1], window)[0]
                    good[index] = True
                except (OSError, SlideFailure) as single:
                    log.warning("tile at %s does not decode: %s", coords[index].tolist(), single)
    return tiles, good


def _runs(coords: np.ndarray, window: Window) -> list[tuple[int, int]]:
    """Index ranges of tiles that follow each other in one row without a gap."""
    runs: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(coords) + 1):
        follows = (
            index < len(coords)
            and index - start < RUN_TILES
            and coords[index, 1] == coords[index - 1, 1]
            and 0 < coords[index, 0] - coords[index - 1, 0] <= window.tile_level0 + 1
        )
        if not follows:
            runs.append((start, index))
            start = index
    return runs


def _read_run(reader: Readable, coords: np.ndarray, window: Window) -> np.ndarray:
    """Tiles of one row with one read: (n, tile_px, tile_px, 3) uint8."""
    lefts = coords[:, 0] / window.downsample
    top = coords[0, 1] / window.downsample
    margin = math.ceil(FILTER_RADIUS * max(window.scale, 1.0)) if window.resampled else 0
    first = max(0, math.floor(lefts[0] + 1e-6) - margin)  # never left of the slide: its padding is white
    above = max(0, math.floor(top + 1e-6) - margin)
    width = math.ceil(lefts[-1] + window.read_px - 1e-6) + margin - first
    height = math.ceil(top + window.read_px - 1e-6) + margin - above
    if not window.resampled:  # whole pixels: the tile starts on the level's nearest pixel
        width = round(lefts[-1]) - round(lefts[0]) + window.tile_px
        height = window.tile_px
        first, above = round(lefts[0]), round(top)
    # level-0 position of the region's corner; readers take level-0 coordinates
    strip = reader.read(round(first * window.downsample), round(above * window.downsample), window.level, width, height)
    if not window.resampled:
        offsets = [round(left) - first for left in lefts]
        return np.stack([strip[:, o : o + window.tile_px] for o in offsets])
    image = Image.fromarray(strip)
    size = (window.tile_px, window.tile_px)
    tiles = []
    for left in lefts:
        box = (left - first, top - above, left - first + window.read_px, top - above + window.read_px)
        tiles.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box)))
    return np.stack(tiles)
