"""Batches of bags: tiles drawn anew for every epoch, padded to the largest bag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slidemake.mil.aggregators import AGGREGATORS, slide_numbers
from slidemake.mil.bags import Bags
from slidemake.mil.places import patches

TILE_FRACTION = 0.25  # regularises, and saves time
PATCH = 256  # tiles of a piece of tissue, where a model looks at neighbours


def draw_count(size: int, settings: Mapping[str, Any]) -> int:
    """How many of a bag's `size` tiles a training step takes."""
    fraction = settings["tile_fraction"]
    if fraction is None:
        registered = AGGREGATORS.get(settings["aggregator"])
        fraction = 1.0 if registered is not None and registered.build.placed else TILE_FRACTION
    want = round(fraction * size)
    return min(size, max(want, settings["min_tiles"]), settings["max_tiles"] or size)


def draw_rows(
    rows: np.ndarray, settings: Mapping[str, Any], rng: np.random.Generator, cells: np.ndarray | None = None
) -> np.ndarray:
    """Random rows of a bag in their order; all of them where all are wanted.

    cells (N, 2): of a bag whose tiles are looked at with their neighbours; pieces of tissue are drawn then.
    """
    count = draw_count(len(rows), settings)
    if count == len(rows):
        return rows
    if cells is not None:
        return rows[patches(cells, count, PATCH, rng)]
    return rows[np.sort(rng.permutation(len(rows))[:count])]


def pad_rows(drawn: Sequence[np.ndarray]) -> tuple[np.ndarray, Tensor | None]:
    """Rows of several bags as one array (B, N), and mask (B, N) or None where nothing had to be padded."""
    counts = [len(rows) for rows in drawn]
    padded = np.full((len(drawn), max(counts)), drawn[0][0])  # with a tile that is there: the mask hides it
    for i, chosen in enumerate(drawn):
        padded[i, : len(chosen)] = chosen
    if min(counts) == max(counts):
        return padded, None
    return padded, torch.arange(max(counts)) < torch.tensor(counts)[:, None]


class Sampled(NamedTuple):
    """Tiles of several patients, padded: features (B, N, D) float32, mask (B, N) or None where nothing had to be
    padded; number (B, N) of each tile's slide within its bag where the settings ask for attention over slides, cells
    (B, N, 2) where the model looks at neighbours, else None."""

    features: Tensor
    mask: Tensor | None
    slides: Tensor | None
    places: Tensor | None


def looks_at_neighbours(bags: Bags, settings: Mapping[str, Any]) -> bool:
    """Whether a model with these settings is told where the tiles lie, and these bags know it."""
    name = settings["aggregator"]
    return bags.cells is not None and name in AGGREGATORS and AGGREGATORS[name].build.placed


def sample_batch(bags: Bags, patients: Sequence[str], settings: Mapping[str, Any], rng: np.random.Generator) -> Sampled:
    """Random tiles of several patients. A single bag of which all tiles are wanted is not copied."""
    by_slide, placed = settings.get("slides") == "attention", looks_at_neighbours(bags, settings)
    drawn = [draw_rows(np.arange(*bags.rows(p)), settings, rng, bags.places(p) if placed else None) for p in patients]
    if len(drawn) == 1 and len(drawn[0]) == bags.tiles(patients[0]):
        slides = slide_numbers(bags.sizes(patients[0]))[None] if by_slide else None
        places = cells_of(bags, drawn[0][None]) if placed else None
        return Sampled(torch.from_numpy(bags.bag(patients[0])).float()[None], None, slides, places)
    rows, mask = pad_rows(drawn)
    features = torch.from_numpy(np.take(bags.features, rows, axis=0)).float()
    slides = None
    if by_slide:
        first = np.array([bags.where[p][0] for p in patients])[:, None]
        slides = torch.from_numpy(bags.slide_of(rows) - first)
    return Sampled(features, mask, slides, cells_of(bags, rows) if placed else None)


def cells_of(bags: Bags, rows: np.ndarray) -> Tensor:
    """Cells (..., 2) of rows (...) of bags that know them."""
    assert bags.cells is not None
    return torch.from_numpy(bags.cells[rows].astype(np.int64))
