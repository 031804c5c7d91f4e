"""Tables in the results, and the seals that say whether they are as they were written.

Whoever writes a table seals it in the same job: a JSON beside it keeps the table's SHA-256 in `files` (splits.json,
train.json, metrics.json, ...; `tables.json` where there is no other). Whoever reads a table goes through `read_table`,
which compares: numbers that somebody has edited, or a disk has changed, never come into a model or a figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slidemake.core import csv_cells
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import check_file, check_place, file_sums, placed, read_json, write_json, write_text

SEAL = "tables.json"  # of tables that no other JSON describes


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Write rows as CSV, whole or not at all; columns in order of first appearance unless given.

    The caller seals it: with `seal_tables`, or in the `files` of the JSON that it writes beside it.
    """
    rows = list(rows)
    names = list(columns or dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv_cells.DictWriter(text, names, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def seal_tables(path: str | Path, tables: Iterable[str | Path]) -> None:
    """Write the seal `path` (a tables.json) of tables in its folder."""
    names = [Path(table).name for table in tables]
    about = {"format": "slidemake-tables", "format_version": 1, **placed(path)}
    write_json(path, {**about, "files": file_sums(Path(path).parent, names)})


def seal_of(table: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The JSON that seals a table, and its content; None for a table that nobody sealed (one made by hand).

    Raises SlideFailure where it is damaged, or was written for another place.
    """
    table = Path(table)
    for name in (f"{table.stem}.json", "train.json", SEAL):
        path = table.with_name(name)
        if not path.is_file():
            continue
        described = read_json(path)
        if isinstance(described, dict) and table.name in described.get("files", {}):
            check_place(path, described)
            return path, described
    return None


def check_table(table: str | Path) -> None:
    """RunError, with what to do, unless a table is as it was written, where it was written."""
    table = Path(table)
    try:
        sealed = seal_of(table)
        if sealed is not None:
            check_file(table, sealed[1])
    except SlideFailure as failure:
        raise RunError(
            f"{failure}. It was edited, copied from elsewhere, or is damaged, and is not used. Delete {table} and give "
            "the same command again: it is made anew. (Labels, sites and folds of your own belong into the sample "
            "sheet.)"
        ) from failure


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV as text, as they were written: RunError otherwise (`check_table`), or when it is not there."""
    return read_columns(path)[1]


def read_columns(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV; errors as `read_table`."""
    check_table(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv_cells.DictReader(handle)
            rows = list(reader)
            return [csv_cells.plain(name) for name in reader.fieldnames or []], rows
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing. Give the same command again: it is made anew.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path} is no table of text ({error}). Delete it and give the same command again.") from error
