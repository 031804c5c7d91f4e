"""What training a model consists of, resolved before anything is trained: folds, their members, fingerprints."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.files import fingerprint
from slidemake.mil.aggregators import AGGREGATORS
from slidemake.mil.automatic import AUTO_LINEAR, MIXTURES
from slidemake.mil.bags import Bags
from slidemake.mil.fitting import DEFAULTS
from slidemake.mil.invariance import (
    active,
    domain_names,
    domain_numbers,
    options_of,
    warn_where_label_and_domain_coincide,
)
from slidemake.mil.scaling import COMPONENTS, PROJECTED
from slidemake.splits.make import Patient, Splits, check_leakage, deal_patients, permuted_control, split_rows
from slidemake.tasks.base import Outcome
from slidemake.tasks.labels import CLASSES, task_type
from slidemake.tasks.registry import make_outcome
from slidemake.tasks.survival import CoxOutcome, SurvivalOutcome

Plan = list[tuple[list[str], list[str]]]


@dataclass(frozen=True)
class Work:
    """All that training a fold depends on, resolved once."""

    name: str
    kind: str  # aggregator | mean_pool_lr | site_only
    settings: dict[str, Any]
    outcome: Outcome
    bags: Bags
    splits: Splits
    context: dict[str, Any]
    out: Path

    @cached_property
    def domain_of(self) -> np.ndarray:
        """(S,) scanner or site of every slide as a number; -1 where it is not known or not asked for."""
        return domain_numbers(self.bags, domain_names(self.bags))

    @cached_property
    def labels(self) -> dict[str, Any]:
        """Encoded label of every patient."""
        return {p: self.outcome.encode(label) for p, label in self.splits.labels.items()}

    def scale(self, fold: Fold) -> dict[str, Any]:
        """What is taken from the labels of a fold's training and validation patients."""
        return self.outcome.scale([self.labels[p] for p in [*fold.train, *fold.val]])


@dataclass(frozen=True)
class Fold:
    """Patients of one fold, those without tiles left out."""

    repeat: int
    fold: str
    train: list[str]
    val: list[str]
    test: list[str]
    fingerprint: str

    @property
    def name(self) -> str:
        return f"repeat{self.repeat}_fold{self.fold}"


