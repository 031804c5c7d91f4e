"""Ways to choose who is tested: stratified folds, random draws, given folds, sites, dates, an external cohort.

Each takes patients and returns {patient: fold}; the names train and val are never tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.words import some
from slidemake.splits.patients import TRAIN, VAL, Patient


def deal_patients(patients: Sequence[Patient], folds: int, seed: int) -> dict[str, str]:
    """Stratified k folds: patient -> "0".."k-1".

    Per stratum (the class, unless a task gives others) the patients are shuffled, ordered by site (stable, so random
    within a site) and dealt one by one like cards, and the next stratum goes on with the next fold: strata, sites
    within strata, and sizes all stay within one.
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
    for stratum in sorted({p.stratum for p in patients}):
        members = [p for p in patients if p.stratum == stratum]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        site_rank = {s: i for i, s in enumerate(rng.permutation(sorted({p.site for p in members})).tolist())}
        for patient in sorted(shuffled, key=lambda p: site_rank[p.site]):
            assigned[patient.patient_id] = str(order[len(assigned) % folds])
    return assigned


def given_folds(patients: Sequence[Patient]) -> dict[str, str]:
    empty = [p.patient_id for p in patients if not p.split]
    if empty:
        raise RunError(
            f"splits.method is given, but the split column is empty for {some(empty)}. Fill it with fold names, or "
            "with train, val and test; or exclude those slides."
        )
    torn = [f"{p.patient_id} ({p.split.replace('+', ', ')})" for p in patients if "+" in p.split]
    if torn:
        raise RunError(
            f"These patients are in more than one fold of the split column: {some(torn)}. A patient has one."
        )
    if not {p.split for p in patients} - {TRAIN, VAL}:
        raise RunError("The split column has train and val only; name the patients to be tested test (or a fold name).")
    return {p.patient_id: p.split for p in patients}


def one_fold_per_site(patients: Sequence[Patient]) -> dict[str, str]:
    empty = [p.patient_id for p in patients if not p.site]
    if empty:
        raise RunError(f"Leave-one-site-out needs the site of every patient; it is empty for {some(empty)}.")
    torn = [f"{p.patient_id} ({p.site.replace('+', ', ')})" for p in patients if "+" in p.site]
    if torn:
        raise RunError(f"Leave-one-site-out needs one site per patient; these have several: {some(torn)}.")
    if len({p.site for p in patients}) < 2:
        raise RunError(f"Leave-one-site-out needs two sites; all patients are from {patients[0].site!r}.")
    return {p.patient_id: p.site for p in patients}


def draw_patients(patients: Sequence[Patient], test_fraction: float, seed: int) -> dict[str, str]:
    """One draw of Monte-Carlo cross-validation: `test_fraction` of every stratum is tested, the rest is trained on.

    Within a stratum sites are spread as in `deal_patients`. A stratum of two or more keeps at least one patient on each
    side; one of a single patient is trained on.
    """
    rng = np.random.default_rng(seed)
    assigned = {p.patient_id: TRAIN for p in patients}
    for stratum in sorted({p.stratum for p in patients}):
        members = sorted((p for p in patients if p.stratum == stratum), key=lambda p: p.patient_id)
        if len(members) < 2:
            continue
        count = min(len(members) - 1, max(1, round(test_fraction * len(members))))
        shuffled = [members[i] for i in rng.permutation(len(members))]
        site_rank = {s: i for i, s in enumerate(rng.permutation(sorted({p.site for p in members})).tolist())}
        ordered = sorted(shuffled, key=lambda p: site_rank[p.site])
        # every (n / count)-th of the ordered patients, from a random start: each site gives its share
        steps = (np.arange(count) + rng.random()) * len(members) / count
        assigned |= {ordered[int(i)].patient_id: "0" for i in steps}
    return assigned


