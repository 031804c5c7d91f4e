"""What the report says of features that were made elsewhere: by which tool, of what tiles, and what does not fit."""

from __future__ import annotations

from collections import Counter
from typing import Any


def imported_section(rows: list[dict[str, str]]) -> dict[str, Any] | None:
    """Of the rows of cohort/slides.csv; None where features were embedded here.

    slides: how many were imported; tools: {layout: slides}; sizes: {um of a tile: slides}; without_slide: slides whose
    file is not there; notes: (sentence, number of slides), the commonest first.
    """
    imported = [row for row in rows if row.get("features_tool")]
    if not imported:
        return None
    notes = Counter(note for row in imported for note in row.get("features_notes", "").split("; ") if note)
    return {
        "slides": len(imported),
        "tools": Counter(row["features_tool"] for row in imported),
        "sizes": Counter(f"{float(row['features_um']):.0f}" for row in imported if row.get("features_um")),
        "without_slide": sum(not row.get("width") for row in imported),
        "notes": notes.most_common(),
    }
