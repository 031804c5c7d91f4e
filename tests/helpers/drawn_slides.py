"""Slides of the demo's kind, drawn small for tests."""

from __future__ import annotations

from pathlib import Path

SIDE = 1536  # px: about a dozen tiles a slide


def draw(folder: Path, rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Draw the slides of demo rows into `folder`; returns the rows with absolute paths, as a sheet has them."""
    from slidemake.demo.cohort import EASY, SHEET_COLUMNS, draw_demo_slide

    for row in rows:
        row["path"] = str(folder / f"{row['slide_id']}.tiff")
        draw_demo_slide(row, row["path"], side=SIDE, seed=seed, difficulty=EASY)
    return [{column: row[column] for column in SHEET_COLUMNS} for row in rows]
