"""What a slide is by content: SHA-256 of all its bytes, taken once and then believed while nobody wrote to the file.

Reading all of a slide costs a second of one core per GiB where the disk keeps up, a few hundredths of what its tiles
cost. It is done when a slide is seen for the first time, and again when its size or the time of its last writing (to
the nanosecond) is another than before: copied, moved back or touched, a slide is recognised as the same. Windows all
over the file are compared as well, for a file that was changed and given its old time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from slidemake.core.files import file_sha256

WINDOWS, WINDOW = 64, 16 << 10  # bytes read of each file to believe that it is as before: 1 MiB in all


def files_of(path: str | Path) -> dict[str, Path]:
    """{name inside of the slide: file} of what holds a slide, in order: itself (""), the files of a folder, and of an
    .mrxs those of the folder of its name too.
    """
    path = Path(path)
    if path.is_dir():
        return {item.relative_to(path).as_posix(): item for item in sorted(path.rglob("*")) if item.is_file()}
    data = path.with_suffix("")
    return {"": path, **(files_of(data) if path.suffix.lower() == ".mrxs" and data.is_dir() else {})}


def content_identity(path: str | Path) -> str:
    """32 hex digits: half the SHA-256 of a file (`sha256sum` says the same), or of the list of a slide's files with
    their own. Of the content, not of the path or the times.
    """
    files = files_of(path)
    if list(files) == [""]:
        return file_sha256(path)[:32]
    listed = "".join(f"{name}:{file_sha256(item)}\n" for name, item in files.items())
    return hashlib.sha256(listed.encode()).hexdigest()[:32]


def trace_of(path: str | Path) -> str:
    """32 hex digits over size, time and windows of a slide's files: the same as before means the same content."""
    digest = hashlib.sha256()
    for name, item in files_of(path).items():
        with open(item, "rb") as handle:
            about = os.fstat(handle.fileno())
            digest.update(f"{name}:{about.st_size}:{about.st_mtime_ns};".encode())
            last = max(0, about.st_size - WINDOW)
            for start in sorted({last * i // (WINDOWS - 1) for i in range(WINDOWS)}):
                handle.seek(start)
                digest.update(handle.read(WINDOW))
    return digest.hexdigest()[:32]
