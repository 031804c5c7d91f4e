"""Embedding stores of a run as exporters read them: features, places and sizes of the tiles of one slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import read_json
from slidemake.stores.arrays import StoredArray
from slidemake.stores.integrity import check_store

OBJECTIVE = 10.0  # um per px at a magnification of 1


@dataclass(frozen=True)
class StoredSlide:
    """features (N, D) as stored; coords (N, 2) int32 in level-0 px; tile: its side there; px, mpp: the tile as it was
    cut; mpp0: um per level-0 px, None where nobody knows."""

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    tile: float
    px: int
    mpp: float
    mpp0: float | None
    encoder: dict[str, Any]

    @property
    def magnification(self) -> int:
        """By the name that the tile's um per px has: 0.5 is 20x."""
        return round(OBJECTIVE / self.mpp)

    @property
    def magnification0(self) -> int:
        """Of level 0, as a whole number of steps of 10 or 5."""
        exact = OBJECTIVE / (self.mpp0 or self.mpp * self.px / self.tile)
        return min((5, 10, 20, 40, 60, 80), key=lambda m: abs(np.log(m / exact)))


def read_slide(store: Path) -> StoredSlide:
    """A slide's features, checked as every consumer checks them. RunError where its tiles have no places."""
    check_store(store)
    attrs = read_json(store / "zarr.json")["attributes"]
    encoder, mpp = attrs["encoder"], attrs.get("mpp") or {}
    if not attrs.get("tile_level0_px") or not encoder.get("tile_px") or not encoder.get("mpp"):
        raise RunError(f"{store} has features without places or sizes of tiles; only format anndata takes them.")
    source = mpp.get("source")
    return StoredSlide(
        attrs["slide_id"],
        StoredArray(store, "features").read(),
        StoredArray(store, "coords").read(),
        float(attrs["tile_level0_px"][0]),
        int(encoder["tile_px"]),
        float(encoder["mpp"]),
        float(source) if source else None,
        encoder,
    )
