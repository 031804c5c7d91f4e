"""CSV that a spreadsheet program cannot be made to execute: cells that would be formulas begin with an apostrophe.

Ids, sites, labels and what slide files say of themselves come from outside, and `=HYPERLINK(...)` in a cell is run
when the table is opened. Readers take the apostrophe away again, so values come back as they were. Numbers, and texts
such as `+` or `-negative` that call nothing, are written as they are.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

_FORMULA = re.compile(r"'*(?:[=@\t\r\n]|[+-].*[(|!=@])", re.DOTALL)


def safe(value: Any) -> Any:
    """A cell as it is written."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def plain(text: str) -> str:
    """A cell as it was before `safe`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


class DictWriter(csv.DictWriter):
    """As csv.DictWriter, with cells made `safe`."""

    def writerow(self, rowdict: Mapping[Any, Any]) -> Any:
        return super().writerow({key: safe(value) for key, value in rowdict.items()})

    def writerows(self, rowdicts: Iterable[Mapping[Any, Any]]) -> None:
        for row in rowdicts:
            self.writerow(row)


def write_rows(handle: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows of cells."""
    csv.writer(handle, lineterminator="\n").writerows([safe(cell) for cell in row] for row in rows)


class DictReader(csv.DictReader):
    """As csv.DictReader, with cells as they were before `safe`."""

    def __next__(self) -> dict[str | Any, str | Any]:
        row = super().__next__()
        return {
            plain(key) if isinstance(key, str) else key: plain(value) if isinstance(value, str) else value
            for key, value in row.items()
        }
