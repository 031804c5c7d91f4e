"""Figures by any column of the sheet: groups with enough cases, the worst of them, and the gap to the best.

The worst of several groups is always worse than the whole, by chance alone: so the gap stands beside the gap that
groups of the same sizes show when patients are dealt to them at random (within their class).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.statistics.bootstrap import percentile_interval

USUAL = ("site", "scanner", "stain")  # columns looked at where none are named
PARTS = 3  # equal parts of a column of numbers
DISTINCT = 6  # values up to which a column of numbers is taken as classes
DEALS = 500  # of patients to groups at random
_DATE = re.compile(r"(\d{4})-\d{2}(-\d{2})?")


def patient_values(slides: Iterable[Mapping[str, Any]], column: str) -> dict[str, str]:
    """{patient: value} of a column, "" where no slide has one.

    Several values are joined by +; numbers of more than 6 values are averaged and cut into three equal parts; dates
    become years.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for row in slides:
        if row.get("status", "ok") == "ok":
            found[row.get("patient_id") or row["slide_id"]].add(str(row.get(column) or "").strip())
    values = {p: sorted(texts - {""}) for p, texts in found.items()}
    stated = [text for texts in values.values() for text in texts]
    if stated and all(_DATE.match(text) for text in stated):
        return {p: "+".join(sorted({text[:4] for text in texts})) for p, texts in values.items()}
    numbers = {p: [_number(text) for text in texts] for p, texts in values.items()}
    if len(set(stated)) > DISTINCT and all(n is not None for of in numbers.values() for n in of):
        return _thirds({p: float(np.mean([n for n in of if n is not None])) for p, of in numbers.items() if of}, values)
    return {p: "+".join(texts) for p, texts in values.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _thirds(numbers: dict[str, float], everyone: Iterable[str]) -> dict[str, str]:
    cuts = np.quantile(list(numbers.values()), [i / PARTS for i in range(1, PARTS)])
    names = [f"up to {cuts[0]:.4g}", *(f"{a:.4g} to {b:.4g}" for a, b in pairwise(cuts))]
    names.append(f"above {cuts[-1]:.4g}")
    placed = {p: names[int(np.searchsorted(cuts, value, side="left"))] for p, value in numbers.items()}
    return {p: placed.get(p, "") for p in everyone}


Measure = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # weights (B, n) of the patients -> {metric: (B,)}
# name and patients (indices) of a group -> draws {metric: (B,)}, None for a group without figures, and its entry
Look = Callable[[str, np.ndarray], tuple[Mapping[str, np.ndarray] | None, dict[str, Any]]]


def by_group(
    patients: Sequence[str],
    values: Mapping[str, str],
    look: Look,
    strata: np.ndarray,
    measure: Measure,
    less_is_better: Callable[[str], bool],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Groups of the patients by their `values` of a column: their entries, or why a group has no figures, how many
    patients have no value, and the gaps between the groups with figures (see `gaps`).
    """
    members, unstated = group_members(patients, values)
    looked = {group: look(group, np.flatnonzero(inside)) for group, inside in members.items()}
    entries = {group: entry for group, (_, entry) in looked.items()}
    draws = {group: found for group, (found, _) in looked.items() if found is not None}
    large = {group: members[group] for group in draws}
    apart = gaps(large, entries, draws, strata, measure, less_is_better, options)
    return {"groups": entries, "unstated": unstated, "gaps": apart}


def gaps(
    members: Mapping[str, np.ndarray],
    scopes: Mapping[str, Mapping[str, Any]],
    draws: Mapping[str, Mapping[str, np.ndarray]],
    strata: np.ndarray,
    measure: Measure,
    less_is_better: Callable[[str], bool],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """{metric: worst, best and their gap with an interval, and the gap that chance makes} over the groups.

    members: {group: (n,) bool}; scopes and draws: the groups' figures and bootstrap draws; strata (n,) int and
    `measure` are for the gap by chance. Worst and best stay those of the figures in every draw. Fewer than two groups
    have no gap.
    """
    if len(members) < 2:
        return {}
    chance = _gaps_by_chance(members, strata, measure, options["seed"])
    found = {}
    for metric in next(iter(draws.values())):
        values = {g: scopes[g]["metrics"][metric]["value"] for g in members}
        known = {g: v for g, v in values.items() if v is not None}
        if len(known) < 2:
            continue
        ordered = sorted(known, key=lambda g: (known[g], g), reverse=less_is_better(metric))
        worst, best = ordered[0], ordered[-1]
        sign = -1 if less_is_better(metric) else 1
        low, high = percentile_interval(sign * (draws[best][metric] - draws[worst][metric]), options["level"])
        by_chance = chance[metric][np.isfinite(chance[metric])]
        gap = abs(known[best] - known[worst])
        found[metric] = {
            "worst": worst,
            "best": best,
            "worst_value": {k: scopes[worst]["metrics"][metric][k] for k in ("value", "low", "high")},
            "best_value": {k: scopes[best]["metrics"][metric][k] for k in ("value", "low", "high")},
            "gap": {"value": gap, "low": low, "high": high},
            "gap_by_chance": float(np.quantile(by_chance, 0.95)) if len(by_chance) else None,
            "p": float((np.sum(by_chance >= gap - 1e-12) + 1) / (len(by_chance) + 1)) if len(by_chance) else None,
        }
    return found


def _gaps_by_chance(
    members: Mapping[str, np.ndarray], strata: np.ndarray, measure: Measure, seed: int
) -> dict[str, np.ndarray]:
    """{metric: (DEALS,) largest minus smallest figure} when patients are dealt to the groups at random.

    Dealt are patients of the same stratum (class), so that groups keep their sizes and their prevalence.
    """
    group = np.full(len(strata), -1)
    for g, inside in enumerate(members.values()):
        group[inside] = g
    rng = np.random.default_rng(seed)
    dealt = np.repeat(group[None], DEALS, 0)
    for stratum in np.unique(strata):
        alike = np.flatnonzero((strata == stratum) & (group >= 0))
        dealt[:, alike] = rng.permuted(dealt[:, alike], axis=1)
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    for g in range(len(members)):
        with np.errstate(invalid="ignore", divide="ignore"):
            for metric, found in measure((dealt == g).astype(float)).items():
                values[metric].append(found)
    return {metric: np.ptp(np.stack(rows), axis=0) for metric, rows in values.items()}


def group_members(patients: Sequence[str], values: Mapping[str, str]) -> tuple[dict[str, np.ndarray], int]:
    """{group: (n,) bool} of the model's patients in order of the groups' names, and how many have no value."""
    of = np.array([values.get(patient, "") for patient in patients])
    names = sorted(Counter(of.tolist()).keys() - {""}, key=_natural)
    return {name: of == name for name in names}, int((of == "").sum())


def _natural(name: str) -> tuple[int, str]:
    """The parts of a column of numbers in their order."""
    return (0 if name.startswith("up to ") else 2 if name.startswith("above ") else 1, name)


def as_scopes(subgroups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"group:<column>=<group>": figures}: the subgroups of a model as scopes of its table."""
    return {
        f"group:{column}={group}": body
        for column, found in subgroups.items()
        for group, body in found["groups"].items()
    }


def groups_of(rows: list[dict[str, str]], asked: list[str] | None) -> dict[str, dict[str, str]]:
    """{column: {patient: value}} of the columns of slides.csv asked for; without a list, the usual ones that say
    something."""
    columns = list(rows[0]) if rows else []
    missing = [column for column in asked or () if column not in columns]
    if missing:
        raise RunError(
            f"evaluation.subgroups: the cohort has no column {', '.join(missing)}; it has {', '.join(columns)}"
        )
    wanted = [column for column in (USUAL if asked is None else asked) if column in columns]
    found = {column: patient_values(rows, column) for column in wanted}
    return {c: values for c, values in found.items() if asked is not None or len(set(values.values()) - {""}) > 1}
