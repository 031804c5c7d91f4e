"""The embedding stage: the tile stores of a rack go through warm encoders, slide by slide.

Tiles travel as uint8 and are stain-normalised, resized and scaled on the device, in the same pass as the model.
Encoders that take their tiles from the same grid share a job: each tile is read once for all of them. How batches are
made and worked on: `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure, damaged
from slidemake.core.files import committed, fingerprint, read_json, read_slide_record
from slidemake.embedding.engine import Engine, FeatureSink, Progress, SlideJob
from slidemake.embedding.forward import Forward, Slots
from slidemake.embedding.sizes import batch_of, workers_of
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.registry import EncoderRecord, identity, weights_sha256
from slidemake.jobs import isolation
from slidemake.jobs.devices import claimed_device
from slidemake.jobs.memory import keep_freed_memory
from slidemake.stores.arrays import ArrayWriter, write_array, write_group
from slidemake.stores.integrity import check_store, seal
from slidemake.stores.tile_store import TileStore, store_fingerprint

FORMAT, FORMAT_VERSION = "slidemake-embeddings", 1
Record = dict[str, Any]


@dataclass(frozen=True)
class Lane:
    """One of the encoders of a job.

    `load()` gives the warm model and is called only when a slide needs it; `make_job` makes a SlideJob of the tiling
    stage's record; `run` is `racks.run_rack` with this encoder's manifest bound.
    """

    load: Callable[[], Any]
    make_job: Callable[[Record], SlideJob]
    run: Callable[[list[Record], Callable[[Record], Record]], list[Record]]


@contextmanager
def device_on_demand(options: Mapping[str, Any], place: Mapping[str, Any], threads: int) -> Iterator[Callable[[], str]]:
    """A function that claims the device when it is first called, for the rest of the job: a job that finds everything
    finished neither waits for a GPU nor imports what asks for one.

    `options`: of the embedding stage; `place`: what the plan says of the device (`workflow.place`); `threads`: those of
    the calling thread, which loads the model.
    """
    with ExitStack() as held:

        @cache
        def claim() -> str:
            keep_freed_memory()  # before torch allocates: large activations would be unmapped at every layer
            import torch

            torch.set_num_threads(threads)
            return held.enter_context(claimed_device(options["device"], place["gpu"]))

        yield claim


def known_encoder(found: Mapping[str, Any], place: Mapping[str, Any]) -> tuple[EncoderRecord, str, dict[str, Any]]:
    """An encoder of a rule's params: its record, the precision that the plan chose for it, its identity with both."""
    record = EncoderRecord.from_dict(dict(found))
    precision = place["precisions"][record.slug]
    return record, precision, identity(record, weights_sha256(resolve_weights(record)), precision)


def loaded_encoder(record: EncoderRecord, device: Callable[[], str], precision: str, compiled: bool = False) -> Any:
    """`loading.load_encoder` on a device that is claimed now."""
    where = device()
    from slidemake.encoders.loading import load_encoder

    return load_encoder(record, where, precision, compile_model=compiled)


def warm_encoder(record: EncoderRecord, device: Callable[[], str], precision: str) -> Forward:
    """An encoder that is ready for batches of the usual size, for stages that embed a sample of tiles."""
    return Forward(loaded_encoder(record, device, precision), device(), batch_of(device()))


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
    from slidemake.stain.stage import slide_transform

    slide_id = record["slide_id"]
    tiles = results / "tiles" / encoder.grid / f"{slide_id}.zarr"
    check_store(tiles)
    stored = read_json(tiles / "zarr.json")["attributes"]
    if (stored.get("slide_id"), stored.get("fingerprint")) != (slide_id, record["fingerprint"]):
        raise damaged(tiles, f"is not the store that tiling made of slide {slide_id}")
    if stored["pixels"] == "normalised":  # the store's tiles are what the encoder gets
        transform, stain_info = None, stain_description(stored["stain"])
    elif stain_method == "none":
        transform, stain_info = None, stain_description(None)
    else:
        transform = slide_transform(results, slide_id, target, stain_method)
        stain_info = stain_description(transform)
    return SlideJob(
        slide_id=slide_id,
        tiles=tiles,
        out=results / "embeddings" / encoder.slug / f"{slide_id}.zarr",
        stain=transform,
        stain_info=stain_info,
        fingerprint=embedding_fingerprint(record["fingerprint"], identity, stain_info, dtype),
        slide=read_slide_record(results / "slides" / slide_id, "slide.json"),
    )


