"""Fingerprints, and writing that is either whole or absent.

Every artefact stores a fingerprint of all that determined it: a consumer compares it and refuses, or recomputes, what
does not match. Files and stores appear under their final name only when complete (written beside it, then renamed).
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import SlideFailure, damaged
from slidemake.core.stages import STAGE_VERSIONS

NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "9p",
    "virtiofs",
    "panfs",
    "pvfs2",
    "orangefs",
    "wekafs",
}
LATE = 30.0  # seconds that a process waits, in all, for what network file systems have not shown yet
_waited = 0.0
FOLDERS = ("manifests", "slides", "cohort", "tasks", "explain", "predictions", "report")  # of results, with JSON
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
    return path.with_name(f".{_short(path.name)}.tmp-{_host()}-{os.getpid()}-{unique}")


def _short(name: str) -> str:
    """A name that leaves room for what temporary names add: file systems take 255 bytes."""
    if len(name) <= 120:
        return name
    return f"{name[:80]}+{hashlib.sha256(name.encode()).hexdigest()[:16]}"  # `+` is in no name of ours


def _host() -> str:
    return socket.gethostname()[:40]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def committed(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place on success, remove it on any exception.

    Works for files and for directories (a Zarr store). What killed jobs left of the same is removed. A directory that
    is there already and holds the same bytes stays, because others may be reading it: a twin of this job committed it.
    Any other is moved away first.
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
            if same_bytes(work, path):
                return
            old = temporary_sibling(path)
            try:
                os.rename(path, old)
            except FileNotFoundError:
                continue  # a twin moved it first
            _remove(old)
    raise OSError(f"cannot rename {work} to {path}: another process keeps putting it back")


def same_bytes(one: Path, two: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names, others = ({p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (one, two))
    try:
        return names == others and all(filecmp.cmp(one / name, two / name, shallow=False) for name in names)
    except FileNotFoundError:  # a twin moved it
        return False


def remove_leftovers(folder: str | Path, name: str, older_than: float = 86400.0) -> None:
    """Delete what killed jobs left while writing `folder/name`: dead processes of this host, or older than a day."""
    for left in Path(folder).glob(f".{_short(name)}.tmp-*"):
        host, pid, _ = left.name.rsplit(".tmp-", 1)[1].rsplit("-", 2)
        try:
            written = left.stat().st_mtime
            dead = host == _host() and not _lives(pid, written)
            if dead or time.time() - written > older_than:
                _remove(left)
        except FileNotFoundError:
            continue


def _lives(pid: str, written: float) -> bool:
    """Whether the process of this host that wrote something at that time is still there: a zombie is not, and a younger
    process has its number by chance."""
    import psutil  # here, because most jobs never ask

    try:
        process = psutil.Process(int(pid))
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written + 1
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def on_network(path: str | Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a path is on a file system that other machines write to, as far as this one knows."""
    place, best, kind = os.path.abspath(path), "", ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        point, found = line.split()[1:3]
        point = point.replace("\\040", " ")
        if (place + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, found
    return kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")


def may_appear(path: str | Path, pause: float = 1.0) -> bool:
    """Wait a moment for something that another machine has written: True when it is worth looking again.

    Network file systems show new files late. Only there anything is waited for, and at most `LATE` seconds in the life
    of a process, so that what is really missing is soon missed. Listing the folder makes this machine ask for news.
    """
    global _waited
    if _waited >= LATE or not on_network(path):
        return False
    _waited += pause
    time.sleep(pause)
    with suppress(OSError):
        os.listdir(Path(path).parent)
    return True


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


def write_image(path: str | Path, image: Any, **options: Any) -> None:
    """Write a Pillow image; whole or not at all. Through memory: on a full disk Pillow leaves half a JPEG and says
    nothing. `options` are those of its `save`, with `format`.
    """
    buffer = io.BytesIO()
    image.save(buffer, **options)
    with committed(path) as work:
        work.write_bytes(buffer.getvalue())


def read_json(path: str | Path) -> Any:
    """Read JSON that `write_json` wrote, without its checksum.

    A file that is missing, broken or not as it was written raises the SlideFailure `damaged`, which names it. One
    without a checksum (written by hand) is taken as it is. A network file system gets time to show it (`may_appear`).
    """
    while True:
        try:
            return _read_json(path)
        except SlideFailure:
            if not may_appear(path):
                raise


def _read_json(path: str | Path) -> Any:
    try:
        value = json.loads(Path(path).read_text(), parse_constant=_no_number)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise damaged(path, "is missing") from error
    except IsADirectoryError as error:
        raise damaged(path, "is a folder, not a file") from error
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8
        raise damaged(path, f"is not valid JSON ({error})") from error
    if isinstance(value, dict) and "checksum" in value and value.pop("checksum") != checksum(value):
        raise damaged(path, "does not match its checksum")
    return value


def _no_number(text: str) -> float:
    """Python would read NaN and Infinity, which are no JSON, and which nothing here writes."""
    raise ValueError(f"it holds {text}")


def has_checksum(path: str | Path) -> bool:
    """Whether a JSON object carries a checksum, as all that `write_json` wrote do (one made by hand does not)."""
    return "checksum" in json.loads(Path(path).read_text())


def read_json_if_whole(path: str | Path) -> Any | None:
    """As `read_json`; None for a file that is absent or damaged, so that the caller makes it again. Never waits."""
    try:
        return _read_json(path)
    except SlideFailure:
        return None


def placed(path: str | Path) -> dict[str, str]:
    """{"place": path inside of the results}, which a JSON keeps so that it is refused where somebody else put it.

    From the last folder that has the name of one of the results' own; nothing for a path outside of them.
    """
    parts = Path(path).parts
    at = max((i for i, part in enumerate(parts) if part in FOLDERS), default=None)
    return {} if at is None else {"place": "/".join(parts[at:])}


def check_place(path: str | Path, content: Any) -> None:
    """`damaged` for a JSON that was written for another place: of another task, model, fold, rack or slide.

    One without a `place` (written by hand, or by an older slidemake) is taken as it is.
    """
    place = content.get("place") if isinstance(content, dict) else None
    if place is not None and not f"/{Path(path).as_posix()}".endswith(f"/{place}"):
        raise damaged(path, f"was written as {place}, and somebody put it here")


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
    """Whether all files that `described["files"]` lists are in `folder` as they were written. Never waits."""
    names = described.get("files", {})
    return not any(_problem_of_file(Path(folder) / name, described, name) for name in names)


def check_file(path: str | Path, described: dict[str, Any], name: str | None = None) -> None:
    """`damaged` unless the file is as `described["files"]` says (where it says anything about it).

    name: under which it is listed, where that is not the file's own (`stain/a.jpg`).
    """
    while problem := _problem_of_file(Path(path), described, name or Path(path).name):
        if not may_appear(path):
            raise damaged(path, problem)


def _problem_of_file(path: Path, described: dict[str, Any], name: str) -> str | None:
    wanted = described.get("files", {}).get(name)
    if wanted is None:
        return None
    if not path.is_file():
        return "is missing"
    return None if file_sha256(path) == wanted else "does not match its checksum"


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
