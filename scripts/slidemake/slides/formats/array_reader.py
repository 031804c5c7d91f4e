"""Slides that a library hands out as arrays: windows of them, checked for colour, with alpha on white.

Levels are taken on their own pixel grid, without anybody's resampling, so that the conventions of `reader` hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure
from slidemake.slides.reader import Level, SlideReader, make_levels

Window = Callable[[int, int, int, int, int], np.ndarray]  # level, x0, y0, x1, y1 -> (h, w, 3 or 4)


class ArrayReader(SlideReader):
    """A slide whose pixels come from `window`; reads are serialised by a lock. `name`: of the implementation."""

    def __init__(
        self,
        name: str,
        path: Path,
        levels: tuple[Level, ...],
        window: Window,
        closing: Callable[[], Any] | None = None,
        **meta: Any,
    ):
        self.name = name
        self.other_images: list[str] = []
        super().__init__(path, levels, **meta)
        self._window, self._closing, self._lock = window, closing, threading.Lock()
        self._check_colour()

    def _check_colour(self) -> None:
        try:
            pixels = self._raw(0, 0, 0, 1, 1)
        except OSError:
            return  # the corner is damaged; whether the rest is, screening finds out
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
            channels = pixels.shape[2] if pixels.ndim == 3 else 1
            message = f"{self.path.name} has {channels} channel(s) of {pixels.dtype}, not 8-bit RGB"
            raise SlideFailure("not_brightfield", message)

    def associated(self) -> list[str]:
        return list(self.other_images)

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


def plane_window(array: Any, axes: str) -> Callable[[int, int, int, int], np.ndarray]:
    """Window of an array with axes such as YXS, CYX or TCZYX, as (h, w, channels); first of all T and Z."""

    def window(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        where = {"Y": slice(y0, y1), "X": slice(x0, x1), "C": slice(None), "S": slice(None)}
        pixels = np.asarray(array[tuple(where.get(axis, 0) for axis in axes)])
        left = [axis for axis in axes if axis in "YXCS"]
        if len(left) == 2:
            return pixels[..., None]
        return np.moveaxis(pixels, [left.index("Y"), left.index("X")], [0, 1])

    return window


def open_arrays(name: str, path: Path, arrays: list[Any], axes: str, closing: Any = None, **meta: Any) -> ArrayReader:
    """Reader of one array per level, finest first, all with the same axes."""
    windows = [plane_window(array, axes) for array in arrays]
    sizes = [(array.shape[axes.index("X")], array.shape[axes.index("Y")]) for array in arrays]
    return ArrayReader(
        name, path, make_levels(sizes), lambda level, *window: windows[level](*window), closing, **meta
    )  # fmt: skip
