"""The colour of the empty glass, against which every density is measured, or why there is none to measure against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from slidemake.tissue.pixels import channel_range, local_texture

ASSUMED = 245.0  # where tissue fills the whole overview
FLAT = 2.5  # spread of grey values over 40 um, of what is one colour; the palest tissue has more
# Glass may be tinted, but transmitted light is not red: (least of the channels, most of them, difference of the two).
TINTED = (150, 195, 70)


@dataclass(frozen=True)
class Glass:
    """white: (3,) float64. kind: `glass` (bright and colourless), `tinted`, `none` (tissue everywhere: white is
    assumed), `implausible` (the brightest large flat area has a colour that no glass has: white is that colour).
    """

    white: np.ndarray
    kind: Literal["glass", "tinted", "none", "implausible"]


def find_glass(rgb: np.ndarray, usable: np.ndarray, mpp: float) -> Glass:
    """The glass of an overview: rgb (h, w, 3) uint8, median-filtered; usable (h, w) bool; mpp: um per px.

    The mode of the bright, colourless pixels, and of several the brightest clear one, because pale tissue may cover
    more of the slide than glass does. Exact 255 is what readers paint outside the scan, so it counts only where there
    is no other glass.
    """
    step = max(1, int(np.sqrt(usable.size / 500_000)))
    pixels = rgb[::step, ::step][usable[::step, ::step]]
    if len(pixels) == 0:
        return Glass(np.full(3, ASSUMED), "none")
    darkest, brightest = channel_range(pixels)
    # Stained tissue keeps a colour; glass is at most tinted.
    bright = pixels[(darkest >= 180) & (brightest - darkest <= 24)]
    painted = bright.min(1) == 255 if len(bright) else np.zeros(0, bool)
    if (~painted).sum() >= 0.01 * len(pixels):
        bright = bright[~painted]
    elif painted.sum() >= 0.01 * len(pixels):
        wrong = _flat_colour(rgb, usable & (channel_range(rgb)[0] < 255), mpp, 0.4 * usable.sum())
        return wrong if wrong is not None and wrong.kind == "implausible" else Glass(np.full(3, 255.0), "glass")
    if len(bright) < 0.002 * len(pixels) or len(bright) < 16:
        return _flat_colour(rgb, usable, mpp, 0.05 * usable.sum()) or Glass(np.full(3, ASSUMED), "none")
    return Glass(_brightest_mode(bright, 0.08), "glass")


def _flat_colour(rgb: np.ndarray, usable: np.ndarray, mpp: float, least: float) -> Glass | None:
    """Glass of unusual colour: what is flat, covers `least` px or more, and is not outshone by a fifth of the rest."""
    grey = rgb.mean(2, dtype=np.float32)
    flat = usable & (local_texture(grey, 40.0 / mpp) < FLAT)
    if flat.sum() < max(least, 1):
        return None
    colour = _brightest_mode(rgb[flat], 0.2)
    if float(colour.mean()) + 3 < float(np.percentile(grey[usable], 80)):
        return None
    least_channel, most, spread = TINTED
    tinted = colour.min() >= least_channel and colour.max() >= most and np.ptp(colour) <= spread
    return Glass(colour, "tinted" if tinted else "implausible")


def _brightest_mode(pixels: np.ndarray, clear: float) -> np.ndarray:
    """(3,) float64: median colour of the brightest peak with `clear` times the pixels of the highest; pixels (n, 3)."""
    level = pixels.astype(np.uint16).sum(1) // 3
    counts = np.convolve(np.bincount(level, minlength=256).astype(np.float64), np.ones(5) / 5, mode="same")
    peaks = [i for i in range(2, 256) if counts[i] == counts[max(0, i - 4) : i + 5].max() and counts[i] > 0]
    peak = max((i for i in peaks if counts[i] >= clear * counts.max()), default=int(np.argmax(counts)))
    near = np.abs(level.astype(int) - peak) <= 2
    return np.median(pixels[near] if near.any() else pixels, axis=0).astype(np.float64)
