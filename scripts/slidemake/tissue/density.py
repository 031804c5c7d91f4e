"""The default method of finding tissue: density, colour and structure of an overview decide together.

`measure` computes once what the rules look at; `density_mask` applies the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi

from slidemake.tissue.artefacts import black_areas, border_strips, followed_ink, glass_edges, pen_mask
from slidemake.tissue.glass import Glass, find_glass
from slidemake.tissue.pixels import (
    TINY,
    box_mean,
    close_gaps,
    component_areas,
    dilate,
    extreme,
    grow,
    hsv,
    median3,
    optical_density,
    thin_parts,
    thinned,
)
from slidemake.tissue.structure import MIN_LONE_FAT_UM2, Structure, fat_mask, measure_structure

THRESHOLD_RANGE = (0.06, 0.22)  # density score of the faintest tissue that starts a piece, and of the palest dense one
LOW_RANGE = (0.03, 0.04)  # how far down faint tissue is followed
MIN_SEPARABILITY = 0.65  # below it the histogram has one mode only (Otsu's eta is 0.64 for one Gaussian)
# Shading, coverslip edges and dried mounting medium are grey and smooth; tissue, even pale haematoxylin alone, is not.
# Colour is (max - min) / sum of OD over 24 um, texture the spread of the OD sum over 40 um: (to start, to follow).
COLOURED = (0.10, 0.05)
TEXTURED = (0.015, 0.008)
# A whole piece with less colour than (share of OD, absolute) is no tissue. Measured: the pale cortex of a DAB slide
# (0.08, 0.015), mounting medium (0.055, 0.005), a scanner's shadow (0.04, 0.012).
GREY_PIECE = (0.065, 0.010)
# Less is asked for where so much of a piece is textured: grey films have specks, not structure. Drawn tissue that is
# pale and greenish: (0.106, 0.007); a film of mounting medium with specks: (0.081, 0.007), a tenth of it textured.
PALE_PIECE = (0.09, 0.003)
SPOTTED_PIECE = 0.35
# Mean OD sum over 40 um above which tissue needs no structure (colloid, cartilage, what is out of focus). The densest
# halo measured has 0.12.
DENSE = 0.25
SPOTS_UM = 64.0  # pale tissue is textured in spots: what lies between them is textured, too
EDGE = 0.2
STRUCTURED_PIECE = 0.5  # share of a piece that is textured, to be tissue without a pixel as dense as the threshold


@dataclass(frozen=True)
class Layers:
    """What is computed once per overview; every array (h, w)."""

    od: list[np.ndarray]  # three float32
    total: np.ndarray  # float32: OD sum
    chroma: np.ndarray  # float32: max - min of OD smoothed over 24 um
    score: np.ndarray  # float32: total + 2 * chroma; colour counts more than grey
    colour: np.ndarray  # float32: chroma over smoothed OD sum
    saturation: np.ndarray  # float32, 0..255
    glass: Glass
    pen: np.ndarray
    pen_wide: np.ndarray
    black: np.ndarray
    strip: np.ndarray  # edge of the slide's label
    fine_od: list[np.ndarray]  # three float32: OD of the unfiltered overview
    structure: Structure

    @property
    def usable(self) -> np.ndarray:
        return ~(self.black | self.strip | self.pen_wide)


@dataclass(frozen=True)
class Found:
    """mask, strong (clear tissue), fat, and the votes of colour and of structure: each (h, w) bool."""

    mask: np.ndarray
    strong: np.ndarray
    fat: np.ndarray
    coloured: np.ndarray
    structured: np.ndarray


def measure(rgb: np.ndarray, mpp: float, pens: list[str], pen_margin_um: float) -> Layers:
    """Layers of an overview, rgb (h, w, 3) uint8 at mpp um per px."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an overview is (h, w, 3) uint8, this one {rgb.shape} {rgb.dtype}")
    black = black_areas(rgb, mpp)
    smooth = median3(median3(rgb))
    strip = border_strips(smooth, mpp) & ~black
    unseen = black | strip
    glass = find_glass(smooth, ~unseen, mpp)
    od = optical_density(smooth, glass.white)
    total = od[0] + od[1] + od[2]
    local = [box_mean(channel, 24.0 / mpp) for channel in od]
    level = local[0] + local[1] + local[2]
    chroma = np.maximum(np.maximum(local[0], local[1]), local[2])
    chroma -= np.minimum(np.minimum(local[0], local[1]), local[2])
    shade = hsv(smooth, vivid=60)  # no pen is less saturated
    pen = pen_mask(od, shade, ~unseen, mpp, pens)
    pen |= followed_ink(od, pen, ~unseen, mpp)
    wide = dilate(pen, pen_margin_um / mpp) if pen.any() else pen
    fine_od = optical_density(rgb, glass.white, -1.0)  # lines of one pixel do not outlive a median
    unfiltered = fine_od[0] + fine_od[1] + fine_od[2]
    unfiltered[unseen] = 0
    return Layers(
        od=od,
        total=total,
        chroma=chroma,
        score=total + 2 * chroma,
        colour=chroma / np.maximum(level, 0.05),
        saturation=shade[1],
        glass=glass,
        pen=pen,
        pen_wide=wide,
        black=black,
        strip=strip,
        fine_od=fine_od,
        structure=measure_structure(unfiltered, ~unseen, mpp),
    )


