"""Stamps of the demo cohort: crypts, malignant and reactive glands, vessels."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage
from skimage.measure import find_contours

from slidemake.demo.sprites import Canvas, Stamp, blob, malignant_nucleus, noise_patch, nucleus


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


@cache
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
    discs = [blob(rng, 5.4, 0.03, rng.uniform(1.15, 1.5), 0.95) for _ in range(6)]
    blood = noise_patch(rng, depth.shape, 12) > rng.uniform(-1.0, 0.8)
    for level in np.arange(wall + 7, depth.max() - 2, 9.5):
        for y, x, _ in walk(depth, level, 11.5, rng):
            if blood[int(y), int(x)]:
                canvas.cell(discs[int(rng.integers(len(discs)))], y, x)
    return canvas.stamp(True)
