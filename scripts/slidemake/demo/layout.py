"""Where which tissue of a demo slide is: its outline, layers, tumour, reactive tissue, follicles, fat and fibres.

A plan is made at 1/16 of the slide's resolution (one cell = 16 px = 8 um).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

CELL = 16  # px of the slide per cell of the plan, which is also the scale of the truth masks


@dataclass(frozen=True)
class MakeUp:
    """How much of what a slide has; shares of the tissue, but `cover`, which is the tissue's share of the slide."""

    pieces: int
    cover: float
    tumour: float = 0.0
    lymphoid: float = 0.0  # about the share in follicles
    reactive: float = 0.0  # granulation tissue and regenerating glands; less where tumour takes their place


@dataclass
class Plan:
    """The map of a slide, every field (m, m) float32 with m = side / 16."""

    depth: np.ndarray  # px below the outline of the tissue, negative on glass
    layer: np.ndarray  # px below the muscularis mucosae; negative inside the mucosa
    tumour: np.ndarray  # px inside the tumour's outline, negative outside
    reactive: np.ndarray  # px inside granulation tissue and regenerating glands, which look like tumour from afar
    follicle: np.ndarray  # px inside a lymphoid follicle
    fat: np.ndarray  # > 0 in fat
    tears: np.ndarray  # > 0 where the section is torn
    inflamed: np.ndarray  # 0 to 1, share of lamina propria cells that are there
    solid: np.ndarray  # > 0 where tumour and reactive tissue grow in sheets, < 0 where they form glands
    u: np.ndarray  # px, coordinate along the fibres
    v: np.ndarray  # px, coordinate across the fibres
    thickness: np.ndarray  # factor on all densities
    crypt_angle: np.ndarray  # direction of crypts, radians
    crypts_cut_long: np.ndarray  # > 0 where crypts are cut lengthwise


def _noise(rng: np.random.Generator, m: int, width_px: float) -> np.ndarray:
    """Unit-variance noise on the plan, correlated over `width_px`."""
    pad = int(3 * width_px / CELL) + 4
    field_ = ndimage.gaussian_filter(rng.standard_normal((m + pad, m + pad)).astype(np.float32), width_px / CELL)[
        :m, :m
    ]
    return (field_ / max(float(field_.std()), 1e-6)).astype(np.float32)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance to the outline of `mask` in px of the slide, positive inside, smoothed over two cells."""
    if not mask.any():
        return np.full(mask.shape, -1e4, np.float32)
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    return ndimage.gaussian_filter((inside - outside) * CELL, 1.0).astype(np.float32)


def _top_share(score: np.ndarray, share: float) -> np.ndarray:
    """The `share` of cells with the highest score."""
    return score > np.quantile(score, 1 - share)


def _outline(rng: np.random.Generator, m: int, pieces: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask covering `share` of the slide; per cell, px along its piece's axis (lumen to serosa) and that angle."""
    y, x = np.mgrid[:m, :m].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    best = np.full((m, m), -np.inf, np.float32)
    axis, angle = np.zeros((m, m), np.float32), np.zeros((m, m), np.float32)
    for i in range(pieces):
        away = 0.0 if pieces == 1 else (0.235 if pieces == 2 else 0.27) * m
        bearing = turn + 2 * np.pi * i / pieces
        cy, cx = (m / 2 + away * f(bearing) + rng.normal(0, 0.012 * m) for f in (np.sin, np.cos))
        radius = m * np.sqrt(share / np.pi / pieces)
        stretch, tilt = rng.uniform(1.05, 1.4 if pieces == 1 else 1.25), rng.uniform(0, np.pi)
        a = ((x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt)) / stretch
        b = (-(x - cx) * np.sin(tilt) + (y - cy) * np.cos(tilt)) * stretch
        theta = np.arctan2(b, a)
        lobes = sum(rng.normal(0, 0.09) / np.sqrt(k) * np.cos(k * theta + rng.uniform(0, 6.3)) for k in range(2, 8))
        score = 1 + lobes - np.hypot(a, b) / radius
        towards = tilt + np.pi / 2 + rng.choice([0, np.pi]) + rng.normal(0, 0.15)  # lumen to serosa
        mine = score > best
        best = np.where(mine, score, best)
        axis[mine] = (((x - cx) * np.cos(towards) + (y - cy) * np.sin(towards)) * CELL)[mine]
        angle[mine] = towards
    best += 0.06 * _noise(rng, m, 260) + 0.025 * _noise(rng, m, 70)
    best[:2] = best[-2:] = best[:, :2] = best[:, -2:] = -9
    return _top_share(best, share), axis, angle


