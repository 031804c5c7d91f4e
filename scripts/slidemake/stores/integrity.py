"""Checksums of stores: a store says of every file in it how long it is and what its SHA-256 is.

They are attributes of the store's group, `files` ({path: [bytes, sha256]}) and `checksum` (of the group's own
zarr.json), so that any reader of Zarr still reads it. Whoever opens a store checks the group's metadata and the lengths
of all files, and the metadata of its arrays, which costs next to nothing; pixels and features carry a CRC32C of their
own. `slidemake verify` reads every byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

from slidemake.core.failures import damaged
from slidemake.core.files import checksum, file_sha256, may_appear

ROOT = "zarr.json"


def crc32c(data: Any) -> bytes:
    """CRC32C of bytes, as Zarr's codec of that name appends it: 4 bytes, little-endian."""
    return struct.pack("<I", google_crc32c.value(data))


def seal(store: Path) -> None:
    """Write the checksums of a store that is complete and not yet committed into its metadata."""
    document = json.loads((store / ROOT).read_text())
    inside = sorted(path for path in store.rglob("*") if path.is_file() and path != store / ROOT)
    files = {path.relative_to(store).as_posix(): [path.stat().st_size, file_sha256(path)] for path in inside}
    document["attributes"] = {**document["attributes"], "files": files}
    document["attributes"]["checksum"] = _checksum(document)
    (store / ROOT).write_text(json.dumps(document, indent=2))


def _checksum(document: dict[str, Any]) -> str:
    attributes = {key: value for key, value in document["attributes"].items() if key != "checksum"}
    return checksum({**document, "attributes": attributes})


def problems(store: str | Path, *, every_byte: bool = False) -> Iterator[str]:
    """What is wrong with a store, as ends of sentences that begin with its path. A store that was never sealed (made by
    hand) has no problems, unless `every_byte` is asked for.
    """
    store = Path(store)
    try:
        document = json.loads((store / ROOT).read_text())
        attributes = document["attributes"]
        sealed = attributes.get("checksum")
    except (FileNotFoundError, NotADirectoryError):
        yield f"has no {ROOT}" if store.is_dir() else "is missing"
        return
    except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"has a {ROOT} that is not valid ({type(error).__name__}: {error})"
        return
    if sealed is None and "files" not in attributes:
        if every_byte:
            yield "carries no checksums"
        return
    if sealed != _checksum(document):
        yield f"has a {ROOT} that does not match its checksum"
        return
    for name, (size, sha256) in attributes["files"].items():
        path = store / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            yield f"lacks its file {name}"
        elif found != size:
            yield f"has a file {name} of {found} bytes instead of {size}"
        elif (every_byte or path.name == ROOT) and file_sha256(path) != sha256:
            yield f"has a file {name} that does not match its checksum"
    if every_byte:
        known = {ROOT, *attributes["files"]}
        extra = (path.relative_to(store).as_posix() for path in sorted(store.rglob("*")) if path.is_file())
        yield from (f"has a file {name} that does not belong to it" for name in extra if name not in known)


def check_store(store: str | Path) -> None:
    """Raise the SlideFailure `damaged` for the first problem of a store, if it has any."""
    while problem := next(problems(store), None):
        if not may_appear(store):
            raise damaged(store, problem)
