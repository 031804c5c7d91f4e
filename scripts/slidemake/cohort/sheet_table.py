"""A sample sheet as a table of text: separators, encodings and headers as spreadsheets write them.

Nothing is turned into a number here: `001` stays `001`.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from slidemake.core.csv_cells import plain as plain_cell
from slidemake.core.failures import RunError

# How R, pandas, Excel, GDC (`'--`) and TCGA's clinical tables (`[...]`) write a cell that is empty.
_MISSING = (
    *("", "NA", "N/A", "#N/A", "<NA>", "NaN", "NULL", "'--", "[Not Available]", "[Not Applicable]"),
    *("[Unknown]", "[Not Evaluated]", "[Discrepancy]", "[Pending]"),
)
MISSING = frozenset(form for text in _MISSING for form in (text, text.lower()) if text != "NA" or form == "NA")
# More often no value than a value, and nobody but who wrote it can tell: asked about where it would become a class.
_DOUBTFUL = (
    *("unknown", "none", "unspecified", "unavailable", "undetermined", "missing", "na", "n.a.", "n.d.", "nil"),
    *("-", "--", "?", ".", "not-available", "not-applicable", "not-evaluated", "not-known", "not-reported"),
    *("not-specified", "not-determined", "no-data", "no-value"),
)
KEYS = ("slide_id", "path")  # cells that are never read as missing, except when they are empty
KNOWN = (
    *KEYS,
    *(
        "patient_id",
        "site",
        "scanner",
        "scan_date",
        "split",
        "mpp",
        "stain",
        "exclude",
        "tissue_geojson",
        "sha256",
        "features",
    ),
)
# What others call our columns. Used to say what is meant; a sheet without patient_id that has one of its other names
# would silently take every slide for a patient of its own, and leak.
OTHER_NAMES = {
    "slide_id": ("slide", "slidename", "image", "imageid", "imagename", "slidebarcode"),
    "path": ("file", "filename", "filepath", "slidepath", "location", "uri", "url", "wsi"),
    "patient_id": ("patient", "case", "caseid", "subject", "subjectid", "participant", "participantid", "patientcode"),
    "mpp": ("micronsperpixel", "umperpixel", "umperpx", "pixelsize", "resolution"),
    "tissue_geojson": ("geojson",),
}


def doubtful(text: str) -> bool:
    """Whether a cell may be a way to say that there is no value: `Unknown`, `None`, `Not Reported`."""
    return re.sub(r"[\s_-]+(?=\w)", "-", text.strip().lower()) in _DOUBTFUL


_SEPARATOR = re.compile(r'"?sep=(.)"?[,;\t ]*\r?\n', re.IGNORECASE)  # a first line for Excel alone


@dataclass(frozen=True)
class Problem:
    """Something wrong with a sheet: in a row (1 is the header, 0 the sheet as a whole) and, where known, a column."""

    row: int
    column: str
    text: str

    def __str__(self) -> str:
        where = [f"row {self.row}"] * (self.row > 0) + [f"column {self.column}"] * bool(self.column)
        return f"{', '.join(where)}: {self.text}" if where else self.text


@dataclass(frozen=True)
class Table:
    """Columns in file order, and per row its number in the file (as a spreadsheet counts) and its cells."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, str]]]
    problems: list[Problem] = field(default_factory=list)


def read_table(path: str | Path) -> Table:
    """Read a CSV with commas, semicolons or tabs (UTF-8, with or without a byte order mark).

    Cells are stripped, blank lines skipped, and every spelling of a missing value (MISSING) becomes "". Rows with more
    cells than the header and doubled column names are listed in `problems`. Raises RunError for what is no such file.
    """
    path = Path(path)
    content = _text(path)
    told = _SEPARATOR.match(content)
    mark = told[1] if told else separator(content)
    lines, ends = _parsed(path, content, mark)
    start = next((i for i, cells in enumerate(lines) if i >= bool(told) and any(cell.strip() for cell in cells)), None)
    if start is None:
        raise RunError(f"{path} is empty. Its first row names the columns: slide_id, path, ...")
    header = [cell.strip() for cell in lines[start]]
    problems = [
        Problem(start + 1, name, "this column is there twice; rename or remove one")
        for name in sorted({name for name in header if name and header.count(name) > 1})
    ]
    rows = []
    for number, cells in enumerate(lines[start + 1 :], start=start + 2):
        if not any(cell.strip() for cell in cells):
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            text = f"{len(cells)} cells under {len(header)} column names; put a cell that holds a separator in quotes"
            problems.append(Problem(number, "", text))
        first, last = ends[number - 2] + 1, ends[number - 1]
        if last > first and any(line.count(mark) >= max(1, len(header) - 2) for c in cells for line in _inside(c)):
            problems.append(Problem(number, "", _swallowed(first, last, content, len(lines) - start - 1)))
        padded = [*cells, *[""] * (len(header) - len(cells))]
        rows.append((number, {name: _cell(name, cell) for name, cell in zip(header, padded, strict=False) if name}))
    if not rows:
        problems.append(Problem(0, "", "there are no slides in it, only column names"))
    return Table(path.name, tuple(dict.fromkeys(name for name in header if name)), rows, problems)


