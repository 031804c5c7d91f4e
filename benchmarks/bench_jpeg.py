"""What JPEG in the tile store does to the default encoder's features, by quality and chroma subsampling.

On real tiles where SLIDEMAKE_TEST_DATA names the project's test data (a scan, and tiles of colon), otherwise on drawn
ones. Tiles are cut so that they do not coincide with the blocks of the JPEG in which they were scanned: encoding those
again would lose next to nothing.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
from inputs import GRID, Slide, window_and_tiles

SETTINGS = [(quality, chroma) for chroma in ("444", "420") for quality in (70, 80, 90, 95)]
SIDE, SHIFT = 216, (3, 5)  # 27 blocks of 8 px; beside the grid of blocks


def real_tiles(folder: Path, most: int) -> np.ndarray:
    """Half of a scanned slide, half of single tiles: (n, SIDE, SIDE, 3)."""
    import imagecodecs
    from slidemake.slides.opening import open_slide

    found = []
    with open_slide(str(folder / "slides" / "cmu-1-small-region.svs"), reader="openslide") as reader:
        for y in range(SHIFT[1], 2967 - SIDE, SIDE):
            for x in range(SHIFT[0], 2220 - SIDE, SIDE):
                found.append(reader.read_level(x, y, 0, SIDE, SIDE))
    found = [tile for tile in found if tile.mean() < 225][: most // 2]  # not background
    with open(folder / "tiles_colon" / "tiles.csv", newline="") as handle:
        paths = [row["path"] for row in csv.DictReader(handle)]
    for path in paths[:: max(1, len(paths) // max(1, most - len(found)))][: most - len(found)]:
        tile = imagecodecs.imread(folder / "tiles_colon" / path)
        found.append(tile[SHIFT[1] : SHIFT[1] + SIDE, SHIFT[0] : SHIFT[0] + SIDE])
    return np.stack(found)


def drawn_tiles(slide: Slide, most: int) -> np.ndarray:
    from slidemake.slides.opening import open_slide
    from slidemake.tiles.reading import read_tiles

    window, coords = window_and_tiles(slide, GRID)
    with open_slide(slide.path, reader=slide.facts["reader"]) as reader:
        return read_tiles(reader, coords[:most], window)[0]


def measure(slide: Slide, most: int) -> list[dict[str, Any]]:
    """One entry per setting: bytes per tile of 224 px, and cosines between features of a tile before and after."""
    import torch
    from bench_embedding import BATCH, ENCODER
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import load_record
    from slidemake.stores.jpeg_codec import decode_jpeg, encode_jpeg

    data = os.environ.get("SLIDEMAKE_TEST_DATA")
    tiles = real_tiles(Path(data), most) if data else drawn_tiles(slide, most)
    encoder = load_encoder(load_record(ENCODER), "cpu", "fp32")

    def features(of: np.ndarray) -> np.ndarray:
        batches = [torch.from_numpy(of[i : i + BATCH]).permute(0, 3, 1, 2) for i in range(0, len(of), BATCH)]
        rows = np.concatenate([encoder.forward(batch).numpy() for batch in batches]).astype(float)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    before = features(tiles)
    others = np.sort(before @ before.T, axis=1)[:, -2]  # of each tile with the most similar other one
    entries = []
    for quality, chroma in SETTINGS:
        encoded = [encode_jpeg(tile, quality, chroma) for tile in tiles]
        after = features(np.stack([decode_jpeg(data) for data in encoded]))
        cosines = np.einsum("nd,nd->n", before, after)
        itself = (np.argmax(after @ before.T, axis=1) == np.arange(len(tiles))).mean()
        entries.append(
            {
                "tiles": f"{len(tiles)} {'real' if data else 'drawn'}",
                "quality": quality,
                "subsampling": chroma,
                "kb": float(np.mean([len(e) for e in encoded])) * (224 / tiles.shape[1]) ** 2 / 1000,
                "median": float(np.median(cosines)),
                "worst_percent": float(np.quantile(cosines, 0.01)),
                "nearest_other": float(np.median(others)),
                "finds_itself": float(itself),
            }
        )
    return entries
