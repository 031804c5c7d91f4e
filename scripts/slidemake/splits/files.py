"""Folds that others have made: CLAM's split CSVs, Patho-Bench's TSV, STAMP's JSON.

A file of several train/test splits becomes as many repeats, each with one tested fold; where its test sets do not
overlap and each is trained on all the rest (plain k-fold), it is one repeat with k folds. Ids are matched with slides
first, then with patients.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.words import some
from slidemake.splits.patients import TRAIN, VAL, Patient, fold_order

_CLAM = re.compile(r"splits_(\d+)\.csv")
_FOLD = re.compile(r"fold_(\d+)")
_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".dcm", ".isyntax")
Parts = list[tuple[str, str]]  # (id of a slide or patient, train | val | test)


def split_files(path: str | Path) -> list[Path]:
    """The files to read: `path` itself, or CLAM's splits_0.csv, splits_1.csv, ... in the folder `path`, by number."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = [(int(m[1]), p) for p in path.iterdir() if (m := _CLAM.fullmatch(p.name))]
    if not found:
        raise RunError(f"splits.file: the folder {path} holds no splits_0.csv, splits_1.csv, ... as CLAM writes them.")
    return [p for _, p in sorted(found)]


def folds_of_file(
    path: str | Path, patients: Sequence[Patient], rows: Iterable[Mapping[str, Any]]
) -> tuple[dict[int, dict[str, str]], list[str], list[str]]:
    """({repeat: {patient: fold}}, warnings, patients that are in none of the splits).

    rows: of the cohort, for the slides of each patient, also those that failed. RunError for a file that is none of the
    three formats, an id in two parts, slides of one patient in different parts, and when nothing matches the cohort.
    """
    known = {p.patient_id for p in patients}
    slides: dict[str, str] = {}
    for row in rows:
        slides[str(row["slide_id"])] = str(row.get("patient_id") or row["slide_id"])
    everyone = known | set(slides.values())
    repeats: list[dict[str, str]] = []
    unknown: dict[str, None] = {}
    for name, parts in _read(Path(path)):
        repeats.append(_by_patient(name, parts, slides, everyone, unknown))
    repeats = [{p: part for p, part in of.items() if p in known} for of in repeats]
    if not any(repeats):
        example = next(iter(unknown), "none")
        raise RunError(
            f"splits.file: none of the ids in {path} is a slide or patient of the cohort (the file's first: {example}; "
            f"the cohort's first: {next(iter(slides), 'none')})."
        )
    warnings = []
    if unknown:
        warnings.append(f"{len(unknown)} ids of {Path(path).name} are not in the cohort: {some(list(unknown), 5)}")
    absent = sorted(known - set().union(*repeats))
    return _as_folds(repeats, Path(path)), warnings, absent


def _as_folds(repeats: list[dict[str, str]], path: Path) -> dict[int, dict[str, str]]:
    """Each train/test split as a repeat with fold "0"; plain k-fold as one repeat with folds "0".."k-1"."""
    for place, of in enumerate(repeats):
        if "test" not in of.values():
            raise RunError(f"splits.file: split {place} of {path} tests no patient of the cohort.")
    tested = [{p for p, part in of.items() if part == "test"} for of in repeats]
    whole = set().union(*(set(of) for of in repeats))
    plain = len(repeats) > 1 and sum(map(len, tested)) == len(set().union(*tested)) == len(whole)
    if plain and all(VAL not in of.values() and set(of) == whole for of in repeats):
        return {0: {p: str(i) for i, test in enumerate(tested) for p in test}}
    return {i: {p: "0" if part == "test" else part for p, part in of.items()} for i, of in enumerate(repeats)}


def _by_patient(
    name: str, parts: Parts, slides: Mapping[str, str], everyone: set[str], unknown: dict[str, None]
) -> dict[str, str]:
    found: dict[str, set[str]] = defaultdict(set)
    for given, part in parts:
        stem = given[: -len(Path(given).suffix)] if Path(given).suffix.lower() in _SUFFIXES else given
        patient = slides.get(given) or slides.get(stem) or (given if given in everyone else None)
        if patient is None:
            unknown[given] = None
        else:
            found[patient].add(part)
    torn = [f"{p} ({', '.join(sorted(f))})" for p, f in sorted(found.items()) if len(f) > 1]
    if torn:
        raise RunError(f"Leak: {name} puts patients on more than one side: {some(torn)}. A patient has one side.")
    return {p: next(iter(f)) for p, f in found.items()}


def _read(path: Path) -> list[tuple[str, Parts]]:
    """[(name, [(id, part)])] of every split in the file or folder."""
    found: list[tuple[str, Parts]] = []
    for file in split_files(path):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"splits.file: {file} cannot be read: {error}") from error
        found += _stamp(file, text) if file.suffix.lower() == ".json" else _table(file, text)
    return found


def _stamp(path: Path, text: str) -> list[tuple[str, Parts]]:
    """{"splits": [{"train_patients": [...], "test_patients": [...]}]}, as STAMP's crossval writes it."""
    try:
        splits = json.loads(text)["splits"]
        return [
            (
                f"split {i} of {path.name}",
                [(str(p), TRAIN) for p in split["train_patients"]]
                + [(str(p), VAL) for p in split.get("val_patients", [])]
                + [(str(p), "test") for p in split["test_patients"]],
            )
            for i, split in enumerate(splits)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f'splits.file: {path} is not a split file of STAMP ({{"splits": [{{"train_patients": [...], '
            f'"test_patients": [...]}}]}}): {type(error).__name__} {error}'
        ) from error


def _table(path: Path, text: str) -> list[tuple[str, Parts]]:
    """CLAM (columns train, val, test hold slide ids) or Patho-Bench (case_id, slide_id, fold_0, fold_1, ...)."""
    lines = text.splitlines()
    separator = "\t" if lines and "\t" in lines[0] else ","
    rows = list(csv.DictReader(lines, delimiter=separator))
    columns = list(rows[0]) if rows else []
    folds = sorted((c for c in columns if _FOLD.fullmatch(c or "")), key=lambda c: fold_order(c[5:]))
    if folds:
        return [(f"{fold} of {path.name}", _patho_bench(path, rows, fold)) for fold in folds]
    if {"train", "test"} <= set(columns):
        if any(str(row["train"]).strip() in ("True", "False") for row in rows):
            raise RunError(f"splits.file: {path} holds True and False; name CLAM's splits_<i>.csv beside it.")
        parts = [
            (row[part].strip(), part)
            for part in ("train", "val", "test")
            for row in rows
            if part in columns and (row[part] or "").strip()
        ]
        return [(path.name, parts)]
    raise RunError(
        f"splits.file: {path} has the columns {', '.join(map(str, columns)) or '(none)'}; expected CLAM's train, val, "
        "test, or Patho-Bench's case_id, slide_id, fold_0, ..."
    )


def _patho_bench(path: Path, rows: list[dict[str, str]], fold: str) -> Parts:
    parts = []
    for number, row in enumerate(rows, start=2):
        part = (row[fold] or "").strip().lower()
        if part not in (TRAIN, VAL, "test", ""):
            raise RunError(f"splits.file: {path}, row {number}: {fold} is {row[fold]!r}, not train, val or test.")
        name = (row.get("slide_id") or row.get("case_id") or "").strip()
        if part and name:
            parts.append((name, part))
    return parts
