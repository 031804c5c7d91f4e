"""The tile store against zarr-python, both ways; damage is found; shapes from 0 to more than a shard."""

import numpy as np
import pytest
import zarr
from slidemake.core.failures import RunError, SlideFailure
from slidemake.stores.arrays import write_array
from slidemake.stores.tile_store import TileCodec, TileStore, create_store, shard_path, write_shard

SIDE, SHARD = 32, 4


def tiles_of(count, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 250, (count, 4, 4, 3)).astype(np.uint8)
    return coarse.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)


def make(path, tiles, codec):
    group = create_store(path, len(tiles), SIDE, codec, SHARD)
    for shard in range(0, len(tiles), SHARD):
        encoded = [codec.encode(t) for t in tiles[shard : shard + SHARD]]
        write_shard(shard_path(path, shard // SHARD), encoded, SHARD)
    write_array(path, "coords", np.arange(2 * len(tiles), dtype=np.int32).reshape(-1, 2))
    write_array(path, "tissue", np.ones(len(tiles), np.float32))
    write_array(path, "quality", np.zeros((len(tiles), 2), np.float32))
    group.attrs.update(
        format="slidemake-tiles",
        format_version=1,
        tile_px=SIDE,
        shard_tiles=SHARD,
        store="pixels",
        codec=codec.as_dict(),
    )
    return TileStore(path)


@pytest.mark.parametrize("name", ["jpeg", "zstd", "none"])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_zarr_python_reads_what_we_write(tmp_path, name, count):
    tiles, codec = tiles_of(count), TileCodec(name)
    store = make(tmp_path / "s.zarr", tiles, codec)
    ours = store.read(0, count)
    theirs = zarr.open_group(tmp_path / "s.zarr", mode="r")["pixels"][...]
    np.testing.assert_array_equal(ours, theirs)
    if name == "jpeg":
        assert count == 0 or np.abs(ours.astype(int) - tiles).mean() < 3
    else:
        np.testing.assert_array_equal(ours, tiles)
    assert len(store) == count
    assert store.coords.shape == (count, 2)


@pytest.mark.parametrize("name", ["jpeg", "zstd", "none"])
def test_we_read_what_zarr_python_writes_and_the_bytes_agree(tmp_path, name):
    tiles, codec = tiles_of(6), TileCodec(name)
    make(tmp_path / "ours.zarr", tiles, codec)
    group = create_store(tmp_path / "theirs.zarr", 6, SIDE, codec, SHARD)
    group["pixels"][...] = tiles
    decoded = zarr.open_group(tmp_path / "ours.zarr", mode="r")["pixels"][...]
    np.testing.assert_array_equal(group["pixels"][...], decoded)
    ours, theirs = (shard_path(tmp_path / f"{who}.zarr", 0).read_bytes() for who in ("ours", "theirs"))
    assert len(ours) == len(theirs)


def test_random_access_equals_sequential(tmp_path):
    store = make(tmp_path / "s.zarr", tiles_of(11), TileCodec("zstd"))
    wanted = [10, 0, 5, 5, 3]
    np.testing.assert_array_equal(store.read_tiles(wanted), store.read(0, 11)[wanted])
    with pytest.raises(IndexError):
        store.read_tiles([11])


@pytest.mark.parametrize("name", ["jpeg", "zstd", "none"])
def test_every_flipped_byte_is_found(tmp_path, name):
    make(tmp_path / "s.zarr", tiles_of(3), TileCodec(name))
    path = shard_path(tmp_path / "s.zarr", 0)
    whole = path.read_bytes()
    for position in np.random.default_rng(1).integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(SlideFailure, match="checksum"):
            TileStore(tmp_path / "s.zarr").read(0, 3)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideFailure, match=r"checksum|shorter"):
        TileStore(tmp_path / "s.zarr").read(0, 3)


def test_damage_after_the_index_was_read_is_found(tmp_path):
    store = make(tmp_path / "s.zarr", tiles_of(3), TileCodec("jpeg"))
    store.read(0, 1)
    path = shard_path(tmp_path / "s.zarr", 0)
    whole = path.read_bytes()
    for spoilt in (b"\0" * len(whole), whole[:20], b""):
        path.write_bytes(spoilt)
        with pytest.raises(SlideFailure, match="damaged in shard 0, tile 0"):
            store.read(0, 3)
    path.write_bytes(whole)
    np.testing.assert_array_equal(store.read(0, 3), TileStore(tmp_path / "s.zarr").read(0, 3))


def test_a_tile_of_another_size_is_damage(tmp_path):
    store = make(tmp_path / "s.zarr", tiles_of(1), TileCodec("jpeg"))
    other = TileCodec("jpeg").encode(np.zeros((SIDE // 2, SIDE, 3), np.uint8))
    write_shard(shard_path(tmp_path / "s.zarr", 0), [other], SHARD)
    with pytest.raises(SlideFailure, match="damaged in shard 0, tile 0"):
        store.read(0, 1)


def test_a_foreign_or_newer_store_is_refused(tmp_path):
    make(tmp_path / "s.zarr", tiles_of(1), TileCodec("none"))
    zarr.open_group(tmp_path / "s.zarr")["coords"].attrs["x"] = 1
    group = zarr.open_group(tmp_path / "s.zarr")
    group.attrs["format_version"] = 99
    with pytest.raises(RunError, match="version 99"):
        TileStore(tmp_path / "s.zarr")
    with pytest.raises(SlideFailure, match="is missing"):
        TileStore(tmp_path / "nothing.zarr")
