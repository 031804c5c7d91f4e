"""Fingerprints and commits that are whole or absent."""

import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from slidemake.core import files
from slidemake.core.content import content_identity, trace_of
from slidemake.core.failures import SlideFailure
from slidemake.core.files import (
    check_file,
    committed,
    file_sums,
    files_are_whole,
    fingerprint,
    on_network,
    read_json,
    read_json_if_whole,
    read_slide_record,
    remove_leftovers,
    temporary_sibling,
    versions,
    write_image,
    write_json,
)
from slidemake.core.stages import STAGE_VERSIONS


def test_equal_parts_equal_fingerprint():
    one = fingerprint("tiles", a=1, b={"y": (1, 2), "x": np.float64(0.5)})
    assert one == fingerprint("tiles", b={"x": 0.5, "y": [1, 2]}, a=np.int64(1))
    assert len(one) == 32
    assert one != fingerprint("embed", a=1, b={"y": (1, 2), "x": 0.5})
    assert one != fingerprint("tiles", a=2, b={"y": (1, 2), "x": 0.5})


def test_a_stage_version_changes_its_fingerprints(monkeypatch):
    before = fingerprint("tiles", a=1)
    monkeypatch.setitem(STAGE_VERSIONS, "tiles", 999)
    assert fingerprint("tiles", a=1) != before


def test_a_commit_is_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"

    def killed():
        with committed(path) as work:
            work.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()
    assert list(tmp_path.iterdir()) == []
    write_json(path, {"a": (1, np.float32(2))})
    assert read_json(path) == {"a": [1, 2.0]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text('{"a": 1')
    assert read_json_if_whole(path) is None
    with pytest.raises(SlideFailure, match=r"x\.json is not valid JSON"):
        read_json(path)


def test_json_that_was_changed_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"mpp": 0.25, "nested": {"y": [1, 2.5, None]}, "checksum": "of an older one"})
    assert read_json(path) == {"mpp": 0.25, "nested": {"y": [1, 2.5, None]}}
    path.write_text(path.read_text().replace("0.25", "0.35"))
    assert read_json_if_whole(path) is None
    with pytest.raises(SlideFailure, match=r"x\.json does not match its checksum"):
        read_json(path)
    path.write_text('{"mpp": 0.35}')  # by hand
    assert read_json(path) == {"mpp": 0.35}


def test_files_that_a_json_lists(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    described = {"files": file_sums(tmp_path, ["a.png"])}
    check_file(tmp_path / "a.png", described)
    check_file(tmp_path / "other.png", described)  # of which it says nothing
    assert files_are_whole(tmp_path, described)
    (tmp_path / "a.png").write_bytes(b"abd")
    with pytest.raises(SlideFailure, match="does not match its checksum"):
        check_file(tmp_path / "a.png", described)
    (tmp_path / "a.png").unlink()
    assert not files_are_whole(tmp_path, described)


def test_a_record_of_another_slide_is_refused(tmp_path):
    write_json(tmp_path / "a" / "slide.json", {"slide_id": "a"})
    assert read_slide_record(tmp_path / "a", "slide.json") == {"slide_id": "a"}
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(SlideFailure, match="of another slide"):
        read_slide_record(tmp_path / "b", "slide.json")


def test_a_directory_replaces_an_older_one(tmp_path):
    store = tmp_path / "s.zarr"
    for content in ("old", "new"):
        with committed(store) as work:
            work.mkdir()
            (work / content).write_text(content)
    assert [p.name for p in store.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_a_twin_that_commits_the_same_leaves_the_first_in_place(tmp_path):
    """Others may be reading it: it must not be away for a moment, nor become other files."""
    store = tmp_path / "s.zarr"
    inodes = []
    for content in ("same", "same", "another"):
        with committed(store) as work:
            (work / "c").mkdir(parents=True)
            (work / "c" / "0").write_text(content)
        inodes.append((store / "c" / "0").stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]
    assert (store / "c" / "0").read_text() == "another"
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


def test_what_a_network_file_system_shows_late_is_waited_for(tmp_path, monkeypatch):
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            write_json(tmp_path / "late.json", {"a": 1, "files": {"x": "0"}})

    monkeypatch.setattr(files, "on_network", lambda path: True)
    monkeypatch.setattr(files.time, "sleep", nap)
    monkeypatch.setattr(files, "_waited", 0.0)
    assert read_json_if_whole(tmp_path / "late.json") is None  # only a question
    assert not naps
    assert read_json(tmp_path / "late.json")["a"] == 1
    assert len(naps) == 3
    with pytest.raises(SlideFailure, match="is missing"):
        read_json(tmp_path / "never.json")
    assert sum(naps) == files.LATE
    with pytest.raises(SlideFailure, match="is missing"):  # patience is used up
        check_file(tmp_path / "x", {"files": {"x": "0"}})
    assert sum(naps) == files.LATE


def test_network_file_systems_are_known_by_their_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nfiler:/x /data nfs4 rw 0 0\ntmpfs /data/local tmpfs rw 0 0\n"
        "files /my\\040files fuse.sshfs rw 0 0\n"
    )
    found = {path: on_network(path, mounts) for path in ("/data/a", "/database/a", "/data/local/a", "/my files/a")}
    assert found == {"/data/a": True, "/database/a": False, "/data/local/a": False, "/my files/a": True}
    assert not on_network(tmp_path)
    assert not on_network("/data", tmp_path / "no_such_file")


def test_leftovers_of_dead_jobs_go_and_those_of_live_ones_stay(tmp_path):
    alive = temporary_sibling(tmp_path / "s.zarr")
    alive.mkdir()
    pid = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout
    dead = alive.with_name(alive.name.replace(f"-{os.getpid()}-", f"-{pid.strip()}-"))
    dead.mkdir()
    elsewhere = alive.with_name(".s.zarr.tmp-another-host-1-ab")
    elsewhere.mkdir()
    other = tmp_path / ".other.zarr.tmp-x-1-ab"
    other.mkdir()
    remove_leftovers(tmp_path, "s.zarr")
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, other])
    remove_leftovers(tmp_path, "s.zarr", older_than=-1)
    assert sorted(tmp_path.iterdir()) == [other]


