"""Fingerprints, and writing that is either whole or absent.

Every artefact stores a fingerprint of all that determined it: a consumer compares it and refuses, or recomputes, what
does not match. Files and stores appear under their final name only when complete (written beside it, then renamed).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.failures import SlideFailure, damaged

# Raised by one when a stage's output changes for the same input; part of every fingerprint and of every rule's params.
STAGE_VERSIONS: dict[str, int] = {
    "demo": 1,
    "screen": 1,
    "tissue": 2,
    "stain": 1,
    "tiles": 3,
    "embed": 3,
    "bags": 1,
    "splits": 2,
    "train": 4,
    "evaluate": 2,
    "explain": 1,
    "predict": 1,
    "report": 1,
}

FORMAT_VERSION = 1  # of the results folder as a whole; `check_results_format` refuses others


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, tuple)):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)


def fingerprint(stage: str, **parts: Any) -> str:
    """32 hex digits (half a SHA-256) that identify an artefact of `stage` made from `parts`."""
    text = canonical_json({"stage": stage, "version": STAGE_VERSIONS[stage], **parts})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def temporary_sibling(path: Path) -> Path:
    """A name beside `path` for work in progress; carries host and process so that twins never share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = os.urandom(4).hex()
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{unique}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def committed(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place on success, remove it on any exception.

    Works for files and for directories (a Zarr store). What killed jobs left of the same is removed. An older directory
    under the final name is moved away first; if a twin job committed its own in the meantime, that one stays: both
    hold the same bytes.
    """
    path = Path(path)
    work = temporary_sibling(path)
    remove_leftovers(path.parent, path.name)
    try:
        yield work
        if work.is_dir():
            _replace_directory(work, path)
        else:
            os.replace(work, path)
    finally:
        _remove(work)


def _replace_directory(work: Path, path: Path) -> None:
    for _ in range(10):
        try:
            os.rename(work, path)
            return
        except OSError:
            if not path.exists():
                raise
            old = temporary_sibling(path)
            try:
                os.rename(path, old)
            except FileNotFoundError:
                continue  # a twin moved it first
            _remove(old)
    raise OSError(f"cannot rename {work} to {path}: another process keeps putting it back")


def remove_leftovers(folder: str | Path, name: str, older_than: float = 86400.0) -> None:
    """Delete what killed jobs left while writing `folder/name`: dead processes of this host, or older than a day."""
    for left in Path(folder).glob(f".{name}.tmp-*"):
        host, pid, _ = left.name.rsplit(".tmp-", 1)[1].rsplit("-", 2)
        alive = True
        if host == socket.gethostname():
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, ValueError):
                alive = False
            except PermissionError:
                alive = True
        try:
            if not alive or time.time() - left.stat().st_mtime > older_than:
                _remove(left)
        except FileNotFoundError:
            continue


def checksum(value: dict[str, Any]) -> str:
    """32 hex digits (half a SHA-256) of a JSON object, without its key `checksum`."""
    text = canonical_json({key: item for key, item in value.items() if key != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, an object with its `checksum`; whole or not at all."""
    value = json.loads(json.dumps(value, default=_plain, allow_nan=False))
    if isinstance(value, dict):
        value["checksum"] = checksum(value)
    with committed(path) as work:
        work.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write text; whole or not at all."""
    with committed(path) as work:
        work.write_text(text)


def read_json(path: str | Path) -> Any:
    """Read JSON that `write_json` wrote, without its checksum.

    A file that is missing, broken or not as it was written raises the SlideFailure `damaged`, which names it. One
    without a checksum (written by hand) is taken as it is.
    """
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise damaged(path, "is missing") from error
    except IsADirectoryError as error:
        raise damaged(path, "is a folder, not a file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({error})") from error
    if isinstance(value, dict) and "checksum" in value and value.pop("checksum") != checksum(value):
        raise damaged(path, "does not match its checksum")
    return value


def read_json_if_whole(path: str | Path) -> Any | None:
    """As `read_json`; None for a file that is absent or damaged, so that the caller makes it again."""
    try:
        return read_json(path)
    except SlideFailure:
        return None


def read_slide_record(folder: str | Path, name: str) -> dict[str, Any]:
    """`name` (slide.json, tissue.json, stain.json) of the folder of a slide; `damaged` also when it is another's."""
    path = Path(folder) / name
    record = read_json(path)
    if not isinstance(record, dict) or record.get("slide_id", path.parent.name) != path.parent.name:
        raise damaged(path, "is of another slide")
    return record


def file_sums(folder: str | Path, names: Iterable[str]) -> dict[str, str]:
    """{name: SHA-256} of files in `folder`: what a JSON beside them keeps as `files`."""
    return {name: file_sha256(Path(folder) / name) for name in sorted(names)}


def files_are_whole(folder: str | Path, described: dict[str, Any]) -> bool:
    """Whether all files that `described["files"]` lists are in `folder` as they were written."""
    try:
        for name in described.get("files", {}):
            check_file(Path(folder) / name, described)
    except SlideFailure:
        return False
    return True


def check_file(path: str | Path, described: dict[str, Any]) -> None:
    """`damaged` unless the file is as `described["files"]` says (where it says anything about it)."""
    path = Path(path)
    wanted = described.get("files", {}).get(path.name)
    if wanted is None:
        return
    if not path.is_file():
        raise damaged(path, "is missing")
    if file_sha256(path) != wanted:
        raise damaged(path, "does not match its checksum")


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_identity(path: str | Path, sample: int = 1 << 20) -> str:
    """Identity of a slide file by content, not by path: SHA-256 over its size and its first, middle and last MiB.

    A folder (multi-file DICOM, MRXS data, OME-Zarr) is the identity of its files in name order. Hashing a whole
    2 GB slide would cost more than tiling it; header, middle and tail change with any re-scan or truncation.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for item in files:
        size = item.stat().st_size
        digest.update(f"{item.relative_to(path) if path.is_dir() else ''}:{size};".encode())
        with open(item, "rb") as handle:
            for start in sorted({0, max(0, size // 2 - sample // 2), max(0, size - sample)}):
                handle.seek(start)
                digest.update(handle.read(sample))
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of slidemake, Python and the packages that shape results, for provenance records."""
    from slidemake import __version__

    found = {"slidemake": __version__, "python": platform.python_version()}
    packages = (
        "snakemake openslide-python openslide-bin tiatoolbox zarr dask torch pyvips timm numpy scipy scikit-learn "
        "scikit-image imagecodecs tifffile pillow"
    )
    for name in packages.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
