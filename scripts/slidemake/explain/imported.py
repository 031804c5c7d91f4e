"""Tiles of features that were imported: places without pixels, on the slide where its file is there, else on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure
from slidemake.stores.arrays import StoredArray


class ImportedTiles:
    """What a tile store says of places, from an embedding store that has no tile store beside it."""

    has_pixels = False

    def __init__(self, store: Path, attrs: dict[str, Any]):
        if not attrs.get("tile_level0_px") or not attrs["imported"]["coordinates"]:
            where = "coordinates" if attrs.get("tile_level0_px") else "size of tiles"
            raise SlideFailure(
                "wrong_features",
                f"the features of {attrs['slide_id']} came without {where}: nothing can be drawn",
                HINT,
            )
        self.attrs = attrs
        self.coords = StoredArray(store, "coords").read()

    def __len__(self) -> int:
        return len(self.coords)

    def paper(self, longest: int) -> tuple[np.ndarray, float, float]:
        """A white picture of the part of the slide that has tiles, and level-0 px per px of it."""
        size = np.array(self.attrs["tile_level0_px"])
        width, height = (self.coords.max(0) + 2 * size).astype(float) if len(self) else (longest, longest)
        scale = max(width, height) / longest
        shape = max(1, round(height / scale)), max(1, round(width / scale), 1), 3
        return np.full(shape, 255, np.uint8), scale, scale

    @property
    def mpp(self) -> tuple[float, float] | None:
        """um per level-0 px, where it is known."""
        found = self.attrs["mpp"].get("source")
        return (float(found), float(found)) if found else None


HINT = "Import a format that has coordinates (TRIDENT, STAMP, CLAM's h5_files), or set explain.slides: none."
