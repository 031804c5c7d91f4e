"""Stain normalisation: the fit of one slide and the transform to a reference, in float64 numpy.

A stain is fitted once per slide on pooled tissue pixels, never per tile: on a tile with little of one stain the
estimate turns on noise. What is applied to pixels afterwards (`on_device` on the device, `apply_stain_numpy` here)
is data: a 3 x 3 matrix in optical density, or two sets of CIELAB moments.

Methods: macenko (Macenko et al., ISBI 2009), vahadane (Vahadane et al., IEEE TMI 2016), ruifrok (fixed vectors;
Ruifrok & Johnston 2001), reinhard (Reinhard et al. 2001). Conventions are TIAToolbox's, which the tests compare with:
natural logarithm, H before E, 99th percentile of concentrations as their scale.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import fingerprint
from slidemake.stain.colour import (
    BLANK_FRACTION,
    GLASS_OD,
    TISSUE_OD,
    lab_to_rgb,
    luminosity_mask,
    optical_density,
    rgb_to_lab,
    tissue_lattice,
)
from slidemake.stain.vectors import RUIFROK, angle_degrees, concentrations, macenko_vectors, vahadane_vectors

METHODS = ("macenko", "vahadane", "reinhard", "ruifrok")
MIN_PIXELS = 500  # tissue-like pixels that a fit needs
MIN_ANGLE = 10.0  # degrees between the two vectors; less is one stain seen twice
# Largest blue/green and red/green of eosin's optical density. Seen: H&E up to 0.85 and 0.39 (nine slides and images of
# five labs); DAB over haematoxylin 1.16 to 1.67, or, where brown is rare, red/green from 0.57.
MAX_EOSIN_BLUE, MAX_EOSIN_RED = 1.1, 0.55
REFUSALS = {
    "too_few_pixels": "fewer than {minimum} tissue-like pixels",
    "single_stain": "one stain only: the two vectors are {angle:.1f} degrees apart",
    "not_he": "not haematoxylin and eosin: the second stain absorbs like DAB or like haematoxylin itself",
}


class StainRefused(Exception):
    """No stain is fitted to these pixels; `reason` is a key of `REFUSALS`. The slide goes on unnormalised."""

    def __init__(self, reason: str, angle: float = 0.0):
        super().__init__(REFUSALS[reason].format(minimum=MIN_PIXELS, angle=angle))
        self.reason = reason


@dataclass(frozen=True)
class StainFit:
    """Stain of one slide or reference. OD methods fill matrix and maxima, reinhard the CIELAB moments."""

    method: str
    white_point: tuple[float, ...]  # (3,) RGB of clear glass, 0..255
    stain_matrix: tuple[tuple[float, ...], ...] | None  # (2, 3) unit rows, H then E
    max_concentrations: tuple[float, ...] | None  # (2,) 99th percentiles
    lab_mean: tuple[float, ...] | None  # (3,)
    lab_std: tuple[float, ...] | None  # (3,)
    pixels: int  # pixels that the fit was given

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_method(configured: str, recommendation: str) -> str:
    """Method for one encoder: `auto` is macenko where the encoder's record says required, else none (docs/stain.md)."""
    if configured != "auto":
        return configured
    return "macenko" if recommendation == "required" else "none"


def fit_stain(pixels: np.ndarray, method: str, white_point: Any = None) -> StainFit:
    """Fit a stain to pooled pixels of tissue.

    `pixels` (n, 3) uint8; `white_point` (3,) or a number, 255 when None. Deterministic. Raises StainRefused when the
    pixels are too few, show one stain, or are not H&E; the test is the same for all methods, on Macenko's vectors of
    the pixels with an optical density of at least 0.15.
    """
    if method not in METHODS:
        raise ValueError(f"unknown stain method {method!r}; one of {', '.join(METHODS)}")
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8).reshape(-1, 3)
    white = np.broadcast_to(np.asarray(255.0 if white_point is None else white_point, np.float64), (3,))
    od = optical_density(pixels, white)
    _refuse_implausible(od)
    matrix = maxima = mean = std = None
    if method == "reinhard":
        lab = rgb_to_lab(np.minimum(pixels * (255.0 / white), 255.0))
        mean, std = rounded(lab.mean(axis=0)), rounded(np.maximum(lab.std(axis=0), 1e-3))
    else:
        vectors = _vectors(pixels, od, method)
        top = np.percentile(concentrations(od, vectors), 99, axis=0)
        if top.min() < 0.01:
            raise StainRefused("single_stain", angle_degrees(*vectors))
        matrix, maxima = tuple(rounded(row) for row in vectors), rounded(top)
    return StainFit(method, rounded(white), matrix, maxima, mean, std, len(pixels))


