"""Scaling of features: how tiles come to an aggregator, estimated on the tiles of training patients and kept with it.

none       as they are
each       centred, every feature divided by its deviation
centred    centred, all divided by their mean deviation: a feature that hardly varies stays small
principal  the leading principal components, all divided by their root mean square
whitened   the leading principal components, each divided by its deviation

An encoder's thousand features are few directions and much noise: dividing each by its deviation blows the noise up,
and a model of thirty patients has room to fit it. Principal components are those of the covariance of the tiles; of
their correlation where features are measured in different units, so that one would drown the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import eigh

from slidemake.mil.bags import Bags

if TYPE_CHECKING:
    from slidemake.mil.aggregators import Aggregator

PROJECTED = ("principal", "whitened")
COMPONENTS = {"principal": 128, "whitened": 32}  # where the settings name no number
TILES = 512  # per patient, evenly spaced, that scaling is estimated on
SCALED_BYTES = 1 << 28  # of a fold's scaled tiles: a thousand tiles of 500 patients on 128 components
COMPONENT_TILES = 20_000  # in all that components are estimated on, at least 16 of every patient
NOISE = 1e-6  # share of the largest variance below which a direction is rounding error: products are of float32

Change = Callable[[np.ndarray, str], np.ndarray]  # (tiles, patient) -> tiles as the model sees them


@dataclass(frozen=True)
class Scaling:
    """x -> ((x - mean) / std) @ axes, without axes where there are none."""

    mean: np.ndarray  # (D,)
    std: np.ndarray  # (D,)
    axes: np.ndarray | None = None  # (D, K)

    def apply(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, K or D) float32."""
        z = (np.asarray(x, np.float32) - self.mean.astype(np.float32)) / self.std.astype(np.float32)
        return z if self.axes is None else z @ self.axes.astype(np.float32)

    def install(self, model: Aggregator) -> None:
        """Make a model that was built for scaled features take features as they are."""
        model.set_scaling(self.mean, self.std, self.axes)


