"""Lay a piece of bowel wall onto a slide: where which tissue is, its textures, glands and cells, as stain densities.

A plan is made at 1/16 of the slide's resolution (one cell = 16 px = 8 um); the painting reads it with linear
interpolation in blocks of 512 px, so that memory is two uint8 planes whatever is drawn on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from slidemake.demo_bank import Bank, sprite_bank
from slidemake.demo_sprites import TEXTURE, Stamp, lay, walk

CELL = 16  # px of the slide per cell of the plan, which is also the scale of the truth masks
BLOCK = 512
CRYPT_PITCH = 122.0  # px between the axes of neighbouring crypts


@dataclass
class Plan:
    """The map of a slide, every field (m, m) float32 with m = side / 16."""

    depth: np.ndarray  # px below the outline of the tissue, negative on glass
    layer: np.ndarray  # px below the muscularis mucosae; negative inside the mucosa
    tumour: np.ndarray  # px inside the tumour's outline, negative outside
    follicle: np.ndarray  # px inside a lymphoid follicle
    fat: np.ndarray  # > 0 in fat
    tears: np.ndarray  # > 0 where the section is torn
    inflamed: np.ndarray  # 0 to 1, share of lamina propria cells that are there
    solid: np.ndarray  # > 0 where the tumour grows in sheets, < 0 where it forms glands
    u: np.ndarray  # px, coordinate along the fibres
    v: np.ndarray  # px, coordinate across the fibres
    thickness: np.ndarray  # factor on all densities
    crypt_angle: np.ndarray  # direction of crypts, radians
    crypts_cut_long: np.ndarray  # > 0 where crypts are cut lengthwise


@dataclass
class Drawing:
    """Densities (side, side, 2) uint8 and the truth masks (m, m) bool at 1/16 scale."""

    planes: np.ndarray
    tissue16: np.ndarray
    tumour16: np.ndarray
    plan: Plan
    counts: dict[str, int] = field(default_factory=dict)


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


def make_plan(
    rng: np.random.Generator, side: int, tumour_share: float, pieces: int, cover: float, lymphoid: float
) -> Plan:
    """Decide where everything is. `tumour_share` of the tissue is tumour, `lymphoid` about the share in follicles."""
    m = side // CELL
    mask, axis, angle = _outline(rng, m, pieces, cover)
    depth = _signed_distance(mask)
    reach = side * np.sqrt(cover / np.pi / pieces)
    layer = axis - rng.uniform(0.0, 0.35) * reach + 70 * _noise(rng, m, 420) + 25 * _noise(rng, m, 120)
    y, x = np.mgrid[:m, :m].astype(np.float32) * CELL

    tumour = np.full((m, m), -1e4, np.float32)
    if tumour_share > 0:
        ys, xs = np.nonzero(depth > 0.35 * depth.max())
        i = int(rng.integers(len(ys)))
        score = (
            -np.hypot(y - ys[i] * CELL, x - xs[i] * CELL) / (0.2 * reach)
            + 0.55 * _noise(rng, m, 210)
            + 0.2 * _noise(rng, m, 60)
        )
        inner = depth > 20
        focus = np.zeros_like(mask)
        focus[inner] = _top_share(score[inner], min(0.95, tumour_share * mask.sum() / inner.sum()))
        tumour = _signed_distance(focus)

    follicles = np.zeros_like(mask)
    seeds = np.argwhere((depth > 90) & (layer > -420) & (layer < 260))
    while len(seeds) and follicles.sum() < lymphoid * mask.sum():
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


class _Window:
    """Linear interpolation of plan fields onto one block of pixels."""

    def __init__(self, y0: int, x0: int, size: int, m: int):
        self.rows, self.row_weights = self._weights(y0, size, m)
        self.columns, self.column_weights = self._weights(x0, size, m)

    @staticmethod
    def _weights(start: int, size: int, m: int) -> tuple[slice, np.ndarray]:
        at = np.clip((np.arange(start, start + size) + 0.5) / CELL - 0.5, 0, m - 1)
        low = np.minimum(at.astype(int), m - 2)
        first, last = int(low[0]), int(low[-1]) + 2
        weights = np.zeros((size, last - first), np.float32)
        weights[np.arange(size), low - first] = 1 - (at - low)
        weights[np.arange(size), low - first + 1] += at - low
        return slice(first, last), weights

    def cells(self, plan_field: np.ndarray) -> np.ndarray:
        return plan_field[self.rows, self.columns]

    def __call__(self, plan_field: np.ndarray) -> np.ndarray:
        return self.row_weights @ self.cells(plan_field) @ self.column_weights.T


def _paint_ground(planes: np.ndarray, truth: np.ndarray, plan: Plan, bank: Bank) -> None:
    """Fibres, muscle, fat, follicle and tumour grounds into `planes`; tissue cells into `truth` (m, m) bool."""
    side, m = planes.shape[0], plan.depth.shape[0]
    for y0 in range(0, side, BLOCK):
        for x0 in range(0, side, BLOCK):
            size_y, size_x = min(BLOCK, side - y0), min(BLOCK, side - x0)
            size = max(size_y, size_x)
            look = _Window(y0, x0, size, m)
            if look.cells(plan.depth).max() < -60:
                continue
            u, v = look(plan.u).astype(np.int32), look(plan.v).astype(np.int32)
            where = (v & (TEXTURE - 1)) * TEXTURE + (u & (TEXTURE - 1))
            fine = bank.ragged[where]
            layer = look(plan.layer) + 9 * fine
            depth = look(plan.depth)
            depth += np.where(layer < -60, 1.2, 11.0) * fine  # mucosal surface is smooth, cut edges are ragged
            ground = bank.textures["lamina"][where]

            def put(name: str, mask: np.ndarray, where: np.ndarray = where, ground: np.ndarray = ground) -> None:
                if mask.any():
                    ground[mask] = bank.textures[name][where[mask]]

            put("muscle", (layer > 0) & (layer < 46))
            put("loose", layer >= 46)
            put("collagen", layer > 46 + 150)
            put("muscle", layer > 620)
            put("fat", (look(plan.fat) + 0.03 * fine > 0) & (layer < 620))
            put("surface", (layer < -60) & (depth < 27))
            put("follicle", look(plan.follicle) + 9 * fine > 0)
            if look.cells(plan.tumour).max() > -40:
                inside = look(plan.tumour) + 5 * fine > 0
                put("desmoplasia", inside)
                put("sheet", inside & (look(plan.solid) + 0.06 * fine > 0))
            tissue = (depth > 0) & (look(plan.tears) + 0.05 * fine < 0)
            ground[~tissue] = 0
            both = ground.view(np.uint8).reshape(size, size, 2)
            planes[y0 : y0 + size_y, x0 : x0 + size_x] = both[:size_y, :size_x]
            shares = tissue[:size_y, :size_x].reshape(size_y // CELL, CELL, size_x // CELL, CELL).mean((1, 3))
            truth[y0 // CELL : (y0 + size_y) // CELL, x0 // CELL : (x0 + size_x) // CELL] = shares >= 0.5


def _lattice(
    rng: np.random.Generator, side: int, along: float, across: float, turn: float, jitter: float
) -> np.ndarray:
    """Points (n, 2) y, x of a shifted-row lattice over the slide, turned by `turn`, in random order."""
    count_a, count_b = int(1.5 * side / along) + 2, int(1.5 * side / across) + 2
    i, j = np.meshgrid(np.arange(-count_a // 2, count_a // 2 + 1), np.arange(-count_b // 2, count_b // 2 + 1))
    a, b = (i + 0.5 * (j % 2)).ravel() * along, j.ravel() * across
    points = np.stack([a * np.sin(turn) + b * np.cos(turn), a * np.cos(turn) - b * np.sin(turn)], -1) + side / 2
    points += rng.normal(0, jitter, points.shape)
    return points[((points >= 0) & (points < side)).all(1)]


class _Ground:
    """Which 8-px cells a gland or vessel has taken."""

    def __init__(self, side: int):
        self.taken = np.zeros((side // 8 + 160, side // 8 + 160), bool)  # with a margin of 80 cells all round

    def claim(self, stamp: Stamp, y: int, x: int, allowance: int) -> bool:
        """Take the stamp's ground unless more than `allowance` cells of it are taken."""
        assert stamp.cover is not None, "only stamps that claim ground have a cover"
        height, width = stamp.cover.shape
        top, left = y // 8 - height // 2 + 80, x // 8 - width // 2 + 80
        here = self.taken[top : top + height, left : left + width]
        if np.count_nonzero(here & stamp.cover) > allowance:
            return False
        here |= stamp.cover
        return True


