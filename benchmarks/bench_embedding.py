"""Slide to embedding beside the model alone on tiles in memory, and stain normalisation beside the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers as peer_programs
from inputs import Slide, tile
from measure import Row, Timed, compare, cpu_seconds, in_turns

THREADS, BATCH = 2, 16
PEER_TURNS = 2  # of the other programs: each takes a quarter of a minute
ENCODER = "efficientnet_lite0"


def stain_transform() -> dict[str, Any]:
    """A Macenko transform of one H&E stain to another: what it costs does not depend on the numbers."""
    from slidemake.stain.fit import StainFit
    from slidemake.stain.fit import stain_transform as make
    from slidemake.stain.targets import pool_targets

    source = StainFit(
        "macenko", (240.0, 238.0, 235.0), ((0.65, 0.70, 0.29), (0.10, 0.95, 0.28)), (1.8, 1.0), None, None, 1
    )
    target = StainFit(
        "macenko", (255.0, 255.0, 255.0), ((0.56, 0.73, 0.39), (0.12, 0.84, 0.53)), (1.6, 1.1), None, None, 1
    )
    described = [{**target.as_dict(), "status": "ok", "slide_id": "t", "fingerprint": "t"}]
    return make(source, pool_targets(described, "macenko")).as_dict()


def embed(encoder: Any, slide: Slide, store: Path, copies: int, folder: Path, stain: dict | None = None) -> float:
    """The embedding stage on `copies` slides that share one store, to finished embedding stores."""
    from slidemake.embedding.engine import SlideJob
    from slidemake.embedding.stage import Lane, process_rack, stain_description
    from slidemake.jobs.racks import run_rack
    from slidemake.stores.tile_store import TileStore

    count = len(TileStore(store))
    records = [{"slide_id": f"s{i}", "status": "ok", "failure": None, "tiles": count} for i in range(copies)]

    def job(record: dict[str, Any]) -> SlideJob:
        out = folder / "embeddings" / f"{record['slide_id']}.zarr"
        info = {"method": "macenko", "target": None, "slide": None} if stain else stain_description(None)
        return SlideJob(record["slide_id"], store, out, stain, info, "benchmark", slide.facts)

    (done,) = process_rack(
        records,
        [Lane(lambda: encoder, job, partial(run_rack, "embed", folder / "manifest.json", rack="r0"))],
        device="cpu",
        dtype="float16",
        batch_size=BATCH,
        threads=THREADS,
    )
    shutil.rmtree(folder)
    if [r["status"] for r in done] != ["ok"] * copies:
        raise SystemExit(f"embedding failed: {done}")
    return count * copies


def model_alone(encoder: Any, tiles: np.ndarray, work: Callable[[Any, Any], Any] | None = None) -> float:
    """The engine's own arrangement (as many batches side by side as threads) with nothing to wait for."""
    from slidemake.embedding.forward import Forward, prepare_thread

    forward = Forward(encoder, "cpu", BATCH)
    parts = [tiles[i : i + BATCH] for i in range(0, len(tiles), BATCH)]
    with ThreadPoolExecutor(THREADS, initializer=prepare_thread) as pool:
        list(pool.map(work or (lambda part: forward(part, None)), parts))
    return len(tiles)


def one_batch_two_threads(encoder: Any, tiles: np.ndarray) -> float:
    """The other arrangement: one batch at a time, each layer on all threads."""
    import torch

    torch.set_num_threads(THREADS)
    for start in range(0, len(tiles), BATCH):
        encoder.forward(torch.from_numpy(tiles[start : start + BATCH]).permute(0, 3, 1, 2))
    return len(tiles)


def network_alone(encoder: Any, tiles: np.ndarray) -> float:
    """The network without resize and normalisation: ready floats, the same batch again and again."""
    import torch

    ready = encoder.preprocess(torch.from_numpy(tiles[:BATCH]).permute(0, 3, 1, 2), None)
    ready = ready.contiguous(memory_format=torch.channels_last)

    def work(part: np.ndarray) -> Any:
        with torch.inference_mode():
            return encoder.model(ready[: len(part)])

    return model_alone(encoder, tiles, work)


