"""Masks of tissue against the truth: slidemake's, TIAToolbox's two maskers and simple rules on the same overviews.

    python benchmarks/tissue.py --composed COHORT --images DATA/images/sections

Three kinds of truth. Real sections with outlines drawn by hand (tests/outlines). Slides composed of real tiles, with
the mask they were composed by (a folder of `<slide>.tiff` and `<slide>_tissue16.png`). Pictures drawn here by
Beer-Lambert with one trouble each: a halo of eosin, ink beside and on tissue, fat, a fold, a bubble, dust, scratches,
the edge of a label, faint IHC, pale and greenish tissue.

HistoQC itself could not be installed (PyPI has no package of that name): `brightness` has fixed thresholds of its kind,
at its working resolution.

Prints a Markdown table: IoU, surplus (share of the mask that is no tissue) and loss (share of the tissue that is not in
the mask), mean over the pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage as ndi
from shapely.geometry import shape
from slidemake.tissue.detection import detect_tissue
from slidemake.tissue.geometry import polygons_mask

MPP = 8.0
STAINS = {"h": (0.65, 0.70, 0.29), "e": (0.07, 0.99, 0.11), "dab": (0.27, 0.57, 0.78), "green": (1.0, 0.72, 0.93)}
MIXES = {
    "faint IHC": {"h": 0.06, "dab": 0.03},
    "pale, greenish": {"green": 0.025},
    "teal on dense purple": {"h": 0.65, "e": 0.15},
}
INKS = {  # (145, 210, 201) is the ink of the real green ring
    "light ink": (145, 210, 201),
    "light blue ink": (160, 195, 240),
    "dark ink": (40, 95, 90),
    "teal on dense purple": (43, 94, 96),
    "light ink on tissue": (145, 210, 201),
}
LABELS = {"cream label": (232, 226, 205), "pink label": (238, 190, 200), "green label": (196, 222, 190)}
DRAWN = (
    *(
        "plain",
        "halo",
        "light ink",
        "light blue ink",
        "dark ink",
        "light ink on tissue",
        "teal on dense purple",
        "fat",
        "fold",
        "bubble",
    ),
    *("dust", "scratches", *LABELS, "faint IHC", "pale, greenish"),
)
OUTLINES = Path(__file__).parents[1] / "tests" / "outlines"
Case = tuple[str, np.ndarray, float, np.ndarray, np.ndarray]  # kind, rgb, mpp, truth, where it is scored


def real_cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("*_mpp*.jpg")):
        name, mpp = path.stem.split("_mpp")
        outline = OUTLINES / f"{name}.geojson"
        if not outline.exists():
            continue
        whole = Image.open(path).convert("RGB")
        size = [round(side * float(mpp) / MPP) for side in whole.size]
        scale = whole.width / size[0], whole.height / size[1]
        areas: dict[str, np.ndarray] = {}
        for feature in json.loads(outline.read_text())["features"]:
            kind = feature["properties"]["classification"]["name"]
            area = polygons_mask([shape(feature["geometry"])], (size[1], size[0]), scale)
            areas[kind] = areas.get(kind, np.zeros_like(area)) | area
        none = np.zeros((size[1], size[0]), bool)
        rgb = np.asarray(whole.resize(size, Image.Resampling.BOX))
        truth = areas["Tissue"] & ~areas.get("Pen*", none)
        yield f"real: {name}", rgb, float(mpp) * scale[0], truth, ~areas.get("Unsure*", none)


def composed_cases(folder: Path) -> Iterator[Case]:
    from slidemake.slides.opening import open_slide

    for path in sorted(folder.glob("*.tiff")):
        with Image.open(path.with_name(f"{path.stem}_tissue16.png")) as mask, open_slide(path) as slide:
            truth = np.asarray(mask.convert("L")) > 127
            rgb, sx, _ = slide.overview(MPP)
            mpp = float(slide.mpp or 0.5) * sx
        if truth.shape != rgb.shape[:2]:
            truth = np.asarray(Image.fromarray(truth).resize(rgb.shape[1::-1], Image.Resampling.NEAREST))
        yield "composed of real tiles", rgb, mpp, truth, np.ones_like(truth)


def drawn_cases(seeds: range) -> Iterator[Case]:
    for seed in seeds:
        for kind in DRAWN:
            rgb, truth = draw(kind, np.random.default_rng([seed, len(kind)]))
            yield f"drawn: {kind}", rgb, MPP, truth, np.ones_like(truth)


def draw(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A slide of 5.6 x 6.4 mm with one piece of tissue and one trouble: rgb (700, 800, 3), truth (700, 800)."""
    high, wide = 700, 800
    y, x = np.mgrid[:high, :wide].astype(float)
    angle, radius = np.arctan2(y - 350, x - 330), np.hypot((y - 350) / 200, (x - 330) / 240)
    wave = sum(rng.normal(0, 0.05) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(2, 8))
    truth = radius < 1 + wave
    mix = MIXES.get(kind) or {"h": rng.uniform(0.1, 0.3), "e": rng.uniform(0.1, 0.3)}
    grain = ndi.gaussian_filter(rng.standard_normal((high, wide)), 1.2)
    grain = np.clip(1 + 0.4 * grain / grain.std(), 0.15, None) * truth
    od = sum((amount * grain)[..., None] * np.asarray(STAINS[name]) for name, amount in mix.items())
    if kind == "halo":
        distance = ndi.distance_transform_edt(~truth)
        od += (0.09 * np.exp(-distance / 90) * (x > 300))[..., None] * np.asarray(STAINS["e"])
    if kind == "fat":
        lobule = (np.hypot((y - 350) / 190, (x - 600) / 160) < 1) & ~truth
        od += (_membranes(rng, lobule, 10) * 0.12)[..., None] * np.asarray((0.12, 0.95, 0.25))
        truth = truth | lobule
    if kind == "fold":
        od[np.abs(y - 300 - 0.3 * x) * truth + 99 * ~truth < 8] *= 2.3
    rgb = np.asarray((244, 242, 243)) * 10**-od
    if kind in INKS:
        line = np.abs(x - (300 if "on " in kind else 560) - 80 * np.sin(y / 110)) < 16
        soft = ndi.gaussian_filter(line.astype(float), 2.5)[..., None]
        rgb *= (np.asarray(INKS[kind]) / 244) ** soft
        truth = truth & ~(soft[..., 0] > 0.1)
    if kind == "bubble":
        rgb[np.abs(np.hypot(y - 150, x - 680) - 70) < 4] *= 0.62
    if kind == "dust":
        for cy, cx in zip(rng.integers(5, high - 5, 150), rng.integers(5, wide - 5, 150), strict=True):
            rgb[cy : cy + rng.integers(1, 5), cx : cx + rng.integers(1, 5)] *= rng.uniform(0.3, 0.8)
        for _ in range(6):
            slope, offset = rng.normal(0, 1), rng.uniform(0, high)
            rgb[np.abs(y - offset - slope * x) < 1] *= 0.85
    if kind == "scratches":
        _scratch(rgb, rng)
    if kind in LABELS:
        _label(rgb, LABELS[kind], rng)
    rgb += rng.normal(0, 1.2, rgb.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8), truth


