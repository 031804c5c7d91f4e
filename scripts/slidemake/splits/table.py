"""splits.csv, one row per repeat and patient, and the report on the folds beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.files import file_sums, fingerprint, placed, read_json_if_whole, write_json
from slidemake.core.tables import read_table, write_table
from slidemake.splits.leakage import check_leakage
from slidemake.splits.patients import TRAIN, UNNAMED, VAL, Patient, Splits, fold_order
from slidemake.statistics.association import cramers_v
from slidemake.tasks.labels import CLASSES, summary

COLUMNS = ("repeat", "patient_id", "fold", "fold_name", "label", "site")


def fold_report(
    splits: Splits, patients: Sequence[Patient], left_out: list[dict[str, str]], method: str, seed: int, kind: str
) -> dict[str, Any]:
    """The contents of splits.json. kind: type of the task; where labels are no classes, `classes` are their strata."""
    groups = {p.patient_id: p.stratum for p in patients}
    classes = sorted(set(groups.values()))
    sites = sorted(set(splits.sites.values()))
    table, warnings = [], []
    for repeat in sorted(splits.folds):
        names = sorted(set(splits.folds[repeat].values()), key=fold_order)
        for fold in names:
            members = [p for p, f in splits.folds[repeat].items() if f == fold]
            by_class = Counter(groups[p] for p in members)
            by_site = Counter(splits.sites[p] for p in members)
            table.append(
                {
                    "repeat": repeat,
                    "fold": fold,
                    "fold_name": splits.fold_names.get(fold, fold),
                    "patients": len(members),
                    "classes": {c: by_class.get(c, 0) for c in classes},
                    "sites": {s: by_site.get(s, 0) for s in sites},
                }
            )
            absent = [c for c in classes if not by_class.get(c)]
            if absent and fold not in (TRAIN, VAL) and kind in CLASSES:
                warnings.append(
                    f"repeat {repeat}, fold {fold}: no patient of class {', '.join(absent)}; the AUROC of this fold "
                    "is undefined"
                )
    counts = Counter(groups.values())
    for name in classes:
        if counts[name] < 10 and kind in CLASSES:
            warnings.append(f"class {name} has {counts[name]} patients: intervals will be wide and thresholds unstable")
    if len(sites) > 1 and (v := cramers_v([p.stratum for p in patients], [p.site for p in patients])) > 0.5:
        warnings.append(f"label and site are confounded (Cramér's V {v:.2f}): compare with site_only and by site")
    return {
        "method": method,
        "seed": seed,
        "repeats": len(splits.folds),
        "patients": len(patients),
        "slides": sum(len(p.slides) for p in patients),
        "classes": {c: counts[c] for c in classes},
        "sites": dict(sorted(Counter(splits.sites.values()).items())),
        "label_site_cramers_v": cramers_v([p.stratum for p in patients], [p.site for p in patients]),
        "outcome": summary(splits.labels, kind),
        "leakage": {"patients_in_two_folds": 0, "scans_in_two_folds": 0},
        "table": table,
        "left_out": left_out,
        "warnings": warnings,
    }


def fold_table(report: dict[str, Any]) -> str:
    """The folds of the first repeat as text: patients, and how many of each class and of each site."""
    rows = [row for row in report["table"] if row["repeat"] == report["table"][0]["repeat"]]
    classes, sites = list(report["classes"]), list(report["sites"])
    head = ["fold", "patients", *classes, *(f"at {site or 'no site'}" for site in sites)]
    body = [
        [
            f"{row['fold']} {row['fold_name']}" if row["fold_name"] != row["fold"] else str(row["fold"]),
            *map(str, [row["patients"], *(row["classes"][c] for c in classes), *(row["sites"][s] for s in sites)]),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *body])


def split_rows(splits: Splits) -> list[dict[str, Any]]:
    """Rows of splits.csv, sorted by repeat, fold and patient."""
    return [
        {
            "repeat": r,
            "patient_id": p,
            "fold": f,
            "fold_name": splits.fold_names.get(f, f),
            "label": splits.labels[p],
            "site": splits.sites[p],
        }
        for r in sorted(splits.folds)
        for p, f in sorted(splits.folds[r].items(), key=lambda item: (fold_order(item[1]), item[0]))
    ]


def write_splits(splits: Splits, table: str | Path, report: str | Path) -> None:
    """Write splits.csv (repeat, patient_id, fold, fold_name, label, site) and the report splits.json beside it."""
    rows = split_rows(splits)
    write_table(table, rows, COLUMNS)
    write_json(
        report,
        {
            **splits.report,
            **placed(report),
            "fingerprint": fingerprint("splits", rows=rows),
            "files": file_sums(Path(table).parent, [Path(table).name]),
        },
    )


def read_splits(table: str | Path) -> Splits:
    """Read splits.csv (and splits.json beside it, which seals it). RunError for one that was edited or leaks."""
    table = Path(table)
    rows = read_table(table)
    missing = [c for c in COLUMNS if rows and c not in rows[0]]
    if not rows or missing:
        raise RunError(
            f"{table} {'is empty' if not rows else 'has no column ' + ', '.join(missing)}; delete it and run again."
        )
    check_leakage(rows)
    folds: dict[int, dict[str, str]] = defaultdict(dict)
    for row in rows:
        folds[int(row["repeat"])][row["patient_id"]] = row["fold"]
    labels = {r["patient_id"]: r["label"] for r in rows}
    sites = {r["patient_id"]: r["site"] for r in rows}
    report = read_json_if_whole(table.with_suffix(".json")) or {}
    named = report.get("method", "kfold") not in UNNAMED or any(r["fold_name"] != r["fold"] for r in rows)
    names = {r["fold"]: r["fold_name"] for r in rows if named and r["fold"].isdecimal()}
    return Splits(dict(folds), labels, sites, report, names)
