"""The tile store: one Zarr v3 group per slide and grid, immutable once committed.

Arrays: `pixels` (N, H, W, 3) uint8, one tile a chunk, whole shards; `coords` (N, 2) int32; `tissue` (N,) float32;
`quality` (N, q) float32. Shard files of `pixels` are written and read here directly, each whole and by one writer:
zarr-python costs 1 to 1.6 ms a tile for what is a read of some bytes. The result is plain Zarr v3 (the tests read and
write the same stores with zarr-python), and every tile carries a CRC32C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from slidemake.core.failures import RunError, damaged
from slidemake.core.files import read_json
from slidemake.stores.arrays import read_array
from slidemake.stores.integrity import check_store, crc32c, problems
from slidemake.stores.jpeg_codec import JpegTile, decode_jpeg, encode_jpeg

FORMAT, FORMAT_VERSION = "slidemake-tiles", 1
MISSING = 2**64 - 1
CODECS = ("jpeg", "zstd", "none")


@dataclass(frozen=True)
class TileCodec:
    """How one tile becomes bytes: `jpeg` (lossy, small), `zstd` (lossless, portable) or `none`."""

    name: str = "jpeg"
    quality: int = 90
    subsampling: str = "444"
    level: int = 3

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise RunError(f"tiling.codec {self.name!r} is not one of {', '.join(CODECS)}")

    def zarr_codecs(self) -> dict[str, Any]:
        """Arguments for zarr.create_array that describe what `encode` writes."""
        if self.name == "jpeg":
            return {"serializer": JpegTile(self.quality, self.subsampling), "compressors": [Crc32cCodec()]}
        zstd = [ZstdCodec(level=self.level)] if self.name == "zstd" else []
        return {"serializer": BytesCodec(), "compressors": [*zstd, Crc32cCodec()]}

    def encode(self, tile: np.ndarray) -> bytes:
        """Bytes of one (H, W, 3) uint8 tile with their CRC32C."""
        if self.name == "jpeg":
            data = encode_jpeg(tile, self.quality, self.subsampling)
        elif self.name == "zstd":
            data = bytes(Zstd(level=self.level).encode(np.ascontiguousarray(tile)))
        else:
            data = np.ascontiguousarray(tile).tobytes()
        return self.sealed(data)

    @staticmethod
    def sealed(data: bytes) -> bytes:
        """Encoded bytes with their CRC32C."""
        return data + crc32c(data)

    def decode(self, data: bytes, out: np.ndarray) -> None:
        """Decode the tile into `out` (H, W, 3), which spares allocating a tile and copying it there.

        A checksum that does not match raises OSError, a tile of another size ValueError.
        """
        body = data[:-4]
        if crc32c(body) != data[-4:]:
            raise OSError("the stored checksum does not match the tile's bytes")
        if self.name == "jpeg":
            decode_jpeg(body, out)
        else:
            raw = Zstd(level=self.level).decode(body) if self.name == "zstd" else body
            out[...] = np.frombuffer(raw, np.uint8).reshape(out.shape)

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> TileCodec:
        codec = attributes["codec"]
        return cls(codec["name"], codec.get("quality", 90), codec.get("subsampling", "444"), codec.get("level", 3))

    def as_dict(self) -> dict[str, Any]:
        if self.name == "jpeg":
            return {"name": "jpeg", "quality": self.quality, "subsampling": self.subsampling}
        return {"name": "zstd", "level": self.level} if self.name == "zstd" else {"name": "none"}


def write_shard(path: Path, encoded: Sequence[bytes], shard_tiles: int) -> None:
    """Write one Zarr v3 shard file: the tiles, then the index (offset and size of each), then the index's CRC32C."""
    index = np.full((shard_tiles, 2), MISSING, "<u8")
    offset = 0
    for slot, data in enumerate(encoded):
        index[slot] = offset, len(data)
        offset += len(data)
    tail = index.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.writelines(encoded)
        handle.write(tail + crc32c(tail))


def read_shard_index(handle: Any, shard_tiles: int) -> np.ndarray:
    """(shard_tiles, 2) offsets and sizes of an open shard file; a damaged index raises OSError."""
    size = shard_tiles * 16 + 4
    end = handle.seek(0, 2)
    if end < size:
        raise OSError(f"{handle.name} is {end} bytes long: shorter than its own index")
    handle.seek(end - size)
    tail = handle.read(size)
    if crc32c(tail[:-4]) != tail[-4:]:
        raise OSError(f"{handle.name}: the checksum of the shard index does not match")
    return np.frombuffer(tail[:-4], "<u8").reshape(shard_tiles, 2)


