"""What a model looked at in one slide: scores per tile as table, picture, QuPath objects and galleries of tiles.

Attention says how much a tile weighed in the slide's prediction, not for which class and not why; leave-one-out says
how the prediction changes when the tile is taken away. Both are sensitivity, not causality, and the pictures say so.
Colour follows the percentile within the slide, because raw attention is heavy-tailed: a linear scale shows three tiles.
Scores come in as plain arrays, so nothing here imports torch. Slides with no tile or with one are legal.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.stats import rankdata

from slidemake.core.files import file_sums, write_json, write_text
from slidemake.explain.pictures import COLOURS, render_gallery, render_heatmap
from slidemake.statistics.class_metrics import auroc

FILES = ("scores.csv", "heatmap.png", "heatmap.geojson", "top.jpg", "bottom.jpg", "explain.json")
BINS = ((0, 50), (50, 75), (75, 90), (90, 95), (95, 100))  # percentiles of the colour classes in QuPath
TRUE_ABOVE = 0.5  # a tile counts as tumour when more than half of it is


def percentiles(scores: np.ndarray) -> np.ndarray:
    """Percentile within the slide (N,), 0..100: the middle of a tile's rank, equal scores level; NaN stays NaN.

    One tile alone is at 50: there is nothing to compare it with.
    """
    scores = np.asarray(scores, float)
    found, known = np.full(scores.shape, np.nan), np.isfinite(scores)
    if known.any():
        found[known] = 100 * (rankdata(scores[known]) - 0.5) / known.sum()
    return found


def select_diverse(scores: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """Indices of at most k tiles with high scores that do not all look alike, best first.

    The best max(5 k, 5 % of the tiles) are clustered by direction in feature space (k-means from farthest-first seeds,
    deterministic) and the best tile of each cluster is taken: ten copies of one gland fill one place. scores (N,) and
    features (N, D); NaN scores are never chosen; clusters that coincide are filled up with the next best.
    """
    scores = np.asarray(scores, float)
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")[: int(np.isfinite(scores).sum())]
    pool = order[: max(5 * k, len(scores) // 20)]
    if len(pool) <= k:
        return pool[:k]
    x = np.nan_to_num(np.asarray(features, float)[pool])
    x = x - x.mean(0)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cluster = _cluster(x, k)
    _, firsts = np.unique(cluster, return_index=True)  # the pool is in order of score: the first is the best
    rest = np.setdiff1d(np.arange(len(pool)), firsts)
    return pool[np.sort(np.concatenate([firsts, rest[: k - len(firsts)]]))]


def _cluster(x: np.ndarray, k: int) -> np.ndarray:
    """Cluster (n,) of each row: Lloyd's iterations, first centre the first row, each next the row farthest from all.

    By hand, because scikit-learn takes longer to import than this takes.
    """
    chosen, distance = [0], ((x - x[0]) ** 2).sum(1)
    while len(chosen) < k and distance.max() > 1e-9:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(1))
    centres, member = x[chosen], np.zeros(len(x), int)
    for _ in range(50):
        nearest = ((centres**2).sum(1) - 2 * x @ centres.T).argmin(1)
        if (nearest == member).all():
            break
        member = nearest
        for c in np.unique(member):
            centres[c] = x[member == c].mean(0)
    return member


def tile_truth(
    mask: str | Path | np.ndarray, coords: np.ndarray, tile_level0_px: tuple[float, float], downsample: float = 16
) -> np.ndarray:
    """Fraction of each tile that a mask covers, (N,) float in 0..1, exact to parts of mask pixels.

    mask: PNG file or array (h, w), set where above 127 (or True); downsample: level-0 px per mask px. Outside of the
    mask nothing is set. Computed from a summed-area table that is interpolated at the tile's corners.
    """
    if not isinstance(mask, np.ndarray):
        with Image.open(mask) as picture:
            mask = np.asarray(picture.convert("L")) > 127
    mask = mask if mask.dtype == bool else mask > 127
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(0, dtype=float).cumsum(1)
    x0, y0 = np.asarray(coords, float).reshape(-1, 2).T / downsample
    w, h = tile_level0_px[0] / downsample, tile_level0_px[1] / downsample

    def area(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        y, x = np.clip(y, 0, mask.shape[0]), np.clip(x, 0, mask.shape[1])
        i, j = np.minimum(y.astype(int), mask.shape[0] - 1), np.minimum(x.astype(int), mask.shape[1] - 1)
        v, u = y - i, x - j
        upper = table[i, j] * (1 - u) + table[i, j + 1] * u
        return upper * (1 - v) + (table[i + 1, j] * (1 - u) + table[i + 1, j + 1] * u) * v

    inside = area(y0 + h, x0 + w) - area(y0, x0 + w) - area(y0 + h, x0) + area(y0, x0)
    return np.clip(inside / (w * h), 0, 1)


def tile_auroc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """How well scores find the tiles whose truth exceeds 0.5; None without tiles of both kinds."""
    return auroc(np.asarray(truth) > TRUE_ABOVE, scores)


def _colour_classes() -> list[dict[str, Any]]:
    """QuPath's name and colour of each of BINS: the middle of the bin on the heatmap's scale."""
    middles = [(low, high, colormaps[COLOURS]((low + high) / 200)[:3]) for low, high in BINS]
    return [{"name": f"attention {a}-{b} %", "color": [round(255 * float(v)) for v in rgb]} for a, b, rgb in middles]


def write_geojson(
    coords: np.ndarray, tile_level0_px: tuple[float, float], measurements: dict[str, np.ndarray], path: str | Path
) -> None:
    """Tiles as QuPath detections in level-0 px: drop the file on the open slide.

    measurements: {name: (N,)}; `attention_percentile` gives the colour class. Values that are not finite are left out,
    because JSON has no NaN. Without tiles the collection is empty.
    """
    w, h = (round(float(v), 3) for v in tile_level0_px)
    rank, classes = measurements["attention_percentile"], _colour_classes()
    bins = np.searchsorted([high for _, high in BINS[:-1]], rank)
    features = []
    for i, (x, y) in enumerate(np.asarray(coords).reshape(-1, 2).tolist()):
        values = {name: float(f"{column[i]:.7g}") for name, column in measurements.items() if np.isfinite(column[i])}
        properties: dict[str, Any] = {"objectType": "detection", "isLocked": False, "measurements": values}
        if np.isfinite(rank[i]):
            properties["classification"] = classes[bins[i]]
        ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    collection = {"type": "FeatureCollection", "features": features}
    write_text(path, json.dumps(collection, separators=(",", ":"), allow_nan=False) + "\n")


def _write_scores(path: Path, coords: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("tile", "x", "y", *columns))
    for i, (x, y) in enumerate(coords.tolist()):
        values = (f"{column[i]:.7g}" if np.isfinite(column[i]) else "" for column in columns.values())
        writer.writerow((i, x, y, *values))
    write_text(path, text.getvalue())


def concentration(attention: np.ndarray) -> dict[str, float | None]:
    """How concentrated attention is: share of the top tenth of tiles, and number of tiles that matter, exp(entropy)."""
    a = np.asarray(attention, float)
    a = np.clip(a[np.isfinite(a)], 0, None)
    if not a.sum():
        return {"top_tenth_share": None, "effective_tiles": None}
    p = np.sort(a / a.sum())[::-1]
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    return {"top_tenth_share": float(p[: -(-len(p) // 10)].sum()), "effective_tiles": float(np.exp(entropy))}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation over tiles where both are known; None with fewer than 3 or a constant."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3:
        return None
    ranks = rankdata(a[known]), rankdata(b[known])
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def gallery(
    tiles: np.ndarray,
    scores: np.ndarray,
    coords: np.ndarray,
    mpp: float | None,
    out: str | Path,
    *,
    name: str,
    title: str,
    level0_mpp: tuple[float, float] | None = None,
    leave_one_out: np.ndarray | None = None,
) -> None:
    """Gallery of tiles (k, H, W, 3) with percentile (0..100), place on the slide and a scale bar in um.

    mpp: um per px of the tiles; level0_mpp: um per px (x, y) of level 0, in which coords (k, 2) are given; without it
    the place is in px. leave_one_out (k,): f(X) - f(X without the tile); its negative is written under the tile.
    """
    captions = []
    for i in range(len(tiles)):
        x, y = coords[i]
        place = f"x {x}, y {y} px"
        if level0_mpp:
            place = f"x {x * level0_mpp[0] / 1000:.2f}, y {y * level0_mpp[1] / 1000:.2f} mm"
        drop = np.nan if leave_one_out is None else leave_one_out[i]
        captions.append((f"percentile {scores[i]:.1f}", f"Δ {-drop:+.2g}" if np.isfinite(drop) else "", place))
    note = "Percentile of attention in the slide; sensitivity, not causality."
    if any(delta for _, delta, _ in captions):
        note += " Δ: change of the logit when the tile is left out."
    render_gallery(tiles, captions, out, mpp=mpp, name=name, title=title, note=note)


def explain_slide(
    folder: str | Path,
    *,
    slide_id: str,
    coords: np.ndarray,
    tile_level0_px: tuple[float, float],
    features: np.ndarray,
    attention: np.ndarray,
    leave_one_out: np.ndarray | None,
    read_tiles: Callable[[np.ndarray], np.ndarray] | None,
    overview: np.ndarray,
    sx: float,
    sy: float,
    mpp: tuple[float, float] | None,
    k: int = 10,
    truth: np.ndarray | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the explanation of one slide into `folder` (FILES, explain.json last) and return explain.json's content.

    coords (N, 2) and tile_level0_px (w, h) in level-0 px; features (N, D); attention (N,); leave_one_out (N,) =
    f(X) - f(X without the tile), or None for models that have none; read_tiles(indices) -> (k, H, W, 3) uint8, or None
    where nobody has the tiles: there are no galleries then;
    overview (h, w, 3) uint8 with sx, sy level-0 px per px; mpp um per level-0 px (x, y) or None; k tiles per gallery;
    truth (N,) fraction of each tile that is tumour, where known (`tile_truth`). `facts` (fingerprint, label, ...) are
    added to explain.json. N = 0 and N = 1 are legal; tiles whose score is NaN are listed and not drawn.
    """
    folder, coords = Path(folder), np.asarray(coords).reshape(-1, 2)
    n, attention = len(coords), np.asarray(attention, float).reshape(-1)
    loo = np.full(n, np.nan) if leave_one_out is None else np.asarray(leave_one_out, float).reshape(-1)
    lengths = {"attention": len(attention), "leave_one_out": len(loo), "features": len(features)}
    if any(length != n for length in lengths.values()):
        raise ValueError(f"{slide_id}: {n} tiles, but {', '.join(f'{v} {name}' for name, v in lengths.items())}")
    rank = percentiles(attention)
    columns = {"attention": attention, "attention_percentile": rank, "leave_one_out": loo}
    if truth is not None:
        columns["tumour"] = np.asarray(truth, float)
    folder.mkdir(parents=True, exist_ok=True)
    _write_scores(folder / "scores.csv", coords, columns)
    write_geojson(coords, tile_level0_px, columns, folder / "heatmap.geojson")
    place: dict[str, Any] = {"sx": sx, "sy": sy, "mpp": mpp and mpp[0], "title": slide_id}
    render_heatmap(overview, coords, tile_level0_px, rank, folder / "heatmap.png", **place)
    top = select_diverse(attention, features, k)
    bottom = select_diverse(np.where(np.isin(np.arange(n), top), np.nan, -attention), features, k)
    for name, chosen, word in (("top", top, "highest"), ("bottom", bottom, "lowest")) if read_tiles else ():
        title = f"{word} attention, {len(chosen)} of {n} tiles" + (", look-alikes left out" if len(chosen) < n else "")
        tiles = read_tiles(chosen) if read_tiles and len(chosen) else np.empty((0, 1, 1, 3), np.uint8)
        tile_mpp = mpp[0] * tile_level0_px[0] / tiles.shape[2] if mpp and len(chosen) else None
        gallery(
            tiles,
            rank[chosen],
            coords[chosen],
            tile_mpp,
            folder / f"{name}.jpg",
            name=slide_id,
            title=title,
            level0_mpp=mpp,
            leave_one_out=None if leave_one_out is None else loo[chosen],
        )
    record = {
        "slide_id": slide_id,
        "tiles": n,
        "without_score": int((~np.isfinite(attention)).sum()),
        "top": top.tolist(),
        "bottom": bottom.tolist(),
        **concentration(attention),
        "attention_vs_leave_one_out": rank_correlation(attention, loo),
        "tile_auroc": None if truth is None else tile_auroc(attention, columns["tumour"]),
        "tile_auroc_leave_one_out": None if truth is None else tile_auroc(loo, columns["tumour"]),
        "tumour_tiles": None if truth is None else int((columns["tumour"] > TRUE_ABOVE).sum()),
        "caption": "Attention is sensitivity, not causality: it shows where the model looked, not why.",
        **(facts or {}),
    }
    record["files"] = file_sums(folder, (path.name for path in folder.iterdir() if path.name in FILES[:-1]))
    write_json(folder / "explain.json", record)
    return record
