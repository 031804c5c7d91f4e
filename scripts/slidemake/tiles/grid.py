"""Where the tiles of a slide lie: physical squares of `tile_px * mpp` micrometres on a fixed grid.

All coordinates are level-0 pixels. Positions are `round(i * stride)` with the exact, fractional stride, so that
rounding never accumulates along a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure

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

    Where pixels are not square these are those of a square pixel of the mean um/px, and `stretch` has the factors in x
    and y by which a side has more of the scan's pixels than that: `read_size`, `size_level0`.
    """

    tile_px: int
    level: int
    downsample: float
    read_px: float
    scale: float
    effective_mpp: float
    tile_level0: float
    stride_level0: float
    stretch: tuple[float, float] = (1.0, 1.0)

    @property
    def resampled(self) -> bool:
        return self.scale != 1.0 or self.stretch != (1.0, 1.0)

    @property
    def finest_scale(self) -> float:
        """`scale` on the axis that is reduced least."""
        return self.scale * min(self.stretch)

    @property
    def read_size(self) -> tuple[float, float]:
        """Width and height of a tile in px of the level."""
        return self.read_px * self.stretch[0], self.read_px * self.stretch[1]

    @property
    def size_level0(self) -> tuple[float, float]:
        """Width and height of a tile in level-0 px."""
        return self.tile_level0 * self.stretch[0], self.tile_level0 * self.stretch[1]


def plan_window(
    grid: Grid, slide_mpp: float | tuple[float, float], downsamples: Sequence[float], tolerance: float = 0.0
) -> Window:
    """Choose the pyramid level and the resampling that give `grid` on a slide of `slide_mpp` um per level-0 px.

    slide_mpp: one number, or (x, y) where pixels are not square; tiles are square in um all the same. The nearest
    level that is finer (or equal) on both axes is read. Where its mpp is within `tolerance` (relative) of the grid's,
    pixels are taken as they are and the effective mpp says so; pixels that are not square are always resampled. Raises
    SlideFailure too_coarse above 5 % of enlargement.
    """
    mpp_x, mpp_y = slide_mpp if isinstance(slide_mpp, tuple) else (slide_mpp, slide_mpp)
    square = mpp_x == mpp_y
    mean = mpp_x if square else (mpp_x + mpp_y) / 2
    stretch = (1.0, 1.0) if square else (mean / mpp_x, mean / mpp_y)
    wanted = grid.mpp / mean
    finest = wanted * min(stretch)
    if finest * COARSER_ALLOWED < 1.0:
        raise SlideFailure(
            "too_coarse",
            f"the scan has {max(mpp_x, mpp_y):.4g} um/px and grid {grid.name} needs {grid.mpp:g} or finer",
        )
    # 0.1 % of slack: a level of 3.9998 or 2.0005 is the level of 4 or 2
    finer = [i for i, d in enumerate(downsamples) if d <= finest * 1.001]
    level = max(finer, key=lambda i: downsamples[i]) if finer else 0
    downsample = float(downsamples[level])
    scale = wanted / downsample
    if square and abs(scale - 1.0) <= max(tolerance, 1e-9):
        scale = 1.0
    effective = mean * downsample if square and scale == 1.0 else grid.mpp
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
        stretch=stretch,
    )


def slide_window(grid: Grid, slide: Mapping[str, Any], tolerance: float = 0.0) -> Window:
    """`plan_window` for a slide as screening recorded it (slide.json)."""
    mpp = tuple(slide.get("mpp_xy") or (slide["mpp"], slide["mpp"]))
    return plan_window(grid, (mpp[0], mpp[1]), [level["downsample"] for level in slide["levels"]], tolerance)


def tile_positions(window: Window, width: int, height: int, bounds: Sequence[int] | None = None) -> np.ndarray:
    """(N, 2) int32 x, y of all tiles that lie wholly inside the slide (inside `bounds` x, y, w, h if given).

    Row-major order. The grid starts at level-0 (0, 0) whatever the bounds are.
    """
    x0, y0, w, h = bounds or (0, 0, width, height)

    def axis(start: float, end: float, stretch: float) -> np.ndarray:
        side, stride = window.tile_level0 * stretch, window.stride_level0 * stretch
        count = max(0, math.floor((end - side) / stride + 1e-9) + 1)
        positions = np.rint(np.arange(count) * stride).astype(np.int64)
        return positions[(positions >= start) & (positions + side <= end + 0.5)]

    xs, ys = axis(x0, min(x0 + w, width), window.stretch[0]), axis(y0, min(y0 + h, height), window.stretch[1])
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    return np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.int32)


def boxes(coords: np.ndarray, window: Window) -> np.ndarray:
    """(N, 4) float64 level-0 x, y, w, h of tiles at `coords`."""
    size = np.broadcast_to(window.size_level0, (len(coords), 2))
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
        "tile_level0_px": [round(side, 6) for side in window.size_level0],
    }
