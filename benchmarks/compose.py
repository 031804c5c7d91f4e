"""Cohorts of slides composed from labelled tiles: glass, a piece of benign tissue and, in half of the patients, a focus
of tumour. Beside each slide lies the truth: masks of tissue and tumour at 1/16 scale.

What a cohort is like (how many sites, how they stain, how small the foci are) is drawn from its seed, so that no
setting of slidemake can be tuned to it. Stains are changed on optical densities (Beer-Lambert, vectors of Ruifrok and
Johnston 2001), as between laboratories.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from labelled_tiles import SPOILT_SHARE, LabelledTiles, Supply, deal
from PIL import Image
from slidemake.core.failures import RunError
from slidemake.core.files import (
    canonical_json,
    committed,
    file_sha256,
    read_json_if_whole,
    write_image,
    write_json,
    write_text,
)
from slidemake.demo.scanner import write_slide
from slidemake.robustness.corruptions import restained

VERSION = 2  # raised when the same settings compose other slides
CELL = 16  # px of the slide per px of the truth masks
TILE_UM = 112.0  # of the default encoder: `across` counts these
MARGIN = 2  # tiles of glass around the tissue
SHEET = ("slide_id", "path", "patient_id", "site", "scanner", "label")
# Gains of haematoxylin and eosin, beside the site's own
GAINS = {"as-is": (1.0, 1.0), "purple": (1.35, 0.25), "pink": (0.55, 1.5), "pale": (0.5, 0.5), "dark": (1.6, 1.4)}
STAINS = (*GAINS, "mixed", "sites")  # `mixed`: another kind for each patient, `sites`: for each site


@dataclass(frozen=True)
class Recipe:
    """What a cohort is like. `focus`: least and largest radius of a tumour, as a share of the tissue's diameter (the
    tissue's own is 0.5); `jitter`: a patient's stains differ from the site's by up to this share; `confound`: share of
    the tumour patients that come from the first site (0.5: label and site are independent)."""

    patients: int = 30
    across: int = 11  # diameter of the tissue, in tiles of 112 um
    sites: int = 2
    stain: str = "mixed"
    jitter: float = 0.15
    focus: tuple[float, float] = (0.1, 0.16)
    confound: float = 0.5

    def in_words(self) -> str:
        low, high = self.focus
        stain = {"mixed": "mixed stains", "sites": "stains by site", "as-is": "stain as it is"}.get(self.stain)
        confounded = "" if self.confound == 0.5 else f", confounded {self.confound:g}"
        return (
            f"{self.sites} site{'s' * (self.sites > 1)}, {stain or self.stain}, +-{self.jitter:.0%}, "
            f"{self.across} tiles across, foci {low:.2f} to {high:.2f}{confounded}"
        )


def draw_recipe(seed: int, number: int, patients: int = 30, **given: Any) -> Recipe:
    """Settings of cohort `number` of `seed`; what is `given` (not None) is not drawn.

    Kinds of stain are dealt like cards, so that as many cohorts as there are kinds see each of them once.
    """
    rng = np.random.default_rng([seed, number, 1])
    kinds = np.random.default_rng([seed, number // len(STAINS), 2]).permutation(STAINS)
    low = rng.uniform(0.08, 0.13)
    drawn = Recipe(
        patients=patients,
        across=int(rng.integers(9, 13)),
        sites=int(rng.integers(1, 5)),
        stain=str(kinds[number % len(kinds)]),
        jitter=round(float(rng.uniform(0, 0.25)), 3),
        focus=(round(float(low), 3), round(float(low + rng.uniform(0.03, 0.08)), 3)),
    )
    recipe = replace(drawn, **{name: value for name, value in given.items() if value is not None})
    if given.get("sites") is None and (recipe.stain == "sites" or recipe.confound != 0.5):
        recipe = replace(recipe, sites=max(recipe.sites, 2))
    return checked(recipe)


def checked(recipe: Recipe) -> Recipe:
    """The recipe; RunError if no cohort can be made by it."""
    low, high = recipe.focus
    for wrong, what in (
        (recipe.patients < 10, f"patients is {recipe.patients}; five folds need at least 10"),
        (not 3 <= recipe.across <= 60, f"across is {recipe.across}; it must be 3 to 60 tiles"),
        (not 1 <= recipe.sites <= 20, f"sites is {recipe.sites}; it must be 1 to 20"),
        (recipe.stain not in STAINS, f"stain is {recipe.stain!r}; one of {', '.join(STAINS)}"),
        (not 0 <= recipe.jitter < 1, f"jitter is {recipe.jitter:g}; it must be 0 or more and below 1"),
        (not 0 < low <= high <= 0.45, f"focus is {low:g} to {high:g}; two radii above 0 and up to 0.45, least first"),
        (not 0 <= recipe.confound <= 1, f"confound is {recipe.confound:g}; it must be 0 to 1"),
        (
            recipe.confound != 0.5 and recipe.sites < 2,
            "label and site are confounded where there are two sites or more",
        ),
    ):
        if wrong:
            raise RunError(what)
    return recipe


@dataclass(frozen=True)
class Look:
    """How a slide is stained and scanned."""

    haematoxylin: float
    eosin: float
    glass: tuple[int, int, int]
    quality: int  # of JPEG
    noise: float  # standard deviation of grey values


def draw_looks(recipe: Recipe, sites: Sequence[int], rng: np.random.Generator) -> list[Look]:
    """Looks of patients who come from `sites`, in their order."""
    of_site = []
    for _ in range(recipe.sites):
        h, e = np.exp(rng.normal(0, 0.18, 2))
        kind = str(rng.choice(list(GAINS))) if recipe.stain == "sites" else recipe.stain
        glass = tuple(int(v) for v in rng.integers(235, 248, 3))
        of_site.append((kind, Look(h, e, glass, int(rng.integers(75, 92)), float(rng.uniform(1, 3)))))
    if recipe.stain == "sites" and recipe.sites > 1:  # dealt: sites stain alike only where there are many
        plain = list(GAINS)
        kinds = [plain[i % len(plain)] for i in rng.permutation(max(recipe.sites, len(plain)))]
        of_site = [(kind, look) for kind, (_, look) in zip(kinds, of_site, strict=False)]
    looks = []
    for site in sites:
        kind, look = of_site[site]
        h, e = GAINS[kind if kind in GAINS else str(rng.choice(list(GAINS)))]
        a, b = rng.uniform(1 - recipe.jitter, 1 + recipe.jitter, 2)
        looks.append(replace(look, haematoxylin=float(look.haematoxylin * h * a), eosin=float(look.eosin * e * b)))
    return looks


def _blob(m: int, centre: tuple[float, float], radius: float, rng: np.random.Generator) -> np.ndarray:
    """(m, m) float32: depth below an uneven round outline, in cells, negative outside."""
    y, x = np.mgrid[:m, :m].astype(np.float32)
    dy, dx = y + 0.5 - centre[0], x + 0.5 - centre[1]
    theta = np.arctan2(dy, dx)
    waves = [rng.normal(0, 0.12) / np.sqrt(k) * np.cos(k * theta + rng.uniform(0, 6.3)) for k in range(2, 8)]
    return radius * (1 + np.clip(sum(waves), -0.35, 0.35)) - np.hypot(dy, dx)


def _tumour_cells(focus: np.ndarray, corners: list[tuple[int, int]], size: int) -> set[tuple[int, int]]:
    """Corners (y, x in px) of the tiles that lie in the focus for the most part; at least the one that does most."""
    share = {}
    for y, x in corners:
        rows, columns = (slice(max(v, 0) // CELL, max((v + size) // CELL, 1)) for v in (y, x))
        part = focus[rows, columns]
        share[y, x] = float(part.mean()) if part.size else 0.0
    return {corner for corner in corners if share[corner] > 0.5} or {max(corners, key=lambda corner: share[corner])}


def compose_slide(
    path: Path, recipe: Recipe, look: Look, benign: Supply, tumour: Supply | None, mpp: float, seed: Sequence[int]
) -> dict[str, Any]:
    """Compose a slide at `path` with `truth/<id>_tissue16.png` and `_tumour16.png`; returns what was laid.

    `mpp`: um per px of the tiles, and so of the slide. Seams between tiles lie at a random offset.
    """
    rng, size = np.random.default_rng([*seed, 1]), benign.side
    across = recipe.across * TILE_UM / mpp  # px
    m = round((across + 2 * MARGIN * TILE_UM / mpp) / CELL)
    tissue = _blob(m, (m / 2, m / 2), 0.5 * across / CELL, rng) > 0
    focus = np.zeros_like(tissue)
    if tumour:
        away, radius = rng.uniform(0, 0.22) * across / CELL, rng.uniform(*recipe.focus) * across / CELL
        turn = rng.uniform(0, 2 * np.pi)
        focus = (_blob(m, (m / 2 + away * np.sin(turn), m / 2 + away * np.cos(turn)), radius, rng) > 0) & tissue
    rgb = np.empty((m * CELL, m * CELL, 3), np.uint8)
    rgb[:] = look.glass
    shift = rng.integers(0, size, 2)
    starts = [range(-int(s), m * CELL, size) for s in shift]
    inside = np.kron(tissue, np.ones((CELL, CELL), bool))
    corners = [(y, x) for y in starts[0] for x in starts[1] if inside[max(y, 0) : y + size, max(x, 0) : x + size].any()]
    chosen = _tumour_cells(focus, corners, size) if tumour else set()
    laid = np.zeros_like(inside)
    for y, x in corners:
        is_tumour = (y, x) in chosen
        tile = (tumour if tumour and is_tumour else benign).take()
        tile = np.rot90(restained(tile, look.haematoxylin, look.eosin), rng.integers(4))
        here = np.s_[max(y, 0) : y + size, max(x, 0) : x + size]
        part = tile[max(-y, 0) :, max(-x, 0) :][: rgb[here].shape[0], : rgb[here].shape[1]]
        rgb[here] = np.where(inside[here][..., None], part, rgb[here])
        laid[here] |= is_tumour & inside[here]
    scanner = np.random.default_rng([*seed, 2])
    for row in range(0, len(rgb), 512):  # noise strip by strip: memory
        strip = rgb[row : row + 512]
        grey = scanner.normal(0, look.noise, (*strip.shape[:2], 1)).astype(np.float32)
        strip[...] = np.clip(np.rint(strip + grey), 0, 255).astype(np.uint8)
    with committed(path) as work:
        write_slide(rgb, work, look.quality, mpp)
    tumour16 = laid.reshape(m, CELL, m, CELL).mean((1, 3)) >= 0.5
    for kind, mask in (("tissue", tissue), ("tumour", tumour16)):
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        write_image(path.parent / "truth" / f"{path.stem}_{kind}16.png", picture, format="PNG")
    return {
        "slide_id": path.stem,
        "tiles": len(corners),
        "tumour_fraction": round(float(tumour16.sum() / tissue.sum()), 4),
        "distinct": len(benign.given) + (len(tumour.given) if tumour else 0),
        "spoilt": {str(k): v for part in (benign, tumour) if part for k, v in part.spoilt.items()},
    }


def digest(**parts: Any) -> str:
    """32 hex digits over what determined something."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _patient(job: dict[str, Any]) -> dict[str, Any]:
    """Compose one patient's slide, unless it is there; runs in a worker process."""
    path, truth = job["path"], job["path"].parent / "truth" / f"{job['path'].stem}.json"
    record = read_json_if_whole(truth) or {}
    if record.get("fingerprint") == job["fingerprint"] and path.is_file() and record["sha256"] == file_sha256(path):
        return record
    supplies = [
        Supply(paths, job["side"], np.random.default_rng([*job["seed"], kind])) if paths else None
        for kind, paths in zip((3, 4), job["tiles"], strict=True)
    ]
    laid = compose_slide(path, job["recipe"], job["look"], *supplies, job["mpp"], job["seed"])
    record = {**laid, "fingerprint": job["fingerprint"], "sha256": file_sha256(path)}
    write_json(truth, record)
    return record


