"""Words and numbers for people: lists cut short, the nearest name, durations."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` was probably meant to be, whatever its case."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def some(items: Sequence[str], most: int = 10) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def duration(seconds: float) -> str:
    """Time for people, in the precision that an estimate has: `40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s" if seconds < 10 else f"{5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60 // 10 * 10} min" if minutes < 600 else f"{round(minutes / 60)} h"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def printable(text: str) -> str:
    """Text with characters that a terminal would obey written out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def safe_id(text: str) -> str:
    """`text` with all that may not stand in a slide_id replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("_.-").rstrip("_.")[:200] or "slide"


def contamination_warning(encoder: str, corpora: Iterable[str]) -> str:
    """The warning about one encoder."""
    return (
        f"encoder {encoder} was pretrained on {', '.join(corpora)}, where this cohort is from: it has seen slides like "
        "these, perhaps the very ones, and its figures here do not say how it does on new ones"
    )