def strong_threshold(layers: Layers, given: float | None) -> tuple[float, float]:
    """Strong threshold on the density score, and Otsu's separability (between-class over total variance, log score)."""
    step = thinned(layers.score.size)
    values = layers.score[step, step][layers.usable[step, step]]
    if values.size == 0:
        return THRESHOLD_RANGE[1], 0.0
    edges = np.linspace(np.log(0.02), np.log(2.0), 129)
    counts = np.histogram(np.log(np.clip(values, 0.0201, 1.999)), edges)[0].astype(np.float64)
    centre = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * centre)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2 / below[-1] ** 2
    between = np.nan_to_num(between[:-1])
    best = int(np.argmax(between))
    variance = float((counts * (centre - mass[-1] / below[-1]) ** 2).sum() / below[-1])
    separability = float(between[best] / variance) if variance > TINY else 0.0
    if given is not None:
        return float(given), separability
    low, high = THRESHOLD_RANGE
    if separability < MIN_SEPARABILITY:
        # One mode: nothing but glass, or nothing but tissue. Only what is clearly dense may start a piece then.
        return high, separability
    return float(np.clip(np.exp(edges[best + 1]), low, high)), separability


def density_mask(layers: Layers, threshold: float, mpp: float, fat: str) -> Found:
    """Tissue by hysteresis over what has colour and structure, and fat. `fat`: keep or drop."""
    usable, structure = layers.usable, layers.structure
    low = _low_threshold(layers, threshold)
    coloured = (layers.colour > COLOURED[0]) & (layers.chroma > 0.01)
    tinted = layers.colour > COLOURED[1]
    seen = (layers.score > low) & usable
    dense = box_mean(layers.total, 40.0 / mpp) > DENSE
    textured = structure.textured | close_gaps(structure.textured & seen & tinted, SPOTS_UM / mpp)
    faint = seen & (textured | (dense & tinted)) & (tinted | (structure.fine > TEXTURED[1]))
    # A coverslip's edge is a colourless line, often joined to a second one or to tissue: it goes before joining does.
    lines = thin_parts(faint, 60.0 / mpp)
    faint &= ~(lines & ~tinted)
    strong = faint & (layers.score > threshold) & (coloured | ((structure.fine > TEXTURED[0]) & ~lines))
    adipose = fat_mask(structure, layers.fine_od, layers.total, faint & (strong | dense), usable, mpp)
    faint, strong = _edges(layers.total, faint, strong, mpp)
    vote = seen & tinted
    if fat == "drop":
        faint &= ~adipose
        strong &= ~adipose
        adipose = np.zeros_like(adipose)
    return _pieces(layers, faint, strong, coloured, adipose, vote, textured, structure.textured, mpp)


def _edges(total: np.ndarray, faint: np.ndarray, strong: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Take back what the windows of texture and colour add beside an edge: pixels as pale as what lies next to them.

    Within 40 um of what is not tissue, a pixel must be denser than the palest one near it by a fifth of the contrast.
    """
    reach = max(1, round(40.0 / mpp))
    rim = faint & grow(~faint, reach)
    smooth = box_mean(total, 24.0 / mpp)
    low, high = extreme(smooth, reach, smallest=True), extreme(smooth, reach)
    rim &= total < low + np.maximum(EDGE * (high - low), 0.02)
    return faint & ~rim, strong & ~rim


def _pieces(
    layers: Layers,
    faint: np.ndarray,
    strong: np.ndarray,
    coloured: np.ndarray,
    fat: np.ndarray,
    vote: np.ndarray,
    textured: np.ndarray,
    spots: np.ndarray,
    mpp: float,
) -> Found:
    """Keep the connected pieces that have clear tissue in them, or structure and colour throughout, or are fat."""
    joined = faint | fat
    labels, count = ndi.label(joined, structure=np.ones((3, 3), bool))
    if count == 0:
        return Found(joined, strong, fat, vote, textured)
    sizes = component_areas(labels, count)

    def totals(where: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(labels[where], None if weights is None else weights[where], minlength=count + 1)

    seeds, solid = totals(strong), totals(faint)
    wanted = (seeds >= 3) & (seeds >= 0.02 * solid)
    large = sizes * mpp**2 >= 20_000
    wanted |= (totals(textured & coloured & faint) >= STRUCTURED_PIECE * sizes) & large
    pale = (totals(spots & faint) >= SPOTTED_PIECE * sizes) & large
    least = [np.where(pale, *limits) for limits in zip(PALE_PIECE, GREY_PIECE, strict=True)]
    grey = np.maximum(least[0] * totals(faint, layers.total), least[1] * solid)
    wanted &= totals(faint, layers.chroma) > grey
    wanted &= ~glass_edges(labels, sizes, coloured, mpp)
    wanted |= totals(fat) * mpp**2 >= MIN_LONE_FAT_UM2
    wanted[0] = False
    mask = wanted[labels]
    return Found(mask, (strong | (textured & coloured & faint) | fat) & mask, fat & mask, vote | fat, textured | fat)


def _low_threshold(layers: Layers, threshold: float) -> float:
    """Score down to which tissue is followed: a quarter of the threshold, and above the noise of the glass."""
    step = thinned(layers.score.size)
    glass = layers.score[step, step]
    glass = glass[layers.usable[step, step] & (glass < LOW_RANGE[1])]
    noise = float(np.median(glass) + 4 * 1.4826 * np.median(np.abs(glass - np.median(glass)))) if glass.size else 0.0
    return max(float(np.clip(0.25 * threshold, *LOW_RANGE)), min(noise, 0.8 * threshold))