def compose_cohort(
    folder: Path, tiles: LabelledTiles, recipe: Recipe, seed: Sequence[int], mpp: float = 0.5, processes: int = 1
) -> list[dict[str, Any]]:
    """Compose a cohort in `folder`: slides/, slides/truth/ and slides.csv; returns the records of its slides.

    Slides that are there, whole and of the same settings and tiles, are kept. RunError where there are too few groups,
    or more than a fifth of the tiles that were asked for cannot be read.
    """
    rng = np.random.default_rng([*seed, 0])
    labels = [number % 2 for number in range(recipe.patients)]
    sites = _sites(recipe, labels, rng)
    dealt, looks = deal(tiles, labels, rng), draw_looks(recipe, sites, rng)
    jobs, rows = [], []
    for number, (label, site, look) in enumerate(zip(labels, sites, looks, strict=True)):
        name, own = f"P{number:03d}", [*seed, number + 10]
        job = {"recipe": recipe, "look": look, "tiles": dealt[number], "side": tiles.side, "mpp": mpp, "seed": own}
        known = {key: asdict(v) if key in ("recipe", "look") else str(v) for key, v in job.items()}
        job["fingerprint"] = digest(version=VERSION, **known)
        jobs.append(job | {"path": folder / "slides" / f"{name}.tiff"})
        where = {"site": f"site{site + 1}", "scanner": f"scanner{site + 1}", "label": ("benign", "tumour")[label]}
        rows.append({"slide_id": name, "path": f"slides/{name}.tiff", "patient_id": name, **where})
    (folder / "slides" / "truth").mkdir(parents=True, exist_ok=True)
    if processes > 1:
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
            records = list(pool.map(_patient, jobs))
    else:
        records = [_patient(job) for job in jobs]
    spoilt = {path: why for record in records for path, why in record["spoilt"].items()}
    asked = len(spoilt) + sum(record["distinct"] for record in records)
    if len(spoilt) > SPOILT_SHARE * asked:
        path, why = next(iter(spoilt.items()))
        raise RunError(f"{tiles.folder}: {len(spoilt)} of {asked} tiles cannot be read; {path}: {why}")
    write_sheet(folder / "slides.csv", rows)
    return records


def _sites(recipe: Recipe, labels: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Site of each patient. Without confounding, sites take turns within each label."""
    if recipe.sites == 1 or recipe.confound == 0.5:
        return [(number // 2) % recipe.sites for number in range(len(labels))]
    first = [recipe.confound if label else 1 - recipe.confound for label in labels]
    return [0 if rng.random() < p else int(rng.integers(1, recipe.sites)) for p in first]


def write_sheet(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a sample sheet, unless the same one is there (its time decides what runs again)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SHEET, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if not path.is_file() or path.read_text() != text.getvalue():
        write_text(path, text.getvalue())
