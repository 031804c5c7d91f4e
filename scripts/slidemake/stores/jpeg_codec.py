"""JPEG as a Zarr v3 codec: one tile is one chunk is one JPEG.

Zarr v3 has no standard JPEG codec yet, so this one is registered under a name of our own and shipped as an entry
point (`zarr.codecs` group): any zarr-python reads our stores once slidemake is installed. Inside a shard it is
followed by the standard `crc32c` codec, so that a flipped byte in a finished store is found.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

NAME = "slidemake.jpeg"


def encode_jpeg(tile: np.ndarray, quality: int, subsampling: str) -> bytes:
    """JPEG bytes of one (H, W, 3) uint8 tile; `subsampling` is "444" or "420"."""
    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=quality, subsampling=subsampling))


def decode_jpeg(data: Any, out: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of JPEG bytes, in `out` where it is given; ValueError where the image has another size."""
    return imagecodecs.jpeg8_decode(data, out=out)


@dataclass(frozen=True)
class JpegTile(ArrayBytesCodec):
    """Chunks of shape (1, H, W, 3) uint8 as baseline JPEG.

    quality: 1 to 100 on libjpeg's scale. subsampling: "444" keeps chroma at full resolution, "420" halves it.
    """

    is_fixed_size = False

    quality: int = 90
    subsampling: str = "444"

    @classmethod
    def from_dict(cls, data: Any) -> JpegTile:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "configuration": {"quality": self.quality, "subsampling": self.subsampling}}

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        tile = decode_jpeg(chunk_bytes.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(tile.reshape(chunk_spec.shape))

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_array: Any, chunk_spec: Any) -> Any:
        tile = chunk_array.as_numpy_array()
        if tile.ndim != 4 or tile.shape[0] != 1 or tile.shape[3] != 3 or tile.dtype != np.uint8:
            raise ValueError(f"{NAME} stores chunks of (1, H, W, 3) uint8, not {tile.shape} {tile.dtype}")
        return chunk_spec.prototype.buffer.from_bytes(encode_jpeg(tile[0], self.quality, self.subsampling))

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._encode_sync, chunk_array, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError("the size of a JPEG is known only after encoding")


register_codec(NAME, JpegTile)
