"""Folds for the shuffled-label control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from slidemake.splits.methods import deal_patients, draw_patients
from slidemake.splits.patients import Patient, Splits
from slidemake.tasks.labels import strata


def permuted_control(splits: Splits, seed: int, kind: str = "multiclass") -> Splits:
    """The same cohort with labels that mean nothing, for the shuffled-label control.

    A free permutation of 24 labels agrees with the truth by chance often enough to be learnt, and folds stratified on
    the true labels make it come out below 0.5. So labels are permuted within each true class, in the cohort's
    proportions (no correlation with the truth), and the folds that chance has made (kfold, monte_carlo) are made again,
    stratified on the permuted labels. Folds that mean something (sites, dates, train/val/test) stay, and labels are
    permuted within each; where they differ between repeats (a file of several splits), within each class. kind: type of
    the task; where labels are no classes, this is done with their strata, and the labels are dealt to the strata's new
    members.
    """
    rng = np.random.default_rng([seed, 7919])
    first = splits.folds[min(splits.folds)]
    method = splits.report.get("method", "given" if splits.fold_names else "kfold")
    dealt = method in ("kfold", "monte_carlo")
    same = all(of == first for of in splits.folds.values()) and set(first) == set(splits.labels)
    truth = strata(splits.labels, kind)
    group = first if same and not dealt else truth
    drawn: dict[str, str] = {}
    for name in sorted(set(group.values())):
        members = sorted(p for p in truth if group[p] == name)
        pool = [truth[p] for p in members] if group is first else truth.values()
        drawn.update(zip(members, _proportional(Counter(pool), len(members), rng), strict=True))
    labels = drawn if truth == splits.labels else _dealt_labels(splits.labels, truth, drawn, rng)
    folds = splits.folds
    if dealt:
        groups = strata(labels, kind)
        people = [Patient(p, labels[p], splits.sites[p], "", (), groups[p]) for p in sorted(labels)]
        sizes = Counter(first.values())
        if method == "kfold":
            folds = {r: deal_patients(people, len(sizes), seed + r) for r in splits.folds}
        else:
            folds = {r: draw_patients(people, sizes["0"] / len(people), seed + r) for r in splits.folds}
    return Splits({r: dict(f) for r, f in folds.items()}, labels, splits.sites, splits.report, splits.fold_names)


def _dealt_labels(
    labels: Mapping[str, str], truth: Mapping[str, str], drawn: Mapping[str, str], rng: np.random.Generator
) -> dict[str, str]:
    """The same labels dealt anew: those of a stratum to patients for whom it was drawn, but for a few where the numbers
    of a stratum's labels and of its new members differ by rounding."""
    people = sorted(labels)
    shuffled = [people[i] for i in rng.permutation(len(people))]
    again = [people[i] for i in rng.permutation(len(people))]
    givers, takers = sorted(shuffled, key=lambda p: truth[p]), sorted(again, key=lambda p: drawn[p])
    return {taker: labels[giver] for taker, giver in zip(takers, givers, strict=True)}


def _proportional(counts: Counter, size: int, rng: np.random.Generator) -> list[str]:
    """`size` labels in the proportions of `counts` (largest remainder), in random order."""
    names = sorted(counts)
    exact = np.array([counts[n] for n in names]) * size / sum(counts.values())
    whole = np.floor(exact).astype(int)
    order = np.lexsort((rng.random(len(names)), -(exact - whole)))
    whole[order[: size - whole.sum()]] += 1
    return rng.permutation(np.repeat(names, whole)).tolist()
