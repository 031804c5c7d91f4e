"""A toy encoder whose features are known, and jobs over stores of random tiles for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from slidemake.embedding.engine import SlideJob
from slidemake.embedding.stage import Lane, embedding_fingerprint, process_rack, stain_description
from slidemake.jobs.racks import run_rack
from slidemake.stores.arrays import write_array
from slidemake.stores.tile_store import TileCodec, create_store, shard_path, write_shard

SIDE, SHARD, DIM = 16, 8, 6


@dataclass(frozen=True)
class Record:
    key: str = "toy"
    dim: int = DIM
    tile_px: int = SIDE


class ToyEncoder:
    """Mean colour and spread of a tile: what it gives can be computed by hand. `limit` is its memory, in tiles."""

    record, path_name = Record(), "eager"
    identity: ClassVar = {"key": "toy"}

    def __init__(self, limit=10**9):
        self.limit, self.batches, self.loads = limit, [], 0

    def forward(self, batch, stain=None):
        if len(batch) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        self.batches.append(len(batch))
        values = (stain(batch) if stain else batch).float()
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


def make_tiles(path: Path, count: int, seed: int) -> np.ndarray:
    tiles = np.random.default_rng(seed).integers(40, 220, (count, SIDE, SIDE, 3)).astype(np.uint8)
    codec = TileCodec("zstd")
    group = create_store(path, count, SIDE, codec, SHARD)
    for start in range(0, count, SHARD):
        write_shard(shard_path(path, start // SHARD), [codec.encode(t) for t in tiles[start : start + SHARD]], SHARD)
    write_array(path, "coords", np.arange(2 * count, dtype=np.int32).reshape(-1, 2))
    write_array(path, "tissue", np.ones(count, np.float32))
    write_array(path, "quality", np.zeros((count, 1), np.float32))
    attributes = {"format": "slidemake-tiles", "format_version": 1, "tile_px": SIDE, "shard_tiles": SHARD}
    attributes |= {"store": "pixels", "pixels": "scanned", "codec": codec.as_dict(), "identity": "i", "grid": "g"}
    group.attrs.update({**attributes, "mpp": {}, "tile_level0_px": [SIDE, SIDE], "fingerprint": f"tiles{seed}"})
    return tiles


def expected(tiles: np.ndarray) -> np.ndarray:
    flat = tiles.reshape(len(tiles), SIDE * SIDE, 3).astype(np.float64)
    return np.concatenate([flat.mean(1), flat.std(1, ddof=1)], 1)


def job(folder, record, **changes):
    name = record["slide_id"]
    plain = SlideJob(
        slide_id=name,
        tiles=folder / "tiles" / f"{name}.zarr",
        out=folder / "embeddings" / f"{name}.zarr",
        stain=None,
        stain_info=stain_description(None),
        fingerprint=embedding_fingerprint(f"tiles {name}", {"key": "toy"}, stain_description(None), "float32"),
        slide={},
    )
    return replace(plain, **changes)


def run(rack, encoder, make=None, batch=8, threads=1):
    folder, records, _ = rack

    def load():
        encoder.loads += 1
        return encoder

    lane = Lane(load, make or partial(job, folder), partial(run_rack, "embed", folder / "manifest.json", rack="r0"))
    (done,) = process_rack(
        records,
        [lane],
        device="cpu",
        dtype="float32",
        batch_size=batch,
        threads=threads,
    )
    return done
