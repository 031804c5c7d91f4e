"""A folder of labelled tiles (tiles.csv with path, label, group) as material for composed slides.

A group is what tiles were cut from: a patient, a slide, a region. Tiles of one group go to one composed patient, for
otherwise a model would be tested on tissue that it was trained on.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from slidemake.core.failures import RunError

COLUMNS = ("path", "label", "group")
BENIGN_WORDS = {"benign", "normal", "norm", "healthy", "negative", "neg", "n", "nontumour", "nontumor", "0"}
SPOILT_SHARE = 0.2  # of the tiles that were asked for; with more the folder is not what it says

Groups = dict[str, list[Path]]


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles by group (sorted) of the two kinds, and their side in px: larger tiles are cropped to it."""

    folder: Path
    benign: Groups
    tumour: Groups
    side: int


def is_benign_name(label: str) -> bool:
    """Whether a label names tissue without tumour, as data sets write it (`colon_n`, `NORM`, `Benign`)."""
    words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
    return any(word in BENIGN_WORDS for word in words)


def _two_labels(
    counts: Counter[str], benign: Sequence[str], tumour: Sequence[str], table: Path
) -> tuple[set[str], set[str]]:
    """The labels of the two kinds, as asked for or guessed from their names; RunError says what there is."""
    there = ", ".join(f"{name!r} ({count} tiles)" for name, count in sorted(counts.items()))
    for asked in (*benign, *tumour):
        if asked not in counts:
            raise RunError(f"{table}: no tile has the label {asked!r}. There are: {there}")
    if both := set(benign) & set(tumour):
        raise RunError(f"{table}: {sorted(both)[0]!r} was given as benign and as tumour")
    if len(counts) < 2:
        raise RunError(f"{table}: a cohort needs tiles of two labels, and there is only {there}")
    clear = set(benign) or {name for name in counts if is_benign_name(name) and name not in tumour}
    other = set(tumour) or {name for name in counts if name not in clear}
    if not clear or not other or (not tumour and len(other) > 1):
        raise RunError(
            f"{table}: which labels are benign and which are tumour is not clear from their names: {there}. Say so, "
            "separated by commas: BENIGN=... TUMOUR=... (make), --benign ... --tumour ... (benchmarks/validate.py)"
        )
    return clear, other


