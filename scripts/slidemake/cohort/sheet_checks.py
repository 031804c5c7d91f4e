"""What can be wrong with the rows of a sample sheet, each with what to write instead.

Single cells are checked against slides.schema.json; rows are compared with each other here.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import date, timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from slidemake.cohort.sheet_table import KNOWN, Problem
from slidemake.core.addresses import URI
from slidemake.core.json_schemas import validator as json_validator
from slidemake.core.words import printable, safe_id

SCHEMA = Path(__file__).with_name("slides.schema.json")
LONGEST = 4000  # characters in a cell
ALLOWED = {"\n", "\r", "\t", "\u200c", "\u200d", "\u00ad"}  # joiners and the soft hyphen, which languages need
Row = tuple[int, dict[str, Any]]  # number in the file, cells

_EXPONENT = re.compile(r"\d(?:[.,]\d+)?[Ee]\+?\d+")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_IDS = ("slide_id", "patient_id")


@cache
def _validator() -> Any:
    return json_validator(schema())


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one row."""
    return json.loads(SCHEMA.read_text())


def converted(cells: dict[str, str]) -> dict[str, Any]:
    """Cells of a row with mpp as a number, exclude as true or false, and empty optional cells as None.

    What cannot be converted stays text, for the schema to refuse.
    """
    row: dict[str, Any] = {key: value if value or key in ("slide_id", "path") else None for key, value in cells.items()}
    if row.get("mpp") is not None:
        try:
            row["mpp"] = float(row["mpp"])
        except ValueError:
            row["mpp"] = str(row["mpp"])
    if row.get("exclude") is not None:
        row["exclude"] = _BOOLEANS.get(row["exclude"].lower(), row["exclude"])
    return row


def check_cells(rows: Iterable[Row], single_line: Iterable[str] = (), pathless: bool = False) -> Iterator[Problem]:
    """Cells that the schema refuses. One validator serves all rows; cells seen before are not looked at again.

    single_line: further columns whose cells hold no line break, as ours hold none. pathless: a slide needs no path.
    """
    single_line = {*KNOWN, *single_line}
    parts = schema()["properties"]
    validators = {name: _validator().evolve(schema=part) for name, part in parts.items()}
    verdicts: dict[tuple[str, Any], bool] = {}
    for number, row in rows:
        for column, value in row.items():
            if isinstance(value, str) and (len(value) > LONGEST or not value.isprintable()):
                fault = _unprintable(value) or (_broken(value) if column in single_line else None)
                if fault:
                    yield Problem(number, printable(column), fault)
                    continue
            if column not in validators or (pathless and column == "path" and value is None):
                continue  # label columns and metadata are text, whatever they say
            key = (column, value)
            if key not in verdicts:
                verdicts[key] = validators[column].is_valid(value) and _real(column, value)
            if not verdicts[key]:
                yield Problem(number, column, _remedy(column, value))


def unasked_features(rows: Iterable[Row]) -> Iterator[Problem]:
    """Files of features where the configuration asks for none: they would be passed over in silence."""
    for number, row in rows:
        if row.get("features"):
            text = "names files of features, and the configuration does not say of which encoder: set features.encoder"
            yield Problem(number, "features", f"{text}, or rename the column to embed the slides here")
            return


