"""Pictures and facts that the report makes from stores: stain before and after, and what an encoder was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.files import read_json, read_json_if_whole, write_image
from slidemake.core.tables import read_table

PER_SITE = 2
OTHERS = 8  # slides shown of those that are not brought to the reference by both stains
TILES_SHOWN = 5
APART = 0.1  # share of slides left as they are from which the report warns that they stand apart


def stain_pictures(results: Path, folder: Path, grid: str, target: str | Path) -> list[dict[str, Any]]:
    """Tiles of slides as scanned (above) and as the encoder sees them (below), written to `folder`.

    Shown are the first slides of each site, and up to `OTHERS` whose fit did not pass: of those that are left as they
    are the lower row is what the fit would have made of them. Tiles are those with most tissue. Empty when the method
    is none.
    """
    reference = read_json(target)
    shown: dict[Any, int] = {}
    pictures = []
    for row in read_table(results / "cohort" / "slides.csv"):
        store = results / "tiles" / grid / f"{row['slide_id']}.zarr"
        if row["status"] != "ok" or not store.exists():
            continue
        for method in (None, *reference.get("also", {})):
            applied = row.get(f"stain_applied_{method}" if method else "stain_applied")
            kind = (method, row.get("site") or "no site") if applied == "both" else (method, None)
            if applied and shown.get(kind, 0) < (PER_SITE if applied == "both" else OTHERS):
                about = _stain_picture(results, folder, store, row, reference, method)
                if about:
                    shown[kind] = shown.get(kind, 0) + 1
                    pictures.append(about)
    return sorted(pictures, key=lambda entry: (entry["applied"] == "both", entry["site"], entry["slide_id"]))


def _stain_picture(
    results: Path, folder: Path, store_path: Path, row: dict[str, str], reference: dict[str, Any], method: str | None
) -> dict[str, Any] | None:
    """One picture and what it shows; None where the store keeps no pixels as scanned, or there was no fit to show."""
    from PIL import Image

    from slidemake.stain.fit import StainTransform, apply_stain_numpy, stain_transform
    from slidemake.stain.judgement import in_words
    from slidemake.stain.stage import slide_transform, stain_file, target_of
    from slidemake.stores.tile_store import TileStore

    slide_id = row["slide_id"]
    transform = StainTransform.from_dict(slide_transform(results, slide_id, reference, method))
    below = transform
    if transform.status != "ok":  # what was refused
        other = method if method in reference.get("also", {}) else None
        fit = read_json(results / "slides" / slide_id / stain_file(other))
        below = stain_transform(fit, target_of(reference, method))
    store = TileStore(store_path)
    if not store.has_pixels or not len(store):
        return None
    fullest = np.flatnonzero(store.tissue >= store.tissue.max() - 0.02)
    chosen = fullest[np.linspace(0, len(fullest) - 1, min(TILES_SHOWN, len(fullest))).astype(int)]
    before = store.read_tiles(chosen)
    both = [before]
    if store.attrs["pixels"] == "scanned" and below.status == "ok":
        both.append(apply_stain_numpy(before, below))
    image = Image.fromarray(np.concatenate([np.concatenate(list(tiles), axis=1) for tiles in both]))
    image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    path = folder / "stain" / f"{slide_id}{f'_{method}' if method else ''}.jpg"
    write_image(path, image, format="JPEG", quality=85)
    return {
        "site": row.get("site") or "no site",
        "slide_id": slide_id,
        "method": transform.method,
        "applied": transform.applied,
        "reason": in_words(transform.reason or ""),
        "path": str(path),
    }


def stain_sentences(rows: list[dict[str, str]]) -> list[str]:
    """How many slides were brought to the reference, by what, and why the others were not: one sentence a method."""
    from slidemake.stain.judgement import in_words

    columns = sorted({key for row in rows for key in row if key.startswith("stain_applied")})
    found = []
    for column in columns:
        judged = [row for row in rows if row.get(column)]
        count = Counter(row[column] for row in judged)
        reasons = Counter(
            in_words(reason)
            for row in judged
            if row[column] != "both"
            for reason in row[column.replace("applied", "reason")].split()
        )
        both = "is" if count["both"] == 1 else "are"
        parts = [f"{count['both']} of {len(judged)} slides {both} brought to the reference"]
        parts += [f"{count[stain]} more by {stain} alone" for stain in ("haematoxylin", "eosin") if count[stain]]
        if count["none"]:
            parts.append(f"{count['none']} {'goes' if count['none'] == 1 else 'go'} into the encoder as scanned")
        why = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
        name = column.removeprefix("stain_applied").lstrip("_")
        found.append(f"{f'{name}: ' if name else ''}{', '.join(parts)}{f'. Reasons: {why}' if why else ''}.")
        if count["none"] < len(judged) and count["none"] >= APART * len(judged):
            found[-1] += (
                " Slides that go as scanned among normalised ones stand apart from them, and a model can follow that: "
                "with so many, stain.method: none is the safer choice."
            )
    return found


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
