"""Colour arithmetic of stain normalisation: optical density, CIELAB, and which pixels count as tissue. numpy only."""

from __future__ import annotations

import numpy as np

# Linear sRGB to XYZ (IEC 61966-2-1), each row divided by the D65 white, as OpenCV's RGB2LAB has it.
RGB_TO_XYZ = (
    np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    / np.array([0.950456, 1.0, 1.088754])[:, None]
)
XYZ_TO_RGB = np.linalg.inv(RGB_TO_XYZ)
LAB_EPSILON, LAB_KAPPA, LAB_OFFSET = 0.008856, 7.787, 16.0 / 116.0

TISSUE_OD = 0.15  # mean optical density (natural log) from which a pixel counts as tissue-like; Macenko's beta
BLANK_FRACTION = 0.005  # a tile with a smaller share of tissue-like pixels passes through unchanged
GLASS_OD = 0.05  # mean optical density below which Reinhard fades a pixel to white glass


def optical_density(rgb: np.ndarray, white_point: np.ndarray) -> np.ndarray:
    """max(-ln(max(I, 1) / I0), 0) per channel, float64; `rgb` (..., 3), `white_point` (3,), both 0..255."""
    return np.maximum(-np.log(np.maximum(np.asarray(rgb, np.float64), 1.0) / np.asarray(white_point, np.float64)), 0.0)


def srgb_to_linear(value: np.ndarray) -> np.ndarray:
    """sRGB 0..1 to linear light 0..1."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: np.ndarray) -> np.ndarray:
    """Linear light 0..1 to sRGB 0..1; negative values become 0."""
    value = np.maximum(value, 0.0)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """RGB 0..255 (..., 3) to CIELAB (D65; L 0..100, a and b about -127..127), in the dtype of float input."""
    rgb = np.asarray(rgb)
    dtype = rgb.dtype if np.issubdtype(rgb.dtype, np.floating) else np.float64
    xyz = srgb_to_linear(rgb.astype(dtype) / 255.0) @ RGB_TO_XYZ.T.astype(dtype)
    f = np.where(xyz > LAB_EPSILON, np.cbrt(xyz), LAB_KAPPA * xyz + LAB_OFFSET)
    lightness = 116.0 * f[..., 1] - 16.0
    return np.stack([lightness, 500.0 * (f[..., 0] - f[..., 1]), 200.0 * (f[..., 1] - f[..., 2])], axis=-1)


def lab_to_linear(lab: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) to linear RGB 0..1, not clipped: a colour that no screen shows lies outside."""
    fy = (lab[..., 0] + 16.0) / 116.0
    f = np.stack([fy + lab[..., 1] / 500.0, fy, fy - lab[..., 2] / 200.0], axis=-1)
    xyz = np.where(f > np.cbrt(LAB_EPSILON), f**3, (f - LAB_OFFSET) / LAB_KAPPA)
    return xyz @ XYZ_TO_RGB.T.astype(lab.dtype)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB (..., 3) to RGB 0..255, clipped, not rounded."""
    return np.clip(linear_to_srgb(lab_to_linear(lab)) * 255.0, 0.0, 255.0)


def luminosity_mask(pixels: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """(n,) True where contrast-stretched lightness is below `threshold` (share of full scale).

    TIAToolbox's convention: one stretch for the three channels, from their joint 2nd to 98th percentile, then the
    lightness of CIELAB in 8 bits. `pixels` (n, 3) uint8.
    """
    low, high = np.percentile(pixels, (2, 98))
    if low >= high:
        low, high = float(pixels.min()), float(pixels.max())
    stretched = pixels
    if high > low:
        stretched = (np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1) * 255.0).astype(np.uint8)
    luminance = srgb_to_linear(stretched.astype(np.float64) / 255.0) @ RGB_TO_XYZ[1]
    f = np.where(luminance > LAB_EPSILON, np.cbrt(luminance), LAB_KAPPA * luminance + LAB_OFFSET)
    return np.rint((116.0 * f - 16.0) * 2.55) < threshold * 255.0


def tissue_lattice(height: int, width: int) -> int:
    """Step of the pixel lattice on which a tile is judged blank: 4, or 1 for tiles too small to be sampled."""
    return 4 if min(height, width) >= 64 else 1
