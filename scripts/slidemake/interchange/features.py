"""What a file of features says, in the words that all formats share, and how a file is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure

BLOCK = 16 << 20  # bytes of features that are in memory at a time


@dataclass
class Features:
    """Features of one slide as their file has them; everything that it does not say is None.

    tool: the layout that they were found in. rows: (N, D), anything that can be sliced by rows: an open data set is not
    read before. coords: (N, 2) x and y of the tiles' top-left corners in `unit`: "px" of level 0, or "um". tile and
    stride: side of a tile and distance of two neighbours, in `unit`. tile_px, mpp: what was cut, px and um per px (by
    its name: 20x is 0.5). mpp0: um per px of level 0 by the file. encoder: what the file calls it. said: what else to
    keep.
    """

    tool: str
    rows: Any
    coords: np.ndarray | None = None
    unit: str = "px"
    tile: float | None = None
    stride: float | None = None
    tile_px: int | None = None
    mpp: float | None = None
    mpp0: float | None = None
    encoder: str | None = None
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.rows.shape[0]), int(self.rows.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """What is stored of them: float16 stays, everything else becomes float32."""
        return np.dtype("float16" if np.dtype(self.rows.dtype) == np.float16 else "float32")

    def blocks(self) -> Iterator[np.ndarray]:
        """(n, D) parts of the features in the type that is stored, in order; at most BLOCK bytes each."""
        count, width = self.shape
        step = max(1, BLOCK // max(1, width * max(4, np.dtype(self.rows.dtype).itemsize)))
        for start in range(0, count, step):
            yield np.ascontiguousarray(self.rows[start : start + step], self.dtype)


def refused(path: str | Path, why: str, hint: str | None = None) -> SlideFailure:
    """A file of features that cannot be used; `why` goes on after its name."""
    return SlideFailure("wrong_features", f"{Path(path).name} {why}", hint)


def two_dimensional(rows: Any, path: str | Path) -> Any:
    """`rows` as (N, D); (1, N, D), as some tools write it, is one slide. SlideFailure for anything else."""
    shape = tuple(rows.shape)
    if len(shape) == 3 and shape[0] == 1:
        rows, shape = np.asarray(rows)[0], shape[1:]
    if len(shape) == 1:
        why = f"holds one vector of {shape[0]} numbers: of a whole slide, or of one tile without a dimension for tiles"
        raise refused(path, why, "Give the features of tiles, in an array (tiles, numbers).")
    if len(shape) != 2:
        raise refused(path, f"holds features of shape {shape}, not (tiles, numbers)")
    if np.dtype(rows.dtype).kind not in "fiu":
        raise refused(path, f"holds features of type {rows.dtype}, which are no numbers")
    if shape[0] and not shape[1]:
        raise refused(path, "holds features of no width")
    return rows


def pairs(coords: Any, path: str | Path) -> np.ndarray:
    """Coordinates as (N, 2) float64. SlideFailure when they are of another shape, or no numbers."""
    found = np.asarray(coords)
    if found.ndim == 3 and found.shape[0] == 1:
        found = found[0]
    if found.size == 0:
        return np.zeros((0, 2))
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "fiu":
        raise refused(path, f"holds coordinates of shape {found.shape} and type {found.dtype}, not (tiles, 2) numbers")
    return found.astype(np.float64)


def positive_number(value: Any) -> float | None:
    """A positive number that a file's attribute gives, else None."""
    try:
        found = float(np.asarray(value).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        return None
    return found if np.isfinite(found) and found > 0 else None


def text(value: Any) -> str | None:
    """Text of a file's attribute, else None."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str) and value else None
