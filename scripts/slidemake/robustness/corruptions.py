"""What happens to tiles between two scanners or two laboratories, at three severities each, for stress tests.

Severities are physical where there is a unit: blur in micrometres, so that a grid of another resolution is blurred
alike. Every corruption takes and returns tiles (n, H, W, 3) uint8. In the spirit of Hendrycks and Dietterich 2019, with
corruptions that occur in pathology.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter

# corruption -> (what the number is, the number at severities 1, 2, 3)
SEVERITIES: dict[str, tuple[str, tuple[float, float, float]]] = {
    "jpeg": ("JPEG quality, 4:2:0", (60, 30, 15)),
    "blur": ("standard deviation in um", (0.25, 0.5, 1.0)),
    "brightness": ("factor on intensities", (0.9, 0.8, 0.65)),
    "stain": ("haematoxylin up and eosin down by this share", (0.1, 0.25, 0.5)),
    "scale": ("magnification against what was asked for", (1.1, 1.25, 1.5)),
}


def corrupt(tiles: np.ndarray, kind: str, severity: int, mpp: float) -> np.ndarray:
    """Tiles under corruption `kind` (a key of SEVERITIES) at severity 0 (unchanged) to 3; `mpp` in um per px."""
    if severity == 0 or not len(tiles):
        return tiles
    amount = SEVERITIES[kind][1][severity - 1]
    return _FUNCTIONS[kind](tiles, amount, mpp)


def _jpeg(tiles: np.ndarray, quality: float, mpp: float) -> np.ndarray:
    from PIL import Image

    found = np.empty_like(tiles)
    for tile, out in zip(tiles, found, strict=True):
        coded = io.BytesIO()
        Image.fromarray(tile).save(coded, "JPEG", quality=int(quality), subsampling="4:2:0")
        out[:] = np.asarray(Image.open(coded))
    return found


def _blur(tiles: np.ndarray, um: float, mpp: float) -> np.ndarray:
    blurred = gaussian_filter(tiles.astype(np.float32), (0, um / mpp, um / mpp, 0), mode="reflect")
    return np.rint(blurred).astype(np.uint8)


def _brightness(tiles: np.ndarray, factor: float, mpp: float) -> np.ndarray:
    table = np.rint(np.arange(256) * factor).clip(0, 255).astype(np.uint8)
    return table[tiles]


@cache
def _separation() -> tuple[np.ndarray, np.ndarray]:
    """Optical density -> (haematoxylin, eosin, rest) and back, (3, 3) each: Ruifrok and Johnston 2001."""
    from skimage.color import hed_from_rgb, rgb_from_hed

    return hed_from_rgb.astype(np.float32), rgb_from_hed.astype(np.float32)


def restained(rgb: np.ndarray, haematoxylin: float, eosin: float) -> np.ndarray:
    """(..., 3) uint8 with the amounts of both stains multiplied, in optical density; what is neither stays as it is."""
    to_stains, to_density = _separation()
    amounts = -np.log((rgb.astype(np.float32) + 1) / 256) @ to_stains
    amounts[..., 0] *= haematoxylin
    amounts[..., 1] *= eosin
    return np.rint(np.exp(-amounts @ to_density) * 256 - 1).clip(0, 255).astype(np.uint8)


def _stain(tiles: np.ndarray, share: float, mpp: float) -> np.ndarray:
    return restained(tiles, 1 + share, 1 - share)


def _scale(tiles: np.ndarray, factor: float, mpp: float) -> np.ndarray:
    """The middle of each tile, enlarged: the same tissue if the resolution were wrong by this factor."""
    from PIL import Image

    height, width = tiles.shape[1:3]
    dx, dy = width * (1 - 1 / factor) / 2, height * (1 - 1 / factor) / 2
    box = (dx, dy, width - dx, height - dy)
    found = np.empty_like(tiles)
    for tile, out in zip(tiles, found, strict=True):
        out[:] = np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.BICUBIC, box=box))
    return found


_FUNCTIONS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "jpeg": _jpeg,
    "blur": _blur,
    "brightness": _brightness,
    "stain": _stain,
    "scale": _scale,
}