def _parsed(path: Path, content: str, mark: str) -> tuple[list[list[str]], list[int]]:
    """(rows of cells, number of the last line of each row)."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=mark)
    rows, ends = [], []
    try:
        for cells in reader:
            rows.append(cells)
            ends.append(reader.line_num)
    except csv.Error as error:  # a cell of more than 128 KiB: a quotation mark that is never closed
        raise RunError(f"{path} is no table of text: {error}. Is a quotation mark missing?") from error
    return rows, ends


def _inside(cell: str) -> list[str]:
    """Lines of a cell but for the first."""
    return cell.splitlines()[1:]


def _swallowed(first: int, last: int, content: str, rows: int) -> str:
    written = sum(bool(line.strip()) for line in content.splitlines()) - 1
    return (
        f"it reaches from line {first} to line {last} of the file, and those look like rows of their own: is a "
        f"quotation mark missing, or one too many? ({written} lines with text under the header, and {rows} rows)"
    )


def _cell(column: str, cell: str) -> str:
    cell = plain_cell(cell.strip())
    return "" if cell in MISSING and column not in KEYS else cell


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"There is no sample sheet {path}. Set `sheet` in the configuration to yours, or make a first one:\n"
            f"  snakemake write_sheet --cores 1 --config slides_folder=FOLDER_OF_SLIDES sheet={path}"
        ) from None
    except IsADirectoryError:
        raise RunError(
            f"{path} is a folder, not a sample sheet. Make a sheet of it:\n"
            f"  snakemake write_sheet --cores 1 --config slides_folder={path} sheet=slides.csv"
        ) from None
    if raw.startswith(b"PK\x03\x04"):
        raise RunError(f"{path} is an Excel workbook. Save it as `CSV UTF-8` and give that file.")
    try:
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RunError(f"{path} is not UTF-8 (row {line}). Save it as `CSV UTF-8` and give that file.") from error


def separator(text: str) -> str:
    """The separator of a CSV: whichever of comma, semicolon and tab splits its first line most often."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(",;\t", key=lambda mark: (len(next(csv.reader([first], delimiter=mark))), mark == ","))


def check_columns(columns: Iterable[str], needed: Iterable[str], own: Iterable[str] = ("path",)) -> list[Problem]:
    """Columns that are missing, and columns whose name is nearly one that slidemake knows.

    `needed` are those that the tasks name; `own` those of ours that must be there besides slide_id. A
    column of any other name is metadata, and welcome.
    """
    columns, needed, keys = list(columns), list(needed), ["slide_id", *own]
    problems = []
    for name in (*keys, *(name for name in needed if name not in keys)):
        if name not in columns:
            near = _meant(name, [column for column in columns if column not in KNOWN])
            remedy = f"did you mean {near}?" if near else f"it has: {', '.join(columns)}"
            if near and name in KEYS:
                remedy = f"rename the column {near} to {name}"
            elif near:
                remedy = f"did you mean {near}? Write that in the configuration, or rename the column"
            problems.append(Problem(1, "", f"there is no column {name}; {remedy}"))
    for name in columns:
        known = next((k for k in KNOWN if k not in KEYS and k not in columns and _meant(k, [name])), None)
        if name not in KNOWN and name not in needed and known:
            problems.append(Problem(1, name, f"did you mean {known}? Rename it, or remove it"))
        elif name not in KNOWN and name not in needed and plain(name) in map(plain, KNOWN):
            problems.append(Problem(1, name, "is another spelling of a column that is there too; remove one"))
    return problems


def _meant(known: str, columns: list[str]) -> str | None:
    """The column that was probably meant to be `known`: by another spelling, by another common name, by a typo."""
    for column in columns:
        if plain(column) == plain(known) or plain(column) in OTHER_NAMES.get(known, ()):
            return column
    if known == "features":  # too near to words of medicine, such as fractures
        return None
    by_plain = {plain(column): column for column in columns}
    close = difflib.get_close_matches(plain(known), by_plain, n=1, cutoff=0.82)
    return by_plain[close[0]] if close else None


def plain(name: str) -> str:
    """A column name without case, spaces and punctuation."""
    return "".join(c for c in name.lower() if c.isalnum())
