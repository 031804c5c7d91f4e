"""From stain densities to a slide file, as a site stains and scans: colours, noise, lab mishaps, pyramidal TIFF.

Colours follow Beer-Lambert: intensity = background * exp(-(H * haematoxylin vector + E * eosin vector)).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from slidemake.demo.sprites import DENSITY, spectral_noise

MPP = 0.5  # um per pixel at level 0
RESOLUTION_TAGS = (282, 283, 296)  # XResolution, YResolution, ResolutionUnit


@dataclass(frozen=True)
class Site:
    """How one hospital stains and scans. Vectors are optical densities of R, G, B (any length); gains scale them."""

    name: str
    scanner: str
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    gain_h: float
    gain_e: float
    background: tuple[int, int, int]
    noise: float  # standard deviation of grey values
    quality: int  # of JPEG
    soft: float  # sigma of the optics' blur, px


# Vectors lie 4 to 9 degrees around (0.60, 0.71, 0.36) and (0.15, 0.92, 0.36), midway between published H&E pairs.
SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site(
            "Northfield",
            "Aurora-S60",
            (0.61, 0.71, 0.35),
            (0.17, 0.90, 0.40),
            1.00,
            1.00,
            (243, 241, 244),
            2.0,
            88,
            0.0,
        ),
        Site(
            "Harbour", "Meridian-X4", (0.67, 0.68, 0.29), (0.08, 0.95, 0.30), 1.30, 0.50, (246, 244, 238), 2.8, 78, 0.55
        ),
        Site(
            "Valecross", "Halcyon-20", (0.54, 0.75, 0.38), (0.20, 0.86, 0.47), 0.56, 0.90, (236, 239, 243), 2.4, 84, 0.4
        ),
    )
}


def unit_vectors(site: Site) -> np.ndarray:
    """(2, 3) float64: unit optical-density vectors of haematoxylin and eosin at `site`."""
    vectors = np.array([site.haematoxylin, site.eosin], float)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@lru_cache(maxsize=8)
def _colour_table(site: Site, gain_h: float, gain_e: float) -> np.ndarray:
    """(65536,) uint32: packed R, G, B of every (haematoxylin, eosin) pair, kept 8 grey values off both ends."""
    vectors = unit_vectors(site)
    value = np.arange(256)[:, None] / DENSITY
    depth = np.exp(-gain_h * site.gain_h * value * vectors[0]), np.exp(-gain_e * site.gain_e * value * vectors[1])
    table = np.zeros((256, 256, 4), np.uint8)  # [eosin, haematoxylin]: eosin is the high byte
    table[..., :3] = np.clip(np.rint(np.array(site.background) * depth[1][:, None] * depth[0][None]), 8, 247)
    return table.reshape(-1, 4).view("<u4").ravel()


def scan(
    planes: np.ndarray, site: Site, rng: np.random.Generator, gain_h: float = 1.0, gain_e: float = 1.0
) -> np.ndarray:
    """Colour and noise: densities (h, w, 2) uint8 to RGB (h, w, 3) uint8. The gains are this slide's, beside its
    site's: how thick it is and how long it was stained."""
    table = _colour_table(site, round(gain_h, 2), round(gain_e, 2))
    height, width = planes.shape[:2]
    rgb = np.empty((height, width, 3), np.uint8)
    grain = 0.75 * rng.standard_normal((544, 544, 1)) + 0.65 * rng.standard_normal((544, 544, 3))
    grain = np.clip(np.rint(grain * site.noise), -8, 8).astype(np.int8).view(np.uint8)
    for y in range(0, height, 512):
        for x in range(0, width, 512):
            part = planes[y : y + 512, x : x + 512]
            if site.soft and part.any():
                part = np.stack([ndimage.gaussian_filter(part[..., i], site.soft, truncate=2.5) for i in (0, 1)], -1)
            index = np.ascontiguousarray(part).view("<u2")[..., 0]
            colour = table[index].view(np.uint8).reshape(*index.shape, 4)[..., :3]
            dy, dx = rng.integers(32, size=2)
            # The table stays 8 away from 0 and 255, so adding two's-complement noise in uint8 never wraps.
            rgb[y : y + 512, x : x + 512] = colour + grain[dy : dy + index.shape[0], dx : dx + index.shape[1]]
    return rgb


