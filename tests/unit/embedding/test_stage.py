"""The embedding engine with a small model: order, resume, memory that runs out, slides that fail."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import toy_encoder
import zarr
from slidemake.core.failures import RunError, SlideFailure
from slidemake.embedding.engine import WAITING, Engine, Source
from slidemake.embedding.forward import Forward
from slidemake.embedding.stage import Lane, embedding_fingerprint, process_rack, stain_description
from slidemake.jobs.racks import run_rack
from slidemake.stain.fit import StainTransform
from slidemake.stores.arrays import ArrayWriter
from slidemake.stores.tile_store import shard_path, store_fingerprint
from toy_encoder import DIM, ToyEncoder, expected, job, make_tiles, run


@pytest.fixture
def rack(tmp_path):
    counts = {"a": 20, "b": 0, "c": 1, "d": 33}
    tiles = {name: make_tiles(tmp_path / "tiles" / f"{name}.zarr", n, i) for i, (name, n) in enumerate(counts.items())}
    records = [{"slide_id": n, "status": "ok", "failure": None, "tiles": c} for n, c in counts.items()]
    return tmp_path, records, tiles


def features(rack, name):
    return zarr.open_group(rack[0] / "embeddings" / f"{name}.zarr", mode="r")["features"][...]


def test_features_are_in_the_order_of_the_tiles_for_any_number_of_them(rack):
    encoder = ToyEncoder()
    records = run(rack, encoder)
    assert [r["status"] for r in records] == ["ok"] * 4
    for name, tiles in rack[2].items():
        np.testing.assert_allclose(features(rack, name), expected(tiles), rtol=1e-5)
    assert encoder.batches == [
        8,
        8,
        4,
        1,
        8,
        8,
        8,
        8,
        1,
    ]  # in order with one thread; never tiles of two slides in a batch
    group = zarr.open_group(rack[0] / "embeddings" / "d.zarr", mode="r")
    np.testing.assert_array_equal(group["coords"][...], np.arange(66).reshape(-1, 2))
    assert group.attrs["engine"] == {"path": "eager", "device": "cpu", "batch": 8}
    assert features(rack, "b").shape == (0, DIM)


def test_features_do_not_depend_on_the_number_of_threads(rack):
    run(rack, ToyEncoder())
    one = {name: features(rack, name) for name in "abcd"}
    (rack[0] / "embeddings").rename(rack[0] / "old")
    run(rack, ToyEncoder(), threads=3)
    for name in "abcd":
        np.testing.assert_array_equal(features(rack, name), one[name])


def test_a_finished_slide_is_not_computed_again_and_the_model_not_loaded(rack):
    encoder = ToyEncoder()
    run(rack, encoder)
    again = run(rack, encoder)
    assert [r["reused"] for r in again] == [True] * 4
    assert encoder.loads == 1
    inodes = {name: (rack[0] / "embeddings" / f"{name}.zarr").stat().st_ino for name in "abcd"}
    changed = lambda r: job(rack[0], r, fingerprint="new" if r["slide_id"] == "c" else job(rack[0], r).fingerprint)  # noqa: E731
    records = run(rack, encoder, changed)
    assert [r.get("reused", False) for r in records] == [True, True, False, True]
    now = {name: (rack[0] / "embeddings" / f"{name}.zarr").stat().st_ino for name in "abcd"}
    assert {name for name in "abcd" if now[name] != inodes[name]} == {"c"}


def test_a_twin_of_the_job_finishes_first(rack):
    """While this job loads its model, another one on the same rack does everything: nothing is computed twice."""
    encoder, twin = ToyEncoder(), ToyEncoder()
    folder, records, _ = rack

    def load():
        run(rack, twin)
        return encoder

    lane = Lane(load, partial(job, folder), partial(run_rack, "embed", folder / "manifest.json", rack="r0"))
    (done,) = process_rack(records, [lane], device="cpu", dtype="float32", batch_size=8)
    assert twin.batches
    assert not encoder.batches
    assert [(r["status"], r["reused"], r["tiles"]) for r in done] == [("ok", True, n) for n in (20, 0, 1, 33)]


def test_what_is_left_of_a_killed_job_does_not_matter(rack):
    """Slides that were finished stay, and the features of the others are those of an undisturbed run."""
    run(rack, ToyEncoder())
    whole = {name: features(rack, name) for name in "abcd"}
    for name in "cd":
        path = rack[0] / "embeddings" / f"{name}.zarr"
        path.rename(path.with_name(f".{name}.zarr.tmp-elsewhere-1-ab"))
    encoder = ToyEncoder()
    records = run(rack, encoder)
    assert [r.get("reused", False) for r in records] == [True, True, False, False]
    for name in "abcd":
        np.testing.assert_array_equal(features(rack, name), whole[name])


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_batches_are_halved_when_memory_runs_out(rack, limit):
    encoder = ToyEncoder(limit)
    run(rack, encoder)
    for name, tiles in rack[2].items():
        np.testing.assert_allclose(features(rack, name), expected(tiles), rtol=1e-5)
    assert max(encoder.batches) <= limit


def test_no_memory_for_one_tile_is_no_slides_failure(rack):
    with pytest.raises(RunError, match="toy does not fit into the memory of cpu with one tile"):
        run(rack, ToyEncoder(0))
    assert not (rack[0] / "manifest.json").exists()


class Breaks(ToyEncoder):
    """A GPU that breaks after some batches: every later call fails, as with CUDA."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, batch, stain=None):
        if len(self.batches) >= self.after:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return super().forward(batch, stain)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_gpu_that_fails_ends_the_job_and_what_was_finished_is_kept(rack, threads):
    """Slides a (3 batches), b (none) and c (1) are done, and d fails: no manifest, and the next run takes d alone."""
    broken = Breaks(4)
    with pytest.raises(RunError, match="unspecified launch failure"):
        run(rack, broken, threads=threads)
    assert not (rack[0] / "manifest.json").exists()
    kept = {path.name for path in (rack[0] / "embeddings").iterdir()}
    assert kept <= {"a.zarr", "b.zarr", "c.zarr"}
    assert kept == {"a.zarr", "b.zarr", "c.zarr"} or threads > 1
    whole = ToyEncoder()
    records = run(rack, whole)
    assert [r["status"] for r in records] == ["ok"] * 4
    assert [r.get("reused", False) for r in records] == [f"{name}.zarr" in kept for name in "abcd"]
    np.testing.assert_allclose(features(rack, "d"), expected(rack[2]["d"]), rtol=1e-5)


