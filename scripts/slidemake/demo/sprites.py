"""Stamps of the demo cohort: nuclei and cells as stain densities; glands and vessels are in `glands`.

Everything here is a pair of planes (haematoxylin, eosin) in units of 1/`DENSITY` of natural-log optical density, at
0.5 um per pixel. A stamp is drawn once per process and laid onto the slide many times, mirrored and turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

DENSITY = 100  # plane value of one unit of optical density (natural log), so that uint8 spans 0 to 2.55
TEXTURE = 1024  # side of a tileable texture, px; a power of two, so that wrapping is a bit mask


@dataclass(frozen=True)
class Stamp:
    """A patch of tissue: `paint` (h, w, 2) uint16 = density x opacity, `keep` (h, w, 2) uint16 = 256 - opacity."""

    paint: np.ndarray
    keep: np.ndarray
    cover: np.ndarray | None = None  # (h/8, w/8) bool: where a gland claims the ground
    angle: float = 0.0  # of its long axis, radians

    def variant(self, turn: int) -> Stamp:
        """One of the 8 mirrored and quarter-turned variants (views, no copies); `turn` 0 to 7."""

        def moved(a: np.ndarray) -> np.ndarray:
            return np.rot90(a[:, ::-1] if turn & 4 else a, turn & 3)

        return Stamp(moved(self.paint), moved(self.keep), None if self.cover is None else moved(self.cover))


def lay(planes: np.ndarray, stamp: Stamp, y: int, x: int) -> None:
    """Lay `stamp` with its centre at (x, y) onto `planes` (H, W, 2) uint8, in place; cropped at the borders."""
    height, width = stamp.paint.shape[:2]
    top, left = y - height // 2, x - width // 2
    if top >= 0 and left >= 0 and top + height <= planes.shape[0] and left + width <= planes.shape[1]:
        ground = planes[top : top + height, left : left + width]
        ground[...] = (ground * stamp.keep + stamp.paint) >> 8
        return
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + height, planes.shape[0]), min(left + width, planes.shape[1])
    if y1 > y0 and x1 > x0:
        part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        ground = planes[y0:y1, x0:x1]
        ground[...] = (ground * stamp.keep[part] + stamp.paint[part]) >> 8


class Canvas:
    """Float planes on which a stamp is drawn: haematoxylin `h`, eosin `e`, opacity `a`, each (side, side)."""

    def __init__(self, height: int, width: int):
        self.h, self.e, self.a = (np.zeros((height, width), np.float32) for _ in range(3))

    def over(self, h: np.ndarray | float, e: np.ndarray | float, a: np.ndarray, at: tuple[int, int] = (0, 0)) -> None:
        """Blend densities `h`, `e` with opacity `a` (a small array) over the canvas, top-left corner at `at`."""
        y0, x0 = max(at[0], 0), max(at[1], 0)
        y1, x1 = min(at[0] + a.shape[0], self.a.shape[0]), min(at[1] + a.shape[1], self.a.shape[1])
        if y1 <= y0 or x1 <= x0:
            return
        here, part = np.s_[y0:y1, x0:x1], np.s_[y0 - at[0] : y1 - at[0], x0 - at[1] : x1 - at[1]]
        a = a[part]
        for plane, value in ((self.h, h), (self.e, e)):
            value = value[part] if isinstance(value, np.ndarray) else value
            plane[here] += (value - plane[here]) * a
        self.a[here] = np.maximum(self.a[here], a)

    def cell(self, parts: tuple[np.ndarray, np.ndarray, np.ndarray], y: float, x: float) -> None:
        """Blend what `nucleus` returned, centred at (x, y)."""
        h, e, a = parts
        self.over(h, e, a, (round(y) - a.shape[0] // 2, round(x) - a.shape[1] // 2))

    def stamp(self, claims_ground: bool = False, angle: float = 0.0) -> Stamp:
        opacity = np.rint(np.clip(self.a, 0, 1) * 255).astype(np.uint16)[..., None]
        density = np.clip(np.stack([self.h, self.e], -1) * DENSITY, 0, 255).astype(np.uint16)
        cover = None
        if claims_ground:
            solid = ndimage.binary_dilation(self.a > 0.5, iterations=1)
            pad = [(0, -n % 8) for n in solid.shape]
            solid = np.pad(solid, pad)
            cover = np.asarray(solid.reshape(solid.shape[0] // 8, 8, solid.shape[1] // 8, 8).any((1, 3)))
        return Stamp(density * opacity, np.repeat(256 - opacity, 2, -1), cover, angle)


def spectral_noise(rng: np.random.Generator, shape: tuple[int, int], across: float, down: float) -> np.ndarray:
    """Tileable Gaussian noise of unit variance, correlated over `across` px in x and `down` px in y."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None]
    gain = np.exp(-2 * (np.pi * across * fx) ** 2 - 2 * (np.pi * down * fy) ** 2)
    gain[0, 0] = 0
    white = rng.standard_normal(shape, dtype=np.float32)
    noise = fft.irfft2(fft.rfft2(white) * gain.astype(np.float32), s=shape)
    return (noise / noise.std()).astype(np.float32)


