"""What the demo cohort's tissue is made of, drawn once per process: textures of fibres and fat, and all stamps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.spatial import cKDTree

from slidemake.demo.glands import crypt, malignant_gland, reactive_gland, vessel
from slidemake.demo.sprites import (
    DENSITY,
    TEXTURE,
    Stamp,
    apoptosis,
    cell_stamp,
    eosinophil,
    lymphocyte,
    malignant_cell,
    mitosis,
    nucleus,
    plasma_cell,
    reactive_cell,
    red_cell,
    spectral_noise,
    spindle,
)


def _fat(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = 90
    seeds = rng.uniform(0, TEXTURE, (4000, 2))
    kept: list[np.ndarray] = []
    for seed in seeds:
        gap = [np.abs(seed - other) for other in kept]
        if all(np.hypot(*np.minimum(g, TEXTURE - g)) > 78 for g in gap):
            kept.append(seed)
        if len(kept) == count:
            break
    far = np.concatenate([np.array(kept) + (dy, dx) for dy in (-TEXTURE, 0, TEXTURE) for dx in (-TEXTURE, 0, TEXTURE)])
    y, x = np.mgrid[:TEXTURE, :TEXTURE]
    bent = [axis + 5 * spectral_noise(rng, y.shape, 14, 14) for axis in (y, x)]
    near = cKDTree(far).query(np.stack(bent, -1).reshape(-1, 2), k=2, workers=1)[0].reshape(TEXTURE, TEXTURE, 2)
    wall = np.exp(-(((near[..., 1] - near[..., 0]) / 4.5) ** 2))
    return 0.02 + 0.12 * wall, 0.02 + 0.5 * wall


def _textures(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """name -> (TEXTURE * TEXTURE,) uint16: haematoxylin in the low byte, eosin in the high byte."""
    size = (TEXTURE, TEXTURE)

    def noise(across: float, down: float) -> np.ndarray:
        return spectral_noise(rng, size, across, down)

    def soft(field: np.ndarray, edge: float, width: float) -> np.ndarray:
        return 1 / (1 + np.exp(-(field - edge) / width))

    grain = noise(1.0, 1.0)
    fibres = 0.6 * noise(48, 2.4) + 0.5 * noise(22, 1.5) + 0.5 * noise(70, 9)
    cleft = soft(0.75 * noise(55, 4.5) + 0.6 * noise(26, 2.2), 0.95, 0.12)
    strands = soft(
        np.abs(0.8 * noise(16, 4) + 0.5 * noise(6, 3)), 0.55, 0.18
    )  # a loose net: strands where it is near 0
    holes = soft(noise(7, 4.5), 0.9, 0.2)
    fine = noise(40, 1.7)
    planes = {
        "collagen": (0.07 + 0.02 * fibres + 0.01 * grain, (0.62 + 0.17 * fibres + 0.015 * grain) * (1 - 0.93 * cleft)),
        "loose": (0.07 + 0.03 * (1 - strands), (0.15 + 0.36 * (1 - strands) + 0.06 * fibres) * (1 - 0.6 * holes)),
        "lamina": (
            (0.13 + 0.012 * grain + 0.02 * fine) * (1 - 0.75 * holes),
            (0.40 + 0.10 * fibres + 0.02 * grain) * (1 - 0.85 * holes),
        ),
        "muscle": (
            0.13 + 0.02 * fine,
            (0.80 + 0.11 * fine + 0.07 * noise(60, 6)) * (1 - 0.8 * soft(noise(70, 3), 1.6, 0.1)),
        ),
        "desmoplasia": (
            0.16 + 0.03 * fibres,
            (0.47 + 0.13 * fibres + 0.05 * fine) * (1 - 0.7 * soft(noise(30, 4), 1.35, 0.15)),
        ),
        "sheet": (0.30 + 0.05 * noise(5, 5) + 0.03 * grain, 0.50 + 0.07 * noise(6, 6) + 0.04 * grain),
        "follicle": (0.26 + 0.04 * grain, 0.24 + 0.05 * grain),
        "surface": (0.24 + 0.03 * grain, 0.44 + 0.05 * grain),
        "fat": _fat(rng),
    }
    packed = {}
    for name, (h, e) in planes.items():
        both = np.clip(np.stack([h, e], -1) * DENSITY, 0, 255).astype(np.uint8)
        packed[name] = both.reshape(-1, 2).view("<u2").ravel()
    return packed


@dataclass(frozen=True)
class Bank:
    """Everything that is drawn once: cells by kind, spindles by direction, glands, vessels, textures."""

    cells: dict[str, list[Stamp]]
    spindles: list[list[Stamp]]  # [direction][shape]; direction i is i * pi / len
    plump: list[list[Stamp]]
    surface: list[list[Stamp]]  # columnar nuclei by direction
    round_crypts: list[Stamp]
    long_crypts: list[Stamp]
    malignant_glands: list[Stamp]
    reactive_glands: list[Stamp]
    vessels: list[Stamp]
    textures: dict[str, np.ndarray]
    ragged: np.ndarray  # (TEXTURE * TEXTURE,) float32, unit variance, a few px fine


@lru_cache(maxsize=2)
def tumour_glands(atypia: float, seed: int = 21) -> list[Stamp]:
    """Glands of a tumour. With an atypia of 1 they are plainly malignant; below it that share of their nuclei is, and
    the rest is as in reactive glands."""
    if atypia >= 1:
        return sprite_bank().malignant_glands
    rng = np.random.default_rng(seed)
    return [reactive_gland(rng, radius, atypia) for radius in rng.uniform(48, 100, 26)]


@lru_cache(maxsize=1)
def sprite_bank(seed: int = 20) -> Bank:
    """The bank of this process; the same for every slide, so that sites differ by stain and not by shapes."""
    rng = np.random.default_rng(seed)
    makers = {
        "lymphocyte": (lymphocyte, 40),
        "plasma": (plasma_cell, 24),
        "eosinophil": (eosinophil, 8),
        "reactive": (reactive_cell, 24),
        "malignant": (malignant_cell, 90),
        "mitosis": (mitosis, 8),
        "apoptosis": (apoptosis, 8),
        "red_cell": (red_cell, 16),
    }
    ways = np.arange(24) * np.pi / 24
    columnar = [
        [
            cell_stamp(
                [(nucleus(rng, 6.8, 3.7, way + rng.normal(0, 0.12), rng.uniform(1.0, 1.4), 0.05, 0.4), 0, 0)], 22
            )
            for _ in range(5)
        ]
        for way in ways
    ]
    return Bank(
        cells={kind: [make(rng) for _ in range(count)] for kind, (make, count) in makers.items()},
        spindles=[[spindle(rng, way) for _ in range(5)] for way in ways],
        plump=[[spindle(rng, way, 1.6) for _ in range(5)] for way in ways],
        surface=columnar,
        round_crypts=[crypt(rng, rng.uniform(0, 50), rng.uniform(0, np.pi)) for _ in range(28)],
        long_crypts=[crypt(rng, rng.uniform(170, 330), way) for way in np.arange(8) * np.pi / 8 for _ in range(3)],
        malignant_glands=[malignant_gland(rng, radius) for radius in rng.uniform(48, 115, 26)],
        reactive_glands=[reactive_gland(rng, radius) for radius in rng.uniform(48, 100, 26)],
        vessels=[vessel(rng, radius) for radius in rng.uniform(22, 70, 10)],
        textures=_textures(rng),
        ragged=(
            0.9 * spectral_noise(rng, (TEXTURE, TEXTURE), 9, 5) + 0.42 * spectral_noise(rng, (TEXTURE, TEXTURE), 4, 2.4)
        ).ravel(),
    )