def test_a_gpu_that_fails_in_one_encoder_leaves_nobody_waiting_in_the_other(rack):
    class First(Breaks, Other):
        pass

    with pytest.raises(RunError, match="unspecified launch failure"):
        two(rack, ToyEncoder(), First(0))


def test_other_errors_are_not_hidden(rack):
    class Wrong(ToyEncoder):
        def forward(self, batch, stain=None):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    records = run(rack, Wrong())
    assert records[0]["failure"]["code"] == "crashed"
    assert "mat1" in records[0]["failure"]["message"]


def test_a_damaged_store_costs_its_slide(rack):
    path = shard_path(rack[0] / "tiles" / "a.zarr", 1)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    records = run(rack, ToyEncoder())
    assert [r["status"] for r in records] == ["failed", "ok", "ok", "ok"]
    assert "checksum" in records[0]["failure"]["message"]
    np.testing.assert_allclose(features(rack, "d"), expected(rack[2]["d"]), rtol=1e-5)


def test_features_that_are_not_finite_are_refused(rack):
    class Diverged(ToyEncoder):
        def forward(self, batch, stain=None):
            return super().forward(batch, stain) * float("nan")

    records = run(rack, Diverged())
    assert records[0]["failure"]["message"] == "toy gave features that are not finite"
    assert store_fingerprint(rack[0] / "embeddings" / "a.zarr") is None