def eager(slide: Slide, store: Path, tiles: int, malloc: bool) -> dict[str, float]:
    """`eager.py` in a process of its own: {"model": tiles/s, "loop": tiles/s}."""
    command = [sys.executable, str(Path(__file__).with_name("eager.py")), slide.path, str(store), str(tiles)]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment = plain | (peer_programs.MALLOC if malloc else {})
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(large: Slide, small: Slide, size: dict[str, Any], folder: Path, others: dict[str, Any]) -> list[Row]:
    """Rows of embedding one slide, and many small ones; the tiles in memory are the first of the one slide.

    `others`: peers that are installed, as `peers.find` gives them.
    """
    from slidemake.jobs.memory import keep_freed_memory

    keep_freed_memory()
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import load_record
    from slidemake.stores.tile_store import TileStore

    copies, turns, most = size["slides"], size["turns"]["embedding"], size["embed"]
    encoder = load_encoder(load_record(ENCODER), "cpu", "fp32")
    stores = {s.slide_id: (tile(s), tile(at(s), store="coords")) for s in (large, small)}
    tiles = TileStore(stores[large.slide_id][0]).read(0, min(most, len(TileStore(stores[large.slide_id][0]))))
    runs: dict[str, Callable[[], float]] = {"model": partial(model_alone, encoder, tiles)}
    kinds = (("large", large, 1), ("many", small, copies))
    for kind, slide, times in kinds:
        for source, store in zip(("store", "slide"), stores[slide.slide_id], strict=True):
            where = folder / f"{kind}-{source}"
            runs[f"{kind} {source}"] = partial(embed, encoder, slide, store, times, where)
    runs["stained"] = partial(embed, encoder, large, stores[large.slide_id][0], 1, folder / "stain", stain_transform())
    runs["network"] = partial(network_alone, encoder, tiles)
    runs["intra"] = partial(one_batch_two_threads, encoder, tiles)
    peers: dict[str, Timed] = {f"{w} {m}": Timed() for w in ("model", "loop") for m in (False, True)}
    others = {name: others[name] for name in peer_programs.TITLES if name in others}
    programs = {(name, malloc): Timed() for name in others for malloc in (False, True)}
    measured = {name: Timed() for name in runs}
    model_alone(encoder, tiles[: 4 * BATCH])  # the first calls of a traced model optimise it
    for turn in range(turns):  # other processes take turns with this one
        for name, timed in in_turns(runs, 1, warm=False).items():
            measured[name].add(timed)
        if turn >= PEER_TURNS:
            continue
        for malloc in (False, True):
            found = eager(large, stores[large.slide_id][0], size["eager"], malloc)
            for what in ("model", "loop"):
                peers[f"{what} {malloc}"].wall.append(found[what])
                peers[f"{what} {malloc}"].cpu.append(found[f"{what}_cpu"])
        for (name, malloc), timed in programs.items():
            if len(timed.wall) == turn:  # one that failed is not tried again
                try:
                    peer_programs.embed_once(others, name, large.path, malloc, timed)
                except peer_programs.PeerFailed as error:
                    print(error, file=sys.stderr)

    rows: list[Row] = []
    n = {s.slide_id: len(TileStore(stores[s.slide_id][0])) for s in (large, small)}
    names = {
        "large store": f"store to embedding, one slide ({n[large.slide_id]} tiles)",
        "large slide": "slide to embedding, the same slide",
        "many store": f"store to embedding, {copies} slides of {n[small.slide_id]} tiles",
        "many slide": "slide to embedding, the same slides",
        "stained": "store to embedding with Macenko, one slide",
    }

    def row(key: str, beside: str, limit: Timed, bar: str = "") -> None:
        rows.append(compare("embedding", names[key], "tiles/s", measured[key], beside, limit, bar=bar))

    for key in names:
        row(key, "model alone, tiles in memory", measured["model"], "" if key == "stained" else ">=0.95")
    row("large store", "network alone, floats in memory", measured["network"])
    row("large store", "model alone, one batch on 2 threads", measured["intra"])
    row("large slide", "eager model alone, as shipped", peers["model False"])
    row("large slide", "eager model alone, same allocator", peers["model True"])
    row("large slide", "OpenSlide + DataLoader + eager, as shipped", peers["loop False"], ">=4")
    row("large slide", "OpenSlide + DataLoader + eager, same allocator", peers["loop True"], ">=2")
    for (name, malloc), timed in programs.items():
        if not timed.wall:
            continue
        beside = f"{peer_programs.TITLES[name]}, {'same allocator' if malloc else 'as shipped'}"
        row("large slide", beside, timed, ">=2" if malloc else ">=4")
    return rows + stain_rows(encoder, tiles[: min(len(tiles), 256)], turns)


def at(slide: Slide) -> Slide:
    """The same slide in another folder of results, for a second store of the same grid."""
    other = slide.results.with_name(slide.results.name + "-coords")
    if not other.exists():
        shutil.copytree(slide.results / "slides", other / "slides")
    return replace(slide, results=other)


def stain_rows(encoder: Any, tiles: np.ndarray, repeats: int) -> list[Row]:
    """CPU milliseconds per tile of the transform, on one thread as inside the engine, beside the model's."""
    import torch
    from slidemake.embedding.engine import stain_hook

    hook = stain_hook(stain_transform())
    assert hook is not None
    torch.set_num_threads(1)
    batches = [torch.from_numpy(tiles[i : i + BATCH]).permute(0, 3, 1, 2) for i in range(0, len(tiles), BATCH)]

    works = {"stain": hook, "model": encoder.forward, "stained": partial(encoder.forward, stain=hook)}
    times = {name: Timed() for name in works}
    for _ in range(repeats):
        spent = dict.fromkeys(works, 0.0)
        for batch in batches:  # batch by batch: what is added is a small difference
            for name, work in works.items():
                started = cpu_seconds()
                with torch.inference_mode():
                    work(batch)
                spent[name] += cpu_seconds() - started
        for name, seconds in spent.items():
            times[name].wall.append(1000 * seconds / len(tiles))
            times[name].cpu.append(1000 * seconds / len(tiles))
    extra = Timed(
        [a - b for a, b in zip(times["stained"].wall, times["model"].wall, strict=True)],
        [a - b for a, b in zip(times["stained"].cpu, times["model"].cpu, strict=True)],
    )
    row = partial(compare, "stain", unit="CPU ms/tile", clock="cpu")
    beside = {"beside": f"{ENCODER}, 1 thread", "limit": times["model"], "bar": "<=0.05"}
    return [
        row("Macenko, by itself", figure=times["stain"], **beside),
        row("Macenko, what it adds to the model", figure=extra, **beside),
    ]