def stain_description(transform: dict[str, Any] | None) -> dict[str, Any]:
    """What an embedding store says of its stain: the same for all slides of a cohort but for `slide`."""
    if transform is None:
        return {"method": "none", "target": None, "slide": None}
    return {"method": transform["method"], "target": transform["target"], "slide": transform["fingerprint"]}


@contextmanager
def embedding_store(
    job: SlideJob, store: TileStore, encoder: Any, dtype: str, attributes: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes the features of all tiles, part by part, and commits them with the tile store's coordinates and all that a
    consumer must check. Nothing is committed after an error, or when some are missing.
    """
    with committed(job.out) as work:
        with ArrayWriter(work, "features", (len(store), encoder.record.dim), dtype) as features:
            yield features.append
        write_array(work, "coords", store.coords)
        kept = {key: store.attrs[key] for key in ("identity", "grid", "mpp", "tile_level0_px")}
        write_group(
            work,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "slide_id": job.slide_id,
                "encoder": encoder.identity,
                "stain": job.stain_info,
                "tiles_fingerprint": store.attrs["fingerprint"],
                **kept,
                "fingerprint": job.fingerprint,
                **attributes,
            },
        )
        seal(work)


def process_rack(
    records: list[Record],
    lanes: list[Lane],
    *,
    device: str | Callable[[], str],
    dtype: str,
    batch_size: int | str,
    threads: int = 1,
) -> list[list[Record]]:
    """Embed the slides of a rack with every encoder for which they are not finished yet; a manifest per encoder.

    `records` are the tiling stage's. `device`: its name, or `device_on_demand`'s function. Returns each lane's records.
    """
    jobs: list[dict[str, SlideJob]] = [{} for _ in lanes]
    broken: dict[tuple[int, str], SlideFailure] = {}
    for number, lane in enumerate(lanes):
        for record in (r for r in records if r["status"] == "ok"):
            try:
                jobs[number][record["slide_id"]] = lane.make_job(record)
            except SlideFailure as failure:
                broken[number, record["slide_id"]] = failure
    pending = {
        (number, slide_id)
        for number, of_lane in enumerate(jobs)
        for slide_id, job in of_lane.items()
        if isolation.wanted(slide_id) and store_fingerprint(job.out) != job.fingerprint
    }
    work = [
        {number: of_lane[r["slide_id"]] for number, of_lane in enumerate(jobs) if (number, r["slide_id"]) in pending}
        for r in records
    ]
    work = [of_slide for of_slide in work if of_slide]
    where = device if isinstance(device, str) else device() if pending else "cpu"
    batch = batch_of(where) if batch_size == "auto" else int(batch_size)
    slots = Slots(where)
    needed = [(n, lane) for n, lane in enumerate(lanes) if any(n == number for number, _ in pending)]
    models = {n: Forward(lane.load(), where, batch, slots) for n, lane in needed}
    for model in models.values():
        model.warm_up()
    tiles = {r["slide_id"]: r.get("tiles", 0) for r in records}

    def output(number: int, job: SlideJob, store: TileStore) -> FeatureSink:
        model = models[number].encoder
        about = {"path": model.path_name, "device": where, "batch": batch}
        return embedding_store(job, store, model, dtype, {"engine": about})

    engine = Engine(
        work,
        models,
        output,
        batch=batch,
        dtype=dtype,
        workers=workers_of(where, threads),
        progress=Progress(sum(tiles[slide_id] for _, slide_id in pending)).add,
    )

    def work_of(number: int) -> Callable[[Record], Record]:
        def work(record: Record) -> Record:
            slide_id = record["slide_id"]
            if (number, slide_id) in broken:
                raise broken[number, slide_id]
            mark = {"fingerprint": jobs[number][slide_id].fingerprint}
            if (number, slide_id) not in pending:
                return {**mark, "reused": True, "tiles": record["tiles"]}
            return {**mark, **engine.result(number, slide_id)}

        return work

    try:
        return [lane.run(records, work_of(number)) for number, lane in enumerate(lanes)]
    finally:
        engine.close()