def test_the_stain_is_applied_on_the_way_in(rack):
    from slidemake.stain.fit import apply_stain_numpy

    matrix = ((0.8, 0.1, 0.0), (0.0, 0.9, 0.1), (0.1, 0.0, 0.7))
    transform = StainTransform("macenko", "ok", "t", None, (250.0,) * 3, (255.0,) * 3, matrix)
    run(rack, ToyEncoder(), lambda r: job(rack[0], r, stain=transform.as_dict()))
    stained = apply_stain_numpy(rack[2]["a"], transform)
    np.testing.assert_allclose(features(rack, "a"), expected(stained), atol=0.5)
    assert np.abs(features(rack, "a") - expected(rack[2]["a"])).max() > 2


class Slow(ToyEncoder):
    """Waits in the middle of a batch until it is let go."""

    def __init__(self):
        super().__init__()
        self.go, self.started = threading.Event(), threading.Semaphore(0)

    def forward(self, batch, stain=None):
        self.started.release()
        assert self.go.wait(60)
        return super().forward(batch, stain)


@contextmanager
def nowhere(number, job, store):
    yield lambda part: None


def engine(rack, model, batch=2, workers=2, output=nowhere):
    folder, records, _ = rack
    work = [{0: job(folder, r)} for r in records]
    models = {0: Forward(model, "cpu", batch)}
    return Engine(work, models, output, batch=batch, workers=workers, progress=lambda n: None)


def test_no_more_pixels_are_in_memory_than_workers_hold_and_closing_stops(rack, monkeypatch):
    reads = []
    plain = Source.read
    monkeypatch.setattr(Source, "read", lambda self, a, b: reads.append((a, b)) or plain(self, a, b))
    model = Slow()
    running = engine(rack, model)
    for _ in range(2):
        assert model.started.acquire(timeout=60)
    assert len(reads) == 2  # what waits is not read
    assert running._slots._value <= WAITING
    model.go.set()
    running.close()
    assert not running._feeder.is_alive()
    assert len(reads) < 10 + 1 + 17


def test_workers_go_on_with_the_next_slide_while_one_is_unfinished(rack):
    """Both workers hold a batch although the first slide has one batch only."""
    folder, records, tiles = rack
    model = Slow()
    running = engine((folder, [records[2], records[3]], tiles), model, batch=8)
    for _ in range(2):
        assert model.started.acquire(timeout=60)
    model.go.set()
    assert running.result(0, "d")["tiles"] == 33
    running.close()


def test_a_slide_is_committed_as_soon_as_it_is_complete_whoever_asks(rack):
    seen = []

    @contextmanager
    def output(number, job, store):
        parts = []
        yield parts.append
        seen.append((job.slide_id, sum(map(len, parts))))

    running = engine(rack, ToyEncoder(), output=output)
    assert running.result(0, "d") == {"tiles": 33, "tiles_per_second": pytest.approx(1e6, abs=1e6)}
    assert seen == [("a", 20), ("b", 0), ("c", 1), ("d", 33)]
    running.close()


def test_an_error_in_reading_is_raised_at_its_slide(rack):
    folder, records, _ = rack

    def make(record):
        where = "nothing" if record["slide_id"] == "a" else "tiles"
        return replace(job(folder, record), tiles=folder / where / "d.zarr")

    models = {0: Forward(ToyEncoder(), "cpu", 8)}
    work = [{0: make(r)} for r in records]
    running = Engine(work, models, nowhere, batch=8, workers=1, progress=lambda n: None)
    with pytest.raises(SlideFailure, match="is missing"):
        running.result(0, "a")
    assert running.result(0, "d")["tiles"] == 33
    running.close()


