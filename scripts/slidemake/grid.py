"""Where the tiles of a slide lie: physical squares of `tile_px * mpp` micrometres on a fixed grid.

All coordinates are level-0 pixels. Positions are `round(i * stride)` with the exact, fractional stride, so that
rounding never accumulates along a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidemake.failures import RunError, SlideFailure

COARSER_ALLOWED = 1.05  # a scan up to 5 % coarser than the grid is resampled; beyond, pixels would be invented
_NAME = re.compile(r"(\d+)px_(\d+(?:\.\d+)?)mpp")


@dataclass(frozen=True)
class Grid:
    """A tiling spec: tiles of `tile_px` x `tile_px` at `mpp` um/px, `stride_px` apart (same px)."""

    name: str
    tile_px: int
    mpp: float
    stride_px: int

    @property
    def tile_um(self) -> float:
        return self.tile_px * self.mpp


def grid_name(tile_px: int, mpp: float) -> str:
    """`224px_0.5mpp`: the grid that an encoder with this input asks for."""
    return f"{tile_px}px_{mpp:g}mpp"


def parse_grid(name: str, stride_px: int | None = None) -> Grid:
    """The grid behind a name such as `224px_0.5mpp`. `stride_px` below the tile size makes tiles overlap."""
    match = _NAME.fullmatch(name)
    if not match:
        raise RunError(f"grid {name!r} is not of the form <tile>px_<mpp>mpp, for example 224px_0.5mpp")
    tile_px, mpp = int(match[1]), float(match[2])
    return Grid(name, tile_px, mpp, stride_px or tile_px)


@dataclass(frozen=True)
class Window:
    """How the tiles of one slide are read.

    level: pyramid level read; downsample: of that level; read_px: side of a tile in px of that level (fractional);
    scale: read_px / tile_px (1 = read as it is, above 1 = reduced); effective_mpp: um/px of the stored tile;
    tile_level0: side of a tile in level-0 px (fractional); stride_level0 likewise.
    """

    tile_px: int
    level: int
    downsample: float
    read_px: float
    scale: float
    effective_mpp: float
    tile_level0: float
    stride_level0: float

    @property
    def resampled(self) -> bool:
        return self.scale != 1.0


def plan_window(grid: Grid, slide_mpp: float, downsamples: Sequence[float], tolerance: float = 0.0) -> Window:
    """Choose the pyramid level and the resampling that give `grid` on a slide of `slide_mpp` um per level-0 px.

    The nearest finer (or equal) level is read. Where its mpp is within `tolerance` (relative) of the grid's, pixels
    are taken as they are and the effective mpp says so. Raises SlideFailure too_coarse above 5 % of enlargement.
    """
    wanted = grid.mpp / slide_mpp
    if wanted * COARSER_ALLOWED < 1.0:
        raise SlideFailure(
            "too_coarse",
            f"the scan has {slide_mpp:.4g} um/px and grid {grid.name} needs {grid.mpp:g} or finer",
        )
    # 0.1 % of slack: a level of 3.9998 or 2.0005 is the level of 4 or 2
    finer = [i for i, d in enumerate(downsamples) if d <= wanted * 1.001]
    level = max(finer, key=lambda i: downsamples[i]) if finer else 0
    downsample = float(downsamples[level])
    scale = wanted / downsample
    if abs(scale - 1.0) <= max(tolerance, 1e-9):
        scale = 1.0
    effective = grid.mpp if scale != 1.0 else slide_mpp * downsample
    tile_level0 = grid.tile_px * scale * downsample
    return Window(
        tile_px=grid.tile_px,
        level=level,
        downsample=downsample,
        read_px=grid.tile_px * scale,
        scale=scale,
        effective_mpp=effective,
        tile_level0=tile_level0,
        stride_level0=tile_level0 * grid.stride_px / grid.tile_px,
    )


def tile_positions(window: Window, width: int, height: int, bounds: Sequence[int] | None = None) -> np.ndarray:
    """(N, 2) int32 x, y of all tiles that lie wholly inside the slide (inside `bounds` x, y, w, h if given).

    Row-major order. The grid starts at level-0 (0, 0) whatever the bounds are.
    """
    x0, y0, w, h = bounds or (0, 0, width, height)

    def axis(start: float, end: float) -> np.ndarray:
        count = max(0, math.floor((end - window.tile_level0) / window.stride_level0 + 1e-9) + 1)
        positions = np.rint(np.arange(count) * window.stride_level0).astype(np.int64)
        return positions[(positions >= start) & (positions + window.tile_level0 <= end + 0.5)]

    xs, ys = axis(x0, min(x0 + w, width)), axis(y0, min(y0 + h, height))
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    return np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.int32)


def boxes(coords: np.ndarray, window: Window) -> np.ndarray:
    """(N, 4) float64 level-0 x, y, w, h of tiles at `coords`."""
    size = np.full((len(coords), 2), window.tile_level0)
    return np.concatenate([np.asarray(coords, np.float64).reshape(-1, 2), size], axis=1)


def describe_window(grid: Grid, window: Window, slide_mpp: float, mpp_source: str) -> dict[str, Any]:
    """What was really done, for the attributes of a tile store."""
    return {
        "grid": grid.name,
        "tile_px": grid.tile_px,
        "tile_um": round(grid.tile_px * window.effective_mpp, 6),
        "stride_px": grid.stride_px,
        "mpp": {
            "requested": grid.mpp,
            "effective": round(window.effective_mpp, 8),
            "slide": slide_mpp,
            "source": mpp_source,
        },
        "level": window.level,
        "level_downsample": window.downsample,
        "scale": round(window.scale, 8),
        "resampling": "bicubic, antialiased" if window.resampled else "none",
        "tile_level0_px": [round(window.tile_level0, 6)] * 2,
    }
