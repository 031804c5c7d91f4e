"""Which patient is tested in which fold.

A split is decided on patients: every slide, block and re-scan of a patient goes where the patient goes. Three methods:

kfold               patients are dealt to `folds` folds; class counts of the folds differ by at most one, and within a
                    class every site is spread as evenly. `repeats` deals differ by their seed (seed + repeat).
given               the sheet's `split` column (or another) names the fold. The names train and val are never tested
                    (val is what early stopping, threshold and temperature use); every other name (test, 0, 1, A, ...)
                    is a tested fold.
leave_one_site_out  a fold per site.

Tested folds are numbered from 0 in every table and file name; `fold_name` keeps what the sheet calls them. No torch
here.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.failures import RunError
from slidemake.provenance import file_sums, fingerprint, read_json_if_whole, write_json, write_text

METHODS = ("kfold", "given", "leave_one_site_out")
TRAIN, VAL = "train", "val"
_SYNONYMS = {"training": TRAIN, "validation": VAL, "valid": VAL, "testing": "test"}
_COLUMNS = ("repeat", "patient_id", "fold", "fold_name", "label", "site")


@dataclass(frozen=True)
class Patient:
    """One patient of a task: its class, its site (sites of several slides joined by +) and its slides, sorted."""

    patient_id: str
    label: str
    site: str
    split: str
    slides: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """Folds of a task: `folds[repeat][patient_id]` is the fold, "0", "1", ..., in which the patient is tested, or train
    or val for those who never are. `fold_names` maps "0", ... to the site or to the sheet's name, where folds have
    names.
    """

    folds: dict[int, dict[str, str]]
    labels: dict[str, str]
    sites: dict[str, str]
    report: dict[str, Any]
    fold_names: dict[str, str] = field(default_factory=dict)

    def tested(self, repeat: int) -> list[str]:
        """Names of the folds that are tested, sorted (numbers by value)."""
        return sorted(set(self.folds[repeat].values()) - {TRAIN, VAL}, key=fold_order)

    def parts(self, repeat: int, fold: str) -> tuple[list[str], list[str], list[str]]:
        """(train, val, test) patients of one fold, each sorted; val is empty unless the split was given with one."""
        of = self.folds[repeat]
        test = sorted(p for p, f in of.items() if f == fold)
        val = sorted(p for p, f in of.items() if f == VAL)
        train = sorted(p for p, f in of.items() if f not in (fold, VAL))
        return train, val, test


def fold_order(name: str) -> tuple[int, int, str]:
    """Sort key: folds 2 before 10, numbers before names."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def collect_patients(
    rows: Iterable[Mapping[str, Any]], label: str, column: str = "split"
) -> tuple[list[Patient], list[dict[str, str]]]:
    """Patients of a task from the rows of cohort/slides.csv.

    Read are slide_id, patient_id (slide_id where empty), site, status (ok, failed, excluded), failure_code, the label
    column and, for given splits, `column`. Returns the patients, sorted by id, and those left out as {patient_id,
    reason}: all slides failed, or no label. Two labels for one patient are a RunError that lists every such patient.
    """
    by_patient: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if label not in row:
            raise RunError(f"The cohort has no column {label!r}; its columns are {', '.join(map(str, row))}.")
        if row.get("status", "ok") != "excluded":
            by_patient[row.get("patient_id") or row["slide_id"]].append(row)
    patients, left_out, problems = [], [], []
    for patient_id, everything in sorted(by_patient.items()):
        labels = {str(row[label] or "").strip() for row in everything} - {""}
        usable = sorted(r["slide_id"] for r in everything if r.get("status", "ok") == "ok")
        if len(labels) > 1:
            problems.append(f"patient {patient_id} has {label} = {' and '.join(sorted(labels))}")
        elif not usable:
            why = ", ".join(f"{r['slide_id']}: {r.get('failure_code') or 'failed'}" for r in everything)
            left_out.append({"patient_id": patient_id, "reason": f"no usable slide ({why})"})
        elif not labels:
            left_out.append({"patient_id": patient_id, "reason": f"no {label}"})
        else:
            split = "+".join(sorted({_fold_name(r.get(column)) for r in everything} - {""}))
            site = "+".join(sorted({r["site"] for r in everything if r.get("site")}))
            patients.append(Patient(patient_id, labels.pop(), site, split, tuple(usable)))
    if problems:
        raise RunError(f"A patient has one {label}, and these have more: {'; '.join(problems)}. Correct the sheet.")
    return patients, left_out