def every_tile(bag: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spaced tiles of a bag (N, D) as float32."""
    tiles = spread(bag, most)
    if tiles.dtype != np.float16 or not tiles.flags.writeable:
        return np.asarray(tiles, np.float32)
    import torch

    return torch.from_numpy(tiles).float().numpy()  # the same numbers, in a seventh of NumPy's time


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spaced rows."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def feature_statistics(
    bags: Bags, patients: Sequence[str], change: Change | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of the tiles of these patients, patients weighing by their tiles (up to 512).

    change: (tiles, patient) -> tiles as the model sees them, where it harmonises them.
    """
    total, squares, n = np.zeros(bags.dim), np.zeros(bags.dim), 0
    shift = every_tile(bags.bag(patients[0]), 1)[0].astype(np.float64)  # keeps the difference of squares accurate
    for patient in patients:
        tiles = every_tile(bags.bag(patient), TILES)
        if change is not None:
            tiles = change(tiles, patient)
        tiles = tiles - shift
        total += tiles.sum(0, dtype=np.float64)
        squares += np.einsum("nd,nd->d", tiles, tiles, dtype=np.float64)
        n += len(tiles)
        bags.forget()
    std = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    std[std < 1e-6] = 1.0  # a constant feature stays constant
    return total / n + shift, std


def fit_scaling(
    bags: Bags, patients: Sequence[str], settings: Mapping[str, Any], change: Change | None = None
) -> Scaling:
    """The scaling that `settings` name (`scaling`, `components`), from the tiles of these patients."""
    how = settings["scaling"]
    if how == "none":
        return Scaling(np.zeros(bags.dim), np.ones(bags.dim))
    if how in PROJECTED:
        most = settings["components"] or COMPONENTS[how]
        return Components.fit(bags, patients, most, change).scaling(how, most)
    mean, std = feature_statistics(bags, patients, change)
    return Scaling(mean, np.full_like(std, std.mean()) if how == "centred" else std)


@dataclass(frozen=True)
class Components:
    """Leading principal components of tiles, largest variance first; those that are rounding error are all 0."""

    mean: np.ndarray  # (D,)
    std: np.ndarray  # (D,) what features are divided by first: 1, or their deviations where their units differ
    axes: np.ndarray  # (D, K)
    variance: np.ndarray  # (K,)

    @classmethod
    def fit(cls, bags: Bags, patients: Sequence[str], most: int, change: Change | None = None) -> Components:
        """At most `most`, and D. A patient gives up to 512 tiles, fewer where there are many patients."""
        each = max(16, min(TILES, COMPONENT_TILES // len(patients)))
        parts = []
        for patient in patients:
            tiles = every_tile(bags.bag(patient), each)
            parts.append(tiles if change is None else change(tiles, patient))
            bags.forget()
        x = np.concatenate(parts)
        mean = x.mean(0, dtype=np.float64)
        x -= mean.astype(np.float32)
        std = _units(x)
        x /= std.astype(np.float32)
        n, dim = x.shape
        small = n < dim  # the directions of few tiles lie in their span
        product = (x @ x.T if small else x.T @ x).astype(np.float64) / n
        k = min(most, *x.shape)
        variance, vectors = eigh(product, subset_by_index=[len(product) - k, len(product) - 1])
        variance, vectors = np.maximum(variance[::-1], 0), vectors[:, ::-1]
        real = variance > NOISE * max(variance[0], 1e-30)
        if small:
            vectors = (x.T @ vectors) / np.sqrt(np.maximum(n * variance, 1e-30))
        vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), np.arange(k)] < 0, -1, 1)  # one sign
        width = min(most, dim)  # the same for every fold
        axes, kept = np.zeros((dim, width)), np.zeros(width)
        axes[:, :k], kept[:k] = np.where(real, vectors, 0), np.where(real, variance, 0)
        return cls(mean, std, axes, kept)

    def scaling(self, how: str, most: int) -> Scaling:
        axes, variance = self.axes[:, :most], self.variance[:most]
        if how == "whitened":
            size = np.sqrt(np.where(variance > 0, variance, 1.0))
        else:
            size = np.sqrt(max(float(variance.sum()) / max(1, int((variance > 0).sum())), 1e-30))
        return Scaling(self.mean, self.std, axes / size)


def _units(x: np.ndarray) -> np.ndarray:
    """(D,) deviations of centred tiles (N, D) where most features would be rounding error beside the largest, as no
    encoder's are but hand-made ones (an area beside a share); else ones."""
    deviation = x.std(0, dtype=np.float64)
    varying = deviation[deviation > 0]
    if not len(varying) or np.median(varying) ** 2 >= NOISE * varying.max() ** 2:
        return np.ones(x.shape[1])
    return np.where(deviation > 0, deviation, 1.0)


def scaled_bags(bags: Bags, patients: Sequence[str], scaling: Scaling) -> Bags:
    """Bags of these patients alone, every tile scaled once instead of at every step, in memory.

    Of slides with many tiles evenly spaced ones are taken, so that all fit into `SCALED_BYTES`.
    """
    kept = [s for p in sorted({*patients}) for s in range(*bags.where.get(p, (0, 0)))]
    width = len(scaling.mean) if scaling.axes is None else scaling.axes.shape[1]
    most = max(1, SCALED_BYTES // (4 * width * max(1, len(kept))))
    parts, cells = [], []
    for s in kept:
        parts.append(scaling.apply(spread(bags.slide(s), most)))
        if bags.cells is not None:
            cells.append(spread(bags.cells[bags.offsets[s] : bags.offsets[s + 1]], most))
        bags.forget()
    where: dict[str, tuple[int, int]] = {}
    for place, s in enumerate(kept):
        first, _ = where.get(bags.patients[s], (place, place))
        where[bags.patients[s]] = (first, place + 1)
    return replace(
        bags,
        features=np.concatenate(parts),
        slides=tuple(bags.slides[s] for s in kept),
        patients=tuple(bags.patients[s] for s in kept),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        where=where,
        cells=np.concatenate(cells) if cells else None,
    )