def test_features_are_written_as_they_come_and_of_a_slide_that_fails_nothing_is_left(rack, monkeypatch):
    """A chunk goes to the disk while the rest of the slide waits for its model: memory does not grow with slides."""
    monkeypatch.setattr("slidemake.stores.arrays.CHUNK_BYTES", 8 * DIM * 4)
    folder, records, _ = rack
    at_the_last, written = threading.Event(), []

    class Last(ToyEncoder):
        def forward(self, batch, stain=None):
            if len(batch) == 1:
                assert at_the_last.wait(60)
                raise RuntimeError("the last batch fails")
            return super().forward(batch, stain)

    def watch():
        for _ in range(600):
            written[:] = (folder / "embeddings").glob(".d.zarr.tmp-*/features/c/*/0")
            if len(written) == 4:
                break
            time.sleep(0.05)
        at_the_last.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    only = (folder, [records[3]], {})
    failed = run(only, Last())
    watcher.join()
    assert len(written) == 4
    assert failed[0]["failure"]["message"] == "RuntimeError: the last batch fails"
    assert list((folder / "embeddings").iterdir()) == []
    run(only, ToyEncoder())
    np.testing.assert_allclose(features(rack, "d"), expected(rack[2]["d"]), rtol=1e-5)
    assert len(list((folder / "embeddings" / "d.zarr" / "features" / "c").iterdir())) == 5


def test_a_disk_that_is_full_ends_the_job_and_leaves_nothing(rack, monkeypatch):
    def full(self, part):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArrayWriter, "append", full)
    with pytest.raises(RunError, match="No space left"):
        run(rack, ToyEncoder())
    assert list((rack[0] / "embeddings").glob(".a*")) == []


class Other(ToyEncoder):
    """Another encoder on the same tiles: twice the numbers of the first."""

    identity: ClassVar = {"key": "other"}

    def forward(self, batch, stain=None):
        return 2 * super().forward(batch, stain)


def two(rack, first, second, stains=(None, None)):
    folder, records, _ = rack

    def lane(name, model, stain):
        def make(record):
            about = {"out": folder / name / f"{record['slide_id']}.zarr", "fingerprint": f"{name} {record['slide_id']}"}
            return job(folder, record, stain=stain, **about)

        def load():
            model.loads += 1
            return model

        return Lane(load, make, partial(run_rack, "embed", folder / f"{name}.json", rack="r0"))

    lanes = [lane("one", first, stains[0]), lane("two", second, stains[1])]
    return process_rack(records, lanes, device="cpu", dtype="float32", batch_size=8, threads=2)


def stored(rack, encoder, name):
    return zarr.open_group(rack[0] / encoder / f"{name}.zarr", mode="r")["features"][...]


def test_two_encoders_read_each_tile_once(rack, monkeypatch):
    reads = []
    plain = Source.read
    monkeypatch.setattr(Source, "read", lambda self, a, b: reads.append(b - a) or plain(self, a, b))
    transform = StainTransform(
        "macenko", "ok", "t", None, (250.0,) * 3, (255.0,) * 3, ((0.8, 0.1, 0.0), (0, 0.9, 0.1), (0.1, 0, 0.7))
    )
    records = two(rack, ToyEncoder(), Other(), (None, transform.as_dict()))
    assert sum(reads) == 20 + 1 + 33
    assert [[r["status"] for r in of_lane] for of_lane in records] == [["ok"] * 4] * 2
    for name, tiles in rack[2].items():
        np.testing.assert_allclose(stored(rack, "one", name), expected(tiles), rtol=1e-5)
    from slidemake.stain.fit import apply_stain_numpy

    stained = apply_stain_numpy(rack[2]["d"], transform)
    np.testing.assert_allclose(stored(rack, "two", "d"), 2 * expected(stained), atol=1.0)
    assert json.loads((rack[0] / "two.json").read_text())["slides"][3]["tiles"] == 33


