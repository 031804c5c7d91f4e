"""Lay a piece of bowel wall onto a slide: where which tissue is, its textures, glands and cells, as stain densities.

The plan (`layout`) is at 1/16 of the resolution of the slide; the painting reads it with linear interpolation in
blocks of 512 px, so that memory is two uint8 planes whatever is drawn on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slidemake.demo.bank import Bank, sprite_bank, tumour_glands
from slidemake.demo.glands import walk
from slidemake.demo.layout import CELL, MakeUp, Plan, make_plan
from slidemake.demo.sprites import TEXTURE, Stamp, lay

BLOCK = 512
Mix = tuple[tuple[str, ...], tuple[float, ...]]  # kinds of cells and their shares
CRYPT_PITCH = 122.0  # px between the axes of neighbouring crypts


@dataclass
class Drawing:
    """Densities (side, side, 2) uint8 and the truth masks (m, m) bool at 1/16 scale."""

    planes: np.ndarray
    tissue16: np.ndarray
    tumour16: np.ndarray
    plan: Plan
    counts: dict[str, int] = field(default_factory=dict)


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
            for zone in (plan.reactive, plan.tumour):
                if look.cells(zone).max() > -40:
                    inside = look(zone) + 5 * fine > 0
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
    rng: np.random.Generator, planes: np.ndarray, plan: Plan, bank: Bank, atypia: float
) -> tuple[_Ground, dict[str, int]]:
    """Malignant glands, then crypts (lengthwise and across), then vessels; each only where there is room."""
    side = planes.shape[0]
    ground, counts = _Ground(side), {"malignant_glands": 0, "reactive_glands": 0, "crypts": 0, "vessels": 0}

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

    for zone, stamps, kind in (
        (plan.tumour, tumour_glands(atypia), "malignant_glands"),
        (plan.reactive, bank.reactive_glands, "reactive_glands"),
    ):
        for pitch, need in ((150.0, 55), (70.0, 30)) if zone.max() > 0 else ():
            for point in _lattice(rng, side, pitch, pitch * 0.87, rng.uniform(0, 3), pitch * 0.2):
                if at(zone, point) > need and at(plan.solid, point) < 0.1:
                    place(stamps, point, kind, 10)
    free = (plan.depth > 84) & (plan.layer < -75) & (plan.follicle < -50) & (plan.tears < -0.3)
    free &= (plan.tumour < -60) & (plan.reactive < -60)
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
            and max(at(plan.tumour, point), at(plan.reactive, point)) < -60
            and rng.random() < 0.6
        ):
            place(bank.vessels, point, "vessels")
    return ground, counts


def _tumour_mixes(atypia: float) -> tuple[Mix, Mix]:
    """Cells of a tumour's sheets and of its stroma; below an atypia of 1 as in reactive tissue but for that share."""
    if atypia >= 1:
        return (
            (("malignant", "lymphocyte", "mitosis", "apoptosis"), (0.93, 0.045, 0.012, 0.013)),
            (("plump", "spindle", "lymphocyte", "malignant", "red_cell"), (0.42, 0.22, 0.27, 0.05, 0.04)),
        )
    sheet, stroma = 0.62, 0.09
    return (
        (
            ("malignant", "reactive", "lymphocyte", "plasma", "mitosis", "apoptosis"),
            (sheet * atypia, sheet * (1 - atypia), 0.24, 0.12, 0.01, 0.01),
        ),
        (
            ("plump", "spindle", "lymphocyte", "malignant", "reactive", "red_cell"),
            (0.40, 0.22, 0.25, stroma * atypia, stroma * (1 - atypia), 0.04),
        ),
    )


def _scatter_cells(
    rng: np.random.Generator,
    planes: np.ndarray,
    plan: Plan,
    bank: Bank,
    ground: _Ground,
    tissue: np.ndarray,
    atypia: float,
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
    reactive, solid = plan.reactive[cy, cx] > 0, plan.solid[cy, cx] > 0
    fat = (plan.fat[cy, cx] > -0.1) & (layer < 620)
    luck = rng.random(len(y))
    slope_y, slope_x = np.gradient(plan.v, CELL)
    fibre = np.arctan2(-slope_x[cy, cx], slope_y[cy, cx])  # along a line of equal v
    way = np.rint((fibre + rng.normal(0, 0.2, len(y))) * 24 / np.pi).astype(int) % 24

    inflamed = plan.inflamed[cy, cx]
    density = np.select(
        [(tumour > 0) | reactive, follicle > 0, fat, layer < 0, layer < 46, layer < 196, layer < 620],
        [
            np.where(solid, np.where(reactive | (atypia < 1), 0.55, 0.44), 0.20),
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
        [
            (tumour > 0) & solid,
            tumour > 0,
            reactive & solid,
            reactive,
            follicle > 45,
            follicle > 0,
            layer < 0,
        ],
        [0, 1, 6, 7, 2, 3, 4],
        5,
    )
    mixes: list[Mix] = [  # per zone
        *_tumour_mixes(atypia),
        (("reactive", "lymphocyte", "apoptosis", "mitosis"), (0.66, 0.31, 0.02, 0.01)),
        (("lymphocyte", "reactive", "plasma"), (0.90, 0.06, 0.04)),
        (
            ("lymphocyte", "plasma", "spindle", "reactive", "eosinophil", "red_cell"),
            (0.40, 0.26, 0.20, 0.08, 0.03, 0.03),
        ),
        (("spindle", "lymphocyte", "red_cell", "plump"), (0.76, 0.13, 0.03, 0.08)),
        (("reactive", "lymphocyte", "plasma", "mitosis", "apoptosis"), (0.62, 0.24, 0.12, 0.01, 0.01)),
        (("plump", "spindle", "lymphocyte", "reactive", "red_cell"), (0.40, 0.22, 0.25, 0.09, 0.04)),
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
        if plan.layer[cy, cx] < -90 and max(plan.tumour[cy, cx], plan.reactive[cy, cx]) < 0:
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


def draw_tissue(rng: np.random.Generator, side: int, made_of: MakeUp, atypia: float = 1.0) -> Drawing:
    """Draw a slide's tissue as stain densities.

    `side` px (a multiple of 16), `atypia`: share of a tumour's epithelial cells that look malignant (the others look
    reactive). Returns planes in units of 1/`DENSITY` natural-log optical density, with truth masks at 1/16 scale:
    tissue is where a section lies on the glass (lumina and fat included, tears not).
    """
    bank = sprite_bank()
    plan = make_plan(rng, side, made_of)
    planes = np.zeros((side, side, 2), np.uint8)
    tissue = np.zeros_like(plan.depth, bool)
    _paint_ground(planes, tissue, plan, bank)
    ground, counts = _place_glands(rng, planes, plan, bank, atypia)
    _line_surface(rng, planes, plan, bank)
    _red_pools(rng, planes, plan, bank, tissue)
    counts["cells"] = _scatter_cells(rng, planes, plan, bank, ground, tissue, atypia)
    return Drawing(planes, tissue, tissue & (plan.tumour > 0), plan, counts)
