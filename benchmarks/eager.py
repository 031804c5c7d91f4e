"""The default encoder as other pipelines run it, in a process of its own: eager, float32, PyTorch's own threads.

python eager.py SLIDE STORE TILES: prints {"model": tiles/s on tiles in memory, "loop": tiles/s of a DataLoader over
OpenSlide in front of it, and the same per second of CPU}. The allocator is what the environment says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from bench_reading import OpenSlideTiles
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.loading import build_model
from slidemake.encoders.registry import load_record
from slidemake.stores.tile_store import TileStore
from torch.utils.data import DataLoader

BATCH = 32  # the fastest of 8, 32 and 64 for these loops; workers: none, likewise


def main(slide: str, store_path: str, most: int) -> dict[str, float]:
    torch.set_num_threads(2)
    record = load_record("efficientnet_lite0")
    model, store = build_model(record, resolve_weights(record)), TileStore(store_path)
    coords, level = store.coords[:most], store.attrs["level"]
    tiles = torch.from_numpy(store.read(0, len(coords))).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (record.mean, record.std))

    @torch.inference_mode()
    def run(batch: torch.Tensor) -> Any:
        return model((batch.float() / 255 - mean) / std)

    def alone() -> None:
        for start in range(0, len(tiles), BATCH):
            run(tiles[start : start + BATCH])

    def loop() -> None:
        for batch in DataLoader(OpenSlideTiles(slide, level, store.tile_px, coords), batch_size=BATCH):
            run(batch)

    run(tiles[:BATCH])
    found = {}
    for name, work in (("model", alone), ("loop", loop)):
        found[name], found[f"{name}_cpu"] = rates(work, len(tiles))
    return found


def rates(work: Callable[[], None], count: int) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, os.times()
    return count / seconds, count / max(after.user + after.system - before.user - before.system, 1e-3)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
