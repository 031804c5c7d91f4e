"""Pictures and facts that the report makes from stores: stain before and after, and what an encoder was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slidemake.cohort_table import read_table
from slidemake.provenance import read_json, read_json_if_whole, write_image

PER_SITE = 2
TILES_SHOWN = 5


def stain_pictures(results: Path, folder: Path, grid: str, target: str | Path) -> list[dict[str, Any]]:
    """Tiles of up to two slides a site as scanned (above) and as the encoder sees them (below), written to `folder`.

    The slides are the first of each site with a stain fit, the tiles those with most tissue. Empty when the method is
    none.
    """
    from PIL import Image

    from slidemake.stain import StainTransform, apply_stain_numpy
    from slidemake.stain_stage import slide_transform
    from slidemake.tiles import TileStore

    reference = read_json(target)
    if reference["status"] == "none":
        return []
    shown: dict[str, int] = {}
    pictures = []
    for row in read_table(results / "cohort" / "slides.csv"):
        site = row.get("site") or "no site"
        store_path = results / "tiles" / grid / f"{row['slide_id']}.zarr"
        if row["status"] != "ok" or shown.get(site, 0) >= PER_SITE or not store_path.exists():
            continue
        transform = StainTransform.from_dict(slide_transform(results, row["slide_id"], reference))
        store = TileStore(store_path)
        if transform.status != "ok" or not store.has_pixels or not len(store):
            continue
        shown[site] = shown.get(site, 0) + 1
        fullest = np.flatnonzero(store.tissue >= store.tissue.max() - 0.02)
        chosen = fullest[np.linspace(0, len(fullest) - 1, min(TILES_SHOWN, len(fullest))).astype(int)]
        before = store.read_tiles(chosen)
        after = apply_stain_numpy(before, transform) if store.attrs["pixels"] == "scanned" else before
        sheet = np.concatenate([np.concatenate(list(tiles), axis=1) for tiles in (before, after)])
        image = Image.fromarray(sheet)
        image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
        path = folder / "stain" / f"{row['slide_id']}.jpg"
        write_image(path, image, format="JPEG", quality=85)
        pictures.append({"site": site, "slide_id": row["slide_id"], "method": transform.method, "path": str(path)})
    return sorted(pictures, key=lambda entry: (entry["site"], entry["slide_id"]))


def encoder_facts(results: Path, encoders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Identity of each encoder as the first embedding store of the cohort has it, and its licence ({name: licence})."""
    facts = {}
    for encoder, licence in encoders.items():
        for store in sorted((results / "embeddings" / encoder).glob("*.zarr")):
            stored = read_json_if_whole(store / "zarr.json") or {}
            if "encoder" in stored.get("attributes", {}):
                facts[encoder] = {**stored["attributes"]["encoder"], "licence": licence}
                break
    return facts