def patient_dates(rows: Iterable[Mapping[str, Any]], column: str) -> dict[str, date]:
    """Earliest date of every patient's slides: when the case entered the cohort. RunError for what is no date."""
    found: dict[str, date] = {}
    for row in rows:
        text = str(row.get(column) or "").strip()
        if not text:
            continue
        try:
            when = date.fromisoformat(text[:10])
        except ValueError as error:
            raise RunError(
                f"Slide {row['slide_id']}: {column} is {text!r}; splits of method temporal need dates as 2024-05-31."
            ) from error
        patient = row.get("patient_id") or row["slide_id"]
        found[patient] = min(when, found.get(patient, when))
    return found


def split_by_date(
    patients: Sequence[Patient],
    dates: Mapping[str, date],
    cutoff: str | None,
    test_fraction: float,
    gap_days: int,
) -> tuple[dict[str, str], str, list[dict[str, str]]]:
    """Train on the past, test on what came later: ({patient: fold}, the cut-off, patients left out and why).

    Tested are patients whose first slide is of the cut-off or later; without one, the cut-off is the date from which on
    about `test_fraction` of the patients came. Those of the `gap_days` before it are left out: so that follow-up and
    reporting of the last training cases do not reach into the test period. Patients of one day stay together.
    """
    undated = sorted(p.patient_id for p in patients if p.patient_id not in dates)
    if undated:
        raise RunError(f"Temporal splits need the date of every patient; it is empty for {some(undated)}.")
    days = sorted(dates[p.patient_id] for p in patients)
    if days[0] == days[-1]:
        raise RunError(f"Temporal splits need two dates at least; all patients are of {days[0]}.")
    if cutoff:
        try:
            first = date.fromisoformat(cutoff)
        except ValueError as error:
            raise RunError(f"splits.cutoff is {cutoff!r}; write a date as 2024-05-31.") from error
    else:
        first = days[min(len(days) - 1, max(1, round((1 - test_fraction) * len(days))))]
        first = next(day for day in days if day > days[0]) if first == days[0] else first
    assigned, left_out = {}, []
    for patient in patients:
        when = dates[patient.patient_id]
        if when >= first:
            assigned[patient.patient_id] = f"from {first}"
        elif when >= first - timedelta(days=gap_days):
            reason = f"first slide of {when}, within {gap_days} days of the cut-off {first}"
            left_out.append({"patient_id": patient.patient_id, "reason": reason})
        else:
            assigned[patient.patient_id] = TRAIN
    sides = set(assigned.values())
    if len(sides) < 2:
        lacks = "tested on" if TRAIN in sides else "trained on"
        raise RunError(
            f"With the cut-off {first} no patient is {lacks}: the patients' first slides are of {days[0]} to "
            f"{days[-1]}. Set splits.cutoff or splits.gap_days."
        )
    return assigned, str(first), left_out


def external_cohort(patients: Sequence[Patient], column: str, tested: Sequence[str]) -> dict[str, str]:
    """The patients whose `column` is one of `tested` are one test fold that nothing is ever fitted on."""
    torn = [f"{p.patient_id} ({p.split.replace('+', ', ')})" for p in patients if "+" in p.split]
    if torn:
        raise RunError(
            f"These patients have several values of column {column}: {some(torn)}. A patient has one cohort."
        )
    values = {p.split for p in patients}
    unknown = sorted(set(tested) - values)
    if not tested or unknown:
        wrong = f"no patient has {', '.join(unknown)}" if unknown else "splits.test is empty"
        raise RunError(
            f"splits.test names the external cohort by values of column {column}, and {wrong}; there are "
            f"{', '.join(sorted(v or '(empty)' for v in values))}."
        )
    return {p.patient_id: " and ".join(tested) if p.split in tested else TRAIN for p in patients}


def split_column(splits: Mapping[str, Any]) -> str | None:
    """The column of the sheet that a split method reads, with a value for every patient; None when there is none."""
    return {
        "given": splits.get("column", "split"),
        "external": splits.get("column", "split"),
        "temporal": splits.get("date_column", "scan_date"),
        "leave_one_site_out": "site",
        "site_preserved": "site",
    }.get(splits.get("method", "kfold"))
