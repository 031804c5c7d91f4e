"""Stamps of the demo cohort: nuclei, cells, glands and vessels as stain densities.

Everything here is a pair of planes (haematoxylin, eosin) in units of 1/`DENSITY` of natural-log optical density, at
0.5 um per pixel. A stamp is drawn once per process and laid onto the slide many times, mirrored and turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage
from skimage.measure import find_contours

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


def _blob(rng: np.random.Generator, radius: float, h: float, e: float, opacity: float, stretch: float = 1.0) -> tuple:
    """Cytoplasm: a soft patch of even density."""
    chromatin, _, alpha = nucleus(rng, radius * stretch, radius / stretch, rng.uniform(0, 6.3), 1.0, 0.1)
    return np.full_like(chromatin, h), (e * (0.7 + 0.3 * chromatin)).astype(np.float32), alpha * opacity


def lymphocyte(rng: np.random.Generator) -> Stamp:
    r = rng.uniform(4.9, 6.3)
    halo = _blob(rng, r + 1.6, 0.12, 0.22, 0.5)
    return cell_stamp(
        [(halo, 0, 0), (nucleus(rng, r * 1.06, r, rng.uniform(0, 6.3), rng.uniform(1.25, 1.75), 0.07, 0.25), 0, 0)], 24
    )


def plasma_cell(rng: np.random.Generator) -> Stamp:
    r, a = rng.uniform(4.8, 5.8), rng.uniform(0, 6.3)
    body = _blob(rng, rng.uniform(8, 9.5), 0.42, 0.62, 0.8, 1.15)
    return cell_stamp(
        [(body, 0, 0), (nucleus(rng, r, r * 0.95, a, rng.uniform(1.2, 1.6), 0.05, 0.5), 3 * np.sin(a), 3 * np.cos(a))],
        30,
    )


def eosinophil(rng: np.random.Generator) -> Stamp:
    a = rng.uniform(0, 6.3)
    dy, dx = 2.6 * np.sin(a), 2.6 * np.cos(a)
    lobes = [nucleus(rng, 3.6, 2.8, a + 1.5, 1.5, 0.05) for _ in range(2)]
    return cell_stamp([(_blob(rng, 7.2, 0.05, 1.1, 0.9), 0, 0), (lobes[0], dy, dx), (lobes[1], -dy, -dx)], 24)


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
    body = _blob(rng, rng.uniform(11, 14), 0.3, 0.52, 0.2, 1.1)
    return cell_stamp([(body, 0, 0), (malignant_nucleus(rng, rng.uniform(0, 6.3)), 0, 0)], 46)


def mitosis(rng: np.random.Generator) -> Stamp:
    a = rng.uniform(0, 6.3)
    plate = [
        (nucleus(rng, 7.5, 2.6, a, 2.2, 0.25), s * 4 * np.cos(a), -s * 4 * np.sin(a))
        for s in ((-1, 1) if rng.random() < 0.5 else (0,))
    ]
    return cell_stamp([(_blob(rng, 13, 0.16, 0.36, 0.9), 0, 0), *plate], 40)


def apoptosis(rng: np.random.Generator) -> Stamp:
    bits = [(nucleus(rng, r, r, 0, 2.1, 0.1), *rng.normal(0, 3, 2)) for r in rng.uniform(1.2, 3.2, 4)]
    return cell_stamp([(_blob(rng, 7, 0.1, 1.0, 0.8), 0, 0), *bits], 28)


def red_cell(rng: np.random.Generator) -> Stamp:
    disc = _blob(rng, rng.uniform(5.0, 6.2), 0.03, rng.uniform(1.15, 1.5), 0.95, rng.uniform(1.0, 1.15))
    return cell_stamp([(disc, 0, 0), (_blob(rng, 2.6, 0.03, 1.0, 0.35), 0, 0)], 20)


def _depth(
    rng: np.random.Generator, radius: float, length: float, angle: float, bend: float, wobble: float
) -> np.ndarray:
    """Depth below the outline (px, negative outside) of a bent tube with an uneven wall."""
    half = int(length / 2 + radius * (1.1 + 2.2 * wobble)) + 8
    steps = np.linspace(-0.5, 0.5, max(2, int(length)))
    sideways = bend * np.cos(np.pi * steps)
    ys = length * steps * np.sin(angle) + sideways * np.cos(angle)
    xs = length * steps * np.cos(angle) - sideways * np.sin(angle)
    axis = np.ones((2 * half + 1, 2 * half + 1), bool)
    axis[(ys.round().astype(int) + half, xs.round().astype(int) + half)] = False
    distance = ndimage.distance_transform_edt(axis).astype(np.float32)
    uneven = noise_patch(rng, axis.shape, 8 * round(radius * 0.45 / 8))
    return ndimage.gaussian_filter(radius * (1 + wobble * uneven) - distance, 1.5)


def walk(depth: np.ndarray, level: float, spacing: float, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(y, x, inward angle) at about every `spacing` px along the line where `depth` equals `level`."""
    down, across = np.gradient(depth)
    found = []
    for line in find_contours(depth, level):
        along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
        count = int(along[-1] / spacing)
        if count < 4:
            continue
        at = (np.arange(count) + rng.uniform(-0.22, 0.22, count)) * along[-1] / count
        for y, x in zip(np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1]), strict=True):
            i, j = int(y), int(x)
            found.append((y, x, float(np.arctan2(down[i, j], across[i, j]))))
    return found