def resolved(settings: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Settings as `fitting` and `build_aggregator` take them: what depends on the task's type is filled in."""
    components = None
    if settings["scaling"] in PROJECTED:
        components = settings["components"] or COMPONENTS[settings["scaling"]]
    contrast = outcome.by_class and outcome.outputs == 2
    return {**settings, "components": components, "falls": not outcome.rises, "contrast": contrast}


def prepare(
    task: Mapping[str, Any],
    options: Mapping[str, Any],
    bags: Bags,
    splits: Splits,
    out: Path,
    context: Mapping[str, Any] | None,
    name: str,
) -> Work:
    settings = {**DEFAULTS, **options}
    control = settings.pop("control", None)
    outcome = make_outcome(task, splits.labels if task_type(task) in CLASSES else _trained_on(splits))
    if control == "shuffled_label":
        splits = permuted_control(splits, settings["seed"], outcome.kind)
    kind = control if control in ("mean_pool_lr", "site_only") else "aggregator"
    if control == "instance_linear":
        shared = ("validation", "members", "max_tiles", "class_weights", "seed", "device")
        settings = {**DEFAULTS, **{key: settings[key] for key in shared}, "aggregator": AUTO_LINEAR}
    if kind == "aggregator" and settings["aggregator"] == "mean_pool_lr":
        kind = "mean_pool_lr"
    elif kind == "aggregator" and settings["aggregator"] not in (*MIXTURES, *AGGREGATORS):
        known = ", ".join([*MIXTURES, *AGGREGATORS, "mean_pool_lr"])
        raise RunError(f"Unknown aggregator {settings['aggregator']!r}; one of {known}.")
    check_leakage(split_rows(splits), dict(zip(bags.slides, bags.patients, strict=True)))
    if kind == "aggregator" and active(settings):
        if outcome.classes:
            warn_where_label_and_domain_coincide(bags, splits.labels, options_of(settings)["domain"])
    else:
        bags = bags.with_domains({})  # nothing here looks at scanners
    if kind != "aggregator" and isinstance(outcome, SurvivalOutcome):
        outcome = CoxOutcome(outcome.horizons, outcome.unit)  # the linear model of survival, whatever the task's own is
    return Work(
        name or control or settings["aggregator"], kind, settings, outcome, bags, splits, dict(context or {}), out
    )


def _trained_on(splits: Splits) -> dict[str, str]:
    """Labels of the patients who are on the training side of any fold: an external cohort sets no horizons."""
    sides = [splits.parts(repeat, fold)[:2] for repeat in splits.folds for fold in splits.tested(repeat)]
    return {p: splits.labels[p] for p in sorted({p for train, val in sides for p in [*train, *val]})}


def make_fold(work: Work, repeat: int, fold: str) -> Fold:
    train, val, test = work.splits.parts(repeat, fold)
    has_tiles = [[p for p in part if work.bags.tiles(p)] for part in (train, val)]
    why = work.outcome.why_untrainable([work.splits.labels[p] for p in has_tiles[0]])
    if why:
        raise RunError(
            f"Fold {fold} of repeat {repeat}, training patients with tiles: {why}. No model can be trained. Use fewer "
            "folds, or see cohort/failures.csv for what was lost."
        )

    parts = {"domains": work.bags.domains} if work.bags.domains else {}

    def described(patients: Sequence[str]) -> dict[str, Any]:
        return {
            p: [work.splits.labels[p], work.splits.sites[p] if work.kind == "site_only" else "", slides_of(work, p)]
            for p in patients
        }

    mark = fingerprint(
        "train",
        model=work.kind,
        settings={k: v for k, v in work.settings.items() if k != "device"},
        target=work.outcome.about(),
        encoder=work.bags.encoder,
        stain=work.bags.stain,
        context=work.context,
        train=described(has_tiles[0]),
        val=described(has_tiles[1]),
        repeat=repeat,
        fold=fold,
        **parts,
    )
    return Fold(repeat, fold, has_tiles[0], has_tiles[1], test, mark)


def slides_of(work: Work, patient: str) -> list[list[Any]]:
    first, last = work.bags.where.get(patient, (0, 0))
    sizes = np.diff(work.bags.offsets[first : last + 1]).tolist()
    names = work.bags.slides[first:last]
    return [[name, work.bags.fingerprints.get(name, ""), n] for name, n in zip(names, sizes, strict=True)]


def member_plan(
    train: Sequence[str],
    val: Sequence[str],
    labels: Mapping[str, Any],
    validation: float,
    seed: int,
    every_stratum: bool = True,
    members: int | None = None,
) -> Plan:
    """(training, validation) patients of every member of a fold.

    With given val patients every member trains on all of `train`. Otherwise `train` is dealt, stratified, to
    1 / validation inner folds, and to fewer when the rarest class has fewer patients; when it has one only, nothing can
    be held out and a single member without validation is planned. labels: class or stratum of every patient; strata
    that need not be in every inner fold (every_stratum=False) do not limit the number of inner folds.

    members: at most so many, each validated on another inner fold (None: all of them); with given val patients exactly
    so many.
    """
    inner_folds = max(2, round(1 / validation))
    if val:
        return [(list(train), list(val))] * (members or inner_folds)
    rarest = min(Counter(labels[p] for p in train).values()) if every_stratum else len(train) // 2
    if rarest < 2:
        return [(list(train), [])]
    people = [Patient(p, str(labels[p]), "", "", ()) for p in train]
    inner = deal_patients(people, min(inner_folds, rarest), seed)
    return [
        ([p for p in sorted(train) if inner[p] != f], [p for p in sorted(train) if inner[p] == f])
        for f in sorted(set(inner.values()), key=int)[:members]
    ]


def fold_seed(seed: int, repeat: int, fold: str, member: int = 0) -> int:
    """An independent 32-bit seed for every member of every fold."""
    return int(np.random.SeedSequence([seed, repeat, zlib.crc32(fold.encode()), member]).generate_state(1)[0])


def cohort_fingerprint(work: Work) -> str:
    """Identity of the training cohort: patients, labels, and every slide with its embeddings' fingerprint."""
    people = {p: [work.splits.labels[p], slides_of(work, p)] for p in sorted(work.splits.labels)}
    return fingerprint("train", cohort=people)
