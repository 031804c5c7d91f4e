"""The tiling stage: a slide, its tissue mask and a grid become a tile store.

The tiles of a slide are cut into groups of one Zarr shard each, and those into parts that are read, scored and encoded
by Dask tasks of their own; the last task of a shard writes its file. So a slide of a single shard keeps several
threads busy, too. A tile whose data are corrupt is left out and counted (the slide is then done once more without it,
so that shards stay whole); it is never painted white.

Where the grid coincides with the JPEG tiles of the scan, a store with codec jpeg keeps the scanner's own bytes: nothing
is encoded again, and nothing is lost. (Each tile is decoded all the same, for its quality scores.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import committed, fingerprint, read_slide_record
from slidemake.jobs import isolation
from slidemake.stores.arrays import write_array
from slidemake.stores.integrity import seal
from slidemake.stores.tile_store import (
    FORMAT,
    FORMAT_VERSION,
    TileCodec,
    TileStore,
    create_store,
    shard_path,
    store_fingerprint,
    write_shard,
)
from slidemake.tiles.grid import Grid, Window, boxes, describe_window, slide_window, tile_positions
from slidemake.tiles.reading import read_tiles, reduction

if TYPE_CHECKING:
    from slidemake.slides.formats.jpeg_tiles import JpegTiles

READ_TILES = 64  # tiles in memory at a time per task; more does not read faster
SLOWEST_TILE = 0.25  # s that a tile may take, on a slide that may take long: some fifty times what one takes


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to make one shard, in plain values (it may run in another process)."""

    slide: dict[str, Any]  # slide.json
    window: Window
    coords: np.ndarray
    out: str | None  # shard file; None scores the tiles without keeping them (store: coords)
    codec: TileCodec
    shard_tiles: int
    stain: dict[str, Any] | None  # transform applied before storing (pixels: normalised)
    original: bool = False  # keep the scanner's JPEG bytes


Part = tuple[np.ndarray, np.ndarray, list[bytes]]  # quality (n, q) float32, good (n,) bool, encoded tiles


def make_part(task: ShardTask, start: int, reader: Any) -> Part:
    """Read, score and encode the `READ_TILES` tiles of a shard from number `start` on. Encodes nothing when one of them
    is corrupt: the shard will not be written.
    """
    from slidemake.tiles.quality import tile_quality

    coords = task.coords[start : start + READ_TILES]
    tiles, good = read_tiles(reader, coords, task.window)
    quality = tile_quality(tiles)
    if task.out is None or not good.all():
        return quality, good, []
    if task.original:
        stored = reader.jpeg_tiles(task.window.level)
        return quality, good, [task.codec.sealed(stored.stored(n)) for n in stored_numbers(stored, coords, task.window)]
    return quality, good, [task.codec.encode(tile) for tile in _normalised(tiles, task.stain)]