def _vectors(pixels: np.ndarray, od: np.ndarray, method: str) -> np.ndarray:
    if method == "ruifrok":
        return RUIFROK
    tissue = od[luminosity_mask(pixels)]
    if len(tissue) < MIN_PIXELS:
        raise StainRefused("too_few_pixels")
    vectors = macenko_vectors(tissue) if method == "macenko" else vahadane_vectors(tissue)
    if angle_degrees(*vectors) < MIN_ANGLE:
        raise StainRefused("single_stain", angle_degrees(*vectors))
    return vectors


def _refuse_implausible(od: np.ndarray) -> None:
    tissue = od[od.mean(axis=1) >= TISSUE_OD]
    if len(tissue) < MIN_PIXELS:
        raise StainRefused("too_few_pixels")
    vectors = macenko_vectors(tissue)
    if angle_degrees(*vectors) < MIN_ANGLE:
        raise StainRefused("single_stain", angle_degrees(*vectors))
    red, green, blue = vectors[1]
    if blue > MAX_EOSIN_BLUE * green or red > MAX_EOSIN_RED * green:
        raise StainRefused("not_he")


def rounded(values: Any) -> tuple[float, ...]:
    """Eight decimals: the last bits differ between processors, and would change fingerprints for nothing."""
    return tuple(round(float(value), 8) for value in values)


def estimate_white_point(overview: np.ndarray, tissue: np.ndarray) -> tuple[float, float, float]:
    """RGB of clear glass: per channel the median of bright, colourless background, within 200..255; 255 without glass.

    `overview` (h, w, 3) uint8; `tissue` (h, w) bool, anything that is not glass. Pure white is left out where other
    glass exists: it is what readers paint where nothing was scanned.
    """
    glass = overview[~tissue].reshape(-1, 3)
    low, high = glass.min(axis=1, initial=255), glass.max(axis=1, initial=0)
    glass = glass[(low >= 200) & (high - low <= 40)]
    scanned = glass[glass.min(axis=1, initial=255) < 255]
    if len(scanned) >= max(100, 0.1 * len(glass)):
        glass = scanned
    if len(glass) < 100:
        return (255.0, 255.0, 255.0)
    red, green, blue = (float(value) for value in np.clip(np.median(glass, axis=0), 200, 255))
    return (red, green, blue)


