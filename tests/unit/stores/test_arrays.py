"""Arrays of a store against zarr-python, both ways: the same metadata and the same numbers; damage is found."""

import json

import numpy as np
import pytest
import zarr
from slidemake.core.failures import SlideFailure
from slidemake.stores import arrays
from slidemake.stores.arrays import ArrayWriter, StoredArray, chunk_path, read_array, write_array, write_group
from zarr.codecs import Crc32cCodec, ZstdCodec

SHAPES = [(0, 3), (1, 3), (7, 3), (12, 3), (5,), (4, 0), (6, 2, 2)]
DTYPES = ["float16", "float32", "int32", "uint8"]


def rows_of(monkeypatch, values, rows):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", max(1, rows * max(1, values[:1].nbytes)))


def numbers(shape, dtype):
    return np.random.default_rng(3).integers(1, 200, shape).astype(dtype)


def theirs(path, values, rows):
    group = zarr.create_group(path, zarr_format=3, attributes={"a": [1, "b"]})
    array = group.create_array(
        "x",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, min(rows, len(values))), *(max(1, n) for n in values.shape[1:])),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=0,
    )
    if values.size:
        array[...] = values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_write_is_what_zarr_python_writes(tmp_path, monkeypatch, shape, dtype):
    values = numbers(shape, dtype)
    rows_of(monkeypatch, values, 4)
    write_group(tmp_path / "ours.zarr", {"a": [1, "b"]})
    write_array(tmp_path / "ours.zarr", "x", values)
    theirs(tmp_path / "theirs.zarr", values, 4)
    files = [
        {p.relative_to(tmp_path / name).as_posix(): p for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("ours.zarr", "theirs.zarr")
    ]
    assert set(files[0]) == set(files[1])
    for name in files[0]:
        ours, other = (of[name].read_bytes() for of in files)
        if name.endswith(".json"):
            assert json.loads(ours) == json.loads(other)
        else:
            assert ours == other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_we_read_what_zarr_python_writes_and_it_reads_ours(tmp_path, monkeypatch, shape, dtype):
    values = numbers(shape, dtype)
    rows_of(monkeypatch, values, 4)
    theirs(tmp_path / "theirs.zarr", values, 4)
    write_group(tmp_path / "ours.zarr", {})
    write_array(tmp_path / "ours.zarr", "x", values)
    assert StoredArray(tmp_path / "theirs.zarr", "x")._ours  # not by way of zarr-python itself
    np.testing.assert_array_equal(read_array(tmp_path / "theirs.zarr", "x"), values)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "ours.zarr", mode="r")["x"][...], values)
    described = StoredArray(tmp_path / "ours.zarr", "x")
    assert (described.shape, described.dtype) == (values.shape, values.dtype)


def test_chunks_that_zarr_python_leaves_out_are_zeros(tmp_path, monkeypatch):
    values = np.zeros((8, 3), np.float32)
    values[5] = 1
    rows_of(monkeypatch, values, 4)
    theirs(tmp_path / "t.zarr", values, 4)
    assert not chunk_path(tmp_path / "t.zarr" / "x", 0, 2).exists()
    np.testing.assert_array_equal(read_array(tmp_path / "t.zarr", "x"), values)


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": None},
        {"chunks": (3, 2)},
        {"chunks": (2, 3), "shards": (4, 3)},
        {"fill_value": 7},
    ],
)
def test_arrays_of_other_software_are_read_all_the_same(tmp_path, options):
    values = numbers((7, 3), "int32")
    group = zarr.create_group(tmp_path / "t.zarr", zarr_format=3)
    group.create_array("x", **{"shape": values.shape, "dtype": "int32", "chunks": (3, 3), **options})[...] = values
    array = StoredArray(tmp_path / "t.zarr", "x")
    assert not array._ours
    np.testing.assert_array_equal(array.read(), values)


@pytest.mark.parametrize("parts", [[7], [1] * 7, [3, 4], [5, 0, 2], [4, 3]])
def test_rows_come_in_parts_of_any_size(tmp_path, monkeypatch, parts):
    values = numbers((7, 3), "float16")
    rows_of(monkeypatch, values, 4)
    with ArrayWriter(tmp_path, "x", values.shape, "float16") as writer:
        for part in np.split(values, np.cumsum(parts)[:-1]):
            writer.append(part)
            assert len(list((tmp_path / "x").rglob("0"))) == (1 + 1 if writer._written >= 4 else 0)  # c/0 and c/0/0
    np.testing.assert_array_equal(read_array(tmp_path, "x"), values)


def test_too_many_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="more than 2 rows"), ArrayWriter(tmp_path, "a", (2, 3), "int32") as writer:
        writer.append(numbers((3, 3), "int32"))
    with pytest.raises(ValueError, match="1 rows instead of 2"), ArrayWriter(tmp_path, "b", (2, 3), "int32") as writer:
        writer.append(numbers((1, 3), "int32"))


def test_every_changed_byte_is_found(tmp_path, monkeypatch):
    values = numbers((7, 3), "float32")
    rows_of(monkeypatch, values, 4)
    write_array(tmp_path, "x", values)
    path = chunk_path(tmp_path / "x", 1, 2)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(SlideFailure, match="an array x that does not decode"):
            read_array(tmp_path, "x")
    for size in (0, 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(SlideFailure, match="an array x that does not decode"):
            read_array(tmp_path, "x")
    with pytest.raises(SlideFailure, match="has no array y"):
        read_array(tmp_path, "y")


def test_what_is_no_array_of_rows_is_damage(tmp_path):
    zarr.create_group(tmp_path / "t.zarr", zarr_format=3).create_array("x", shape=(), dtype="float32")
    with pytest.raises(SlideFailure, match="has no array x"):
        read_array(tmp_path / "t.zarr", "x")