def _unprintable(value: str) -> str | None:
    """What is wrong with a text that would spoil terminals, pages and tables."""
    odd = sorted({c for c in value if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - ALLOWED)
    if odd:
        return f"holds the invisible character U+{ord(odd[0]):04X}; remove it"
    if len(value) > LONGEST:
        return f'"{value[:40]}..." has {len(value)} characters; at most {LONGEST} are allowed'
    return None


def _broken(value: str) -> str | None:
    """What is wrong with a text of several lines where it is a name."""
    first, *others = value.splitlines()
    if not others:
        return None
    return f'holds a line break after "{first[:40]}"; is a quotation mark missing before it, or one too many?'


def _real(column: str, value: Any) -> bool:
    """What a JSON schema does not see: NaN passes every range, and 2024-02-31 has the form of a date."""
    if column == "mpp" and value is not None:
        return value == value
    if column == "scan_date" and value is not None:
        return _date(value[:10]) is not None
    return not (column in _IDS and value and _EXPONENT.fullmatch(value))


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


def _remedy(column: str, value: Any) -> str:
    special: dict[str, Callable[[Any], str]] = {
        "slide_id": _about_id,
        "patient_id": _about_id,
        "mpp": _about_mpp,
        "scan_date": _about_date,
        "exclude": lambda v: f'"{v}" is neither yes nor no; write true or false',
        "path": lambda v: "is empty; write the path of the slide file",
    }
    return special.get(column, lambda v: f'"{v}" is not allowed: {schema()["properties"][column]["description"]}')(
        value
    )


def _about_id(value: Any) -> str:
    text = str(value or "")
    if not text:
        return "is empty; give every slide a name of its own"
    if _EXPONENT.fullmatch(text):
        return f'"{text}" is a number that a spreadsheet has rounded; format the column as text and enter the ids again'
    if "/" in text or "\\" in text:
        stem = PurePosixPath(text.replace("\\", "/")).name.rsplit(".", 1)[0]
        return f'"{text}" is a path; write the name of the file alone: {safe_id(stem)}'
    if len(text) > 200:
        return f'"{text[:40]}..." has {len(text)} characters; at most 200 are allowed'
    odd = sorted({c for c in text if not re.match(r"[A-Za-z0-9._-]", c)})
    if not odd:
        return f'"{text}" begins with {text[0]}; begin with a letter, a digit or _: write {safe_id(text)}'
    shown = ", ".join("a space" if c == " " else c for c in odd)
    return f'"{text}" holds {shown}; only letters, digits, . _ - are allowed: write {safe_id(text)}'


def _about_mpp(value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:g} um per pixel is outside 0.05 to 10; write the true value, or leave it empty to take the file's"
        )
    try:
        better = f"write {float(value.replace(',', '.')):g}"
    except ValueError:
        better = "write um per pixel such as 0.25, or leave it empty to take the file's"
    return f'"{value}" is not a number; {better}'


def _about_date(value: Any) -> str:
    text = str(value)
    if re.fullmatch(r"\d{5}", text):
        return f'"{text}" is a spreadsheet\'s number of a day; write {date(1899, 12, 30) + timedelta(days=int(text))}'
    found = re.fullmatch(r"(\d{1,4})[./-](\d{1,2})[./-](\d{1,4})", text) or re.fullmatch(r"(\d{4})(\d\d)(\d\d)", text)
    better = "write it as year-month-day, for example 2024-03-15"
    if found and len(found[1]) == 4:
        guess = f"{found[1]}-{int(found[2]):02d}-{int(found[3]):02d}"
        better = f"write {guess}" if _date(guess) else better
    return f'"{text}" is not a date; {better}'


# -- rows against each other -------------------------------------------------------------------------------------


def check_rows(rows: list[Row], sheet: Path) -> Iterator[Problem]:
    """Doubled ids and paths, ids that differ too little, ids that a spreadsheet has damaged."""
    yield from _repeated(rows, "slide_id", lambda v: v, "is the id of row {first} too; every slide needs its own")
    text = "differs from {value} in row {first} in case only, and macOS and Windows take both for one file; rename one"
    yield from _repeated(rows, "slide_id", str.lower, text, distinct=True)
    included = [(number, row) for number, row in rows if row.get("exclude") is not True]
    for number, row in included:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*:[^/]*@", str(row.get("path") or "")):
            yield Problem(number, "path", "holds a password; credentials come from the environment: remove it")
        if str(row.get("path") or "").lower().startswith("file://"):
            yield Problem(number, "path", f"is a file of this system: write {unquote(urlsplit(row['path']).path)}")
    yield from _repeated(
        included,
        "path",
        lambda v: resolve(v, sheet),
        "is the file of row {first} too; keep one row, or set exclude on the other",
    )
    text = "is the file of row {first} too; every slide has features of its own"
    yield from _repeated(included, "features", lambda v: resolve(v, sheet), text)
    for column in _IDS:
        text = "and {value} in row {first} differ in leading zeros only: a spreadsheet has taken them for numbers; "
        text += "format the column as text and enter the ids again"
        yield from _repeated(rows, column, _without_zeros, text, distinct=True)
        yield from _turned_into_decimals(rows, column)
    yield from _zeros_of_file_names(rows)


