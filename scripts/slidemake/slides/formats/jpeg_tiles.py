"""The JPEG tiles that a TIFF file stores, each decoded once, however many regions lie across it.

Regions that are read one after the other, by several threads, share a bounded cache of decoded tiles; a tile that one
thread is decoding is waited for by the others. Pixels are libjpeg-turbo's, as OpenSlide's are. The decoder is strict:
damage of which libjpeg would only warn, filling in grey, is an error here.

JPEG can also be decoded at 1/2, 1/4 or 1/8 of its size, from the low frequencies of each block alone: an antialiased
reduction for less than the price of the full one.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import simplejpeg

from slidemake.slides.formats.tiff_index import TiffPage

REDUCTIONS = (8, 4, 2)  # that libjpeg's scaled inverse transform offers
ROWS_KEPT = 3  # rows of stored tiles: tiles of one row of the grid lie on two, the next row needs the second again
CACHE_BYTES = (40 << 20, 384 << 20)  # least and most: what was read long ago is in no processor cache any more


class JpegTiles:
    """One level of a slide, `reduce` times smaller: regions put together from its stored tiles. Thread-safe.

    `width`, `height` are those of the reduced level. `decoded` counts the tiles decoded so far.
    """

    def __init__(self, path: Path, page: TiffPage, reduce: int = 1):
        self.path, self.page, self.reduce = path, page, reduce
        self.width, self.height = -(-page.width // reduce), -(-page.height // reduce)
        self.tile = (page.tile[0] // reduce, page.tile[1] // reduce)
        self.across = -(-page.width // page.tile[0])
        size = self.tile[0] * self.tile[1] * 3
        least, most = CACHE_BYTES
        self._room = max(1, min(max(least, ROWS_KEPT * self.across * size), most) // size)
        self._tiles: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()
        adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + (b"\1" if page.photometric == 6 else b"\0")
        self._head = b"\xff\xd8" + adobe + page.jpeg_tables[2:-2]
        self._offsets, self._counts = page.offsets.tolist(), page.counts.tolist()
        self._file = os.open(path, os.O_RDONLY)
        self.decoded = 0

    def close(self) -> None:
        """Give the file and the decoded tiles back; nobody may be reading."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._tiles = -1, OrderedDict()

    def stored(self, number: int) -> bytes:
        """Tile `number` (row-major) as a JPEG file of its own: no decoding, the bytes that the scanner wrote.

        The tables that the tiles of a TIFF share are put in, and an Adobe marker that says which colours they are.
        """
        return self._head + os.pread(self._file, max(0, self._counts[number] - 2), self._offsets[number] + 2)

    def decode(self, number: int) -> np.ndarray:
        """(h, w, 3) uint8 of a stored tile, read-only; OSError when it is damaged. From the cache where it is there."""
        with self._lock:
            found = self._tiles.get(number)
            if found is not None:
                self._tiles.move_to_end(number)
            else:
                mine: Future[np.ndarray] = Future()
                self._tiles[number] = mine
                self.decoded += 1
                while len(self._tiles) > self._room:
                    self._tiles.popitem(last=False)  # whoever waits for it holds it
        if found is not None:
            return found.result()
        try:
            tile = self._decode(number)
        except BaseException as error:  # handed to everyone who waits for this tile
            mine.set_exception(error)
            raise
        mine.set_result(tile)
        return tile

    def _decode(self, number: int) -> np.ndarray:
        wide, high = self.tile
        try:
            tile = simplejpeg.decode_jpeg(self.stored(number), min_height=high, min_width=wide, min_factor=self.reduce)
        except ValueError as error:
            raise OSError(f"{self._where(number)} are damaged: {error}") from None
        if tile.shape != (high, wide, 3):
            raise OSError(f"{self._where(number)} are of {tile.shape[1]} x {tile.shape[0]} px, not {wide} x {high}")
        tile.flags.writeable = False
        return tile

    def _where(self, number: int) -> str:
        x, y = number % self.across, number // self.across
        return f"{self.path.name}: the JPEG data of tile ({x}, {y}) of the level {self.page.width} px wide"

    def read(self, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Region with its corner at (x, y) px of the reduced level: (h, w, 3) uint8, white outside the slide."""
        out = np.empty((h, w, 3), np.uint8)
        self.read_into(out, x, y)
        return out

    def read_into(self, out: np.ndarray, x: int, y: int) -> None:
        """As `read`, into (h, w, 3) uint8 `out`."""
        h, w = out.shape[:2]
        wide, high = self.tile
        right, bottom = min(x + w, self.width), min(y + h, self.height)
        if x < 0 or y < 0 or right < x + w or bottom < y + h:
            out[...] = 255
        for row in range(max(y, 0) // high, -(-bottom // high)):
            top, low = max(y, row * high), min(bottom, row * high + high)
            for column in range(max(x, 0) // wide, -(-right // wide)):
                left, far = max(x, column * wide), min(right, column * wide + wide)
                tile = self.decode(row * self.across + column)
                part = tile[top - row * high : low - row * high, left - column * wide : far - column * wide]
                out[top - y : low - y, left - x : far - x] = part
