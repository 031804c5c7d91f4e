"""Arrays of a store beside its pixels: features, coordinates, scores.

They are written and read here directly, as plain Zarr v3: zarr-python takes 5 ms to create, fill or open an array,
which on slides of few tiles costs as much as reading them. Arrays that were written by others are read with
zarr-python. Chunks are whole rows, compressed with zstd, with a CRC32C.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from slidemake.core.failures import damaged
from slidemake.stores.integrity import crc32c

CHUNK_BYTES = 4 << 20  # bounds what writing and reading take besides the array
LEVEL = 3  # of zstd


def write_group(store: Path, attributes: dict[str, Any]) -> None:
    """The Zarr v3 group `store`, whose arrays are there or follow."""
    store.mkdir(parents=True, exist_ok=True)
    document = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    (store / "zarr.json").write_text(json.dumps(document, indent=2))


def array_metadata(shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> dict[str, Any]:
    """The zarr.json of an array in chunks of `rows` rows, as zarr-python writes it."""
    floating, one_byte = dtype.kind == "f", dtype.itemsize == 1
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [rows, *(max(1, n) for n in shape[1:])]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if floating else 0,
        "codecs": [
            {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}},
            {"name": "crc32c"},
        ],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


class ArrayWriter:
    """Writes the array `name` of a store from rows that come one part after the other; a context that ends well only
    when all rows came. Holds one chunk in memory.
    """

    def __init__(self, store: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any] | str):
        self._folder, self._shape, self._dtype = store / name, shape, np.dtype(dtype).newbyteorder("<")
        row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize)
        self._rows = max(1, min(CHUNK_BYTES // row_bytes, shape[0]))
        self._chunk = np.zeros((self._rows, *shape[1:]), self._dtype)
        self._written = 0

    def __enter__(self) -> ArrayWriter:
        self._folder.mkdir(parents=True)
        document = array_metadata(self._shape, self._dtype, self._rows)
        (self._folder / "zarr.json").write_text(json.dumps(document, indent=2))
        return self

    def append(self, values: np.ndarray) -> None:
        """Add rows (n, ...), n of any size."""
        if self._written + len(values) > self._shape[0]:
            raise ValueError(f"more than {self._shape[0]} rows for {self._folder}")
        while len(values):
            start = self._written % self._rows
            part = values[: self._rows - start]
            self._chunk[start : start + len(part)] = part
            self._written += len(part)
            values = values[len(part) :]
            if self._written % self._rows == 0:
                self._flush(self._written // self._rows - 1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        if self._written != self._shape[0]:
            raise ValueError(f"{self._written} rows instead of {self._shape[0]} for {self._folder}")
        left = self._written % self._rows
        if left:
            self._chunk[left:] = 0  # a chunk at the border is stored whole
            self._flush(self._written // self._rows)

    def _flush(self, number: int) -> None:
        if not self._chunk.size:
            return
        path = chunk_path(self._folder, number, len(self._shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        data = Zstd(level=LEVEL).encode(self._chunk)
        with open(path, "wb") as handle:  # one after the other: joined they would be in memory twice
            handle.write(data)
            handle.write(crc32c(data))


def chunk_path(array: Path, number: int, dimensions: int) -> Path:
    """File of a chunk of whole rows."""
    return array.joinpath("c", str(number), *["0"] * (dimensions - 1))


def write_array(store: Path, name: str, values: np.ndarray) -> None:
    """The whole array `name` of a store. Empty is legal."""
    with ArrayWriter(store, name, values.shape, values.dtype) as writer:
        writer.append(values)


class StoredArray:
    """An array of a committed store that is described and not read yet: `shape`, `dtype`, `read()`.

    OSError, LookupError, TypeError or ValueError when there is no such array.
    """

    def __init__(self, store: str | Path, name: str):
        self._store, self._name = Path(store), name
        self._document = json.loads((self._store / name / "zarr.json").read_text())
        self.shape = tuple(int(n) for n in self._document["shape"])
        self._rows = int(self._document["chunk_grid"]["configuration"]["chunk_shape"][0])
        self.dtype = np.dtype(self._document["data_type"])
        self._ours = self._document == array_metadata(self.shape, self.dtype, self._rows)

    def read(self) -> np.ndarray:
        """The whole array; SlideFailure `damaged` when it does not decode."""
        try:
            return self._decoded() if self._ours else self._by_zarr()
        except Exception as error:  # every codec has errors of its own
            raise damaged(
                self._store, f"has an array {self._name} that does not decode ({type(error).__name__}: {error})"
            ) from error

    def _by_zarr(self) -> np.ndarray:
        import zarr

        return np.asarray(zarr.open_array(self._store / self._name, mode="r")[...])

    def _decoded(self) -> np.ndarray:
        values = np.zeros(self.shape, self.dtype.newbyteorder("<"))
        if not values.size:
            return values
        for number, start in enumerate(range(0, len(values), self._rows)):
            path = chunk_path(self._store / self._name, number, values.ndim)
            if not path.exists():  # zarr-python leaves out chunks of nothing but zeros
                continue
            data = path.read_bytes()
            if crc32c(data[:-4]) != data[-4:]:
                raise OSError("the stored checksum does not match")
            part = values[start : start + self._rows]
            rows = np.frombuffer(Zstd(level=LEVEL).decode(data[:-4]), values.dtype)
            part[...] = rows.reshape(self._rows, *self.shape[1:])[: len(part)]
        return values


def read_array(store: str | Path, name: str) -> np.ndarray:
    """A whole array of a store; `damaged` when it is missing or does not decode."""
    try:
        array = StoredArray(store, name)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise damaged(store, f"has no array {name} ({type(error).__name__}: {error})") from error
    return array.read()