@lru_cache(maxsize=24)
def _noise_tile(width: int) -> np.ndarray:
    return spectral_noise(np.random.default_rng(1000 + width), (TEXTURE, TEXTURE), width / 10, width / 10)


def noise_patch(rng: np.random.Generator, shape: tuple[int, int], width: float) -> np.ndarray:
    """A window of noise correlated over `width` px, cut at a random place from a tile that is computed once."""
    y, x = rng.integers(TEXTURE, size=2)
    rows, columns = (y + np.arange(shape[0])) % TEXTURE, (x + np.arange(shape[1])) % TEXTURE
    return _noise_tile(round(width * 10))[np.ix_(rows, columns)]


def nucleus(
    rng: np.random.Generator,
    long: float,
    short: float,
    angle: float,
    dark: float,
    wobble: float = 0.06,
    vesicular: float = 0.0,
    nucleoli: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One nucleus as (haematoxylin, eosin, opacity), each (k, k): soft outline, clumped chromatin, membrane, nucleoli.

    `long`, `short`: half axes, px; `vesicular` 0 to 1: how much of the chromatin sits on the membrane.
    """
    half = int(np.ceil(max(long, short) * (1 + 2 * wobble))) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    theta = np.arctan2(v / short, u / long)
    radius = 1.0 + sum(
        wobble * rng.standard_normal() / (k - 1) * np.cos(k * theta + rng.uniform(0, 6.3)) for k in (2, 3, 4, 5)
    )
    inside = (radius - np.hypot(u / long, v / short)) * min(long, short)
    opacity = np.clip(inside / 1.7 + 0.5, 0, 1)
    clumps = ndimage.gaussian_filter(rng.standard_normal(y.shape), 1.1)
    clumps /= clumps.std()
    membrane = np.exp(-(((inside - 1.2) / 1.1) ** 2))
    chromatin = dark * ((1 - 0.5 * vesicular) * (1 + (0.16 + 0.14 * vesicular) * clumps) + 0.36 * vesicular * membrane)
    for _ in range(nucleoli):
        ny, nx = rng.normal(0, 0.28, 2) * min(long, short)
        chromatin += dark * 0.8 * np.exp(-((x - nx) ** 2 + (y - ny) ** 2) / (2 * rng.uniform(0.9, 1.5) ** 2))
    return chromatin.astype(np.float32), np.full_like(y, 0.32), (0.94 * opacity).astype(np.float32)


def cell_stamp(parts_list: list[tuple[tuple, float, float]], side: int) -> Stamp:
    canvas = Canvas(side, side)
    for parts, dy, dx in parts_list:
        canvas.cell(parts, side / 2 + dy, side / 2 + dx)
    return canvas.stamp()


def blob(rng: np.random.Generator, radius: float, h: float, e: float, opacity: float, stretch: float = 1.0) -> tuple:
    """Cytoplasm: a soft patch of even density."""
    chromatin, _, alpha = nucleus(rng, radius * stretch, radius / stretch, rng.uniform(0, 6.3), 1.0, 0.1)
    return np.full_like(chromatin, h), (e * (0.7 + 0.3 * chromatin)).astype(np.float32), alpha * opacity


def lymphocyte(rng: np.random.Generator) -> Stamp:
    r = rng.uniform(4.9, 6.3)
    halo = blob(rng, r + 1.6, 0.12, 0.22, 0.5)
    return cell_stamp(
        [(halo, 0, 0), (nucleus(rng, r * 1.06, r, rng.uniform(0, 6.3), rng.uniform(1.25, 1.75), 0.07, 0.25), 0, 0)], 24
    )


def plasma_cell(rng: np.random.Generator) -> Stamp:
    r, a = rng.uniform(4.8, 5.8), rng.uniform(0, 6.3)
    body = blob(rng, rng.uniform(8, 9.5), 0.42, 0.62, 0.8, 1.15)
    return cell_stamp(
        [(body, 0, 0), (nucleus(rng, r, r * 0.95, a, rng.uniform(1.2, 1.6), 0.05, 0.5), 3 * np.sin(a), 3 * np.cos(a))],
        30,
    )


def eosinophil(rng: np.random.Generator) -> Stamp:
    a = rng.uniform(0, 6.3)
    dy, dx = 2.6 * np.sin(a), 2.6 * np.cos(a)
    lobes = [nucleus(rng, 3.6, 2.8, a + 1.5, 1.5, 0.05) for _ in range(2)]
    return cell_stamp([(blob(rng, 7.2, 0.05, 1.1, 0.9), 0, 0), (lobes[0], dy, dx), (lobes[1], -dy, -dx)], 24)


def spindle(rng: np.random.Generator, angle: float, plump: float = 1.0) -> Stamp:
    long, short = rng.uniform(8, 12.5), rng.uniform(1.9, 3.0) * plump
    return cell_stamp([(nucleus(rng, long, short, angle, rng.uniform(0.95, 1.5), 0.09, 0.3 * (plump > 1)), 0, 0)], 36)


def reactive_cell(rng: np.random.Generator) -> Stamp:
    """Germinal-centre and stromal cells: pale, rounder, small nucleoli. Benign but large."""
    r = rng.uniform(5.8, 7.6)
    return cell_stamp(
        [(nucleus(rng, r * 1.15, r * 0.9, rng.uniform(0, 6.3), rng.uniform(0.85, 1.15), 0.07, 0.7, 1), 0, 0)], 28
    )


def malignant_nucleus(rng: np.random.Generator, angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pleomorphic: 9 to 16 um across, irregular, either hyperchromatic or vesicular with nucleoli."""
    size = np.exp(rng.normal(2.13, 0.22))
    stretch = rng.uniform(1.05, 1.5)
    open_chromatin = rng.random() < 0.45
    return nucleus(
        rng,
        min(size * stretch, 16),
        min(size / stretch, 12),
        angle,
        rng.uniform(1.0, 1.35) if open_chromatin else rng.uniform(1.3, 1.8),
        rng.uniform(0.07, 0.16),
        rng.uniform(0.6, 0.95) if open_chromatin else rng.uniform(0.1, 0.4),
        int(rng.integers(1, 3)) if open_chromatin else int(rng.random() < 0.3),
    )


def malignant_cell(rng: np.random.Generator) -> Stamp:
    body = blob(rng, rng.uniform(11, 14), 0.3, 0.52, 0.2, 1.1)
    return cell_stamp([(body, 0, 0), (malignant_nucleus(rng, rng.uniform(0, 6.3)), 0, 0)], 46)


def mitosis(rng: np.random.Generator) -> Stamp:
    a = rng.uniform(0, 6.3)
    plate = [
        (nucleus(rng, 7.5, 2.6, a, 2.2, 0.25), s * 4 * np.cos(a), -s * 4 * np.sin(a))
        for s in ((-1, 1) if rng.random() < 0.5 else (0,))
    ]
    return cell_stamp([(blob(rng, 13, 0.16, 0.36, 0.9), 0, 0), *plate], 40)


def apoptosis(rng: np.random.Generator) -> Stamp:
    bits = [(nucleus(rng, r, r, 0, 2.1, 0.1), *rng.normal(0, 3, 2)) for r in rng.uniform(1.2, 3.2, 4)]
    return cell_stamp([(blob(rng, 7, 0.1, 1.0, 0.8), 0, 0), *bits], 28)


def red_cell(rng: np.random.Generator) -> Stamp:
    disc = blob(rng, rng.uniform(5.0, 6.2), 0.03, rng.uniform(1.15, 1.5), 0.95, rng.uniform(1.0, 1.15))
    return cell_stamp([(disc, 0, 0), (blob(rng, 2.6, 0.03, 1.0, 0.35), 0, 0)], 20)