def _scratch(rgb: np.ndarray, rng: np.random.Generator) -> None:
    """Forty scratches along much the same direction, dark with a bright rim, over glass and tissue alike."""
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]].astype(float)
    for _ in range(40):
        slope, width = rng.normal(0.5, 0.25), rng.uniform(0.6, 1.6)
        away = (y - rng.uniform(-300, 900) - slope * x) / np.hypot(1, slope) / width
        here = (x > rng.uniform(0, 500)) & (x < rng.uniform(500, 800))
        rgb *= (1 - rng.uniform(0.1, 0.45) * np.exp(-(away**2)) * here)[..., None]
        rgb += (rng.uniform(0, 25) * np.exp(-((away - 2) ** 2)) * here)[..., None]


def _label(rgb: np.ndarray, colour: tuple[int, int, int], rng: np.random.Generator) -> None:
    """The edge of a printed label at the right border, with its shadow on the glass."""
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]].astype(float)
    beside = 720 + 4 * np.sin(y / 90) - x
    paper = np.asarray(colour) * (1 + 0.036 * ndi.gaussian_filter(rng.standard_normal(x.shape), 1)[..., None])
    for top in range(60, 640, 36):
        for left in range(738, 800, 14):
            if rng.random() < 0.8:
                paper[top : top + 22, left : left + rng.integers(3, 9)] = (45, 45, 50)
    rgb *= (1 - 0.45 * np.exp(-np.clip(beside, 0, None) / 5))[..., None]
    rgb[beside < 0] = paper[beside < 0]