def _place_glands(
    rng: np.random.Generator, planes: np.ndarray, plan: Plan, bank: Bank
) -> tuple[_Ground, dict[str, int]]:
    """Malignant glands, then crypts (lengthwise and across), then vessels; each only where there is room."""
    side = planes.shape[0]
    ground, counts = _Ground(side), {"malignant_glands": 0, "crypts": 0, "vessels": 0}

    def at(plan_field: np.ndarray, point: np.ndarray) -> float:
        return float(plan_field[int(point[0]) // CELL, int(point[1]) // CELL])

    def place(stamps: list[Stamp], point: np.ndarray, kind: str, allowance: int = 0, turned: bool = True) -> None:
        stamp = stamps[int(rng.integers(len(stamps)))]
        if turned:
            stamp = stamp.variant(int(rng.integers(8)))
        y, x = int(point[0]), int(point[1])
        if ground.claim(stamp, y, x, allowance):
            lay(planes, stamp, y, x)
            counts[kind] += 1

    if plan.tumour.max() > 0:
        for pitch, need in ((150.0, 55), (70.0, 30)):
            for point in _lattice(rng, side, pitch, pitch * 0.87, rng.uniform(0, 3), pitch * 0.2):
                if at(plan.tumour, point) > need and at(plan.solid, point) < 0.1:
                    place(bank.malignant_glands, point, "malignant_glands", 10)
    free = (plan.depth > 84) & (plan.layer < -75) & (plan.tumour < -60) & (plan.follicle < -50) & (plan.tears < -0.3)
    turn = float(np.median(plan.crypt_angle[plan.depth > 0])) if (plan.depth > 0).any() else 0.0
    for point in _lattice(rng, side, 330.0, CRYPT_PITCH, turn, 8.0):
        if at(free, point) and at(plan.depth, point) > 130 and at(plan.crypts_cut_long, point) > 0:
            wanted = at(plan.crypt_angle, point) % np.pi
            apart = [abs((s.angle - wanted + np.pi / 2) % np.pi - np.pi / 2) for s in bank.long_crypts]
            place([bank.long_crypts[k] for k in np.argsort(apart, kind="stable")[:3]], point, "crypts", 8, turned=False)
    for pitch, jitter in ((CRYPT_PITCH + 6, 9.0), (32.0, 9.0)):
        for point in _lattice(rng, side, pitch, pitch * 0.87, turn, jitter):
            if at(free, point):
                place(bank.round_crypts, point, "crypts", 4)
    for point in _lattice(rng, side, 260.0, 230.0, 0.0, 80.0):
        if (
            at(plan.depth, point) > 110
            and at(plan.layer, point) > 120
            and at(plan.tumour, point) < -60
            and rng.random() < 0.6
        ):
            place(bank.vessels, point, "vessels")
    return ground, counts


def _scatter_cells(
    rng: np.random.Generator, planes: np.ndarray, plan: Plan, bank: Bank, ground: _Ground, tissue: np.ndarray
) -> int:
    """Single cells of each tissue, on a jittered grid so that they rarely overlap."""
    side, pitch = planes.shape[0], 11.0
    n = int(side / pitch)
    jy, jx = (np.arange(n) + 0.5) * pitch, (np.arange(n) + 0.5) * pitch
    y = (jy[:, None] + rng.uniform(-4.5, 4.5, (n, n))).ravel()
    x = (jx[None] + rng.uniform(-4.5, 4.5, (n, n))).ravel()
    yi, xi = np.clip(y, 0, side - 1).astype(int), np.clip(x, 0, side - 1).astype(int)
    keep = tissue[yi // CELL, xi // CELL] & ~ground.taken[yi // 8 + 80, xi // 8 + 80]
    keep[keep] = planes[yi[keep], xi[keep], 1] > 9  # no cell floats in fat, a cleft or a tear
    keep &= (plan.depth[yi // CELL, xi // CELL] > 36) | (plan.layer[yi // CELL, xi // CELL] > -60)  # surface epithelium
    y, x = yi[keep], xi[keep]
    cy, cx = y // CELL, x // CELL
    layer, tumour, follicle = plan.layer[cy, cx], plan.tumour[cy, cx], plan.follicle[cy, cx]
    fat = (plan.fat[cy, cx] > -0.1) & (layer < 620)
    luck = rng.random(len(y))
    slope_y, slope_x = np.gradient(plan.v, CELL)
    fibre = np.arctan2(-slope_x[cy, cx], slope_y[cy, cx])  # along a line of equal v
    way = np.rint((fibre + rng.normal(0, 0.2, len(y))) * 24 / np.pi).astype(int) % 24

    inflamed = plan.inflamed[cy, cx]
    density = np.select(
        [tumour > 0, follicle > 0, fat, layer < 0, layer < 46, layer < 196, layer < 620],
        [
            np.where(plan.solid[cy, cx] > 0, 0.44, 0.20),
            0.80,
            0.22,
            0.16 + 0.55 * inflamed,
            0.085,
            0.05 + 0.05 * inflamed,
            0.05,
        ],
        0.075,
    )
    zone = np.select(
        [(tumour > 0) & (plan.solid[cy, cx] > 0), tumour > 0, (follicle > 45), follicle > 0, layer < 0],
        [0, 1, 2, 3, 4],
        5,
    )
    mixes = [  # per zone: kinds and their shares
        (("malignant", "lymphocyte", "mitosis", "apoptosis"), (0.93, 0.045, 0.012, 0.013)),
        (("plump", "spindle", "lymphocyte", "malignant", "red_cell"), (0.42, 0.22, 0.27, 0.05, 0.04)),
        (("reactive", "lymphocyte", "apoptosis", "mitosis"), (0.66, 0.31, 0.02, 0.01)),
        (("lymphocyte", "reactive", "plasma"), (0.90, 0.06, 0.04)),
        (
            ("lymphocyte", "plasma", "spindle", "reactive", "eosinophil", "red_cell"),
            (0.40, 0.26, 0.20, 0.08, 0.03, 0.03),
        ),
        (("spindle", "lymphocyte", "red_cell", "plump"), (0.76, 0.13, 0.03, 0.08)),
    ]
    oriented = {"spindle": bank.spindles, "plump": bank.plump}
    chosen = np.nonzero(luck < density)[0]
    lot, shape = rng.random(len(chosen)), rng.integers(1 << 16, size=len(chosen))
    edges = [np.cumsum(shares) for _, shares in mixes]
    variants = {kind: [stamp.variant(k) for stamp in stamps for k in range(8)] for kind, stamps in bank.cells.items()}
    for k, i in enumerate(chosen):
        kinds, edge = mixes[zone[i]][0], edges[zone[i]]
        kind = kinds[min(int(np.searchsorted(edge, lot[k])), len(kinds) - 1)]
        stamps = oriented[kind][way[i]] if kind in oriented else variants[kind]
        lay(planes, stamps[shape[k] % len(stamps)], int(y[i]), int(x[i]))
    return len(chosen)


def _line_surface(rng: np.random.Generator, planes: np.ndarray, plan: Plan, bank: Bank) -> None:
    """Nuclei of the surface epithelium: one row of columns along the smooth, luminal outline."""
    for y, x, inward in walk(plan.depth, 14.0, 8.4 / CELL, rng):
        cy, cx = int(y), int(x)
        if plan.layer[cy, cx] < -90 and plan.tumour[cy, cx] < 0:
            py, px = (y + 0.5) * CELL + rng.normal(0, 1.3), (x + 0.5) * CELL + rng.normal(0, 1.3)
            shapes = bank.surface[round((inward + rng.normal(0, 0.15)) * 24 / np.pi) % 24]
            lay(planes, shapes[int(rng.integers(len(shapes)))], int(py), int(px))


def _red_pools(rng: np.random.Generator, planes: np.ndarray, plan: Plan, bank: Bank, tissue: np.ndarray) -> None:
    """A few fresh haemorrhages: clumps of red cells between the fibres."""
    spots = np.argwhere(tissue & (plan.depth > 60) & (plan.follicle < 0))
    for _ in range(int(rng.integers(4, 14)) if len(spots) else 0):
        cy, cx = spots[int(rng.integers(len(spots)))] * CELL
        count = int(rng.integers(15, 90))
        spread = 6.0 * np.sqrt(count)
        for dy, dx in rng.normal(0, 1, (count, 2)) * (spread * 0.45, spread):
            stamps = bank.cells["red_cell"]
            lay(planes, stamps[int(rng.integers(len(stamps)))], int(cy + dy), int(cx + dx))


def draw_tissue(
    rng: np.random.Generator, side: int, tumour_share: float, pieces: int, cover: float, lymphoid: float
) -> Drawing:
    """Draw a slide's tissue as stain densities.

    `side` px (a multiple of 16), `tumour_share` and `lymphoid`: shares of the tissue, `cover`: tissue's share of the
    slide. Returns planes in units of 1/`DENSITY` natural-log optical density, with truth masks at 1/16 scale: tissue
    is where a section lies on the glass (lumina and fat included, tears not).
    """
    bank = sprite_bank()
    plan = make_plan(rng, side, tumour_share, pieces, cover, lymphoid)
    planes = np.zeros((side, side, 2), np.uint8)
    tissue = np.zeros_like(plan.depth, bool)
    _paint_ground(planes, tissue, plan, bank)
    ground, counts = _place_glands(rng, planes, plan, bank)
    _line_surface(rng, planes, plan, bank)
    _red_pools(rng, planes, plan, bank, tissue)
    counts["cells"] = _scatter_cells(rng, planes, plan, bank, ground, tissue)
    return Drawing(planes, tissue, tissue & (plan.tumour > 0), plan, counts)