@dataclass(frozen=True)
class StainTransform:
    """How a slide's pixels become the reference's; plain data.

    Optical density methods: OD = max(-ln(max(I, 1) / I0_source), 0); OD' = OD @ matrix; I' = I0_target exp(-OD'),
    clipped to 0..255. Reinhard: I balanced to the white point, CIELAB moments of the source brought to the target's;
    pixels brighter than an optical density of `GLASS_OD` fade to balanced white, so that glass stays white.
    `status` none leaves pixels as they are (method none, or a slide whose fit was refused or did not pass, with the
    `reason`). `applied` says which stains are brought to the reference: both, haematoxylin, eosin, or none;
    `judgement` has the figures that it was decided on.
    """

    method: str
    status: str = "none"
    target: str | None = None  # hash of the reference
    reason: str | None = None
    white_point: tuple[float, ...] | None = None
    target_white_point: tuple[float, ...] | None = None
    matrix: tuple[tuple[float, ...], ...] | None = None  # (3, 3)
    lab_mean: tuple[float, ...] | None = None
    lab_std: tuple[float, ...] | None = None
    target_lab_mean: tuple[float, ...] | None = None
    target_lab_std: tuple[float, ...] | None = None
    applied: str = "none"
    judgement: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the transform's own `fingerprint` over all of its numbers."""
        values = asdict(self)
        return {**values, "fingerprint": fingerprint("stain", transform=values)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StainTransform:
        plain = {key: value for key, value in values.items() if key != "fingerprint"}
        for key, value in plain.items():
            if isinstance(value, list):
                plain[key] = tuple(tuple(row) if isinstance(row, list) else row for row in value)
        return cls(**plain)


def stain_transform(fit: StainFit | dict[str, Any], target: dict[str, Any]) -> StainTransform:
    """Transform from a slide's fit (or its stain.json) to a reference. Raises RunError when their methods differ."""
    values = fit.as_dict() if isinstance(fit, StainFit) else fit
    if target["status"] == "none":
        return StainTransform("none", reason=target["reason"])
    method, digest = target["method"], target["hash"]
    if values.get("status", "ok") == "none":
        return StainTransform(method, target=digest, reason=values["reason"])
    if values["method"] != method:
        raise RunError(
            f"The slide's stain was fitted with {values['method']!r}, the reference with {method!r}. Delete "
            "cohort/stain_target.json in the results folder and run again; a bundle needs the method it was made with."
        )
    white, target_white = tuple(values["white_point"]), tuple(target["white_point"])
    if method == "reinhard":
        moments: dict[str, Any] = {key: tuple(values[key]) for key in ("lab_mean", "lab_std")}
        moments |= {f"target_{key}": tuple(target[key]) for key in ("lab_mean", "lab_std")}
        return StainTransform(method, "ok", digest, None, white, target_white, **moments)
    scale = np.asarray(target["max_concentrations"]) / np.asarray(values["max_concentrations"])
    matrix = np.linalg.pinv(np.asarray(values["stain_matrix"])) @ np.diag(scale) @ np.asarray(target["stain_matrix"])
    return StainTransform(method, "ok", digest, None, white, target_white, tuple(rounded(row) for row in matrix))


def apply_stain_numpy(tiles: np.ndarray, transform: StainTransform, chunk: int = 16) -> np.ndarray:
    """Normalise tiles (n, H, W, 3) uint8 -> uint8, with the numbers of `on_device.apply_stain`, rounded.

    A tile with fewer than 0.5 % of tissue-like pixels comes back as it is.
    """
    if transform.status == "none" or len(tiles) == 0:
        return tiles.copy()
    return np.concatenate([_apply_chunk(tiles[i : i + chunk], transform) for i in range(0, len(tiles), chunk)])


def _apply_chunk(tiles: np.ndarray, transform: StainTransform) -> np.ndarray:
    white = np.asarray(transform.white_point)
    table = optical_density(np.arange(256)[:, None] * np.ones(3), white).astype(np.float32)
    od = np.stack([table[:, c][tiles[..., c]] for c in range(3)], axis=-1)
    if transform.method == "reinhard":
        out = _reinhard(tiles, od.mean(axis=-1, keepdims=True), transform)
    else:
        matrix, top = np.asarray(transform.matrix, np.float32), np.asarray(transform.target_white_point, np.float32)
        out = np.exp(-(od @ matrix)) * top
    step = tissue_lattice(*tiles.shape[1:3])
    blank = (od[:, ::step, ::step].mean(axis=-1) >= TISSUE_OD).mean(axis=(1, 2)) < BLANK_FRACTION
    result = np.rint(np.clip(out, 0, 255)).astype(np.uint8)
    result[blank] = tiles[blank]
    return result


def _reinhard(tiles: np.ndarray, density: np.ndarray, transform: StainTransform) -> np.ndarray:
    balanced = np.minimum(tiles * (255.0 / np.asarray(transform.white_point, np.float32)), np.float32(255.0))
    mean, std, target_mean, target_std = (
        np.asarray(getattr(transform, key), np.float32)
        for key in ("lab_mean", "lab_std", "target_lab_mean", "target_lab_std")
    )
    moved = lab_to_rgb((rgb_to_lab(balanced.astype(np.float32)) - mean) * (target_std / std) + target_mean)
    weight = np.minimum(density / GLASS_OD, 1.0)
    return balanced + weight * (moved - balanced)
