"""Tile stores: size, writing, reading in order and at random, beside zarr-python on the same store.

Rates are per second of CPU time, that is per core.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from inputs import Slide, window_and_tiles
from measure import Row, compare, in_turns
from slidemake.stores.arrays import write_array
from slidemake.stores.jpeg_codec import decode_jpeg, encode_jpeg
from slidemake.stores.tile_store import TileCodec, TileStore, create_store, shard_path, write_shard

GRID, SHARD, CALL = "256px_0.5mpp", 256, 64
CODECS = {
    "jpeg 444": TileCodec("jpeg", 90, "444"),
    "jpeg 420": TileCodec("jpeg", 90, "420"),
    "zstd": TileCodec("zstd"),
    "none": TileCodec("none"),
}


def write(path: Path, tiles: np.ndarray, codec: TileCodec) -> float:
    """A store as the tiling stage writes it, with one thread."""
    group = create_store(path, len(tiles), tiles.shape[1], codec, SHARD)
    for start in range(0, len(tiles), SHARD):
        write_shard(shard_path(path, start // SHARD), [codec.encode(t) for t in tiles[start : start + SHARD]], SHARD)
    write_array(path, "coords", np.zeros((len(tiles), 2), np.int32))
    write_array(path, "tissue", np.ones(len(tiles), np.float32))
    write_array(path, "quality", np.zeros((len(tiles), 1), np.float32))
    attributes = {"format": "slidemake-tiles", "format_version": 1, "tile_px": tiles.shape[1], "shard_tiles": SHARD}
    group.attrs.update({**attributes, "store": "pixels", "codec": codec.as_dict()})
    return len(tiles)


def write_with_zarr(path: Path, tiles: np.ndarray, codec: TileCodec) -> float:
    """The same array written by zarr-python, a shard at a time."""
    pixels: Any = create_store(path, len(tiles), tiles.shape[1], codec, SHARD)["pixels"]
    for start in range(0, len(tiles), SHARD):
        pixels[start : start + SHARD] = tiles[start : start + SHARD]
    return len(tiles)


def in_order(read: Callable[[int, int], Any], count: int) -> float:
    for start in range(0, count, CALL):
        read(start, min(start + CALL, count))
    return count


def at_random(read: Callable[[int], Any], order: np.ndarray) -> float:
    for index in order.tolist():
        read(index)
    return len(order)


def codec_alone(codec: TileCodec, tiles: np.ndarray) -> tuple[Callable[[], float], Callable[[], float]]:
    """Encoding and decoding in memory with the library that does it: the limits of writing and reading."""
    from numcodecs.zstd import Zstd

    encode: Callable[[np.ndarray], bytes] = Zstd(level=codec.level).encode
    decode: Callable[[bytes], Any] = Zstd(level=codec.level).decode
    if codec.name == "jpeg":
        encode, decode = partial(encode_jpeg, quality=codec.quality, subsampling=codec.subsampling), decode_jpeg
    elif codec.name == "none":
        encode, decode = np.ndarray.tobytes, lambda data: np.frombuffer(data, np.uint8).copy()
    encoded = [bytes(encode(tile)) for tile in tiles]

    def encode_all() -> float:
        return sum(bool(encode(tile)) for tile in tiles)

    def decode_all() -> float:
        return sum(decode(data) is not None for data in encoded)

    return encode_all, decode_all


def measure(slide: Slide, repeats: int, most: int, folder: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of all codecs on at most `most` tiles of a slide, and the sizes."""
    from slidemake.slides.opening import open_slide
    from slidemake.tiles.reading import read_tiles

    zarr.config.set({"threading.max_workers": 1})
    window, coords = window_and_tiles(slide, GRID)
    with open_slide(slide.path, reader=slide.facts["reader"]) as reader:
        tiles = read_tiles(reader, coords[:most], window)[0]
    order = np.random.default_rng(0).permutation(len(tiles))[:400]
    rows, sizes = [], []
    for name, codec in CODECS.items():
        path = folder / f"{slide.slide_id}-{name.replace(' ', '')}.zarr"
        write(path, tiles, codec)
        store, array = TileStore(path), zarr.open_group(path, mode="r")["pixels"]
        np.testing.assert_array_equal(store.read(0, 3), array[0:3])
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        sizes.append({"slide": slide.slide_id, "codec": name, "bytes_per_tile": size / len(tiles)})
        encode_all, decode_all = codec_alone(codec, tiles)
        times = in_turns(
            {
                "write": partial(write, folder / "w.zarr", tiles, codec),
                "write zarr": partial(write_with_zarr, folder / "z.zarr", tiles, codec),
                "encode": encode_all,
                "order": partial(in_order, store.read, len(tiles)),
                "order zarr": partial(in_order, lambda a, b, array=array: array[a:b], len(tiles)),
                "random": partial(at_random, lambda i, store=store: store.read_tiles([i]), order),
                "random zarr": partial(at_random, lambda i, array=array: array[i], order),
                "decode": decode_all,
            },
            repeats,
        )
        for scratch in ("w.zarr", "z.zarr"):
            shutil.rmtree(folder / scratch)
        default = name == "jpeg 444"
        what, row = f"{slide.slide_id} {name} 256 px", partial(compare, "store", clock="cpu")
        for verb, key, alone, bar in (
            ("write", "write", "encode", ""),
            ("in order", "order", "decode", ">=2000"),
            ("at random", "random", "decode", ">=1500"),
        ):
            known = {"bar": bar if default else "", "absolute": True}
            unit = "tiles/s core"
            rows.append(row(f"{verb} {what}", unit, times[key], "zarr-python", times[f"{key} zarr"], **known))
            rows.append(row(f"{verb} {what}", unit, times[key], f"{alone} alone", times[alone]))
    return rows, sizes
