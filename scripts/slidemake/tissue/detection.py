"""Where the tissue is: a deterministic, weight-free and stain-agnostic mask of a slide's overview.

Everything is measured as optical density (OD) against the slide's own glass, so that H&E, DAB and a pale haematoxylin
are treated alike and a yellowish or grey background does no harm. Colour and structure decide together: what is faint
must have structure (`structure`), or it is a smear of stain; what has structure must have colour, or it is dust
or a scratch; a net of membranes is fat, though most of it is as empty as glass. One threshold is found for the whole
overview (never per window: an empty window has no threshold to find), faint tissue is followed from clear tissue
outwards, and what scanners and people leave on the glass (pen, padding, labels, coverslip edges, shading) is taken
out. Every length and area rule is in um or um^2, so the same rule holds at any overview resolution.

`density` is the method described here, `grandqc`, `hest` and `sam` are learned (`models`); `otsu` and
`morphological` are TIAToolbox's maskers on the same overview (Pocock et al. 2022, Commun. Med. 2:120). Pen and padding
removal and the area rules apply to all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage as ndi

from slidemake.core.failures import RunError
from slidemake.tissue.artefacts import PEN_COLOURS, bubble_mask, fold_mask
from slidemake.tissue.density import THRESHOLD_RANGE, Found, Layers, density_mask, measure, strong_threshold
from slidemake.tissue.models import MODELS, Finer, model_mask
from slidemake.tissue.pixels import (
    channel_range,
    close_gaps,
    component_areas,
    dilate,
    extreme,
    fill_small_holes,
    keep_components,
    thin_parts,
)

METHODS = ("density", "otsu", "morphological", *MODELS)
FAT = ("keep", "drop")

# Options of `detect_tissue`; the stage adds its own (overview resolution, focus samples).
DEFAULTS: dict[str, Any] = {
    "method": "density",
    "weights": None,  # file (sam: folder) with the weights of a learned method
    "threshold": None,  # strong threshold on the density score; None: Otsu, held within THRESHOLD_RANGE
    "min_area_um2": 20_000.0,  # smaller pieces are debris (one 224 px tile at 0.5 um/px is 12,544 um^2)
    "fill_holes_um2": 50_000.0,  # smaller holes are lumina and count as tissue; 0 keeps every hole
    "close_um": 24.0,  # gaps up to this width are bridged
    "fat": "keep",  # "drop": adipose tissue is not tissue
    "pen": list(PEN_COLOURS),  # pen colours to remove; [] for stains that look like ink (trichrome, Alcian blue)
    "pen_margin_um": 75.0,  # also removed around pen
    "remove_folds": False,  # folds are flagged, and kept unless this says otherwise
}

# Shares above which a flag is raised.
FLAG_AT = {"pen": 0.005, "black": 0.01, "fold": 0.01, "blur": 0.15, "faint": 0.5, "bubble": 0.002, "smear": 0.01}
OVERVIEW_SHARES = (
    "pen_fraction",
    "black_fraction",
    "label_fraction",
    "bubble_fraction",
    "smear_fraction",
    "tissue_fraction",
)
UNSURE = 0.75  # a piece is unsure when colour and structure agree on less of it
UNSURE_SHARE = 0.05  # so is a slide when such pieces make up this share of its tissue
GLASS_FLAGS = {"none": "no_glass", "tinted": "tinted_glass", "implausible": "implausible_colours"}


@dataclass(frozen=True)
class Pieces:
    """labels (h, w) int32: 0 is no tissue; confidence (count + 1,): share on which colour and structure agree, 0..1."""

    labels: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class TissueResult:
    """mask (h, w) bool; qc figures (shares 0..1); flags, sorted; the strong threshold (density score, or grey
    value of TIAToolbox's maskers; None for a mask that was given); pieces with their confidence (None where only one
    method looked).

    `pen_fraction`, `black_fraction`, `label_fraction`, `bubble_fraction` and `smear_fraction` are shares of the
    overview, `fold_fraction`, `faint_fraction`, `fat_fraction` and `unsure_fraction` of the tissue.
    """

    mask: np.ndarray
    qc: dict[str, Any]
    flags: list[str]
    threshold: float | None
    pieces: Pieces | None = None


@dataclass
class _Notes:
    """What a method says beside its mask, for the figures."""

    threshold: float | None = None
    separability: float | None = None
    faint: np.ndarray | None = None
    fat: np.ndarray | None = None
    smear: np.ndarray | None = None
    pieces: Pieces | None = None
    more: dict[str, Any] = field(default_factory=dict)


def detect_tissue(
    rgb: np.ndarray, mpp: float, options: dict[str, Any] | None = None, finer: Finer | None = None
) -> TissueResult:
    """Find tissue on an overview.

    rgb: (h, w, 3) uint8; mpp: um per px of this overview (8 is a good choice; 2 to 60 work); options: see `DEFAULTS`;
    finer: reads the slide for a learned model that sees finer than the overview.
    A slide without tissue gives an empty mask, not an error, and so does one whose colours are not those of
    transmitted light (flag `implausible_colours`). Raises RunError for an unknown option or method.
    """
    settings = check_options(options or {})
    window = _scanned(rgb, mpp)
    if window is not None:
        inside = detect_tissue(rgb[window], mpp, settings, finer and _shifted(finer, window))
        return _within(inside, window, rgb.shape[:2])
    layers = measure(rgb, mpp, settings["pen"], settings["pen_margin_um"])
    notes = _Notes()
    found = None
    if layers.glass.kind == "implausible":
        mask = strong = np.zeros(rgb.shape[:2], bool)
    elif settings["method"] == "density":
        notes.threshold, notes.separability = strong_threshold(layers, settings["threshold"])
        found = density_mask(layers, notes.threshold, mpp, settings["fat"])
        mask, strong = found.mask, found.strong
    elif settings["method"] in MODELS:
        mask = strong = _learned(rgb, layers, mpp, settings, finer)
    else:
        mask, notes.threshold = _tiatoolbox_mask(rgb, layers.usable, layers.glass.white, mpp, settings["method"])
        strong = mask
    mask = _finish(layers, mask, strong, mpp, settings)
    notes.faint = mask & ~dilate(strong, 16.0 / mpp)
    if found is not None:
        notes.fat = found.fat & mask
        notes.pieces, notes.smear = _agreement(found, mask, layers.usable, mpp)
    return _result(layers, mask, notes, mpp, settings)


def _learned(rgb: np.ndarray, layers: Layers, mpp: float, settings: dict[str, Any], finer: Finer | None) -> np.ndarray:
    """The mask of a learned model; `sam` is shown the pieces of `density`, `hest` all that is not as pale as glass."""
    method, pieces = settings["method"], layers.usable & (layers.score > THRESHOLD_RANGE[0] / 2)
    if method == "sam":
        found = density_mask(layers, strong_threshold(layers, settings["threshold"])[0], mpp, settings["fat"])
        pieces = _finish(layers, found.mask, found.strong, mpp, settings)
    return model_mask(rgb, mpp, method, settings["weights"], pieces, finer) & layers.usable


def _shifted(finer: Finer, window: tuple[slice, slice]) -> Finer:
    """`finer` in px of a window of the overview."""
    return lambda x, y, width, side: finer(x + window[1].start, y + window[0].start, width, side)


def _scanned(rgb: np.ndarray, mpp: float) -> tuple[slice, slice] | None:
    """Where anything was scanned, with 0.5 mm of what is painted white around it; None unless that is the smaller half.

    Files that hold a few tiles of a large slide are white elsewhere, and looking there takes as long as anywhere.
    """
    if rgb.ndim != 3 or rgb.size == 0 or rgb[[0, 0, -1, -1], [0, -1, 0, -1]].min(1).max() < 255:
        return None  # no white corner: a quick no for most slides
    seen = channel_range(rgb)[0] < 255
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if rows.size == 0:
        return (slice(0, 1), slice(0, 1)) if seen.size > 1 else None
    margin = max(1, round(500 / mpp))
    window = tuple(
        slice(max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin))
        for found, length in ((rows, seen.shape[0]), (columns, seen.shape[1]))
    )
    area = (window[0].stop - window[0].start) * (window[1].stop - window[1].start)
    return (window[0], window[1]) if 2 * area < seen.size else None


def _within(found: TissueResult, window: tuple[slice, slice], shape: tuple[int, int]) -> TissueResult:
    """The result for a part of an overview as one for the whole (h, w), of which the rest is glass."""
    mask = np.zeros(shape, bool)
    mask[window] = found.mask
    part = found.mask.size / mask.size
    qc = {key: round(value * part, 6) if key in OVERVIEW_SHARES else value for key, value in found.qc.items()}
    pieces = None
    if found.pieces is not None:
        labels = np.zeros(shape, found.pieces.labels.dtype)
        labels[window] = found.pieces.labels
        pieces = Pieces(labels, found.pieces.confidence)
    colours = [flag for flag in found.flags if flag in GLASS_FLAGS.values()]
    return TissueResult(mask, qc, sorted(flags_of(qc) + colours), found.threshold, pieces)


def describe_mask(rgb: np.ndarray, mpp: float, mask: np.ndarray, options: dict[str, Any] | None = None) -> TissueResult:
    """QC figures of a mask (h, w) bool that was drawn by hand: pen and folds in it are reported, not removed."""
    settings = {**check_options(options or {}), "remove_folds": False}
    return _result(measure(rgb, mpp, settings["pen"], settings["pen_margin_um"]), mask, _Notes(), mpp, settings)


def _finish(layers: Layers, mask: np.ndarray, strong: np.ndarray, mpp: float, settings: dict[str, Any]) -> np.ndarray:
    """Close gaps, fill small holes, take pen out again, and drop small pieces."""
    mask = close_gaps(mask, settings["close_um"] / mpp)
    # Holes are filled before pen is taken out again: a pen stroke across tissue is not a hole of the tissue.
    mask = fill_small_holes(mask | (layers.pen_wide & ~layers.black), settings["fill_holes_um2"] / mpp**2)
    mask &= layers.usable
    if layers.pen.any():
        # The blurred rim of a stroke outlives its core as a thin strip.
        mask &= ~(thin_parts(mask, 50.0 / mpp) & dilate(layers.pen_wide, 200.0 / mpp))
    return keep_components(mask, settings["min_area_um2"] / mpp**2, evidence=strong)


def _agreement(found: Found, mask: np.ndarray, usable: np.ndarray, mpp: float) -> tuple[Pieces, np.ndarray]:
    """Pieces of the mask with the share on which colour and structure agree, and the smear that was left out.

    What has colour but no structure and touches a piece counts against it, whether it was left out or kept.
    """
    smear = found.coloured & ~found.structured & ~mask & usable
    smear &= ~thin_parts(smear, 40.0 / mpp)
    labels, count = ndi.label(mask, structure=np.ones((3, 3), bool))
    if count == 0:
        return Pieces(labels, np.zeros(1)), smear
    sizes = component_areas(labels, count).astype(np.float64)
    disputed = np.bincount(labels[mask & (found.coloured ^ found.structured)], minlength=count + 1).astype(np.float64)
    beside, number = ndi.label(smear, structure=np.ones((3, 3), bool))
    if number:
        # Each smear counts against the largest piece near it.
        order = np.argsort(sizes * (np.arange(count + 1) > 0), kind="stable")
        rank = np.empty(count + 1, np.int64)
        rank[order] = np.arange(count + 1)
        near = extreme(rank[labels].astype(np.int32), max(2, round(64.0 / mpp)))
        close = (beside > 0) & (near > 0)
        highest = np.zeros(number + 1, np.int64)
        np.maximum.at(highest, beside[close], near[close])
        extra = np.bincount(order[highest[1:]], component_areas(beside, number)[1:], minlength=count + 1)
        disputed += extra
        sizes += extra
    confidence = 1 - disputed / np.maximum(sizes, 1)
    confidence[0] = 0
    return Pieces(labels, np.clip(confidence, 0, 1)), smear


def _result(layers: Layers, mask: np.ndarray, notes: _Notes, mpp: float, settings: dict[str, Any]) -> TissueResult:
    folds = fold_mask(layers.od, layers.saturation, mask if notes.fat is None else mask & ~notes.fat, mpp)
    bubbles = bubble_mask(layers.total, layers.colour, mask, layers.usable, mpp)
    area = max(int(mask.sum()), 1)
    tissue = layers.total[mask]

    def share(part: np.ndarray | None, whole: float) -> float:
        return 0.0 if part is None else round(float(part.sum() / whole), 6)

    qc = {
        "pen_fraction": share(layers.pen, mask.size),
        "black_fraction": share(layers.black, mask.size),
        "label_fraction": share(layers.strip, mask.size),
        "bubble_fraction": share(bubbles, mask.size),
        "smear_fraction": share(notes.smear, mask.size),
        "fold_fraction": share(folds, area),
        "faint_fraction": share(notes.faint, area),
        "fat_fraction": share(notes.fat, area),
        "tissue_fraction": share(mask, mask.size),
        "confidence": None,
        "unsure_fraction": 0.0,
        "median_density": round(float(np.median(tissue)), 4) if tissue.size else None,
        "separability": None if notes.separability is None else round(notes.separability, 4),
        "white_point": [round(float(value), 1) for value in layers.glass.white],
    }
    if notes.pieces is not None and mask.any():
        per_pixel = notes.pieces.confidence[notes.pieces.labels[mask]]
        qc["confidence"] = round(float(per_pixel.mean()), 4)
        qc["unsure_fraction"] = round(float((per_pixel < UNSURE).mean()), 6)
    if settings["remove_folds"]:
        mask = keep_components(mask & ~folds, settings["min_area_um2"] / mpp**2)
    flags = flags_of(qc) + ([GLASS_FLAGS[layers.glass.kind]] if layers.glass.kind in GLASS_FLAGS else [])
    return TissueResult(mask, qc, sorted(flags), notes.threshold, notes.pieces)


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `detect_tissue` with their defaults; RunError for what it does not know."""
    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        raise RunError(f"unknown tissue option(s) {', '.join(unknown)}; known: {', '.join(sorted(DEFAULTS))}")
    settings = {**DEFAULTS, **options}
    for key, known in (("method", METHODS), ("fat", FAT)):
        if settings[key] not in known:
            raise RunError(f"tissue {key} {settings[key]!r} is not one of {', '.join(known)}")
    if settings["method"] in MODELS and not settings["weights"]:
        about = MODELS[settings["method"]]
        raise RunError(
            f"tissue.method {settings['method']} needs tissue.weights, the {'folder' if about.folder else 'file'} with "
            f"its weights: slidemake downloads none. They are at {about.home} (mind their licence)."
        )
    wrong = sorted(set(settings["pen"]) - set(PEN_COLOURS))
    if wrong:
        raise RunError(f"tissue pen colour(s) {', '.join(wrong)} are not among {', '.join(PEN_COLOURS)}")
    return settings


def flags_of(qc: dict[str, Any]) -> list[str]:
    """Names of the QC figures that are above their limit (`FLAG_AT`, `UNSURE_SHARE`), sorted."""
    limits = {**FLAG_AT, "unsure": UNSURE_SHARE}
    return sorted(name for name, limit in limits.items() if (qc.get(f"{name}_fraction") or 0.0) > limit)


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
