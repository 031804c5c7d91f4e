"""Batches of bags: tiles drawn anew for every epoch, padded to the largest bag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidemake.mil.aggregators import slide_numbers
from slidemake.mil.bags import Bags


def draw_count(size: int, settings: Mapping[str, Any]) -> int:
    """How many of a bag's `size` tiles a training step takes."""
    want = round(settings["tile_fraction"] * size)
    return min(size, max(want, settings["min_tiles"]), settings["max_tiles"] or size)


def draw_rows(rows: np.ndarray, settings: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Random rows of a bag in their order; all of them where all are wanted."""
    count = draw_count(len(rows), settings)
    return rows if count == len(rows) else rows[np.sort(rng.permutation(len(rows))[:count])]


def pad_rows(drawn: Sequence[np.ndarray]) -> tuple[np.ndarray, Tensor | None]:
    """Rows of several bags as one array (B, N), and mask (B, N) or None where nothing had to be padded."""
    counts = [len(rows) for rows in drawn]
    padded = np.full((len(drawn), max(counts)), drawn[0][0])  # with a tile that is there: the mask hides it
    for i, chosen in enumerate(drawn):
        padded[i, : len(chosen)] = chosen
    if min(counts) == max(counts):
        return padded, None
    return padded, torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def sample_batch(
    bags: Bags, patients: Sequence[str], settings: Mapping[str, Any], rng: np.random.Generator
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Random tiles of several patients, padded: features (B, N, D) float32, and mask (B, N) or None where nothing had
    to be padded. A single bag of which all tiles are wanted is not copied. Third, number (B, N) of each tile's slide
    within its bag where the settings ask for attention over slides, else None.
    """
    by_slide = settings.get("slides") == "attention"
    drawn = [draw_rows(np.arange(*bags.rows(p)), settings, rng) for p in patients]
    if len(drawn) == 1 and len(drawn[0]) == bags.tiles(patients[0]):
        slides = slide_numbers(bags.sizes(patients[0]))[None] if by_slide else None
        return torch.from_numpy(bags.bag(patients[0])).float()[None], None, slides
    rows, mask = pad_rows(drawn)
    features = torch.from_numpy(np.take(bags.features, rows, axis=0)).float()
    slides = None
    if by_slide:
        first = np.array([bags.where[p][0] for p in patients])[:, None]
        slides = torch.from_numpy(bags.slide_of(rows) - first)
    return features, mask, slides