def test_a_zombie_and_a_younger_process_with_the_number_are_dead(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        mine = temporary_sibling(tmp_path / "s.zarr")
        zombie = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
        zombie.mkdir()
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it yet
            time.sleep(0.01)
        remove_leftovers(tmp_path, "s.zarr")
        assert not zombie.exists()
    mine.mkdir()
    os.utime(mine, (0, 0))  # written long before this process began
    remove_leftovers(tmp_path, "s.zarr", older_than=float("inf"))
    assert not mine.exists()


def test_content_identity_is_of_bytes_not_of_names(tmp_path):
    data = np.random.default_rng(0).bytes(5 << 20)
    one, two = tmp_path / "a.svs", tmp_path / "b.tiff"
    one.write_bytes(data)
    two.write_bytes(data)
    assert content_identity(one) == content_identity(two)
    two.write_bytes(data[:-1])
    assert content_identity(one) != content_identity(two)
    two.write_bytes(b"x" + data[1:])
    assert content_identity(one) != content_identity(two)
    for name in ("d1", "d2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.dcm").write_bytes(b"abc")
    assert content_identity(tmp_path / "d1") == content_identity(tmp_path / "d2")
    assert content_identity(one) == hashlib.sha256(data).hexdigest()[:32]


def test_content_identity_covers_the_file(tmp_path):
    """500 kB in a file of 8 MiB were not among the 3 MiB that were looked at."""
    data = bytearray(np.random.default_rng(0).bytes(8 << 20))
    path = tmp_path / "a.svs"
    path.write_bytes(data)
    before, times = content_identity(path), path.stat()
    traced = trace_of(path)
    assert trace_of(path) == traced
    data[2 << 20 : (2 << 20) + 500_000] = bytes(500_000)
    path.write_bytes(data)
    assert content_identity(path) != before
    assert trace_of(path) != traced
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert trace_of(path) != traced  # windows are all over the file
    data[2 << 20 : (2 << 20) + 500_000] = np.random.default_rng(0).bytes(8 << 20)[2 << 20 : (2 << 20) + 500_000]
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert trace_of(path) == traced
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert trace_of(path) != traced
    assert content_identity(path) == before


def test_versions_name_what_shapes_results():
    assert versions()["numpy"] == np.__version__
    assert versions()["slidemake"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a device that is always full")
def test_a_picture_on_a_full_disk_is_an_error(monkeypatch):
    """Pillow by itself writes the part of a JPEG that fits, and says nothing."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))

    @contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr(files, "committed", full)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(OSError, match="No space left"):
            write_image("x", picture, format=kind)


def test_a_picture_is_what_pillow_writes(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    write_image(tmp_path / "a.jpg", picture, format="JPEG", quality=88)
    picture.save(tmp_path / "b.jpg", quality=88)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_names_of_the_greatest_length_on_a_host_with_a_long_name(tmp_path, monkeypatch):
    """200 characters of a slide_id, and what is added to them for a while, are less than the 255 of a file system."""
    monkeypatch.setattr(files.socket, "gethostname", lambda: "a-host-with-a-long-name." * 3)
    one, two = (tmp_path / ("x" * 199 + letter + ".zarr") for letter in "ab")
    left = files.temporary_sibling(one)
    other = files.temporary_sibling(two)
    for path in (left, other):
        path.mkdir()
        path.rename(path.with_name(re.sub(rf"-{os.getpid()}-", "-999999999-", path.name)))  # of a process that is gone
    with committed(one) as work:
        work.mkdir()
        assert sorted(p.name[-9:] for p in tmp_path.iterdir()) == sorted([other.name[-9:], work.name[-9:]])
    assert one.is_dir()