def _fold_name(value: str | None) -> str:
    text = (value or "").strip()
    return _SYNONYMS.get(text.lower(), text.lower() if text.lower() in (TRAIN, VAL, "test") else text)


def make_splits(
    rows: Iterable[Mapping[str, Any]],
    label: str,
    options: Mapping[str, Any],
    identities: Mapping[str, str] | None = None,
) -> Splits:
    """Assign every patient of a task to its test fold.

    rows        rows of cohort/slides.csv (see `collect_patients`); `label` the label column
    options     {"method", "folds" (kfold), "repeats", "seed", "column" (given)}; missing keys take kfold, 5, 1, 0,
                split
    identities  slide -> content identity; the same scan under two patients in two folds stops the run

    The same input gives the same folds, whatever the order of the rows. Errors: RunError for one class, fewer patients
    than folds, a patient in two folds, a training side with one class, no site or split column.
    """
    method = options.get("method", "kfold")
    repeats, seed = int(options.get("repeats", 1)), int(options.get("seed", 0))
    patients, left_out = collect_patients(rows, label, options.get("column", "split"))
    counts = Counter(p.label for p in patients)
    if len(counts) < 2:
        only = f"only {next(iter(counts))!r}" if counts else "no patient at all"
        raise RunError(
            f"Task label {label!r} has {only} among {len(patients)} usable patients; two classes are needed. Check the "
            f"column, and cohort/failures.csv for slides that were lost ({len(left_out)} patients were left out)."
        )
    if method == "kfold":
        folds = int(options.get("folds", 5))
        assigned = {r: deal_patients(patients, folds, seed + r) for r in range(repeats)}
    elif method == "given":
        assigned = dict.fromkeys(range(repeats), _given(patients))
    elif method == "leave_one_site_out":
        assigned = dict.fromkeys(range(repeats), _sites(patients))
    else:
        raise RunError(f"Unknown split method {method!r}; one of {', '.join(METHODS)}.")
    names: dict[str, str] = {}
    if method != "kfold":
        tested = sorted(set(assigned[0].values()) - {TRAIN, VAL}, key=fold_order)
        number = {name: str(i) for i, name in enumerate(tested)}
        names = {str(i): name for i, name in enumerate(tested)}
        assigned = {r: {p: number.get(f, f) for p, f in a.items()} for r, a in assigned.items()}
    splits = Splits(
        assigned,
        {p.patient_id: p.label for p in patients},
        {p.patient_id: p.site for p in patients},
        {},
        names,
    )
    scans = {s: identities[s] for p in patients for s in p.slides if s in identities} if identities else {}
    check_leakage(split_rows(splits), {s: p.patient_id for p in patients for s in p.slides}, scans)
    _check_training_sides(splits)
    splits.report.update(_report(splits, patients, left_out, method, seed))
    return splits