@lru_cache(maxsize=4)
def _pool(kind: str) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Nuclei for glands, [direction][shape]: glands share them, because drawing one costs more than blending it."""
    rng = np.random.default_rng(sorted(("columnar", "goblet", "malignant", "flat", "crowded")).index(kind))

    def one(angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if kind == "columnar":
            return nucleus(rng, rng.uniform(5.6, 7.6), rng.uniform(3.4, 4.5), angle, rng.uniform(1.0, 1.45), 0.05, 0.4)
        if kind == "crowded":
            return nucleus(rng, rng.uniform(7.6, 9.6), rng.uniform(3.6, 4.6), angle, rng.uniform(1.25, 1.6), 0.05, 0.3)
        if kind == "goblet":
            wide = rng.uniform(5.4, 7.8)
            return nucleus(rng, wide * rng.uniform(1.25, 1.6), wide, angle, 1.0, 0.05)
        if kind == "flat":
            return nucleus(rng, rng.uniform(6, 8), rng.uniform(1.9, 2.4), angle, rng.uniform(1.2, 1.45), 0.06)
        return malignant_nucleus(rng, angle)

    return [[one(way * np.pi / 24 + rng.normal(0, 0.1)) for _ in range(14)] for way in range(24)]


def _pick(rng: np.random.Generator, kind: str, angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shapes = _pool(kind)[round(angle * 24 / np.pi) % 24]
    return shapes[int(rng.integers(len(shapes)))]


def crypt(rng: np.random.Generator, length: float, angle: float) -> Stamp:
    """A colonic crypt: basal row of radial nuclei, goblet cells with mucin, a narrow lumen, a basement membrane."""
    radius, height = rng.uniform(50, 62), rng.uniform(38, 44)
    depth = _depth(rng, radius, length, angle, rng.normal(0, 0.05) * length, 0.07)
    canvas = Canvas(*depth.shape)
    grain = noise_patch(rng, depth.shape, 1.6)
    goblets, reactive = rng.uniform(0.45, 0.95), rng.uniform(0, 1)
    apical = np.clip(depth / height, 0, 1)
    canvas.over(0.05, 0.10, np.clip((depth + 6) / 4, 0, 1) * 0.75)  # the thin cleft around a shrunken gland
    membrane = np.exp(-(((depth + 0.5) / 1.6) ** 2))
    canvas.over(
        0.22 + 0.04 * grain - 0.08 * apical + 0.03 * reactive,
        0.42 + 0.05 * grain + 0.25 * membrane,
        np.clip(depth / 1.6 + 0.6, 0, 1),
    )
    for row, share in ((17, 1.0), (30, 0.75)):
        for y, x, inward in walk(depth, row + rng.uniform(2, 4), 15.5, rng):
            if rng.random() < goblets * share:
                _, _, vacuole = _pick(rng, "goblet", inward)
                shift = rng.uniform(-2, 3)
                y, x = y + shift * np.sin(inward), x + shift * np.cos(inward)
                canvas.cell((np.full_like(vacuole, 0.26), np.full_like(vacuole, 0.42), vacuole * 0.6), y, x)
                small = np.clip((vacuole - 0.45) * 2, 0, 1)
                canvas.cell((0.10 * np.ones_like(small), np.full_like(vacuole, 0.045), small), y, x)
    mucin = noise_patch(rng, depth.shape, 6)
    canvas.over(
        0.05 + 0.05 * np.clip(mucin, 0, 2), 0.05 + 0.03 * np.clip(mucin, 0, 2), np.clip((depth - height) / 2.5, 0, 1)
    )
    stratified = 0.25 + 0.4 * reactive
    for y, x, inward in walk(depth, 9.0, 8.2, rng):
        lift = rng.normal(0, 1.3) + (rng.uniform(5, 9) if rng.random() < stratified * 0.5 else 0)
        chromatin, eosin, alpha = _pick(rng, "columnar", inward + rng.normal(0, 0.2))
        canvas.cell(
            (chromatin * (1 + 0.2 * reactive), eosin, alpha), y + lift * np.sin(inward), x + lift * np.cos(inward)
        )
    return canvas.stamp(True, angle)


def malignant_gland(rng: np.random.Generator, radius: float) -> Stamp:
    """An irregular, back-to-back or cribriform gland: stratified pleomorphic nuclei, no goblet cells, dirty lumen."""
    depth = _depth(
        rng,
        radius,
        radius * rng.uniform(0, 1.6),
        rng.uniform(0, np.pi),
        rng.normal(0, 0.3) * radius,
        rng.uniform(0.12, 0.22),
    )
    canvas = Canvas(*depth.shape)
    wall = rng.uniform(34, 50)
    grain = noise_patch(rng, depth.shape, 1.5)
    rooms = noise_patch(rng, depth.shape, 15)  # cribriform spaces break the epithelium up
    lumen = np.clip(np.minimum((depth - wall) / 2.5, (rooms + 0.55) * 6), 0, 1)
    canvas.over(0.05, 0.08, np.clip((depth + 5) / 3, 0, 1) * 0.5)
    canvas.over(0.31 + 0.06 * grain, 0.50 + 0.07 * grain, np.clip(depth / 1.6 + 0.5, 0, 1))
    debris = noise_patch(rng, depth.shape, 3.5)
    dirty = rng.uniform(0.2, 1.0)
    canvas.over(
        0.03 + 0.1 * dirty * np.clip(debris, 0, 1.5),
        0.05 + dirty * (0.06 + 0.42 * np.clip(0.4 + debris, 0, 1.2)),
        lumen,
    )
    for level in np.arange(9.0, depth.max() - 4, 14.0):
        share = 1.0 if level < 12 else 0.85 if level < wall else 0.6
        for y, x, inward in walk(depth, level, 15.0, rng):
            y, x = y + rng.normal(0, 2.2), x + rng.normal(0, 2.2)
            i, j = (int(np.clip(v, 0, n - 1)) for v, n in zip((y, x), depth.shape, strict=True))
            if rng.random() < share and lumen[i, j] < 0.25:
                canvas.cell(_pick(rng, "malignant", inward + rng.normal(0, 0.4)), y, x)
            elif lumen[i, j] > 0.9 and rng.random() < 0.25 * dirty:
                canvas.cell(nucleus(rng, 2.4, 1.8, 0, 1.9, 0.2), y, x)
    return canvas.stamp(True)


def reactive_gland(rng: np.random.Generator, radius: float, atypia: float = 0.0) -> Stamp:
    """A regenerating gland: no goblet cells, crowded dark nuclei in two or three rows, debris in the lumen. Benign: its
    outline is smooth and its nuclei are of one size, long and parallel. With `atypia`, the share of malignant nuclei
    among them, a well differentiated carcinoma that looks like it."""
    length = radius * rng.uniform(0, 1.6)
    depth = _depth(rng, radius, length, rng.uniform(0, np.pi), rng.normal(0, 0.2) * radius, rng.uniform(0.08, 0.15))
    canvas = Canvas(*depth.shape)
    wall = rng.uniform(34, 46)
    grain, debris = noise_patch(rng, depth.shape, 1.5), noise_patch(rng, depth.shape, 3.5)
    lumen = np.clip((depth - wall) / 2.5, 0, 1)
    canvas.over(0.05, 0.08, np.clip((depth + 5) / 3, 0, 1) * 0.5)
    canvas.over(0.31 + 0.06 * grain, 0.50 + 0.07 * grain, np.clip(depth / 1.6 + 0.5, 0, 1))
    dirty = rng.uniform(0.1, 0.8)
    canvas.over(
        0.03 + 0.1 * dirty * np.clip(debris, 0, 1.5),
        0.05 + dirty * (0.06 + 0.42 * np.clip(0.4 + debris, 0, 1.2)),
        lumen,
    )
    for level, share in ((9.0, 1.0), (18.0, 0.85), (27.0, rng.uniform(0.2, 0.8))):
        for y, x, inward in walk(depth, level, 9.5, rng):
            y, x = y + rng.normal(0, 1.6), x + rng.normal(0, 1.6)
            i, j = (int(np.clip(v, 0, n - 1)) for v, n in zip((y, x), depth.shape, strict=True))
            if rng.random() < share and lumen[i, j] < 0.25:
                kind = "malignant" if rng.random() < atypia else "crowded"
                canvas.cell(_pick(rng, kind, inward + rng.normal(0, 0.12)), y, x)
    return canvas.stamp(True)


def vessel(rng: np.random.Generator, radius: float) -> Stamp:
    """A small vessel: muscle wall, flat endothelium, lumen with some red cells."""
    depth = _depth(rng, radius, radius * rng.uniform(0, 1.2), rng.uniform(0, np.pi), 0, 0.07)
    wall = radius * rng.uniform(0.22, 0.5)
    canvas = Canvas(*depth.shape)
    grain = noise_patch(rng, depth.shape, 2)
    canvas.over(0.10 + 0.03 * grain, 0.72 + 0.1 * grain + 0.1 * np.sin(depth * 0.9), np.clip(depth / 2 + 0.5, 0, 1))
    canvas.over(0.02, 0.06, np.clip((depth - wall) / 2, 0, 1))
    for level in np.arange(wall * 0.25, wall, 9.0):
        for y, x, inward in walk(depth, level, 34, rng):
            canvas.cell(_pick(rng, "flat", inward + np.pi / 2), y, x)
    for y, x, inward in walk(depth, wall - 1.0, 19, rng):
        canvas.cell(_pick(rng, "flat", inward + np.pi / 2), y, x)
    discs = [_blob(rng, 5.4, 0.03, rng.uniform(1.15, 1.5), 0.95) for _ in range(6)]
    blood = noise_patch(rng, depth.shape, 12) > rng.uniform(-1.0, 0.8)
    for level in np.arange(wall + 7, depth.max() - 2, 9.5):
        for y, x, _ in walk(depth, level, 11.5, rng):
            if blood[int(y), int(x)]:
                canvas.cell(discs[int(rng.integers(len(discs)))], y, x)
    return canvas.stamp(True)
