"""Ways in which files are damaged, each a function of a seeded generator: truncated, flipped, zeroed, swapped, gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

HEAD = 4096  # bytes at the beginning, where headers are


def _position(rng: np.random.Generator, size: int) -> int:
    """Somewhere in the file: near its beginning or its end as often as anywhere."""
    where = int(rng.integers(3))
    if where == 0:
        return int(rng.integers(0, min(HEAD, size)))
    if where == 1:
        return int(rng.integers(max(0, size - HEAD), size))
    return int(rng.integers(0, size))


def truncate(path: Path, rng: np.random.Generator) -> str:
    size = path.stat().st_size
    keep = int(rng.choice([0, 1, size // 2, max(0, size - int(rng.integers(1, 64))), int(size * rng.random())]))
    os.truncate(path, keep)
    return f"truncated to {keep} of {size} bytes"


def flip(path: Path, rng: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return truncate(path, rng)
    count = int(rng.choice([1, 1, 2, 8]))
    places = [_position(rng, len(data)) for _ in range(count)]
    for place in places:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return f"a bit flipped at {', '.join(map(str, places))} of {len(data)}"


def block(path: Path, rng: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return truncate(path, rng)
    start, length = _position(rng, len(data)), int(rng.choice([16, 512, 4096, 65536]))
    stop = min(len(data), start + length)
    noise = rng.integers(2)
    data[start:stop] = rng.bytes(stop - start) if noise else bytes(stop - start)
    path.write_bytes(data)
    return f"bytes {start} to {stop} of {len(data)} {'made noise' if noise else 'zeroed'}"


def drop(path: Path, rng: np.random.Generator) -> str:
    """Some bytes in the middle are missing: all that follows is displaced."""
    data = path.read_bytes()
    if len(data) < 2:
        return truncate(path, rng)
    start, length = _position(rng, len(data)), int(rng.choice([1, 2, 100]))
    path.write_bytes(data[:start] + data[start + length :])
    return f"{length} bytes left out at {start} of {len(data)}"


def append(path: Path, rng: np.random.Generator) -> str:
    extra = rng.bytes(int(rng.choice([1, 100, 5000])))
    with open(path, "ab") as handle:
        handle.write(extra)
    return f"{len(extra)} bytes appended"


def delete(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    return "deleted"


def folder_instead(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    path.mkdir()
    return "a folder instead of the file"


def swap(one: Path, other: Path) -> str:
    """Exchange two files or folders."""
    aside = one.with_name(one.name + ".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"swapped with {other.name if other.parent == one.parent else other}"


def replace(path: Path, other: Path) -> str:
    """The content of another file under this name."""
    shutil.copyfile(other, path)
    return f"replaced by {other.name}"


KINDS = (truncate, flip, flip, flip, block, block, drop, append, delete, folder_instead)


def damage(path: Path, rng: np.random.Generator) -> str:
    """One of the kinds above, in words."""
    return KINDS[int(rng.integers(len(KINDS)))](path, rng)