def _stroke(
    rng: np.random.Generator, size: tuple[int, int], start: np.ndarray, end: np.ndarray, width: float
) -> np.ndarray:
    """(h/8, w/8) float32: coverage of a hand-drawn stroke from `start` to `end` (y, x in px)."""
    steps = np.linspace(0, 1, 400)[:, None]
    side = np.array([-(end - start)[1], (end - start)[0]]) / max(np.hypot(*(end - start)), 1)
    bow = 0.09 * np.hypot(*(end - start)) * np.sin(steps * np.pi * rng.uniform(0.8, 1.6)) * rng.choice([-1, 1])
    points = (start + steps * (end - start) + bow * side) / 8
    ink = np.ones((size[0] // 8, size[1] // 8), bool)
    inside = ((points >= 0) & (points < ink.shape)).all(1)
    ink[tuple(points[inside].astype(int).T)] = False
    return np.clip((width / 16 - ndimage.distance_transform_edt(ink)) / 1.5 + 0.5, 0, 1).astype(np.float32)


def mark_with_pen(rgb: np.ndarray, tissue16: np.ndarray, rng: np.random.Generator, colour: str) -> float:
    """A marker stroke (`blue`, `green`) over glass and the tissue's edge, in place; returns its share of the slide."""
    height, width = rgb.shape[:2]
    edge = np.argwhere(ndimage.binary_dilation(tissue16, iterations=4) & ~tissue16) * 16
    centre = edge[int(rng.integers(len(edge)))].astype(float)
    away = rng.uniform(0, np.pi)
    half = 0.16 * min(height, width) * np.array([np.sin(away), np.cos(away)])
    ink = _stroke(rng, (height, width), centre - half, centre + half, 0.034 * min(height, width))
    streaks = spectral_noise(rng, ink.shape, 12, 1.2)
    ink *= np.clip(0.85 + 0.13 * streaks, 0.4, 1.2)
    density = np.array({"blue": (1.5, 1.0, 0.28), "green": (1.55, 0.45, 1.15)}[colour])
    for y in range(0, height, 512):
        part = np.kron(ink[y // 8 : (y + 512) // 8], np.ones((8, 8), np.float32))[..., None]
        touched = np.asarray(part.any((0, 2)))
        if touched.any():
            columns = np.s_[int(touched.argmax()) : len(touched) - int(touched[::-1].argmax())]
            rows = rgb[y : y + part.shape[0], columns]
            rows[...] = rows * np.exp(-part[:, columns] * density)
    return float((ink > 0.3).mean())


def _spot(tissue16: np.ndarray, rng: np.random.Generator, radius: int) -> tuple[int, int]:
    """A place (y, x in px) inside the tissue, away from its edge where there is room."""
    depth = ndimage.distance_transform_edt(tissue16)
    spots = np.argwhere(depth >= min(radius / 16, 0.7 * depth.max()))
    y, x = spots[int(rng.integers(len(spots)))] * 16
    return int(y), int(x)


def _window(rgb: np.ndarray, y: int, x: int, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y0, x0 = max(y - reach, 0), max(x - reach, 0)
    part = rgb[y0 : y + reach, x0 : x + reach]
    dy, dx = np.ogrid[y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]]
    return part, dy.astype(np.float32), dx.astype(np.float32)


def defocus(rgb: np.ndarray, tissue16: np.ndarray, rng: np.random.Generator) -> float:
    """An area out of focus, in place; returns its share of the slide."""
    radius = int(0.11 * min(rgb.shape[:2]))
    part, dy, dx = _window(rgb, *_spot(tissue16, rng, radius), int(1.25 * radius))
    inside = np.clip((radius * 1.1 - np.hypot(dy * 0.85, dx)) / (0.25 * radius), 0, 1)[..., None]
    blurred = np.stack([ndimage.gaussian_filter(part[..., c], 5.5, truncate=2.5) for c in range(3)], -1)
    part[...] = np.rint(part + (blurred.astype(np.float32) - part) * inside)
    return float((inside > 0.5).sum() / rgb[..., 0].size)


def trap_bubble(rgb: np.ndarray, tissue16: np.ndarray, rng: np.random.Generator) -> float:
    """An air bubble under the cover slip: dark refracting rim, washed-out soft inside; in place; returns its share."""
    radius = int(0.07 * min(rgb.shape[:2]))
    part, dy, dx = _window(rgb, *_spot(tissue16, rng, radius), int(1.2 * radius))
    theta = np.arctan2(dy, dx)
    depth = radius * (1 + 0.05 * np.cos(2 * theta + 1) + 0.03 * np.cos(3 * theta)) - np.hypot(dy, dx)
    inside = np.clip(depth / 3, 0, 1)[..., None]
    blurred = np.stack([ndimage.gaussian_filter(part[..., c], 2.5, truncate=2.5) for c in range(3)], -1).astype(
        np.float32
    )
    washed = blurred + (235 - blurred) * 0.22
    rim = np.exp(-(((depth - 9) / 7) ** 2)) * 0.72 + 0.35 * np.exp(-(((depth - 34) / 10) ** 2))
    part[...] = np.rint((part + (washed - part) * inside) * (1 - np.clip(rim, 0, 1))[..., None])
    return float((inside > 0.5).sum() / rgb[..., 0].size)


def fold(planes: np.ndarray, tissue16: np.ndarray, rng: np.random.Generator) -> float:
    """A fold: a band where the section lies doubled, in place on the densities; returns its share of the slide."""
    height, width = planes.shape[:2]
    centre = np.array(_spot(tissue16, rng, 500), float)
    away = rng.uniform(0, np.pi)
    half = 0.2 * min(height, width) * np.array([np.sin(away), np.cos(away)])
    band = _stroke(rng, (height, width), centre - half, centre + half, 0.016 * min(height, width))
    shift = (37, 61)
    for y in range(0, height, 512):
        share = np.kron(band[y // 8 : (y + 512) // 8], np.ones((8, 8), np.float32))
        if share.any():
            here = planes[y : y + share.shape[0]]
            other = np.roll(here, shift, (0, 1)).astype(np.float32)
            on_tissue = here.any(-1, keepdims=True)
            doubled = here + on_tissue * share[..., None] * (0.75 * other + 0.25 * here)
            here[...] = np.minimum(doubled, 255)
    return float((band > 0.5).mean())


def dust(planes: np.ndarray, rng: np.random.Generator, specks: int) -> None:
    """Specks of dirt and stain precipitate on the glass, in place on the densities."""
    height, width = planes.shape[:2]
    for _ in range(specks):
        r = int(rng.integers(2, 7))
        y, x = int(rng.integers(r, height - r)), int(rng.integers(r, width - r))
        gy, gx = np.ogrid[-r : r + 1, -r : r + 1]
        spot = np.exp(-((gy / r) ** 2 + (gx * rng.uniform(0.8, 2) / r) ** 2) * 2.5) * rng.uniform(25, 110)
        here = planes[y - r : y + r + 1, x - r : x + r + 1]
        here[...] = np.maximum(here, spot[..., None].astype(np.uint8))


def write_slide(rgb: np.ndarray, path: Path, quality: int, mpp: float | None = MPP) -> None:
    """Pyramidal tiled JPEG TIFF with resolution in pixels per cm; `mpp` None leaves the resolution tags out."""
    import pyvips

    height, width = rgb.shape[:2]
    image = pyvips.Image.new_from_memory(rgb.data, width, height, 3, "uchar").copy(
        interpretation="srgb", xres=1000 / (mpp or 1000), yres=1000 / (mpp or 1000)
    )
    image.tiffsave(
        str(path), tile=True, tile_width=256, tile_height=256, pyramid=True, compression="jpeg", Q=quality, resunit="cm"
    )
    if mpp is None:
        _drop_tags(path, RESOLUTION_TAGS)


def _drop_tags(path: Path, tags: tuple[int, ...]) -> None:
    """Remove tags from every directory of a classic little-endian TIFF, as scanners without calibration leave them."""
    with open(path, "r+b") as handle:
        magic, offset = struct.unpack("<4sI", handle.read(8))
        if magic != b"II*\0":
            raise ValueError(f"{path} is no classic little-endian TIFF")
        while offset:
            handle.seek(offset)
            (count,) = struct.unpack("<H", handle.read(2))
            entries = [handle.read(12) for _ in range(count)]
            (following,) = struct.unpack("<I", handle.read(4))
            kept = [entry for entry in entries if struct.unpack("<H", entry[:2])[0] not in tags]
            handle.seek(offset)
            handle.write(struct.pack("<H", len(kept)) + b"".join(kept) + struct.pack("<I", following))
            offset = following
