"""The loop over a rack: records, resume, who is to blame."""

import errno
import json
import threading

import pytest
from slidemake.core.failures import CODES, HINTS, RunError, SlideFailure
from slidemake.jobs.racks import Machine, assign_racks, auto_rack_size, read_manifest, read_manifests, run_rack


def slides(*names):
    return [{"slide_id": name, "status": "ok", "failure": None} for name in names]


def test_appending_a_slide_touches_one_rack():
    before = assign_racks([f"s{i}" for i in range(10)], 4)
    after = assign_racks([f"s{i}" for i in range(11)], 4)
    assert [rack for rack in after if after[rack] != before.get(rack)] == ["r00002"]
    assert list(before) == ["r00000", "r00001", "r00002"]


def test_training_jobs_share_the_cores():
    assert [Machine(cores=n).training_threads(jobs=5) for n in (2, 5, 16, 64)] == [1, 1, 3, 12]
    assert Machine(cores=64).training_threads(jobs=0) == 16  # no more than there are folds to fit
    assert Machine(cores=8, cluster=True).training_threads(jobs=5) == 8  # a node's cores are a job's own


def test_gpus_share_half_of_the_cores():
    assert Machine(cores=16).embedding_threads(on_gpu=False) == 16
    assert Machine(cores=16).embedding_threads(on_gpu=True) == 8
    assert Machine(cores=16, gpus=1).embedding_threads(on_gpu=True) == 8
    assert Machine(cores=16, gpus=4).embedding_threads(on_gpu=True) == 2  # all four run at once
    assert Machine(cores=2, gpus=4).embedding_threads(on_gpu=True) == 1


@pytest.mark.parametrize(
    ("slides", "machine", "size", "racks"),
    [
        (5, Machine(cores=2), 3, 2),  # both cores work
        (500, Machine(cores=32, gpus=4), 16, 32),  # a rack per core, eight for each GPU
        (500, Machine(cores=8, gpus=16), 8, 63),  # four for each GPU
        (100, Machine(cores=32), 4, 25),  # no rack smaller than that
        (10_000, Machine(cores=2), 64, 157),
        (500, Machine(cores=16, cluster=True), 8, 63),
        (10_000, Machine(cores=16, cluster=True), 64, 157),
        (1, Machine(), 3, 1),
        (0, Machine(), 3, 0),
    ],
)
def test_auto_rack_size(slides, machine, size, racks):
    assert auto_rack_size(slides, machine) == size
    assert len(assign_racks([str(i) for i in range(slides)], size)) == racks


@pytest.mark.parametrize("machine", [Machine(), Machine(64, 8), Machine(16, cluster=True)])
def test_auto_racks_are_filled_evenly(machine):
    for slides in range(3, 3000):
        size = auto_rack_size(slides, machine)
        racks = -(-slides // size)
        assert 3 <= size <= 64
        assert size == 3 or -(-slides // racks) == size, "as many racks of this size would do with a smaller one"


@pytest.mark.parametrize("threads", [1, 3])
def test_failures_are_records_and_travel_on(tmp_path, threads):
    def work(record):
        if record["slide_id"] == "b":
            raise SlideFailure("no_mpp", "no um per pixel")
        if record["slide_id"] == "c":
            raise ZeroDivisionError("oops")
        if record["slide_id"] == "d":
            raise MemoryError
        return {"figure": 7, "fingerprint": "f"}

    first = tmp_path / "one.json"
    records = run_rack("screen", first, slides("a", "b", "c", "d"), work, rack="r0", threads=threads)
    assert records == read_manifest(first, "screen")
    assert [r["status"] for r in records] == ["ok", "failed", "failed", "failed"]
    assert [r["failure"] and r["failure"]["code"] for r in records] == [None, "no_mpp", "crashed", "out_of_memory"]
    assert records[1]["failure"] == {
        "slide_id": "b",
        "stage": "screen",
        "code": "no_mpp",
        "message": "no um per pixel",
        "hint": HINTS["no_mpp"],
    }
    seen = []
    later = run_rack(
        "tissue", tmp_path / "two.json", records, lambda r: seen.append(r["slide_id"]) or {}, threads=threads
    )
    assert seen == ["a"]
    assert [r["failure"] and r["failure"]["stage"] for r in later] == [None, "screen", "screen", "screen"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "No space left on the disk"),
        (PermissionError(errno.EACCES, "denied"), "No permission"),
    ],
)
def test_disk_trouble_ends_the_run_not_the_slide(tmp_path, error, said):
    def work(record):
        raise error

    with pytest.raises(RunError, match=said):
        run_rack("tiles", tmp_path / "m.json", slides("a"), work)
    assert not (tmp_path / "m.json").exists()


def test_the_manifest_is_written_last_and_whole(tmp_path):
    manifest = tmp_path / "m.json"

    def work(record):
        assert not manifest.exists()
        if record["slide_id"] == "b":
            raise RunError("stop")
        return {}

    with pytest.raises(RunError):
        run_rack("tiles", manifest, slides("a", "b"), work)
    assert list(tmp_path.iterdir()) == []
    run_rack("tiles", manifest, slides("a"), work)
    assert json.loads(manifest.read_text())["stage"] == "tiles"
    assert [r["slide_id"] for r in read_manifests([manifest, manifest])] == ["a", "a"]
    with pytest.raises(RunError, match="not of 'embed'"):
        read_manifest(manifest, "embed")


def test_threads_work_side_by_side(tmp_path):
    barrier = threading.Barrier(2, timeout=20)  # passes only when two slides are in work at once
    run_rack("tissue", tmp_path / "m.json", slides("a", "b"), lambda r: {"n": barrier.wait()}, threads=2)


def test_failure_codes_are_the_contract():
    assert "truncated" in CODES
    with pytest.raises(ValueError, match="unknown failure code"):
        SlideFailure("whatever", "x")
