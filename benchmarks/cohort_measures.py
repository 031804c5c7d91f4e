"""What a run on a composed cohort came to, measured against its truth: from the files of the results folder."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from compose import CELL, digest
from PIL import Image
from slidemake.core.failures import RunError
from slidemake.core.files import read_json, read_json_if_whole, write_json
from yardstick import Bag, read_features, read_folds, scores, share_of_tiles, supervised_tiles, tile_auroc

TASK = "tumour"
YARDSTICK_VERSION = 2


def _truth(cohort: Path, slide: str, kind: str) -> np.ndarray:
    """(m, m) bool: tissue or tumour, one px per `CELL` level-0 px."""
    return np.asarray(Image.open(cohort / "slides" / "truth" / f"{slide}_{kind}16.png")) > 0


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def measure_cohort(cohort: Path) -> dict[str, Any]:
    """All figures of a finished run in `cohort`/results, as plain JSON."""
    results, rows = cohort / "results", _rows(cohort / "slides.csv")
    metrics = read_json(results / "tasks" / TASK / "metrics.json")
    auroc = {
        name: figure
        for name, model in metrics["models"].items()
        if (figure := model["scopes"]["pooled"]["metrics"]["auroc"]["value"]) is not None
    }
    models = [name for name, model in metrics["models"].items() if not model["control"]]
    bags = read_bags(cohort, rows, _features_of(results, models[0]))
    by_slide = [iou for row in rows if (iou := mask_iou(cohort, row["slide_id"])) is not None]
    attention = [a for row in rows if (a := attention_over_truth(cohort, models[0], row["slide_id"])) is not None]
    return {
        "slides": len(rows),
        "failed": dict(Counter(row["failure_code"] for row in _rows(results / "cohort" / "failures.csv"))),
        "tiles": sum(len(bag.features) for bag in bags),
        "models": models,
        "auroc": auroc,
        **yardstick(cohort, bags),
        "attention": float(np.mean(attention)) if attention else None,
        "mask_iou": float(np.median(by_slide)) if by_slide else None,
        "mask_iou_worst": min(by_slide, default=None),
        "stain": stain_judgement(results),
    }


def _features_of(results: Path, model: str) -> Path:
    """Folder of the embeddings that a model was trained on."""
    wanted = read_json(results / "tasks" / TASK / model / "bundle" / "bundle.json")
    found: dict[Path, set[str]] = {}  # folders of its encoder, and the stain methods of their slides
    for store in sorted((results / "embeddings").glob("*/*.zarr")):
        attrs = zarr.open_group(store, mode="r").attrs.asdict()
        if attrs["encoder"]["key"] == wanted["encoder"]["key"]:
            found.setdefault(store.parent, set()).add(str((attrs["stain"] or {}).get("method")))
    # A slide may be left as it is: only where several folders are of the encoder does the method decide.
    method = str(wanted["stain_of_features"]["method"])
    fitting = [folder for folder, methods in found.items() if len(found) == 1 or method in methods]
    if not fitting:
        raise RunError(
            f"{results}: none of the embeddings is of {wanted['encoder']['key']}, which {model} was trained on"
        )
    return fitting[0]


def read_bags(cohort: Path, rows: list[dict[str, str]], embeddings: Path) -> list[Bag]:
    """A bag per slide that has features, in the sheet's order."""
    bags = []
    for row in rows:
        store = embeddings / f"{row['slide_id']}.zarr"
        if not store.exists():
            continue
        features, coords = read_features(store)
        side = math.ceil(zarr.open_group(store, mode="r").attrs["tile_level0_px"][0])
        share = share_of_tiles(_truth(cohort, row["slide_id"], "tumour"), coords, side, CELL)
        bags.append(Bag(row["patient_id"], features, share, int(row["label"] == "tumour")))
    return bags


def yardstick(cohort: Path, bags: list[Bag]) -> dict[str, Any]:
    """Plain attention MIL and the supervised linear model of tiles; kept in `cohort`/yardstick.json until the features
    or the folds change."""
    folds = read_folds(cohort / "results" / "tasks" / TASK / "splits.csv")
    found = [bag for bag in bags if all(bag.name in of for of in folds)]
    key = digest(version=YARDSTICK_VERSION, folds=folds, bags={bag.name: _digest(bag) for bag in found})
    kept = read_json_if_whole(cohort / "yardstick.json")
    if not kept or kept.get("fingerprint") != key:
        auroc, attention = scores(found, folds)
        tiles = supervised_tiles(found, folds[0])
        kept = {"fingerprint": key, "plain": auroc, "plain_attention": attention, "tiles_supervised": tiles}
        write_json(cohort / "yardstick.json", kept)
    return {name: kept[name] for name in ("plain", "plain_attention", "tiles_supervised")}


def _digest(bag: Bag) -> str:
    arrays = [hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (bag.features, bag.tumour)]
    return digest(arrays=arrays, label=bag.label)


def attention_over_truth(cohort: Path, model: str, slide: str) -> float | None:
    """AUROC of a slide's tile weights (out of fold) against the tiles that are tumour for more than half; None where
    the slide has none, or was not explained."""
    table = cohort / "results" / "explain" / TASK / model / slide / "scores.csv"
    if not table.is_file():
        return None
    rows = [row for row in _rows(table) if row["attention"]]
    truth, store = _truth(cohort, slide, "tumour"), cohort / "results" / "tiles"
    side = next(
        zarr.open_group(path, mode="r").attrs["tile_level0_px"][0] for path in sorted(store.glob(f"*/{slide}.zarr"))
    )
    coords = np.array([(int(row["x"]), int(row["y"])) for row in rows]).reshape(-1, 2)
    share = share_of_tiles(truth, coords, math.ceil(side), CELL)
    return tile_auroc(share, np.array([float(row["attention"]) for row in rows]))


def mask_iou(cohort: Path, slide: str) -> float | None:
    """Intersection over union of the tissue mask with the true one, on the true one's cells; None without a mask. A
    slide that was told to have no tissue has an IoU of 0."""
    folder = cohort / "results" / "slides" / slide
    record, truth = read_json_if_whole(folder / "tissue.json"), _truth(cohort, slide, "tissue")
    if record is None or not (folder / "tissue.png").is_file():
        return 0.0 if _has_no_tissue(cohort, slide) else None
    mask = np.asarray(Image.open(folder / "tissue.png")) > 127
    across, down = record["level0_per_mask_px"]
    y, x = (
        np.clip(((np.arange(n) + 0.5) * CELL / step).astype(int), 0, limit - 1)
        for n, step, limit in zip(truth.shape, (down, across), mask.shape, strict=True)
    )
    found = mask[np.ix_(y, x)]
    return float((found & truth).sum() / max((found | truth).sum(), 1))


def _has_no_tissue(cohort: Path, slide: str) -> bool:
    failures = _rows(cohort / "results" / "cohort" / "failures.csv")
    return any(row["slide_id"] == slide and row["failure_code"] == "no_tissue" for row in failures)


def stain_judgement(results: Path) -> dict[str, Any]:
    """How slides were normalised, as cohort/slides.csv tells: the number of each kind (both stains, one alone), and why
    others were left as they are. Without such columns nothing was to be normalised."""
    normalised, left = Counter(), Counter()
    for row in _rows(results / "cohort" / "slides.csv"):
        applied = row.get("stain_applied")
        if applied and applied != "none":
            normalised[applied] += 1
        elif row["status"] == "ok":
            left["not asked for" if applied is None else row.get("stain_reason") or "not said"] += 1
    return {"normalised": dict(normalised), "left": dict(left)}