def _membranes(rng: np.random.Generator, area: np.ndarray, cell: int) -> np.ndarray:
    """(h, w) 0..1: walls between cells of about `cell` px, where two jittered grid points are as near."""
    from scipy.spatial import cKDTree

    high, wide = area.shape
    points = np.stack(np.mgrid[0:high:cell, 0:wide:cell], -1).reshape(-1, 2) + rng.uniform(0, cell, (1, 2))
    points = points + rng.uniform(-0.4 * cell, 0.4 * cell, points.shape)
    where = np.argwhere(area)
    near, _ = cKDTree(points).query(where, k=2)
    walls = np.zeros(area.shape)
    walls[tuple(where.T)] = np.clip(1 - (near[:, 1] - near[:, 0]) / 2, 0, 1)
    return walls


def by_brightness(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Fixed rules in the manner of HistoQC (Janowczyk et al. 2019): neither bright nor dark, without specks and holes.

    Grey between 0.15 and 0.9 of white at 8 um per px; holes below 1,000 px filled, objects below 64 px removed.
    """
    grey = ndi.gaussian_filter(rgb.mean(2) / 255, 1)
    mask = (grey < 0.9) & (grey > 0.15)
    unit = (MPP / mpp) ** 2
    for value, least in ((False, 1000 * unit), (True, 64 * unit)):
        labels, _ = ndi.label(mask == value)
        small = np.bincount(labels.ravel()) < least
        small[0] = False
        mask = np.where(small[labels], not value, mask)
    return mask


def maskers() -> dict[str, Callable[[np.ndarray, float], np.ndarray]]:
    from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker

    return {
        "slidemake": lambda rgb, mpp: detect_tissue(rgb, mpp).mask,
        "TIAToolbox Otsu": lambda rgb, mpp: np.asarray(OtsuTissueMasker().fit_transform(rgb[None])[0], bool),
        "TIAToolbox morphological": lambda rgb, mpp: np.asarray(
            MorphologicalMasker(mpp=mpp).fit_transform(rgb[None])[0], bool
        ),
        "brightness": by_brightness,
    }


def scores(mask: np.ndarray, truth: np.ndarray, scored: np.ndarray) -> tuple[float, float, float]:
    """IoU, surplus and loss."""
    mask, truth = mask & scored, truth & scored
    both = float((mask & truth).sum())
    return (
        both / max(float((mask | truth).sum()), 1),
        1 - both / max(float(mask.sum()), 1),
        1 - both / max(float(truth.sum()), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of the real sections, <name>_mpp<um per px>.jpg")
    parser.add_argument("--composed", type=Path, nargs="*", default=[], help="folders of composed cohorts")
    parser.add_argument("--drawn", type=int, default=5, help="drawn pictures per kind")
    options = parser.parse_args()
    cases = list(real_cases(options.images)) if options.images else []
    cases += [case for folder in options.composed for case in composed_cases(folder)]
    cases += list(drawn_cases(range(options.drawn)))
    methods = maskers()
    rows: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for kind, rgb, mpp, truth, scored in cases:
        for name, method in methods.items():
            rows.setdefault(kind, {}).setdefault(name, []).append(scores(method(rgb, mpp), truth, scored))
    print("| pictures | n | " + " | ".join(f"{name}: IoU, surplus, loss" for name in methods) + " |")
    print("|---|---|" + "---|" * len(methods))
    for kind, found in rows.items():
        cells = [np.mean(found[name], axis=0) for name in methods]
        text = " | ".join(f"{iou:.3f}, {100 * more:.1f} %, {100 * less:.1f} %" for iou, more, less in cells)
        print(f"| {kind} | {len(found['slidemake'])} | {text} |")


if __name__ == "__main__":
    main()