def test_an_encoder_added_later_is_computed_alone(rack):
    first = ToyEncoder()
    run_one = Lane(lambda: first, partial(two_job, rack[0], "one"), partial(run_rack, "embed", rack[0] / "one.json"))
    process_rack(rack[1], [run_one], device="cpu", dtype="float32", batch_size=8)
    again, added = ToyEncoder(), Other()
    records = two(rack, again, added)
    assert again.loads == 0
    assert added.loads == 1
    assert [r["reused"] for r in records[0]] == [True] * 4
    assert not any(r.get("reused") for r in records[1])


def two_job(folder, name, record):
    about = {"out": folder / name / f"{record['slide_id']}.zarr", "fingerprint": f"{name} {record['slide_id']}"}
    return job(folder, record, **about)


def test_an_encoder_that_fails_costs_the_other_nothing(rack):
    class Wrong(Other):
        def forward(self, batch, stain=None):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    records = two(rack, ToyEncoder(), Wrong())
    assert [r["status"] for r in records[0]] == ["ok"] * 4
    assert [r["status"] for r in records[1]] == ["failed", "ok", "failed", "failed"]  # b has no tiles


def test_a_compiled_model_sees_one_shape_only(rack):
    encoder = ToyEncoder()
    encoder.path_name = "compiled"
    run(rack, encoder)
    assert set(encoder.batches) == {8}
    for name, tiles in rack[2].items():
        np.testing.assert_allclose(features(rack, name), expected(tiles), rtol=1e-5)


def test_an_identity_has_all_that_shapes_features():
    base = ("tiles", {"key": "e", "weights_sha256": "1"}, stain_description(None), "float16")
    marks = {embedding_fingerprint(*base)}
    marks.add(embedding_fingerprint("other", *base[1:]))
    marks.add(embedding_fingerprint(base[0], {"key": "e", "weights_sha256": "2"}, *base[2:]))
    stain = stain_description({"method": "macenko", "target": "t", "fingerprint": "f"})
    marks.add(embedding_fingerprint(*base[:2], stain, "float16"))
    marks.add(embedding_fingerprint(*base[:3], "float32"))
    assert len(marks) == 5


DEADLY = """
import ctypes, sys
from pathlib import Path
from functools import partial
from types import SimpleNamespace
import toy_encoder as t
from slidemake.jobs.job import job
from slidemake.embedding.stage import Lane, process_rack
from slidemake.jobs.racks import run_rack

class Deadly(t.ToyEncoder):
    def forward(self, batch, stain=None):
        if len(batch) == 1:  # slide c alone has such a batch
            ctypes.string_at(0)
        return super().forward(batch, stain)

folder = Path(sys.argv[1])
records = [
    {"slide_id": n, "status": "ok", "failure": None, "tiles": c} for n, c in {"a": 20, "b": 0, "c": 1, "d": 33}.items()
]
with job(SimpleNamespace(log=[folder / "log.txt"], rule="embed_tiles")):
    run = partial(run_rack, "embed", folder / "manifest.json", rack="r0", background=True)
    lane = Lane(Deadly, partial(t.job, folder), run)
    process_rack(records, [lane], device="cpu", dtype="float32", batch_size=10, threads=2)
"""


def test_a_slide_on_which_the_model_crashes_is_left_out(rack):
    """A real segmentation fault in the model, with two threads: the other slides' features are all there."""
    paths = [str(Path(toy_encoder.__file__).parent), str(Path(__file__).parents[3] / "scripts")]
    done = subprocess.run(
        [sys.executable, "-c", DEADLY, str(rack[0])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((rack[0] / "manifest.json").read_text())["slides"]
    codes = {record["slide_id"]: (record["failure"] or {}).get("code") for record in records}
    assert codes == {"a": None, "b": None, "c": "crashed", "d": None}
    for name in "ad":
        np.testing.assert_allclose(features(rack, name), expected(rack[2][name]), rtol=1e-5)
    assert not (rack[0] / "embeddings" / "c.zarr").exists()