def create_store(
    path: Path, count: int, tile_px: int, codec: TileCodec, shard_tiles: int, *, with_pixels: bool = True
) -> zarr.Group:
    """Create the group at `path` with an empty `pixels` array (metadata only; shards are files that follow)."""
    group = zarr.create_group(path, zarr_format=3, overwrite=True)
    if with_pixels:
        group.create_array(
            "pixels",
            shape=(count, tile_px, tile_px, 3),
            dtype="uint8",
            chunks=(1, tile_px, tile_px, 3),
            shards=(shard_tiles, tile_px, tile_px, 3),
            fill_value=0,
            filters=None,
            **codec.zarr_codecs(),
        )
    return group


def shard_path(store: Path, shard: int) -> Path:
    """File of shard `shard` of `pixels`."""
    return store / "pixels" / "c" / str(shard) / "0" / "0" / "0"


class TileStore:
    """A committed tile store, read-only. `len(store)` tiles; reads are thread-safe."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_store(self.path)
        self.attrs: dict[str, Any] = read_json(self.path / "zarr.json")["attributes"]
        if self.attrs.get("format") != FORMAT or self.attrs.get("format_version") != FORMAT_VERSION:
            raise RunError(
                f"{self.path} is {self.attrs.get('format')} version {self.attrs.get('format_version')}; this slidemake "
                f"reads {FORMAT} version {FORMAT_VERSION}. Delete the store (or choose another output) and run again."
            )
        self.coords = read_array(self.path, "coords").reshape(-1, 2)
        self.has_pixels = self.attrs["store"] == "pixels"
        self.tile_px: int = self.attrs["tile_px"]
        self._codec = TileCodec.from_attributes(self.attrs)
        self._shard_tiles: int = self.attrs["shard_tiles"]
        self._indices: dict[int, np.ndarray] = {}  # of shards that were read: 16 bytes a tile

    @cached_property
    def tissue(self) -> np.ndarray:
        """(N,) float32, share of each tile that is tissue."""
        return read_array(self.path, "tissue")

    @cached_property
    def quality(self) -> np.ndarray:
        """(N, q) float32, columns as in the attribute quality_names."""
        return read_array(self.path, "quality")

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tiles start..stop in stored order: (n, H, W, 3) uint8."""
        return self.read_tiles(range(start, stop))

    def read_tiles(self, indices: Iterable[int]) -> np.ndarray:
        """Tiles at `indices`: (n, H, W, 3) uint8. SlideFailure `damaged` names store and tile."""
        wanted = [int(i) for i in indices]
        out = np.empty((len(wanted), self.tile_px, self.tile_px, 3), np.uint8)
        by_shard: dict[int, list[int]] = {}
        for place, tile in enumerate(wanted):
            if not 0 <= tile < len(self):
                raise IndexError(f"tile {tile} of {len(self)} in {self.path}")
            by_shard.setdefault(tile // self._shard_tiles, []).append(place)
        for shard, places in by_shard.items():
            tile = wanted[places[0]]
            try:
                with open(shard_path(self.path, shard), "rb", buffering=0) as handle:
                    index = self._indices.get(shard)
                    if index is None:
                        index = self._indices[shard] = read_shard_index(handle, self._shard_tiles)
                    for place in places:
                        tile = wanted[place]
                        offset, size = (int(v) for v in index[tile % self._shard_tiles])
                        handle.seek(offset)
                        self._codec.decode(handle.read(size), out[place])
            except FileNotFoundError as error:
                raise damaged(self.path, f"lacks shard {shard} of its pixels") from error
            except (OSError, ValueError, RuntimeError) as error:
                raise damaged(self.path, f"is damaged in shard {shard}, tile {tile}: {error}") from error
        return out


def store_fingerprint(path: str | Path) -> str | None:
    """Fingerprint in a finished store (tiles or embeddings), None where there is none or it is damaged."""
    from slidemake.core.files import read_json_if_whole

    if next(problems(path), None) is not None:
        return None
    metadata = read_json_if_whole(Path(path) / "zarr.json")
    return (metadata or {}).get("attributes", {}).get("fingerprint")