def _repeated(
    rows: list[Row], column: str, key: Callable[[str], str], text: str, distinct: bool = False
) -> Iterator[Problem]:
    """Rows whose cell has the same `key` as an earlier one; `distinct`: where the cells differ, once per cell."""
    first: dict[str, Row] = {}
    told: set[str] = set()
    for number, row in rows:
        value = row.get(column)
        if not isinstance(value, str) or not value:
            continue
        before, earlier = first.setdefault(key(value), (number, row))
        if before == number or (distinct and (earlier[column] == value or value in told)):
            continue
        told.add(value)
        yield Problem(number, column, f'"{value}" {text.format(first=before, value=json.dumps(earlier[column]))}')


def _without_zeros(value: str) -> str:
    return value.lstrip("0") if value.isdecimal() and value.strip("0") else value


def _turned_into_decimals(rows: list[Row], column: str) -> Iterator[Problem]:
    """`12.0` in every cell: software that had empty cells beside whole numbers wrote them so."""
    if column == "patient_id":  # a cell that was empty holds the slide_id by now
        rows = [(number, row) for number, row in rows if row[column] != row.get("slide_id")]
    values = [(number, row[column]) for number, row in rows if row.get(column)]
    if values and all(re.fullmatch(r"\d+\.0", str(value)) for _, value in values):
        number, value = values[0]
        text = f'"{value}", like every id here, was turned into a decimal number by a program; write {value[:-2]}'
        yield Problem(number, column, text + " (and see whether leading zeros are gone)")


def _zeros_of_file_names(rows: list[Row]) -> Iterator[Problem]:
    """Slide `1` in file `001.svs`: the id has lost its zeros."""
    for number, row in rows:
        slide_id, stem = str(row.get("slide_id") or ""), PurePosixPath(str(row.get("path") or "")).stem
        if slide_id.isdecimal() and stem.isdecimal() and len(stem) > len(slide_id) and int(stem) == int(slide_id):
            text = f'"{slide_id}" has lost the leading zeros of its file {stem}; write {stem}'
            yield Problem(number, "slide_id", f"{text} (format the column as text)")


def lost_zeros(values: Iterable[str]) -> str | None:
    """A sentence of warning when ids look like codes of fixed width of which some lost their leading zeros.

    Such ids are all digits, most have the greatest length (three or more), none begins with a zero, and they are not
    simply counted from 0 or 1.
    """
    ids = sorted(set(values))
    if len(ids) < 5 or not all(value.isdecimal() for value in ids) or any(value.startswith("0") for value in ids):
        return None
    width = max(map(len, ids))
    short = [value for value in ids if len(value) < width]
    counted = max(map(int, ids)) <= 2 * len(ids)
    if width < 3 or not short or len(short) > 0.4 * len(ids) or counted:
        return None
    return f"{len(short)} of {len(ids)} ids have fewer than {width} digits, such as {short[0]}: lost leading zeros?"


def resolve(path: str, sheet: Path) -> str:
    """A path of the sheet: URIs stay, `~` is the home folder, relative paths start at the sheet's folder. Absolute,
    because results keep it and may be used from another folder than the one they were made from.
    """
    if URI.match(path):
        return path
    return os.path.abspath(sheet.parent / Path(path).expanduser())


def disagreements(rows: list[Row], column: str) -> Iterator[Problem]:
    """Patients with more than one value in `column`; empty cells agree with everything."""
    values: dict[str, dict[str, int]] = defaultdict(dict)
    for number, row in rows:
        if row.get(column):
            values[row["patient_id"]].setdefault(row[column], number)
    for patient, found in values.items():
        if len(found) > 1:
            (first, before), *others = found.items()
            for value, number in others:
                yield Problem(number, column, f'patient {patient} has "{value}" here and "{first}" in row {before}')
