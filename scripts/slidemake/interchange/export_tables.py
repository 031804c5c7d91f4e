"""A cohort's labels, folds and predictions in the tables of other tools."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core import csv_cells

Row = Mapping[str, str]
NEVER_TESTED = ("train", "val")  # folds of patients that no model was tested on


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """CSV whose cells no spreadsheet takes for formulas (an id such as @P1 gets an apostrophe)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv_cells.DictWriter(handle, columns, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def folds_of(splits: Iterable[Row]) -> dict[str, dict[str, list[str]]]:
    """{fold over all repeats ("0", or "repeat1_fold0"): {"train", "test": patients}} of the rows of splits.csv."""
    of_repeat: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in splits:
        of_repeat[row["repeat"]][row["fold"]].append(row["patient_id"])
    found = {}
    for repeat, folds in sorted(of_repeat.items(), key=lambda item: int(item[0])):
        everybody = {patient for patients in folds.values() for patient in patients}
        for fold in sorted(set(folds) - set(NEVER_TESTED)):
            tested = sorted(folds[fold])
            found[f"repeat{repeat}_fold{fold}"] = {"train": sorted(everybody - set(tested)), "test": tested}
    return found


def clam_tables(
    folder: Path, slides: Sequence[Row], task: str, labels: Mapping[str, str], splits: Sequence[Row]
) -> None:
    """`<task>.csv` (case_id, slide_id, label) and `splits/<task>/splits_<k>.csv` (train, val, test of slides).

    CLAM wants validation slides, and slidemake draws them within the training of a fold: val is left empty.
    """
    known = [row for row in slides if row["patient_id"] in labels]
    rows = [{"case_id": r["patient_id"], "slide_id": r["slide_id"], "label": labels[r["patient_id"]]} for r in known]
    write_csv(folder / f"{task}.csv", ("case_id", "slide_id", "label"), rows)
    of_patient: dict[str, list[str]] = defaultdict(list)
    for row in known:
        of_patient[row["patient_id"]].append(row["slide_id"])
    for number, fold in enumerate(folds_of(splits).values()):
        train, test = ([s for p in fold[part] for s in of_patient[p]] for part in ("train", "test"))
        longest = max(len(train), len(test))
        lines = [
            {"": i, "train": train[i] if i < len(train) else "", "val": "", "test": test[i] if i < len(test) else ""}
            for i in range(longest)
        ]
        write_csv(folder / "splits" / task / f"splits_{number}.csv", ("", "train", "val", "test"), lines)


def stamp_tables(folder: Path, encoder: str, slides: Sequence[Row], labels: Mapping[str, Mapping[str, str]]) -> None:
    """`clini.csv` (PATIENT and a column per task) and `slide.csv` (PATIENT, FILENAME relative to the features)."""
    patients = sorted({row["patient_id"] for row in slides})
    rows = [{"PATIENT": p, **{task: of.get(p, "") for task, of in labels.items()}} for p in patients]
    write_csv(folder / "clini.csv", ("PATIENT", *labels), rows)
    files = [{"PATIENT": row["patient_id"], "FILENAME": f"{row['slide_id']}.h5"} for row in slides]
    write_csv(folder / encoder / "slide.csv", ("PATIENT", "FILENAME"), files)


def stamp_splits(folder: Path, task: str, splits: Sequence[Row]) -> None:
    """`splits_<task>.json`, as STAMP's cross-validation writes it."""
    folds = [{"train_patients": f["train"], "test_patients": f["test"]} for f in folds_of(splits).values()]
    (folder / f"splits_{task}.json").write_text(json.dumps({"splits": folds}, indent=1) + "\n", encoding="utf-8")


def write_h5ad(path: Path, vectors: np.ndarray, rows: list[dict[str, Any]], about: Mapping[str, Any]) -> None:
    """AnnData with a row per slide: X (S, D), obs the rows' columns (numbers where all of a column are), uns `about`.

    By the layout of AnnData 0.8 and later, which anndata reads without more; rows need `slide_id`.
    """
    import h5py

    def told(item: Any, kind: str, version: str) -> Any:
        item.attrs["encoding-type"], item.attrs["encoding-version"] = kind, version
        return item

    def frame(parent: Any, name: str, index: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        group = told(parent.create_group(name), "dataframe", "0.2.0")
        group.attrs["_index"] = "_index"
        group.attrs["column-order"] = np.array(list(columns), dtype=h5py.string_dtype())
        texts(group, "_index", index)
        for column, values in columns.items():
            numbers = _numbers(values)
            if numbers is None:
                texts(group, column, [str(value) for value in values])
            else:
                told(group.create_dataset(column, data=numbers), "array", "0.2.0")

    def texts(group: Any, name: str, values: Sequence[str]) -> None:
        told(group.create_dataset(name, data=list(values), dtype=h5py.string_dtype()), "string-array", "0.2.0")

    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row if key != "slide_id"))
    with h5py.File(path, "w") as file:
        told(file, "anndata", "0.1.0")
        told(file.create_dataset("X", data=vectors.astype(np.float32)), "array", "0.2.0")
        columns = {name.replace("/", "_"): [row.get(name, "") for row in rows] for name in names}
        frame(file, "obs", [row["slide_id"] for row in rows], columns)
        frame(file, "var", [f"feature_{i}" for i in range(vectors.shape[1])], {})
        uns = told(file.create_group("uns"), "dict", "0.1.0")
        for key, value in about.items():
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            told(uns.create_dataset(key, data=text, dtype=h5py.string_dtype()), "string", "0.2.0")
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            told(file.create_group(name), "dict", "0.1.0")


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """A column as numbers, NaN where a cell is empty; None where one is text, or has zeros in front."""
    try:
        numbers = [float("nan") if value == "" else float(value) for value in values]
    except (TypeError, ValueError):
        return None
    coded = any(isinstance(v, str) and len(v) > 1 and v[0] == "0" and v[1].isdigit() for v in values)
    return None if coded or all(value == "" for value in values) else np.array(numbers)
