"""Where the tiles of a slide lie on its grid, for models that look at neighbours. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

APART = 8  # empty columns between the slides of a patient: more than the reach of any model's window


def grid_cells(coords: np.ndarray, side: Sequence[float] | None = None) -> np.ndarray:
    """(N, 2) x, y in level-0 px -> (N, 2) int32 row and column, counted from the uppermost and leftmost tile.

    The grid's step is the mean distance of columns (rows) that lie next to each other: positions are rounded to px, and
    a step that is a little off would open gaps on wide slides. side: width and height of a tile; the step is no longer
    than that, so that a few tiles far from each other are no neighbours.
    """
    if len(coords) > 1 and not np.ptp(coords, axis=0).any():  # features that came without coordinates
        return square_cells(len(coords))
    cells = np.zeros((len(coords), 2), np.int32)
    steps = [_step(coords[:, axis], None if side is None else float(side[axis])) for axis in (0, 1)]
    for axis, step in enumerate(steps):
        step = step or steps[1 - axis]  # one column: as its rows
        if len(coords) and step:
            cells[:, 1 - axis] = np.rint((coords[:, axis] - coords[:, axis].min()) / step)
    return cells


def _step(values: np.ndarray, side: float | None) -> float | None:
    gaps = np.diff(np.unique(values))
    if not len(gaps):
        return None
    step = float(gaps[gaps < 1.5 * gaps.min()].mean())
    return step if side is None else min(step, side)


def beside_each_other(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Cells of a patient's slides as if they lay side by side, `APART` columns between them."""
    placed, column = [], 0
    for of_slide in cells:
        moved = of_slide.astype(np.int32, copy=True)
        moved[:, 1] += column
        placed.append(moved)
        column += int(of_slide[:, 1].max(initial=0)) + 1 + APART
    return np.concatenate(placed) if placed else np.zeros((0, 2), np.int32)


def square_cells(count: int) -> np.ndarray:
    """(N, 2) of tiles of which no place is known: row by row in a square, in their order."""
    side = max(1, int(np.ceil(np.sqrt(count))))
    return np.stack(np.divmod(np.arange(count), side), 1).astype(np.int32)


def patches(cells: np.ndarray, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices, ascending, of `count` of the N tiles: around tiles drawn at random, the `size` nearest that are left.

    What is drawn are pieces of the tissue, in which neighbours are what they are on the whole slide.
    """
    left = np.ones(len(cells), bool)
    places, taken = cells.astype(np.float64), 0
    while taken < count:
        rest = np.flatnonzero(left)
        apart = ((places[rest] - places[rng.choice(rest)]) ** 2).sum(1)
        nearest = rest[np.argsort(apart, kind="stable")[: min(size, count - taken)]]
        left[nearest] = False
        taken += len(nearest)
    return np.flatnonzero(~left)