def finish_shard(task: ShardTask, parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Write the shard file when every tile is good. Returns quality (n, q) and good (n,) of its tiles."""
    quality = np.concatenate([part[0] for part in parts])
    good = np.concatenate([part[1] for part in parts])
    if task.out is not None and good.all():
        write_shard(Path(task.out), [tile for part in parts for tile in part[2]], task.shard_tiles)
    return quality, good


def make_shard(task: ShardTask) -> tuple[np.ndarray, np.ndarray]:
    """A whole shard, by a worker that opens the slide for itself."""
    from slidemake.slides.opening import open_screened

    with open_screened(task.slide) as reader:
        return finish_shard(task, [make_part(task, a, reader) for a in range(0, len(task.coords), READ_TILES)])


def stored_numbers(stored: JpegTiles, coords: np.ndarray, window: Window) -> list[int]:
    """Numbers of the stored JPEG tiles that tiles at `coords` coincide with."""
    place = np.floor(coords / window.downsample + 0.5).astype(int) // window.tile_px
    return (place[:, 1] * stored.across + place[:, 0]).tolist()


def keeps_original(reader: Any, window: Window, coords: np.ndarray, options: dict[str, Any]) -> bool:
    """Whether every tile is, pixel for pixel, one of the JPEG tiles that the slide stores."""
    if options["codec"] != "jpeg" or options["pixels"] != "scanned" or window.resampled:
        return False
    stored = reader.jpeg_tiles(window.level)
    if stored is None or stored.tile != (window.tile_px, window.tile_px):
        return False
    return not (np.floor(coords / window.downsample + 0.5).astype(int) % window.tile_px).any()


def _normalised(tiles: np.ndarray, stain: dict[str, Any] | None) -> np.ndarray:
    if stain is None:
        return tiles
    from slidemake.stain.fit import StainTransform, apply_stain_numpy

    return apply_stain_numpy(tiles, StainTransform.from_dict(stain))


def run_shards(
    tasks: list[ShardTask], threads: int, scheduler: str, reader: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute shards with Dask: on threads that share `reader`, or on the cluster whose address `scheduler` is."""
    import dask

    if scheduler in ("threads", "synchronous"):
        from dask.local import get_sync
        from dask.threaded import get

        here = get if scheduler == "threads" else get_sync  # by name, Dask would look for a cluster, too
        part, finish = dask.delayed(make_part, pure=False, traverse=False), dask.delayed(finish_shard, pure=False)
        delayed = [
            finish(task, [part(task, start, reader) for start in range(0, len(task.coords), READ_TILES)])
            for task in tasks
        ]
        return list(dask.compute(*delayed, scheduler=here, num_workers=max(1, threads), optimize_graph=False))
    return _on_cluster(tasks, scheduler)


def _on_cluster(tasks: list[ShardTask], scheduler: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shards made by the workers of a `dask.distributed` cluster, which open the slide and write the shards themselves.

    A worker that dies is not missed: its shards are made again, whole, by another. Raises RunError when there is no
    such cluster, or when its workers do not see the same files.
    """
    try:
        from dask.distributed import Client, wait
    except ImportError as error:
        raise RunError(
            f"dask.scheduler is {scheduler!r}, but dask.distributed is not installed here ({error}). Install it "
            "(the package distributed), or set dask.scheduler to 'threads'."
        ) from error
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RunError(
            f"No Dask scheduler answers at {scheduler!r} ({error}). Start one (dask scheduler), correct dask.scheduler "
            "(tcp://host:8786), or set it to 'threads'."
        ) from error
    here = [  # a worker need not run in this folder
        replace(
            task,
            slide={**task.slide, "path": os.path.abspath(task.slide["path"])},
            out=task.out and os.path.abspath(task.out),
        )
        for task in tasks
    ]
    with client, client.as_current():
        futures = [client.submit(make_shard, task, pure=False) for task in here]
        wait(futures)  # also after an error: no worker may still be writing when the caller cleans up
        results = client.gather(futures)
    for task, (_, good) in zip(here, results, strict=True):
        if task.out and good.all() and not Path(task.out).is_file():
            raise RunError(
                f"A Dask worker of {scheduler!r} has written {task.out}, and it is not there: the workers do not share "
                "this file system. Let them, with the same paths, or set dask.scheduler to 'threads'."
            )
    return results


def tiles_fingerprint(tissue_fingerprint: str, grid: Grid, options: dict[str, Any], stain: str | None) -> str:
    """Identity of a tile store: the slide and its tissue (through their fingerprint), the grid and the options."""
    shape = {"name": grid.name, "tile_px": grid.tile_px, "mpp": grid.mpp, "stride_px": grid.stride_px}
    return fingerprint("tiles", tissue=tissue_fingerprint, grid=shape, options=options, stain=stain)


def process_slide(
    record: dict[str, Any],
    grid: Grid,
    results: Path,
    options: dict[str, Any],
    *,
    threads: int = 1,
    scheduler: str = "threads",
    stain: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tile one slide into `results/tiles/{grid}/{slide}.zarr`; a finished store is found by its fingerprint.

    `record` is the tissue stage's (slide_id, fingerprint). `options` are the keys of `tiling` in the configuration.
    `stain` is a stain transform for `pixels: normalised`. Raises SlideFailure too_coarse, too_few_tiles, unreadable.
    """
    slide_id = record["slide_id"]
    path = results / "tiles" / grid.name / f"{slide_id}.zarr"
    print_ = tiles_fingerprint(record["fingerprint"], grid, options, stain["fingerprint"] if stain else None)
    if store_fingerprint(path) == print_:
        return {"fingerprint": print_, "reused": True, **_figures(TileStore(path))}
    slide = read_slide_record(results / "slides" / slide_id, "slide.json")
    window = slide_window(grid, slide, options.get("mpp_tolerance", 0.0))
    coords, tissue, refused = select_tiles(window, slide, results / "slides" / slide_id, options["min_tissue"])
    minimum = options.get("min_tiles", 1)
    if len(coords) < minimum:
        raise SlideFailure(
            "too_few_tiles",
            f"{len(coords)} tiles of {grid.tile_um:g} um have {options['min_tissue']:.0%} of tissue or more; "
            f"tiling.min_tiles asks for {minimum}",
        )
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "slide_id": slide_id,
        "identity": slide["identity"],
        **describe_window(grid, window, slide["mpp"], slide["mpp_source"]),
        "shard_tiles": options["shard_tiles"],
        "store": options["store"],
        "pixels": options["pixels"],
        "stain": stain,
        "min_tissue": options["min_tissue"],
        "status": "ok",
        "fingerprint": print_,
    }
    isolation.allow(len(coords) * SLOWEST_TILE)
    with committed(path) as work:
        corrupt = _write(work, slide, window, coords, tissue, attributes, refused, options, threads, scheduler, stain)
    return {"fingerprint": print_, "corrupt": corrupt, **_figures(TileStore(path))}


def select_tiles(
    window: Window, slide: dict[str, Any], folder: Path, min_tissue: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tiles with enough tissue: coords (N, 2), tissue fraction (N,), and how many were refused for too little."""
    from slidemake.tissue.geometry import tissue_fractions
    from slidemake.tissue.stage import read_mask

    mask, described = read_mask(folder)
    coords = tile_positions(window, slide["width"], slide["height"], slide["bounds"])
    fractions = tissue_fractions(mask, tuple(described["level0_per_mask_px"]), boxes(coords, window))
    keep = fractions >= max(min_tissue, 1e-6)
    touched = int((fractions > 0).sum())
    return coords[keep], fractions[keep].astype(np.float32), touched - int(keep.sum())


def _codec(options: dict[str, Any]) -> TileCodec:
    return TileCodec(options["codec"], options.get("jpeg_quality", 90), options.get("jpeg_subsampling", "444"))


def _write(
    work: Path,
    slide: dict[str, Any],
    window: Window,
    coords: np.ndarray,
    tissue: np.ndarray,
    attributes: dict[str, Any],
    refused: int,
    options: dict[str, Any],
    threads: int,
    scheduler: str,
    stain: dict[str, Any] | None,
) -> int:
    """Write the whole store at `work`; returns the number of corrupt tiles left out."""
    from slidemake.slides.opening import open_screened
    from slidemake.tiles.quality import NAMES

    keep_pixels, size, codec = options["store"] == "pixels", options["shard_tiles"], _codec(options)
    candidates = len(coords)
    quality = np.zeros((0, len(NAMES)), np.float32)
    with open_screened(slide) as reader:
        original = keeps_original(reader, window, coords, options)
        reduced = reduction(reader, window)
        while True:
            group = create_store(work, len(coords), window.tile_px, codec, size, with_pixels=keep_pixels)
            starts = range(0, len(coords), size)
            outs = [str(shard_path(work, k)) if keep_pixels else None for k in range(len(starts))]
            tasks = [
                ShardTask(slide, window, coords[a : a + size], out, codec, size, stain, original)
                for a, out in zip(starts, outs, strict=True)
            ]
            results = run_shards(tasks, threads, scheduler, reader)
            if not results:
                break
            quality = np.concatenate([q for q, _ in results])
            good = np.concatenate([g for _, g in results])
            if good.all():
                break
            coords, tissue = coords[good], tissue[good]  # once more without the corrupt ones
    corrupt = candidates - len(coords)
    if corrupt > 0.5 * candidates:
        raise SlideFailure("unreadable", f"{corrupt} of {candidates} tissue tiles do not decode")
    write_array(work, "coords", coords.astype(np.int32))
    write_array(work, "tissue", tissue.astype(np.float32))
    write_array(work, "quality", quality.astype(np.float32))
    group.update_attributes(
        {
            **attributes,
            "codec": codec.as_dict() | ({"original": True} if original else {}),
            "reduced": reduced,
            "quality_names": list(NAMES),
            "refused": {"tissue": refused, "corrupt": corrupt},
        }
    )
    seal(work)
    return corrupt


def _figures(store: TileStore) -> dict[str, Any]:
    names = store.attrs["quality_names"]
    medians = np.median(store.quality, axis=0) if len(store) else np.zeros(len(names))
    return {
        "tiles": len(store),
        "refused_tissue": store.attrs["refused"]["tissue"],
        "corrupt": store.attrs["refused"]["corrupt"],
        "mpp_effective": store.attrs["mpp"]["effective"],
        "quality_median": {name: round(float(value), 5) for name, value in zip(names, medians, strict=True)},
        "bytes": sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file()),
    }