def deal_patients(patients: Sequence[Patient], folds: int, seed: int) -> dict[str, str]:
    """Stratified k folds: patient -> "0".."k-1".

    Per class the patients are shuffled, ordered by site (stable, so random within a site) and dealt one by one like
    cards, and the next class goes on with the next fold: classes, sites within classes, and sizes all stay within one.
    """
    if folds < 2:
        raise RunError(f"splits.folds is {folds}; cross-validation needs at least 2.")
    if len(patients) < folds:
        raise RunError(
            f"{len(patients)} usable patients cannot be dealt to {folds} folds. Set splits.folds to "
            f"{max(2, len(patients))} or fewer, or add patients."
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(folds)
    patients = sorted(patients, key=lambda p: p.patient_id)
    assigned: dict[str, str] = {}
    for label in sorted({p.label for p in patients}):
        members = [p for p in patients if p.label == label]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        site_rank = {s: i for i, s in enumerate(rng.permutation(sorted({p.site for p in members})).tolist())}
        for patient in sorted(shuffled, key=lambda p: site_rank[p.site]):
            assigned[patient.patient_id] = str(order[len(assigned) % folds])
    return assigned


def _given(patients: Sequence[Patient]) -> dict[str, str]:
    empty = [p.patient_id for p in patients if not p.split]
    if empty:
        raise RunError(
            f"splits.method is given, but the split column is empty for {_some(empty)}. Fill it with fold names, or "
            "with train, val and test; or exclude those slides."
        )
    torn = [f"{p.patient_id} ({p.split.replace('+', ', ')})" for p in patients if "+" in p.split]
    if torn:
        raise RunError(
            f"These patients are in more than one fold of the split column: {_some(torn)}. A patient has one."
        )
    if not {p.split for p in patients} - {TRAIN, VAL}:
        raise RunError("The split column has train and val only; name the patients to be tested test (or a fold name).")
    return {p.patient_id: p.split for p in patients}


def _sites(patients: Sequence[Patient]) -> dict[str, str]:
    empty = [p.patient_id for p in patients if not p.site]
    if empty:
        raise RunError(f"Leave-one-site-out needs the site of every patient; it is empty for {_some(empty)}.")
    torn = [f"{p.patient_id} ({p.site.replace('+', ', ')})" for p in patients if "+" in p.site]
    if torn:
        raise RunError(f"Leave-one-site-out needs one site per patient; these have several: {_some(torn)}.")
    if len({p.site for p in patients}) < 2:
        raise RunError(f"Leave-one-site-out needs two sites; all patients are from {patients[0].site!r}.")
    return {p.patient_id: p.site for p in patients}


def _some(items: Sequence[str], most: int = 10) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def check_leakage(
    rows: Iterable[Mapping[str, Any]],
    patient_of: Mapping[str, str] | None = None,
    identities: Mapping[str, str] | None = None,
) -> None:
    """Stop the run (RunError) when training data reaches a test fold.

    rows         split rows {repeat, patient_id, fold}: a patient with two folds in one repeat is a leak
    patient_of   slide -> patient, and `identities` slide -> content identity: the same scan under two patients who are
                 in different folds is a leak
    """
    seen: dict[tuple[int, str], set[str]] = defaultdict(set)
    for row in rows:
        seen[int(row["repeat"]), str(row["patient_id"])].add(str(row["fold"]))
    torn = [f"{p} (folds {', '.join(sorted(f, key=fold_order))})" for (_, p), f in sorted(seen.items()) if len(f) > 1]
    if torn:
        raise RunError(
            f"Leak: patients in two folds: {_some(list(dict.fromkeys(torn)))}. Test results would be worth nothing; "
            "give "
            "each patient one fold."
        )
    holders: dict[str, set[str]] = defaultdict(set)
    for slide, identity in (identities or {}).items():
        holders[identity].add((patient_of or {}).get(slide, slide))
    for identity, patients in sorted(holders.items()):
        for repeat in sorted({r for r, _ in seen}):
            if len({f for p in patients for f in seen.get((repeat, p), ())}) > 1:
                raise RunError(
                    f"Leak: the same scan (content {identity}) belongs to patients {', '.join(sorted(patients))}, "
                    "who are in "
                    "different folds. Keep one of the rows, or give both the same patient_id."
                )


def _check_training_sides(splits: Splits) -> None:
    for repeat in sorted(splits.folds):
        for fold in splits.tested(repeat):
            train, _, _ = splits.parts(repeat, fold)
            classes = sorted({splits.labels[p] for p in train})
            if len(classes) < 2:
                raise RunError(
                    f"Fold {fold!r} (repeat {repeat}) leaves {len(train)} training patients of "
                    f"{'class ' + classes[0] if classes else 'no class'}: no model can be trained. Use kfold or "
                    "fewer folds."
                )


def _report(
    splits: Splits, patients: Sequence[Patient], left_out: list[dict[str, str]], method: str, seed: int
) -> dict[str, Any]:
    classes = sorted(set(splits.labels.values()))
    sites = sorted(set(splits.sites.values()))
    table, warnings = [], []
    for repeat in sorted(splits.folds):
        names = sorted(set(splits.folds[repeat].values()), key=fold_order)
        for fold in names:
            members = [p for p, f in splits.folds[repeat].items() if f == fold]
            by_class = Counter(splits.labels[p] for p in members)
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
            if absent and fold not in (TRAIN, VAL):
                warnings.append(
                    f"repeat {repeat}, fold {fold}: no patient of class {', '.join(absent)}; the AUROC of this fold "
                    "is undefined"
                )
    counts = Counter(splits.labels.values())
    for name in classes:
        if counts[name] < 10:
            warnings.append(f"class {name} has {counts[name]} patients: intervals will be wide and thresholds unstable")
    if len(sites) > 1 and (v := cramers_v([p.label for p in patients], [p.site for p in patients])) > 0.5:
        warnings.append(f"label and site are confounded (Cramér's V {v:.2f}): compare with site_only and by site")
    return {
        "method": method,
        "seed": seed,
        "repeats": len(splits.folds),
        "patients": len(patients),
        "slides": sum(len(p.slides) for p in patients),
        "classes": {c: counts[c] for c in classes},
        "sites": dict(sorted(Counter(splits.sites.values()).items())),
        "label_site_cramers_v": cramers_v([p.label for p in patients], [p.site for p in patients]),
        "leakage": {"patients_in_two_folds": 0, "scans_in_two_folds": 0},
        "table": table,
        "left_out": left_out,
        "warnings": warnings,
    }


def cramers_v(first: Sequence[str], second: Sequence[str]) -> float:
    """Cramér's V of two nominal variables, 0 (independent) to 1; 0 when either is constant."""
    a, b = np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    observed = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(observed, (a, b), 1)
    if min(observed.shape) < 2:
        return 0.0
    expected = observed.sum(1, keepdims=True) * observed.sum(0, keepdims=True) / len(a)
    chi2 = ((observed - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi2 / (len(a) * (min(observed.shape) - 1))))


def permuted_control(splits: Splits, seed: int) -> Splits:
    """The same cohort with labels that mean nothing, for the shuffled-label control.

    A free permutation of 24 labels agrees with the truth by chance often enough to be learnt, and folds stratified on
    the true labels make it come out below 0.5. So labels are permuted within each true class, in the cohort's
    proportions (no correlation with the truth), and the folds of kfold are dealt again, stratified on the permuted
    labels. Other folds (sites, train/val/test) stay and labels are permuted within each.
    """
    rng = np.random.default_rng([seed, 7919])
    first = splits.folds[min(splits.folds)]
    dealt = not splits.fold_names
    group = splits.labels if dealt else first
    labels: dict[str, str] = {}
    for name in sorted(set(group.values())):
        members = sorted(p for p in splits.labels if group[p] == name)
        pool = splits.labels.values() if dealt else [splits.labels[p] for p in members]
        labels.update(zip(members, _proportional(Counter(pool), len(members), rng), strict=True))
    folds = splits.folds
    if dealt:
        people = [Patient(p, labels[p], splits.sites[p], "", ()) for p in sorted(labels)]
        count = len(set(first.values()))
        folds = {r: deal_patients(people, count, seed + r) for r in splits.folds}
    return Splits({r: dict(f) for r, f in folds.items()}, labels, splits.sites, splits.report, splits.fold_names)


def _proportional(counts: Counter, size: int, rng: np.random.Generator) -> list[str]:
    """`size` labels in the proportions of `counts` (largest remainder), in random order."""
    names = sorted(counts)
    exact = np.array([counts[n] for n in names]) * size / sum(counts.values())
    whole = np.floor(exact).astype(int)
    order = np.lexsort((rng.random(len(names)), -(exact - whole)))
    whole[order[: size - whole.sum()]] += 1
    return rng.permutation(np.repeat(names, whole)).tolist()


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
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())
    write_json(
        report,
        {
            **splits.report,
            "fingerprint": fingerprint("splits", rows=rows),
            "files": file_sums(Path(table).parent, [Path(table).name]),
        },
    )


def read_splits(table: str | Path) -> Splits:
    """Read splits.csv (and splits.json beside it); checks for leaks again, since the file can be edited by hand."""
    table = Path(table)
    try:
        with open(table, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except FileNotFoundError as error:
        raise RunError(f"{table} is missing; run the split_cohort rule first.") from error
    missing = [c for c in _COLUMNS if rows and c not in rows[0]]
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
    named = report.get("method", "kfold") != "kfold" or any(r["fold_name"] != r["fold"] for r in rows)
    names = {r["fold"]: r["fold_name"] for r in rows if named and r["fold"].isdecimal()}
    return Splits(dict(folds), labels, sites, report, names)
