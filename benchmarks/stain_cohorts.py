"""Cohorts of small bags of real tiles under the stains of several sites, for the comparison of stain methods.

A patient is a bag of tiles; those of positive patients hold a few of tumour. Tiles of one source group belong to one
patient. Stains are changed in optical density along Ruifrok and Johnston's vectors, per site and a little per patient;
then the scanner adds noise and compresses. The tiles' folder holds tiles.csv with path, label and group.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from compose import GAINS
from slidemake.robustness.corruptions import restained

TILE = 224  # px, at 0.5 um per px
GLASS = ((243, 241, 244), (246, 243, 238), (236, 240, 243), (240, 236, 240))  # RGB of clear glass of each site
LARGE = 5  # the first cohorts have more patients and tiles
QUALITY = (85, 75, 90, 80)  # JPEG quality of each site's scanner


@dataclass(frozen=True)
class Design:
    """One cohort. `stains` has one stain per site; `skew` is the share of positives at even sites (odd: the rest)."""

    name: str
    kind: str
    seed: int
    stains: tuple[str, ...]
    tumour: tuple[int, int] = (2, 5)  # tiles of tumour in a positive patient, from and to
    jitter: float = 0.15  # each patient's gains vary by this share
    skew: float = 0.5
    patients: int = 30
    tiles: int = 16


@dataclass
class Patient:
    """A bag: tiles (n, TILE, TILE, 3) uint8 as scanned, truth (n,) bool of tumour, the glass as the scanner sees it."""

    site: int
    label: int
    tiles: np.ndarray
    truth: np.ndarray
    glass: tuple[int, int, int]


def designs() -> list[Design]:
    """The cohorts of the comparison, in the order in which they are best worked off: kinds take turns."""
    one = [
        Design(f"same-{i}", "one stain everywhere", 200 + i, (stain,) * 3, tumour)
        for i, (stain, tumour) in enumerate(
            [("as-is", (2, 4)), ("purple", (2, 5)), ("pale", (2, 5)), ("pink", (3, 6)), ("purple", (1, 3))]
        )
    ]
    by_site = [
        Design(f"site-{i}", "stain by site", 300 + i, stains, tumour)
        for i, (stains, tumour) in enumerate(
            [
                (("as-is", "purple", "pale"), (2, 5)),
                (("pink", "purple", "as-is", "dark"), (2, 4)),
                (("pale", "pink"), (2, 5)),
                (("purple", "dark", "pink"), (3, 6)),
                (("as-is", "dark", "pale", "pink"), (1, 4)),
                (("purple", "pale"), (2, 4)),
            ]
        )
    ]
    by_label = [
        Design(f"label-{i}", "stain by site and label", 400 + i, stains, tumour, skew=skew)
        for i, (stains, tumour, skew) in enumerate(
            [
                (("purple", "as-is", "pink"), (2, 5), 0.75),
                (("pale", "dark"), (2, 5), 0.75),
                (("as-is", "pink", "purple", "pale"), (2, 4), 0.7),
                (("pink", "purple"), (3, 6), 0.8),
                (("dark", "as-is", "purple"), (2, 4), 0.75),
            ]
        )
    ]
    longest = max(len(one), len(by_site), len(by_label))
    found = [kind[i] for i in range(longest) for kind in (by_site, by_label, one) if i < len(kind)]
    return [replace(design, patients=36, tiles=24) if i < LARGE else design for i, design in enumerate(found)]


def compose(design: Design, folder: Path, benign: str, tumour: str) -> list[Patient]:
    """The patients of a cohort; `benign` and `tumour` are labels of tiles.csv."""
    rng = np.random.default_rng(design.seed)
    sites = np.arange(design.patients) % len(design.stains)
    chance = np.where(sites % 2 == 0, design.skew, 1 - design.skew)
    labels = np.zeros(design.patients, int)
    for site in range(len(design.stains)):
        at = rng.permutation(np.nonzero(sites == site)[0])
        labels[at[: int(np.clip(round(chance[at[0]] * len(at)), 2, len(at) - 2))]] = 1
    pools = {label: _pools(folder, label, design.patients, rng) for label in (benign, tumour)}
    cohort = []
    for i, (site, label) in enumerate(zip(sites, labels, strict=True)):
        count = int(rng.integers(design.tumour[0], design.tumour[1] + 1)) if label else 0
        paths = _pick(pools[tumour][i], count, rng) + _pick(pools[benign][i], design.tiles - count, rng)
        tiles = np.stack([_read(path) for path in paths])
        gains = np.asarray(GAINS[design.stains[site]]) * rng.uniform(1 - design.jitter, 1 + design.jitter, 2)
        scanned = _scan(restained(tiles, *gains), QUALITY[site], rng)
        cohort.append(Patient(int(site), int(label), scanned, np.arange(design.tiles) < count, GLASS[site]))
    return cohort


def _pools(folder: Path, label: str, patients: int, rng: np.random.Generator) -> list[list[Path]]:
    groups: dict[str, list[Path]] = {}
    with (folder / "tiles.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            if row["label"] == label:
                groups.setdefault(row["group"], []).append(folder / row["path"])
    names = rng.permutation(sorted(groups))
    return [[path for name in part for path in groups[str(name)]] for part in np.array_split(names, patients)]


def _pick(paths: list[Path], count: int, rng: np.random.Generator) -> list[Path]:
    """`count` of the paths, none twice before all were taken."""
    order = [int(i) for _ in range(-(-count // len(paths))) for i in rng.permutation(len(paths))]
    return [paths[i] for i in order[:count]]


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB").resize((TILE, TILE)))


def _scan(tiles: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a grey level or two, and the scanner's JPEG."""
    from PIL import Image

    noisy = np.clip(tiles.astype(np.int16) + rng.integers(-3, 4, (*tiles.shape[:3], 1)), 0, 255).astype(np.uint8)
    out = np.empty_like(noisy)
    for tile, found in zip(noisy, out, strict=True):
        coded = io.BytesIO()
        Image.fromarray(tile).save(coded, "JPEG", quality=quality)
        found[:] = np.asarray(Image.open(coded))
    return out
