"""Two spellings of one name: what a person reads as the same, and a program does not.

`P01` and `p01`, `Site-A` with a hyphen and with a dash, a full-width digit, an accent made of two characters, a space
that does not break, a joiner that nobody sees: each makes two patients of one (who is then trained on and tested), or
two sites, or two classes. Every column that groups is looked at by the one rule here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from slidemake.cohort.sheet_table import Problem, doubtful

# Letters of other alphabets that look like Latin ones in every font.
_LOOK_ALIKES = str.maketrans("АВЕКМНОРСТУХІЈЅаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTYXIJSaeopcyxijsABEZHIKMNOPTYXo")
_SHOWN_ROWS = 6


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _widths(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _dashes(text: str) -> str:
    return "".join("-" if unicodedata.category(c) == "Pd" or c == "\u2212" else c for c in text)


def _visible(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())


def _spaces(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# What is undone, in this order, and what to call the difference that it makes.
_STEPS = (
    ("the Unicode form of a letter", _composed),
    ("the kind of a dash", _dashes),
    ("characters that nobody sees", _visible),
    ("the kind or number of spaces", _spaces),
    ("the width or form of a character", _widths),
    ("letters of another alphabet that look alike", lambda text: text.translate(_LOOK_ALIKES)),
    ("case", lambda text: unicodedata.normalize("NFKC", text.casefold())),
)


def spelling_key(text: str) -> str:
    """What all spellings of one name have in common."""
    if text.isascii():  # nearly all: the same as all steps, and fast
        return _spaces(_visible(text)).lower()
    for _, step in _STEPS:
        text = step(text)
    return text


def difference(one: str, two: str) -> str:
    """In words, what two spellings of one name differ in."""
    found = []
    for name, step in _STEPS:
        after = step(one), step(two)
        if one != two and (after[0] == after[1] or _differing(*after) < _differing(one, two)):
            found.append(name)
        one, two = after
    return " and ".join(found) or "spelling"


def _differing(one: str, two: str) -> int:
    """How many characters two texts do not share, place by place."""
    return sum(a != b for a, b in zip(one, two, strict=False)) + abs(len(one) - len(two))


def spelling_problems(cells: Iterable[tuple[int, str]], column: str) -> Iterator[Problem]:
    """A problem for each further spelling of a name. cells: (row, text) of a column that groups, without empty ones."""
    rows: dict[str, list[int]] = defaultdict(list)
    for number, text in cells:
        rows[text].append(number)
    by_key: dict[str, list[str]] = defaultdict(list)
    for text in rows:
        by_key[spelling_key(text)].append(text)
    for same in by_key.values():
        first, *others = same
        for other in others:
            yield Problem(
                rows[other][0],
                column,
                f"{shown(other)} ({_rows(rows[other])}) and {shown(first)} ({_rows(rows[first])}) differ in "
                f"{difference(first, other)} only; write one of them everywhere",
            )


def number_problems(names: Iterable[str], column: str) -> Iterator[str]:
    """Classes that are one number written in two ways, such as `1` and `1.0`."""
    by_value: dict[float, list[str]] = defaultdict(list)
    for name in names:
        try:
            by_value[float(name)].append(name)
        except ValueError:
            continue
    for same in by_value.values():
        if len(same) > 1:
            yield f"{' and '.join(same)} of column {column} are the same number; write one of them everywhere"


def doubtful_names(counts: Mapping[str, int]) -> dict[str, int]:
    """Those of the names (name -> how many have it) that are more often no value than a value: `Unknown`, `None`."""
    return {name: count for name, count in counts.items() if doubtful(name)}


def shown(text: str) -> str:
    """A name in quotes, with what cannot be seen or told apart written as its code points."""
    return '"' + "".join(c if c.isascii() and c.isprintable() else _point(c) for c in text) + '"'


def _point(char: str) -> str:
    plain = unicodedata.category(char)[0] in "LN" and char.translate(_LOOK_ALIKES) == char
    same = plain and unicodedata.normalize("NFKC", char) == char and not unicodedata.combining(char)
    return char if same else f"<U+{ord(char):04X}>"


def _rows(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:_SHOWN_ROWS])) + (", ..." if len(numbers) > _SHOWN_ROWS else "")
    return f"row{'s' if len(numbers) > 1 else ''} {listed}"
