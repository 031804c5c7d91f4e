"""Coordinates of features in level-0 px, and what does not fit: with the slide, with the encoder, with each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.interchange.features import Features, refused
from slidemake.interchange.hdf5_features import spacing

TOLERANCE = 0.05  # of um per px: tiles of 20x are 0.47 to 0.52 um per px, depending on the scanner
WHOLE = 1e-3  # px: coordinates so near to a whole number are whole


@dataclass(frozen=True)
class Cut:
    """What the encoder's input was by its record, or by the configuration: None where nobody says."""

    tile_px: int | None = None
    mpp: float | None = None
    resize: int | None = None
    dim: int | None = None


@dataclass
class Placed:
    """coords: (N, 2) int32, level-0 px, None where the file has none. tile, stride: level-0 px. mpp: um per level-0 px
    and where it is from. tile_px, tile_mpp: px and um per px of the tiles as they were cut, by name (20x is 0.5), which
    all slides of a cohort share. um: side of a tile, um. notes: sentences.
    """

    coords: np.ndarray | None
    tile: float | None
    stride: float | None
    mpp: float | None
    mpp_source: str | None
    tile_px: int | None
    tile_mpp: float | None
    um: float | None
    notes: list[str] = field(default_factory=list)


def place(path: Path, found: Features, slide: dict[str, Any], declared: Cut) -> Placed:
    """Where the tiles of a file lie on its slide. `slide`: what is known of it (width, height, mpp), {} for nothing.

    Micrometres become px by the slide's um per px: the slide's or the sheet's, else the file's; without any they stay
    micrometres, on a level 0 of 1 um per px. SlideFailure for coordinates that are not finite or lie outside.
    """
    notes: list[str] = []
    mpp, source = _mpp(found, slide)
    coords, tile, stride = found.coords, found.tile, found.stride
    if found.unit == "um":
        if mpp is None:
            mpp, source = 1.0, "coordinates"
        coords = None if coords is None else coords / mpp
        tile, stride = (None if v is None else v / mpp for v in (tile, stride))
    if coords is not None:
        if not np.isfinite(coords).all():
            raise refused(path, "has coordinates that are not finite")
        whole = np.round(coords)
        if found.unit == "px" and len(coords) and np.abs(coords - whole).max() > WHOLE:
            notes.append("coordinates with fractions of a pixel were rounded")
        _inside(path, whole, tile or 0.0, slide)
        if stride is None:
            stride = spacing(whole)
        if len(np.unique(whole, axis=0)) < len(whole):
            notes.append("some tiles have the same coordinates as another")
        coords = whole.astype(np.int32)
    if tile is None and declared.tile_px and declared.mpp and mpp:
        tile = declared.tile_px * declared.mpp / mpp
    if tile is None and stride is not None:
        tile = stride
        notes.append("the file does not say how large its tiles are: they are drawn as large as their distance")
    um = tile * mpp if tile and mpp else None
    named = found.tile_px * found.mpp if found.tile_px and found.mpp else um
    return Placed(
        coords, tile, stride, mpp, source, found.tile_px or declared.tile_px, found.mpp or declared.mpp, named, notes
    )


def _mpp(found: Features, slide: dict[str, Any]) -> tuple[float | None, str | None]:
    for value, source in ((slide.get("mpp"), "slide"), (found.mpp0, "features")):
        if value:
            return float(value), source
    return None, None


def _inside(path: Path, coords: np.ndarray, tile: float, slide: dict[str, Any]) -> None:
    """SlideFailure when tiles lie where no slide is. Tools let tiles reach over the edges, so a tile is outside when
    all of it is."""
    width, height = slide.get("width"), slide.get("height")
    lost = (coords + tile < 0).any(1) if tile else (coords < 0).any(1)
    if width and height:
        lost |= (coords >= [width, height]).any(1)
    if lost.any():
        x, y = coords[int(lost.argmax())]
        size = f" of {width} x {height} px" if width and height else ""
        raise refused(
            path,
            f"has {int(lost.sum())} of {len(coords)} tiles outside of the slide{size}, the first at {x:.0f}, {y:.0f}",
            "Are these features of another slide, or of another level? Correct the sheet's path, mpp or features.",
        )


def scale_note(name: str, placed: Placed, record: Cut) -> str | None:
    """A sentence when tiles covered another field than the encoder's record cuts: their features are others."""
    if not (placed.um and record.tile_px and record.mpp and record.resize):
        return None
    um, wanted = placed.um, record.tile_px * record.mpp
    if abs(um / wanted - 1) <= TOLERANCE:
        return None
    return (
        f"tiles of {um:.0f} um ({um / record.resize:.3g} um per px for {name}), and slidemake cuts {wanted:.0f} um "
        f"({wanted / record.resize:.3g}): such features are not comparable with those that it makes itself"
    )