def _focus(rng: np.random.Generator, mask: np.ndarray, depth: np.ndarray, reach: float, share: float) -> np.ndarray:
    """Depth inside an uneven focus of `share` of the tissue that lies away from its edge, px."""
    m = len(mask)
    if share <= 0:
        return np.full((m, m), -1e4, np.float32)
    y, x = np.mgrid[:m, :m].astype(np.float32) * CELL
    ys, xs = np.nonzero(depth > 0.35 * depth.max())
    i = int(rng.integers(len(ys)))
    score = (
        -np.hypot(y - ys[i] * CELL, x - xs[i] * CELL) / (0.2 * reach)
        + 0.55 * _noise(rng, m, 210)
        + 0.2 * _noise(rng, m, 60)
    )
    inner = depth > 20
    focus = np.zeros_like(mask)
    focus[inner] = _top_share(score[inner], min(0.95, share * mask.sum() / inner.sum()))
    return _signed_distance(focus)


def make_plan(rng: np.random.Generator, side: int, made_of: MakeUp) -> Plan:
    """Decide where everything is on a slide of `side` px."""
    m = side // CELL
    mask, axis, angle = _outline(rng, m, made_of.pieces, made_of.cover)
    depth = _signed_distance(mask)
    reach = side * np.sqrt(made_of.cover / np.pi / made_of.pieces)
    layer = axis - rng.uniform(0.0, 0.35) * reach + 70 * _noise(rng, m, 420) + 25 * _noise(rng, m, 120)
    y, x = np.mgrid[:m, :m].astype(np.float32) * CELL

    tumour = _focus(rng, mask, depth, reach, made_of.tumour)
    reactive = np.minimum(_focus(rng, mask, depth, reach, made_of.reactive), -tumour - 40)

    follicles = np.zeros_like(mask)
    seeds = np.argwhere((depth > 90) & (layer > -420) & (layer < 260))
    while len(seeds) and follicles.sum() < made_of.lymphoid * mask.sum():
        fy, fx = seeds[int(rng.integers(len(seeds)))] * CELL
        long, short, tilt = rng.uniform(110, 230), rng.uniform(85, 150), rng.uniform(0, np.pi)
        a = (x - fx) * np.cos(tilt) + (y - fy) * np.sin(tilt)
        b = -(x - fx) * np.sin(tilt) + (y - fy) * np.cos(tilt)
        follicles |= (np.hypot(a / long, b / short) < 1) & (depth > 30)
    follicle = _signed_distance(follicles) + 8 * _noise(rng, m, 40)

    turn = float(np.median(angle[mask])) + np.pi / 2 + rng.normal(0, 0.3)
    wave = [110 * _noise(rng, m, 340) + 9 * _noise(rng, m, 75) for _ in range(2)]
    return Plan(
        depth=depth,
        layer=layer.astype(np.float32),
        tumour=tumour,
        reactive=reactive,
        follicle=np.where(follicles.any(), follicle, -1e4).astype(np.float32),
        fat=np.minimum(_noise(rng, m, 200) - rng.uniform(0.7, 1.4), (layer - 260) / 60).astype(np.float32),
        tears=(_noise(rng, m, 60) * 0.6 + 0.8 * _noise(rng, m, 230) - 2.25).astype(np.float32),
        inflamed=np.clip(rng.uniform(0.25, 0.7) + 0.22 * _noise(rng, m, 300), 0.1, 1).astype(np.float32),
        solid=(_noise(rng, m, 130) - rng.uniform(-0.4, 0.9)).astype(np.float32),
        u=(x * np.cos(turn) + y * np.sin(turn) + wave[0]).astype(np.float32),
        v=(-x * np.sin(turn) + y * np.cos(turn) + wave[1]).astype(np.float32),
        thickness=np.clip(1 + 0.07 * _noise(rng, m, 700) + 0.02 * _noise(rng, m, 90), 0.75, 1.25).astype(np.float32),
        crypt_angle=(angle + 0.25 * _noise(rng, m, 400)).astype(np.float32),
        crypts_cut_long=(_noise(rng, m, 520) + rng.uniform(-0.8, 0.6)).astype(np.float32),
    )
