"""The embedding stage: the tile stores of a rack go through one warm encoder, slide by slide.

A reader thread decodes ahead of the model, across the slides of the rack, into a bounded queue; tiles travel as uint8
and are stain-normalised, resized and scaled on the device, in the same pass as the model. A batch never holds tiles of
two slides, so features do not depend on what else was in the rack, or on where an earlier job was killed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.failures import SlideFailure
from slidemake.provenance import committed, fingerprint, read_json, remove_leftovers
from slidemake.tiles import TileStore, add_array, store_fingerprint

log = logging.getLogger("slidemake")

FORMAT, FORMAT_VERSION = "slidemake-embeddings", 1
QUEUED_BATCHES = 8
BATCH = {"cpu": 16, "cuda": 128}  # batch_size: auto. On CPU larger batches are not faster and need more memory


@dataclass(frozen=True)
class SlideJob:
    """One slide to embed: where its tiles are, how they are stain-normalised, where the features go."""

    slide_id: str
    tiles: Path
    out: Path
    stain: dict[str, Any] | None  # stain transform, None for tiles as they are
    stain_info: dict[str, Any]
    fingerprint: str
    slide: dict[str, Any]  # slide.json, for stores that keep coordinates only


def embedding_fingerprint(tiles: str, encoder: dict[str, Any], stain: dict[str, Any], dtype: str) -> str:
    """Identity of an embedding store: the tiles, the encoder with its weights and transform, the stain transform."""
    return fingerprint("embed", tiles=tiles, encoder=encoder, stain=stain, dtype=dtype)


def make_slide_job(
    results: Path,
    encoder: Any,
    identity: dict[str, Any],
    stain_method: str,
    target: dict[str, Any],
    dtype: str,
    record: dict[str, Any],
) -> SlideJob:
    """What is to be done for one slide of the tiling stage's `record`; `identity` is the encoder's (with weights)."""
    from slidemake.stain_stage import slide_transform

    slide_id = record["slide_id"]
    tiles = results / "tiles" / encoder.grid / f"{slide_id}.zarr"
    stored = read_json(tiles / "zarr.json")["attributes"]
    if stored["pixels"] == "normalised":  # the store's tiles are what the encoder gets
        transform, stain_info = None, stain_description(stored["stain"])
    elif stain_method == "none":
        transform, stain_info = None, stain_description(None)
    else:
        transform = slide_transform(results, slide_id, target)
        stain_info = stain_description(transform)
    return SlideJob(
        slide_id=slide_id,
        tiles=tiles,
        out=results / "embeddings" / encoder.slug / f"{slide_id}.zarr",
        stain=transform,
        stain_info=stain_info,
        fingerprint=embedding_fingerprint(record["fingerprint"], identity, stain_info, dtype),
        slide=read_json(results / "slides" / slide_id / "slide.json"),
    )


def stain_description(transform: dict[str, Any] | None) -> dict[str, Any]:
    """What an embedding store says of its stain: the same for all slides of a cohort but for `slide`."""
    if transform is None:
        return {"method": "none", "target": None, "slide": None}
    return {"method": transform["method"], "target": transform["target"], "slide": transform["fingerprint"]}


class TileAhead:
    """Decodes the tiles of several slides in order, ahead of the consumer, in a bounded queue.

    Iterate a slide's batches with `batches(job)`, in the order in which the jobs were given. An error in reading a
    slide is raised where that slide is consumed.
    """

    def __init__(self, jobs: list[SlideJob], batch: int, depth: int = QUEUED_BATCHES):
        self._jobs, self._batch = jobs, batch
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tiles-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for job in self._jobs:
            try:
                for start, tiles in read_batches(job, self._batch):
                    if not self._put((job.slide_id, (start, tiles))):
                        return
            except Exception as error:  # handed to the consumer, who knows the slide it belongs to
                if not self._put((job.slide_id, error)):
                    return
            if not self._put((job.slide_id, None)):
                return

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def batches(self, job: SlideJob) -> Iterator[tuple[int, np.ndarray]]:
        """(first tile, (n, H, W, 3) uint8) of one slide."""
        failed: Exception | None = None
        while True:
            slide_id, item = self._queue.get()
            if slide_id != job.slide_id:
                continue  # what is left of a slide that the consumer gave up
            if item is None:
                if failed:
                    raise failed
                return
            if isinstance(item, Exception):
                failed = item
            else:
                yield item

    def close(self) -> None:
        """Stop reading; safe to call at any time."""
        self._stop.set()
        self._thread.join(timeout=30)


def read_batches(job: SlideJob, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of a slide's tiles, from the stored pixels or, for `store: coords`, from the slide itself."""
    store = TileStore(job.tiles)
    if store.has_pixels:
        for start in range(0, len(store), batch):
            yield start, store.read(start, min(start + batch, len(store)))
        return
    from slidemake.reader import open_slide

    with open_slide(job.slide["path"], reader=job.slide["reader"]) as reader:
        ahead = batch * max(1, 64 // batch)  # a row of tiles is read together
        for first in range(0, len(store), ahead):
            tiles = read_selected(store, job.slide, reader, range(first, min(first + ahead, len(store))))
            for start in range(0, len(tiles), batch):
                yield first + start, tiles[start : start + batch]


def read_selected(store: TileStore, slide: dict[str, Any], reader: Any, indices: Iterable[int]) -> np.ndarray:
    """Tiles (n, H, W, 3) uint8 of a store that has them, or, for `store: coords`, out of the open slide."""
    if store.has_pixels:
        return store.read_tiles(indices)
    from slidemake.grid import parse_grid, plan_window
    from slidemake.tile_reading import read_tiles

    grid = parse_grid(store.attrs["grid"], store.attrs["stride_px"])
    # a store whose tiles were taken within tolerance says so by not having resampled
    tolerance = 0.0 if store.attrs["resampling"] != "none" else 0.25
    window = plan_window(grid, slide["mpp"], [level["downsample"] for level in slide["levels"]], tolerance)
    coords = store.coords[np.asarray(list(indices), int)]
    tiles, good = read_tiles(reader, coords, window)
    if not good.all():
        bad = coords[~good][0].tolist()
        raise SlideFailure("unreadable", f"the tile at {bad} decoded while tiling, and no longer does")
    return tiles


def embed_slide(
    forward: Forward, job: SlideJob, ahead: TileAhead, pool: Executor, dtype: str, progress: Callable[[int], None]
) -> np.ndarray:
    """Features (N, D) of one slide; its batches run on `pool`, a few at a time, and are put together in order."""
    stain = stain_hook(job.stain)
    parts: list[np.ndarray] = []
    running: deque[Future[np.ndarray]] = deque()

    def collect() -> None:
        parts.append(running.popleft().result())
        progress(len(parts[-1]))

    for _, tiles in ahead.batches(job):
        running.append(pool.submit(forward, tiles, stain))
        while len(running) > forward.workers:
            collect()
    while running:
        collect()
    features = np.concatenate(parts) if parts else np.zeros((0, forward.encoder.record.dim), np.float32)
    if not np.isfinite(features).all():
        raise SlideFailure("crashed", f"{forward.encoder.record.key} gave features that are not finite")
    return features.astype(dtype)


def stain_hook(transform: dict[str, Any] | None) -> Callable[[Any], Any] | None:
    """The transform as a function of tensors (B, 3, H, W); None where there is none."""
    if transform is None:
        return None
    from slidemake.stain import StainTransform
    from slidemake.stain_torch import apply_stain

    values = StainTransform.from_dict(transform)
    return lambda tensor: apply_stain(tensor, values)


class Forward:
    """Runs batches of tiles through an encoder; when memory runs out, in halves from then on.

    On the CPU several batches run side by side with one thread each, instead of one batch with several threads: layers
    of a small model are too short to be worth splitting, and features then do not depend on the number of threads.
    """

    def __init__(self, encoder: Any, device: str, threads: int):
        self.encoder, self.device, self.limit = encoder, device, 10**9
        self.workers = max(1, threads) if device == "cpu" else 1

    def pool(self) -> ThreadPoolExecutor:
        """Threads that call this object."""
        import torch

        alone = partial(torch.set_num_threads, 1) if self.device == "cpu" else None
        return ThreadPoolExecutor(self.workers, thread_name_prefix="model", initializer=alone)

    def __call__(self, tiles: np.ndarray, stain: Callable[[Any], Any] | None) -> np.ndarray:
        """Features (n, D) float32 of tiles (n, H, W, 3) uint8. SlideFailure out_of_memory when one does not fit."""
        import torch

        batch = torch.from_numpy(tiles)
        if self.device != "cpu":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        batch = batch.permute(0, 3, 1, 2)
        parts = []
        while len(batch):
            part = batch[: self.limit]
            try:
                parts.append(self.encoder.forward(part, stain=stain).to(torch.float32))
            except (torch.cuda.OutOfMemoryError, RuntimeError, MemoryError) as error:
                self._lower(len(part), error)
                continue
            batch = batch[len(part) :]
        return torch.cat(parts).cpu().numpy()

    def _lower(self, size: int, error: Exception) -> None:
        import torch

        out_of_memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "memory" in str(error).lower()
        if not out_of_memory:
            raise error
        key = self.encoder.record.key
        if size == 1:
            raise SlideFailure("out_of_memory", f"{key} does not fit in memory with one tile") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.limit = min(self.limit, (size + 1) // 2)
        log.warning("%s: out of memory with %d tiles at a time: going on with %d", key, size, self.limit)


def write_embeddings(job: SlideJob, features: np.ndarray, encoder: Any, attributes: dict[str, Any]) -> None:
    """Commit `features` with the tile store's coordinates and all that a consumer must check."""
    import zarr

    store = TileStore(job.tiles)
    with committed(job.out) as work:
        group = zarr.create_group(work, zarr_format=3)
        add_array(group, "features", features)
        add_array(group, "coords", store.coords)
        group.attrs.update(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "slide_id": job.slide_id,
                "identity": store.attrs["identity"],
                "encoder": encoder.identity,
                "stain": job.stain_info,
                "tiles_fingerprint": store.attrs["fingerprint"],
                "grid": store.attrs["grid"],
                "mpp": store.attrs["mpp"],
                "tile_level0_px": store.attrs["tile_level0_px"],
                "fingerprint": job.fingerprint,
                **attributes,
            }
        )


def process_rack(
    records: list[dict[str, Any]],
    encoder: Any,
    make_job: Callable[[dict[str, Any]], SlideJob],
    run: Callable[[list[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]], list[dict[str, Any]]],
    *,
    device: str,
    dtype: str,
    batch_size: int | str,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Embed the slides of a rack that are not finished yet; `run` is `racks.run_rack` with its manifest bound.

    `records` are the tiling stage's. `encoder()` loads the model, and is called only when a slide needs it.
    """
    jobs = {r["slide_id"]: make_job(r) for r in records if r["status"] == "ok"}
    todo = [job for job in jobs.values() if store_fingerprint(job.out) != job.fingerprint]
    pending = {job.slide_id for job in todo}
    for job in todo:
        remove_leftovers(job.out.parent, job.out.name)
    batch = BATCH["cpu" if device == "cpu" else "cuda"] if batch_size == "auto" else int(batch_size)
    model: Any = encoder() if todo else None
    forward, ahead = Forward(model, device, threads), TileAhead(todo, batch)
    total = sum(r.get("tiles", 0) for r in records if r["slide_id"] in pending)
    progress = Progress(total)

    def work(record: dict[str, Any]) -> dict[str, Any]:
        job = jobs[record["slide_id"]]
        if job.slide_id not in pending:
            return {"fingerprint": job.fingerprint, "reused": True, "tiles": record["tiles"]}
        started = time.perf_counter()
        features = embed_slide(forward, job, ahead, pool, dtype, progress.add)
        seconds = time.perf_counter() - started
        write_embeddings(job, features, model, {"engine": {"path": model.path_name, "device": device, "batch": batch}})
        return {
            "fingerprint": job.fingerprint,
            "tiles": len(features),
            "tiles_per_second": round(len(features) / max(seconds, 1e-9), 1),
        }

    with forward.pool() as pool:
        try:
            return run(records, work)
        finally:
            ahead.close()


class Progress:
    """A line on the terminal every few seconds: tiles done, tiles per second, time left."""

    def __init__(self, total: int, every: float = 10.0):
        self.total, self.every, self.done = total, every, 0
        self.started = self.last = time.monotonic()

    def add(self, tiles: int) -> None:
        self.done += tiles
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / max(rate, 1e-9)
            log.info("embedding: %d of %d tiles, %.0f tiles/s, %.0f s left", self.done, self.total, rate, left)
