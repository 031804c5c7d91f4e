"""Addresses of slides that lie elsewhere: what is one, and how it may be shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from slidemake.core.words import safe_id

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: str) -> bool:
    """Whether a path of the sheet is an address."""
    return URI.match(path) is not None


def shown(uri: str) -> str:
    """An address as messages and results may show it: without password and query, which may hold a signature."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def local_name(uri: str) -> str:
    """Name of the local copy: the last part of the address, with nothing that could lead out of its folder."""
    return safe_id(unquote(urlsplit(uri).path).rstrip("/").rpartition("/")[2])


def local_copy(folder: str | Path, slide_id: str, uri: str) -> str:
    """Where the slide of `uri` lies in the folder of its rack's slides."""
    return str(Path(folder) / slide_id / local_name(uri))


def truth_file(pattern: str, slide: str | Path, slide_id: str) -> str:
    """Path of the mask of annotated tumour of the slide at a path, as `explain.truth` says."""
    return pattern.format(folder=Path(slide).parent, stem=Path(slide).stem, slide_id=slide_id)
