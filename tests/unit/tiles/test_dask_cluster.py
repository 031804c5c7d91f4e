"""Shards of a slide on a cluster of two processes on the loopback: the same store as threads make."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
import pyvips
import zarr
from PIL import Image
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import read_json, write_json
from slidemake.stores.tile_store import TileCodec, TileStore
from slidemake.tiles.grid import parse_grid, plan_window
from slidemake.tiles.stage import ShardTask, process_slide, run_shards

distributed = pytest.importorskip("dask.distributed")
pytestmark = pytest.mark.slow

GRID = parse_grid("64px_0.5mpp")
OPTIONS = {"store": "pixels", "codec": "jpeg", "pixels": "scanned", "min_tissue": 0.5, "shard_tiles": 4}
RECORD = {"slide_id": "s", "fingerprint": "t"}


def start(workers: int) -> distributed.LocalCluster:
    return distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )


def assert_gone(pids: list[int]) -> None:
    left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)[1]
    assert not left


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with two workers, spawned, whose current folder is another than ours."""
    assert dask.config.get("distributed.worker.multiprocessing-method") == "spawn"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with start(2) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            pids = list(client.run(os.getpid).values())
            client.run(os.chdir, str(elsewhere))
        assert len({*pids, os.getpid()}) == 3
        yield cluster.scheduler_address
    assert_gone(pids)
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A slide of 512 x 384 px at 0.5 um/px, all tissue, as screening and tissue detection leave it: 48 tiles."""
    small = np.random.default_rng(3).integers(90, 230, (48, 64, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC))
    path = tmp_path / "slide.tiff"
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb", xres=2000, yres=2000)
    image.tiffsave(str(path), tile=True, tile_width=128, tile_height=128, compression="jpeg", Q=90)
    folder = tmp_path / "results" / "slides" / "s"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(folder / "tissue.png")
    write_json(folder / "tissue.json", {"level0_per_mask_px": [8.0, 8.0]})
    described = {"path": str(path), "reader": "openslide", "width": 512, "height": 384, "bounds": None, "mpp": 0.5}
    rest = {"mpp_source": "file", "identity": "i", "levels": [{"downsample": 1.0}]}
    write_json(folder / "slide.json", {**described, **rest})
    return tmp_path / "results"


def files_of(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()}


def tile(results: Path, scheduler: str, **changes: object) -> tuple[dict[str, object], dict[str, bytes]]:
    """Figures and files of the store, made anew."""
    store = results / "tiles" / GRID.name / "s.zarr"
    if store.exists():
        store.rename(results.parent / f"old-{len(list(results.parent.iterdir()))}")
    figures = process_slide(RECORD, GRID, results, {**OPTIONS, **changes}, threads=2, scheduler=scheduler)
    assert "reused" not in figures
    assert [entry.name for entry in store.parent.iterdir()] == ["s.zarr"]
    return figures, files_of(store)


def shards(results: Path, slide: Path | None = None, count: int = 6) -> list[ShardTask]:
    window = plan_window(GRID, 0.5, [1.0], 0.0)
    coords = np.array([[64 * (i % 8), 64 * (i // 8)] for i in range(4 * count)])
    opened = {"path": str(slide or results.parent / "slide.tiff"), "reader": "openslide", "mpp": 0.5}
    return [
        ShardTask(opened, window, coords[4 * k : 4 * k + 4], str(results / f"s{k}"), TileCodec(), 4, None)
        for k in range(count)
    ]


@pytest.mark.parametrize("changes", [{}, {"codec": "zstd", "shard_tiles": 20}, {"store": "coords"}])
def test_the_store_is_the_one_that_threads_make(cluster, results, changes):
    figures, files = tile(results, "threads", **changes)
    assert figures["tiles"] == 48
    assert tile(results, cluster, **changes) == (figures, files)
    store = TileStore(results / "tiles" / GRID.name / "s.zarr")
    assert len(store.coords) == len(store.quality) == 48
    if store.has_pixels:
        np.testing.assert_array_equal(zarr.open_group(store.path)["pixels"][...], store.read(0, 48))


def test_paths_may_be_relative_to_the_folder_of_the_run(cluster, results, monkeypatch):
    expected = tile(results, "threads")
    monkeypatch.chdir(results.parent)
    described = results / "slides" / "s" / "slide.json"
    slide = read_json(described)
    write_json(described, {**slide, "path": slide["path"].removeprefix(str(results.parent) + "/")})
    assert tile(Path("results"), cluster) == expected


def die_in_the_middle() -> None:
    """On a worker: from now on leave half a shard behind and be killed."""
    import slidemake.tiles.stage as module

    def dying(task: ShardTask) -> None:
        Path(task.out).parent.mkdir(parents=True, exist_ok=True)
        Path(task.out).write_bytes(b"half a shard" * 10_000)
        os.kill(os.getpid(), signal.SIGKILL)

    module.make_shard = dying


def test_a_worker_that_is_killed_while_it_writes_changes_nothing(results):
    expected = tile(results, "threads")
    with start(1) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
        bare = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-nanny"]
        options = ["--nthreads", "1", "--no-dashboard", "--local-directory", str(results.parent / "scratch")]
        paths = os.pathsep.join(path for path in sys.path if path)
        victim = subprocess.Popen(
            bare + options,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            client.wait_for_workers(2, timeout=60)
            (address,) = [address for address, pid in client.run(os.getpid).items() if pid == victim.pid]
            client.run(die_in_the_middle, workers=[address])
            assert tile(results, cluster.scheduler_address) == expected
            assert victim.wait(timeout=20) == -signal.SIGKILL
        finally:
            victim.kill()
            victim.wait()
    assert_gone(pids)


def test_a_slides_failure_arrives_as_it_was_raised(cluster, results):
    with pytest.raises(SlideFailure, match=r"gone\.tiff does not exist") as caught:
        run_shards(shards(results, results.parent / "gone.tiff"), 1, cluster, None)
    assert caught.value.code == "missing_file"
    assert "sheet" in caught.value.hint
    failure = SlideFailure("unreadable", "message", "a hint of its own")
    copy = pickle.loads(pickle.dumps(failure))
    assert copy.record("s", "tiles") == failure.record("s", "tiles")


def write_nothing(undo: bool = False) -> None:
    """On a worker: shards go to a file system of its own."""
    import slidemake.stores.tile_store
    import slidemake.tiles.stage as module

    module.write_shard = slidemake.stores.tile_store.write_shard if undo else lambda *arguments: None


def test_workers_that_do_not_share_the_files_are_found_out(cluster, results):
    with distributed.Client(cluster, set_as_default=False) as client:
        client.run(write_nothing)
        try:
            with pytest.raises(RunError, match="do not share this file system"):
                run_shards(shards(results), 1, cluster, None)
        finally:
            client.run(write_nothing, undo=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nothing://like/it"])
def test_no_scheduler_there_is_the_runs_trouble(results, address):
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
        pytest.raises(RunError, match="No Dask scheduler answers at"),
    ):
        run_shards(shards(results), 1, address, None)
