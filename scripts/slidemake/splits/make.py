"""Which patient is tested in which fold.

A split is decided on patients: every slide, block and re-scan of a patient goes where the patient goes. The methods:

kfold               patients are dealt to `folds` folds; counts of the folds differ by at most one in every class, and
                    within a class every site is spread as evenly. `repeats` deals differ by their seed (seed + repeat).
monte_carlo         each of `repeats` draws tests `test_fraction` of every class and trains on the rest.
site_preserved      k folds, no site in two of them, otherwise as alike as an integer program makes them.
leave_one_site_out  a fold per site.
temporal            tested are the patients who came at `cutoff` or later, trained on are those before.
external            tested are the patients of another cohort (a value of a column); nothing is fitted on them.
given               the sheet's `split` column (or another) names the fold. The names train and val are never tested
                    (val is what early stopping, threshold and temperature use); every other name (test, 0, 1, A, ...)
                    is a tested fold.
file                a split file of CLAM, Patho-Bench or STAMP.

All of them are nested: within the training side of every fold `training.plan.member_plan` deals inner folds, on which
early stopping, temperature and threshold are decided; the tested patients decide nothing.

Tested folds are numbered from 0 in every table and file name; `fold_name` keeps what the sheet calls them. No torch
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slidemake.core.failures import RunError
from slidemake.splits.files import folds_of_file
from slidemake.splits.leakage import check_leakage, check_training_sides
from slidemake.splits.methods import (
    deal_patients,
    draw_patients,
    external_cohort,
    given_folds,
    one_fold_per_site,
    patient_dates,
    split_by_date,
)
from slidemake.splits.patients import TRAIN, UNNAMED, VAL, Patient, Splits, as_task, collect_patients, fold_order
from slidemake.splits.shuffled import permuted_control
from slidemake.splits.site_preserved import site_preserved_folds
from slidemake.splits.table import fold_report, read_splits, split_rows, write_splits
from slidemake.statistics.association import cramers_v
from slidemake.tasks.labels import about_label, task_type, why_untrainable

__all__ = [
    "TRAIN",
    "VAL",
    "Patient",
    "Splits",
    "check_leakage",
    "collect_patients",
    "cramers_v",
    "deal_patients",
    "fold_order",
    "make_splits",
    "permuted_control",
    "read_splits",
    "split_rows",
    "write_splits",
]
METHODS = (
    "kfold",
    "monte_carlo",
    "site_preserved",
    "leave_one_site_out",
    "temporal",
    "external",
    "given",
    "file",
)
DEFAULTS: dict[str, Any] = {
    "method": "kfold",
    "folds": 5,
    "repeats": 1,
    "seed": 0,
    "column": "split",
    "test": [],
    "test_fraction": 0.2,
    "date_column": "scan_date",
    "cutoff": None,
    "gap_days": 0,
    "file": None,
}


@dataclass
class _Assigned:
    """Folds of every repeat, and what the method has to say about them."""

    folds: dict[int, dict[str, str]]
    left_out: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def make_splits(
    rows: Iterable[Mapping[str, Any]],
    label: str | Mapping[str, Any],
    options: Mapping[str, Any],
    identities: Mapping[str, str] | None = None,
) -> Splits:
    """Assign every patient of a task to its test fold.

    rows        rows of cohort/slides.csv (see `collect_patients`); `label` the column of the classes, or a task
    options     the task's `splits`; missing keys take DEFAULTS
    identities  slide -> content identity; the same scan under two patients in two folds stops the run

    The same input gives the same folds, whatever the order of the rows. Errors: RunError for labels that
    nothing can be learned from (one class, no event), in the cohort or on a training side, fewer patients than folds, a
    patient in two folds, no site or split column.
    """
    options = DEFAULTS | dict(options)
    method = options["method"]
    if method not in METHODS:
        raise RunError(f"Unknown split method {method!r}; one of {', '.join(METHODS)}.")
    rows = list(rows)
    patients, left_out = collect_patients(rows, label, options["column"])
    task = as_task(label)
    _check_labels(patients, task, left_out)
    made = _assign(patients, rows, options)
    outside = {one["patient_id"] for one in made.left_out}
    patients = [p for p in patients if p.patient_id not in outside]
    assigned, names = _numbered(made.folds, method)
    splits = Splits(
        assigned,
        {p.patient_id: p.label for p in patients},
        {p.patient_id: p.site for p in patients},
        {},
        names,
    )
    scans = {s: identities[s] for p in patients for s in p.slides if s in identities} if identities else {}
    check_leakage(split_rows(splits), {s: p.patient_id for p in patients for s in p.slides}, scans)
    check_training_sides(splits, task_type(task))
    left_out += made.left_out
    report = fold_report(splits, patients, left_out, method, int(options["seed"]), task_type(task))
    report["warnings"] = made.warnings + report["warnings"]
    report["about"] = made.about
    splits.report.update(report)
    return splits


def _check_labels(patients: Sequence[Patient], task: Mapping[str, Any], left_out: list[dict[str, str]]) -> None:
    why = why_untrainable([p.label for p in patients], task_type(task))
    if why:
        raise RunError(
            f"Task label {about_label(task)}: {why}. Check the column, and cohort/failures.csv for slides that were "
            f"lost ({len(left_out)} patients were left out)."
        )


def _assign(patients: list[Patient], rows: list[Mapping[str, Any]], options: Mapping[str, Any]) -> _Assigned:
    method, folds, seed = options["method"], int(options["folds"]), int(options["seed"])
    repeats = range(int(options["repeats"]))
    if method == "kfold":
        return _Assigned({r: deal_patients(patients, folds, seed + r) for r in repeats})
    if method == "monte_carlo":
        return _Assigned({r: draw_patients(patients, float(options["test_fraction"]), seed + r) for r in repeats})
    if method == "file":
        return _from_file(patients, rows, options)
    if method == "temporal":
        dates = patient_dates(rows, options["date_column"])
        asked = (options["cutoff"], float(options["test_fraction"]), int(options["gap_days"]))
        same, cutoff, left_out = split_by_date(patients, dates, *asked)
        return _Assigned(dict.fromkeys(repeats, same), left_out, about={"cutoff": cutoff})
    if method == "site_preserved":
        same, solved = site_preserved_folds(patients, folds)
        about = {"site_folds": solved.fold_of, "deviation": solved.deviation, "lower_bound": solved.bound}
        return _Assigned(dict.fromkeys(repeats, same), about=about)
    if method == "external":
        return _Assigned(dict.fromkeys(repeats, external_cohort(patients, options["column"], options["test"])))
    return _Assigned(
        dict.fromkeys(repeats, given_folds(patients) if method == "given" else one_fold_per_site(patients))
    )


def _from_file(patients: list[Patient], rows: list[Mapping[str, Any]], options: Mapping[str, Any]) -> _Assigned:
    if not options["file"]:
        raise RunError("splits.method is file, and splits.file names none.")
    folds, warnings, absent = folds_of_file(options["file"], patients, rows)
    left_out = [{"patient_id": p, "reason": "not in the split file"} for p in absent]
    return _Assigned(folds, left_out, warnings, {"file": str(options["file"])})


def _numbered(folds: dict[int, dict[str, str]], method: str) -> tuple[dict[int, dict[str, str]], dict[str, str]]:
    """Folds that have names get numbers; {number: name}."""
    if method in UNNAMED:
        return folds, {}
    tested = sorted(set(folds[0].values()) - {TRAIN, VAL}, key=fold_order)
    number = {name: str(i) for i, name in enumerate(tested)}
    return {r: {p: number.get(f, f) for p, f in a.items()} for r, a in folds.items()}, {v: k for k, v in number.items()}