def _rows(table: Path, ungrouped: bool) -> list[dict[str, str]]:
    if not table.is_file():
        raise RunError(
            f"{table} is missing. A folder of labelled tiles has a tiles.csv with the columns path (from that folder), "
            "label, and group (patient, slide or region that the tile was cut from)."
        )
    with open(table, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        rows = list(reader)
    if missing == ["group"] and ungrouped:
        rows = [row | {"group": row["path"]} for row in rows]
    elif missing == ["group"]:
        raise RunError(
            f"{table} has no column 'group'. Tiles that were cut from the same tissue would be dealt to different "
            "patients, and every model would look better than it is. Add the column (patient, slide or region of "
            "each tile), or say that each tile is of another patient: UNGROUPED=1 (make), --ungrouped "
            "(benchmarks/validate.py)"
        )
    elif missing:
        raise RunError(f"{table} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
    for line, row in enumerate(rows, start=2):
        if empty := [name for name in COLUMNS if not (row[name] or "").strip()]:
            raise RunError(f"{table}, row {line}: the cell {empty[0]!r} is empty")
    return rows


def read_labelled_tiles(
    folder: Path, benign: Sequence[str] = (), tumour: Sequence[str] = (), ungrouped: bool = False
) -> LabelledTiles:
    """Read `folder`/tiles.csv. `benign`, `tumour`: labels of either kind; without them names like `colon_n` or `NORM`
    are taken for benign and the one other label for tumour. RunError says what is wrong with the folder."""
    table = folder / "tiles.csv"
    rows = _rows(table, ungrouped)
    clear, other = _two_labels(Counter(row["label"] for row in rows), benign, tumour, table)
    kinds: tuple[Groups, Groups] = ({}, {})
    for row in sorted(rows, key=lambda row: row["path"]):
        if row["label"] in clear | other:
            kinds[row["label"] in other].setdefault(row["group"], []).append(folder / row["path"])
    _part_shared_groups(kinds)
    every = [path for kind in kinds for paths in kind.values() for path in paths]
    return LabelledTiles(folder, dict(sorted(kinds[0].items())), dict(sorted(kinds[1].items())), _side(every, folder))


def _part_shared_groups(kinds: tuple[Groups, Groups]) -> None:
    """A group with tiles of both kinds (a patient's tumour and the normal tissue beside it) keeps one of them, the one
    that has fewer groups: otherwise two composed patients would share a real one."""
    for group in sorted(set(kinds[0]) & set(kinds[1])):
        del kinds[len(kinds[1]) >= len(kinds[0])][group]


def _side(paths: Sequence[Path], folder: Path, sample: int = 60) -> int:
    """The side that most tiles have, from a sample of them, px."""
    sides: Counter[int] = Counter()
    for path in paths[:: max(1, len(paths) // sample)]:
        try:
            with Image.open(path) as picture:
                sides[min(picture.size)] += 1
        except OSError:
            continue
    if not sides:
        raise RunError(f"{folder}: none of {min(len(paths), sample)} tiles could be opened, {paths[0]} for one")
    return max(sides, key=lambda side: (sides[side], side))


def deal(tiles: LabelledTiles, labels: Sequence[int], rng: np.random.Generator) -> list[tuple[list[Path], list[Path]]]:
    """Benign and tumour tiles of each patient; no group serves two patients. `labels`: 1 for patients with a tumour.

    Every patient gets benign tiles, and those with a tumour get tumour tiles. RunError where there are too few groups.
    """
    wanted = {"benign": len(labels), "tumour": int(sum(labels))}
    for (kind, count), groups in zip(wanted.items(), (tiles.benign, tiles.tumour), strict=True):
        if len(groups) < count:
            fewer = min(len(tiles.benign), 2 * len(tiles.tumour))
            raise RunError(
                f"{tiles.folder}: {len(labels)} patients need {count} groups of {kind} tiles, and there are "
                f"{len(groups)}. Up to {fewer} patients can be composed: PATIENTS={fewer} (make), --patients {fewer}"
            )

    def share(groups: Groups, parts: int) -> list[list[Path]]:
        names = rng.permutation(sorted(groups))
        return [[path for name in names[part::parts] for path in groups[name]] for part in range(parts)]

    clear, tumour = share(tiles.benign, wanted["benign"]), iter(share(tiles.tumour, wanted["tumour"]))
    return [(clear[number], next(tumour) if label else []) for number, label in enumerate(labels)]


class Supply:
    """Decoded tiles of one patient, in random order, the same ones again when all were given out.

    Tiles that cannot be decoded, or are smaller than `side`, are passed over and remembered in `spoilt`.
    """

    def __init__(self, paths: Iterable[Path], side: int, rng: np.random.Generator):
        self.paths = [Path(str(path)) for path in rng.permutation([str(path) for path in paths])]
        self.side, self.next = side, 0
        self.given: set[Path] = set()
        self.spoilt: dict[Path, str] = {}

    def take(self) -> np.ndarray:
        """The next tile, (side, side, 3) uint8; RunError where none of them can be read."""
        while len(self.spoilt) < len(self.paths):
            path = self.paths[self.next % len(self.paths)]
            self.next += 1
            if path in self.spoilt:
                continue
            try:
                tile = self._read(path)
            except (OSError, ValueError, SyntaxError) as error:
                self.spoilt[path] = str(error)
                continue
            self.given.add(path)
            return tile
        path, why = next(iter(self.spoilt.items()))
        raise RunError(f"none of the {len(self.paths)} tiles of a composed patient can be read; {path}: {why}")

    def _read(self, path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            if min(picture.size) < self.side:
                raise ValueError(f"{picture.width} x {picture.height} px, smaller than most tiles ({self.side} px)")
            rgb = np.asarray(picture.convert("RGB"))
        top, left = ((n - self.side) // 2 for n in rgb.shape[:2])
        return rgb[top : top + self.side, left : left + self.side]
