"""Where the tissue is: a deterministic, weight-free and stain-agnostic mask of a slide's overview.

Everything is measured as optical density (OD) against the slide's own glass, so that H&E, DAB and a pale haematoxylin
are treated alike and a yellowish or grey background does no harm. One threshold is found for the whole overview
(never per window: an empty window has no threshold to find), faint tissue is followed from clear tissue outwards, and
what scanners and people leave on the glass (pen, padding, coverslip edges, shading) is taken out. Every length and
area rule is in um or um^2, so the same rule holds at any overview resolution.

`density` is the method described here. `otsu` and `morphological` are TIAToolbox's maskers on the same overview
(Pocock et al. 2022, Commun. Med. 2:120); pen and padding removal and the area rules apply to them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage as ndi

from slidemake.failures import RunError
from slidemake.tissue_artefacts import PEN_COLOURS, black_areas, bubble_mask, fold_mask, pen_mask
from slidemake.tissue_pixels import (
    TINY,
    box_mean,
    close_gaps,
    component_areas,
    dilate,
    fill_small_holes,
    glass_white_point,
    hsv,
    keep_components,
    local_texture,
    median3,
    optical_density,
    thin_parts,
)

METHODS = ("density", "otsu", "morphological")

# Options of `detect_tissue`; the stage adds its own (overview resolution, focus samples).
DEFAULTS: dict[str, Any] = {
    "method": "density",
    "threshold": None,  # strong threshold on the density score; None: Otsu, held within THRESHOLD_RANGE
    "min_area_um2": 20_000.0,  # smaller pieces are debris (one 224 px tile at 0.5 um/px is 12,544 um^2)
    "fill_holes_um2": 50_000.0,  # smaller holes are lumina and fat and count as tissue; 0 keeps every hole
    "close_um": 24.0,  # gaps up to this width are bridged
    "pen": list(PEN_COLOURS),  # pen colours to remove; [] for stains that look like ink (trichrome, Alcian blue)
    "pen_margin_um": 100.0,  # also removed around pen
    "remove_folds": False,  # folds are flagged, and kept unless this says otherwise
}

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

# Shares above which a flag is raised.
FLAG_AT = {"pen": 0.005, "black": 0.01, "fold": 0.01, "blur": 0.15, "faint": 0.5, "bubble": 0.002}


@dataclass(frozen=True)
class TissueResult:
    """mask (h, w) bool; qc figures (shares 0..1); flags, sorted; the strong threshold (density score, or grey
    value of TIAToolbox's maskers; None for a mask that was given).

    `pen_fraction`, `black_fraction` and `bubble_fraction` are shares of the overview, `fold_fraction` and
    `faint_fraction` of the tissue.
    """

    mask: np.ndarray
    qc: dict[str, Any]
    flags: list[str]
    threshold: float | None


@dataclass(frozen=True)
class _Layers:
    """What is computed once per overview; every array (h, w)."""

    od: list[np.ndarray]  # three float32
    total: np.ndarray  # float32: OD sum
    chroma: np.ndarray  # float32: max - min of OD smoothed over 24 um
    score: np.ndarray  # float32: total + 2 * chroma; colour counts more than grey
    colour: np.ndarray  # float32: chroma over smoothed OD sum
    saturation: np.ndarray  # float32, 0..255
    white: np.ndarray  # (3,)
    pen: np.ndarray
    pen_wide: np.ndarray
    black: np.ndarray


def detect_tissue(rgb: np.ndarray, mpp: float, options: dict[str, Any] | None = None) -> TissueResult:
    """Find tissue on an overview.

    rgb: (h, w, 3) uint8; mpp: um per px of this overview (8 is a good choice; 2 to 60 work); options: see `DEFAULTS`.
    A slide without tissue gives an empty mask, not an error. Raises RunError for an unknown option or method.
    """
    settings = check_options(options or {})
    layers = _layers(rgb, mpp, settings)
    usable = ~(layers.black | layers.pen_wide)
    separability = None
    if settings["method"] == "density":
        threshold, separability = _threshold(layers, usable, settings["threshold"])
        mask, strong = _density_mask(layers, usable, threshold, mpp)
    else:
        mask, threshold = _tiatoolbox_mask(rgb, usable, layers.white, mpp, settings["method"])
        strong = mask
    mask = close_gaps(mask, settings["close_um"] / mpp)
    # Holes are filled before pen is taken out again: a pen stroke across tissue is not a hole of the tissue.
    mask = fill_small_holes(mask | (layers.pen_wide & ~layers.black), settings["fill_holes_um2"] / mpp**2)
    mask &= usable
    if layers.pen.any():
        # The blurred rim of a stroke outlives its core as a thin strip.
        mask &= ~(thin_parts(mask, 50.0 / mpp) & dilate(layers.pen_wide, 200.0 / mpp))
    mask = keep_components(mask, settings["min_area_um2"] / mpp**2, evidence=strong)
    return _result(layers, mask, mask & ~dilate(strong, 16.0 / mpp), threshold, separability, mpp, settings)


def describe_mask(rgb: np.ndarray, mpp: float, mask: np.ndarray, options: dict[str, Any] | None = None) -> TissueResult:
    """QC figures of a mask (h, w) bool that was drawn by hand: pen and folds in it are reported, not removed."""
    settings = {**check_options(options or {}), "remove_folds": False}
    return _result(_layers(rgb, mpp, settings), mask, np.zeros_like(mask), None, None, mpp, settings)


def _result(
    layers: _Layers,
    mask: np.ndarray,
    faint: np.ndarray,
    threshold: float | None,
    separability: float | None,
    mpp: float,
    settings: dict[str, Any],
) -> TissueResult:
    folds = fold_mask(layers.od, layers.saturation, mask, mpp)
    bubbles = bubble_mask(layers.total, layers.colour, mask, ~(layers.black | layers.pen_wide), mpp)
    area = max(int(mask.sum()), 1)
    tissue = layers.total[mask]
    qc = {
        "pen_fraction": round(float(layers.pen.mean()), 6),
        "black_fraction": round(float(layers.black.mean()), 6),
        "bubble_fraction": round(float(bubbles.mean()), 6),
        "fold_fraction": round(float(folds.sum() / area), 6),
        "faint_fraction": round(float(faint.sum() / area), 6),
        "tissue_fraction": round(float(mask.mean()), 6),
        "median_density": round(float(np.median(tissue)), 4) if tissue.size else None,
        "separability": None if separability is None else round(separability, 4),
        "white_point": [round(float(value), 1) for value in layers.white],
    }
    if settings["remove_folds"]:
        mask = keep_components(mask & ~folds, settings["min_area_um2"] / mpp**2)
    return TissueResult(mask, qc, flags_of(qc), threshold)


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `detect_tissue` with their defaults; RunError for what it does not know."""
    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        raise RunError(f"unknown tissue option(s) {', '.join(unknown)}; known: {', '.join(sorted(DEFAULTS))}")
    settings = {**DEFAULTS, **options}
    if settings["method"] not in METHODS:
        raise RunError(f"tissue method {settings['method']!r} is not one of {', '.join(METHODS)}")
    wrong = sorted(set(settings["pen"]) - set(PEN_COLOURS))
    if wrong:
        raise RunError(f"tissue pen colour(s) {', '.join(wrong)} are not among {', '.join(PEN_COLOURS)}")
    return settings


def flags_of(qc: dict[str, Any]) -> list[str]:
    """Names of the QC figures that are above their limit (`FLAG_AT`), sorted."""
    return sorted(name for name, limit in FLAG_AT.items() if (qc.get(f"{name}_fraction") or 0.0) > limit)


def _layers(rgb: np.ndarray, mpp: float, settings: dict[str, Any]) -> _Layers:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an overview is (h, w, 3) uint8, this one {rgb.shape} {rgb.dtype}")
    black = black_areas(rgb, mpp)
    smooth = median3(median3(rgb))
    white = glass_white_point(smooth, ~black)
    od = optical_density(smooth, white)
    total = od[0] + od[1] + od[2]
    local = [box_mean(channel, 24.0 / mpp) for channel in od]
    chroma = np.maximum(np.maximum(local[0], local[1]), local[2])
    chroma -= np.minimum(np.minimum(local[0], local[1]), local[2])
    colour = chroma / np.maximum(local[0] + local[1] + local[2], 0.05)
    shade = hsv(smooth)
    pen = pen_mask(od, shade, ~black, mpp, settings["pen"])
    wide = dilate(pen, settings["pen_margin_um"] / mpp) if pen.any() else pen
    return _Layers(od, total, chroma, total + 2 * chroma, colour, shade[1], white, pen, wide, black)


def _threshold(layers: _Layers, usable: np.ndarray, given: float | None) -> tuple[float, float]:
    """Strong threshold on the density score, and Otsu's separability (between-class over total variance, log score)."""
    values = layers.score[usable]
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


def _density_mask(layers: _Layers, usable: np.ndarray, threshold: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Mask by hysteresis, and the strong pixels in it. Shading has neither colour nor texture and starts nothing."""
    glass = layers.score[usable & (layers.score < LOW_RANGE[1])]
    noise = float(np.median(glass) + 4 * 1.4826 * np.median(np.abs(glass - np.median(glass)))) if glass.size else 0.0
    low = max(float(np.clip(0.25 * threshold, *LOW_RANGE)), min(noise, 0.8 * threshold))
    texture = local_texture(layers.total, 40.0 / mpp)
    coloured = (layers.colour > COLOURED[0]) & (layers.chroma > 0.01)
    tinted = layers.colour > COLOURED[1]
    faint = (layers.score > low) & (tinted | (texture > TEXTURED[1])) & usable
    # A coverslip's edge is a colourless line, often joined to a second one or to tissue: it goes before joining does.
    lines = thin_parts(faint, 60.0 / mpp)
    faint &= ~(lines & ~tinted)
    strong = faint & (layers.score > threshold) & (coloured | ((texture > TEXTURED[0]) & ~lines))
    labels, count = ndi.label(faint, structure=np.ones((3, 3), bool))
    if count == 0:
        return faint, strong
    sizes = component_areas(labels, count)
    seeds = np.bincount(labels[strong], minlength=count + 1)
    density = np.bincount(labels[faint], layers.total[faint], minlength=count + 1)
    chroma = np.bincount(labels[faint], layers.chroma[faint], minlength=count + 1)
    wanted = (
        (seeds >= 3) & (seeds >= 0.02 * sizes) & (chroma > np.maximum(GREY_PIECE[0] * density, GREY_PIECE[1] * sizes))
    )
    wanted &= ~_glass_edges(labels, sizes, coloured, mpp)
    wanted[0] = False
    mask = wanted[labels]
    return mask, strong & mask


def _glass_edges(labels: np.ndarray, sizes: np.ndarray, coloured: np.ndarray, mpp: float) -> np.ndarray:
    """(count + 1,) bool: components longer than ten times their width that are coverslip or scanner edges.

    Needle biopsies are as long: a piece goes only when it has no colour, or touches the border and is thin (< 150 um).
    """
    edge = np.zeros(len(sizes), bool)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    at_border = np.zeros(len(sizes), bool)
    at_border[touching] = True
    boxes = ndi.find_objects(labels)
    shares = np.bincount(labels[coloured], minlength=len(sizes)) / np.maximum(sizes, 1)
    for label in np.flatnonzero(sizes * mpp**2 > 5_000):
        if label == 0:
            continue
        window = boxes[label - 1]
        height, width = (part.stop - part.start for part in window)
        if sizes[label] > 0.35 * height * width and max(height, width) < 8 * min(height, width):
            continue
        y, x = np.nonzero(labels[window] == label)
        spread = np.cov(np.stack([y, x]).astype(np.float64)) if len(y) > 2 else np.eye(2)
        small, large = np.sqrt(12 * np.maximum(np.linalg.eigvalsh(spread), 1 / 12))
        if large > 10 * small:
            edge[label] = shares[label] < 0.3 or (at_border[label] and small * mpp < 150)
    return edge


def _tiatoolbox_mask(
    rgb: np.ndarray, usable: np.ndarray, white: np.ndarray, mpp: float, method: str
) -> tuple[np.ndarray, float]:
    """TIAToolbox's masker on the overview with pen and padding painted as glass; the threshold is a grey value."""
    try:
        from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker
    except ImportError as error:
        raise RunError(
            f"tissue method {method!r} needs TIAToolbox, which is not installed here ({error}). "
            "Install slidemake[tiatoolbox], or set tissue.method to density."
        ) from error
    painted = rgb.copy()
    painted[~usable] = np.clip(np.round(white), 0, 255).astype(np.uint8)
    masker = OtsuTissueMasker() if method == "otsu" else MorphologicalMasker(mpp=mpp)
    mask = np.asarray(masker.fit_transform(painted[None])[0], bool)
    threshold = float(masker.threshold)
    # Otsu divides a blank slide as well; the same absolute density that tissue needs elsewhere is asked for here.
    if float(white.mean()) > 0 and -np.log10(max(threshold, 1.0) / float(white.mean())) * 3 < THRESHOLD_RANGE[0] / 2:
        mask[:] = False
    return mask & usable, threshold
