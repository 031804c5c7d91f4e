"""Which file of features is a slide's: the sheet's cell, or the configuration's pattern. Looks at names alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any


def names_of(row: Any) -> dict[str, str]:
    """What a pattern may name of a row of the sheet."""
    path = row.path if isinstance(row.path, str) else ""
    return {"slide_id": row.slide_id, "patient_id": row.patient_id, "stem": PurePosixPath(path).stem or row.slide_id}


def filled_in(pattern: str, row: Any) -> str:
    """The pattern for one slide; characters of names that a pattern would read are taken as they are."""
    escape = glob.escape if has_wildcard(pattern) else str
    for name, value in names_of(row).items():
        pattern = pattern.replace("{" + name + "}", escape(value))
    return pattern


def has_wildcard(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def feature_files(row: Any, pattern: str | None) -> list[str]:
    """Absolute paths of the files that are a slide's: one is right, none or several are the slide's failure.

    `row.features`: what the sheet gives, which wins. A pattern without wildcards is one name, there or not.
    """
    if row.features:
        return [os.path.abspath(row.features)]
    if not pattern:
        return []
    name = filled_in(pattern, row)
    found = sorted(glob.glob(name)) if has_wildcard(pattern) else [name]
    return [os.path.abspath(path) for path in found]


def of_no_slide(rows: Iterable[Any], pattern: str | None) -> list[str]:
    """Names of files that fit the pattern and belong to no slide of the sheet (excluded slides count as slides)."""
    if not pattern:
        return []
    everything = pattern
    for name in ("slide_id", "patient_id", "stem"):
        everything = everything.replace("{" + name + "}", "*")
    known = {path for row in rows for path in feature_files(row, pattern)}
    return sorted(Path(path).name for path in glob.glob(everything) if os.path.abspath(path) not in known)
