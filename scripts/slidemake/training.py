"""Training a model on every fold of every repeat: bundles, out-of-fold predictions, learning curves.

In each fold the tested patients are set aside. The other patients are dealt to 1 / validation inner folds, and as many
members are trained, each early-stopped on the inner fold that it did not see. The members together are the fold's model
(mean of outputs). Every training patient is thereby predicted once by a member that was not fitted to it, and what
turns outputs into predictions (temperature, baseline hazard) and the threshold come from these pooled predictions: with
24 patients a single validation set would be four or five, on which a threshold is noise. Two biases remain, both small:
the epoch was chosen on the same patients, and one member's logits are a little noisier than the ensemble's, so the
temperature is, if anything, too cautious. The tested fold is used for nothing but its predictions. Where the split
names val patients, members differ by seed only and use those.
"""

from __future__ import annotations

import logging
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidemake.aggregators import AGGREGATORS, model_parameters, predict_bag
from slidemake.bags import Bags
from slidemake.baselines import (
    as_aggregator,
    as_mean_pool,
    fit_mean_pool_lr,
    predict_site,
    site_prevalence,
    site_threshold,
)
from slidemake.baselines_linear import fit_linear
from slidemake.baselines_site import fit_site
from slidemake.bundle import Bundle, Group, is_complete, load_bundle, save_bundle
from slidemake.failures import RunError
from slidemake.fitting import DEFAULTS, fit_member
from slidemake.invariance import (
    active,
    domain_names,
    domain_numbers,
    options_of,
    warn_where_label_and_domain_coincide,
)
from slidemake.objectives import make_objective
from slidemake.outcomes import SCORES, ClassOutcome, Outcome, RegressionOutcome, Threshold, make_outcome, number
from slidemake.outcomes_survival import CoxOutcome, SurvivalOutcome
from slidemake.prediction import predict_bags, prediction_columns, prediction_row, write_predictions
from slidemake.provenance import file_sums, fingerprint, versions, write_json
from slidemake.splits import Patient, Splits, check_leakage, deal_patients, permuted_control, split_rows
from slidemake.targets import CLASSES, strata, task_type

log = logging.getLogger("slidemake")

CURVE_COLUMNS = ("repeat", "fold", "epoch", "train_loss", "val_loss")  # and the validation score
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


def train_model(
    task: Mapping[str, Any],
    options: Mapping[str, Any],
    bags: Bags,
    splits: Splits,
    out_dir: str | Path,
    context: Mapping[str, Any] | None = None,
    threads: int = 1,
    name: str = "",
) -> dict[str, Any]:
    """Train a model on every fold and write predictions, curves, bundles and, last, train.json (returned).

    task     {"label", "type"?, "positive"?, ...}; labels themselves are the splits'
    options  `fitting.DEFAULTS` overridden; "control": mean_pool_lr, site_only or shuffled_label makes it that control
    context  what a bundle must carry besides (grid, stain with its target, tissue, tiling options)
    threads  folds trained at once; the result does not depend on it

    A fold whose bundle carries the same fingerprint is not trained again. RunError for a training side that nothing can
    be learned from (one class, no event), a patient in two folds, features that cannot be trained on.
    """
    started = time.monotonic()
    work = _prepare(task, options, bags, splits, Path(out_dir), context, name)
    folds = [_fold(work, r, f) for r in sorted(work.splits.folds) for f in work.splits.tested(r)]
    log.info(
        "training %s: %d folds, %d patients, %d tiles",
        work.name,
        len(folds),
        len(bags.where),
        sum(map(bags.tiles, bags.where)),
    )
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(lambda item: _run_fold(work, item[1], item[0], len(folds)), enumerate(folds, 1)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
    return _write_results(work, folds, results, dict(task), started)


def _prepare(
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
    if kind == "aggregator" and settings["aggregator"] == "mean_pool_lr":
        kind = "mean_pool_lr"
    elif kind == "aggregator" and settings["aggregator"] not in AGGREGATORS:
        known = ", ".join([*AGGREGATORS, "mean_pool_lr"])
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


def _fold(work: Work, repeat: int, fold: str) -> Fold:
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
            p: [work.splits.labels[p], work.splits.sites[p] if work.kind == "site_only" else "", _slides(work, p)]
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


def _slides(work: Work, patient: str) -> list[list[Any]]:
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
) -> Plan:
    """(training, validation) patients of every member of a fold.

    With given val patients every member trains on all of `train`. Otherwise `train` is dealt, stratified, to
    1 / validation inner folds, and to fewer when the rarest class has fewer patients; when it has one only, nothing can
    be held out and a single member without validation is planned. labels: class or stratum of every patient; strata
    that need not be in every inner fold (every_stratum=False) do not limit the number of inner folds.
    """
    members = max(2, round(1 / validation))
    if val:
        return [(list(train), list(val))] * members
    rarest = min(Counter(labels[p] for p in train).values()) if every_stratum else len(train) // 2
    if rarest < 2:
        return [(list(train), [])]
    people = [Patient(p, str(labels[p]), "", "", ()) for p in train]
    inner = deal_patients(people, min(members, rarest), seed)
    return [
        ([p for p in sorted(train) if inner[p] != f], [p for p in sorted(train) if inner[p] == f])
        for f in sorted(set(inner.values()), key=int)
    ]


def fold_seed(seed: int, repeat: int, fold: str, member: int = 0) -> int:
    """An independent 32-bit seed for every member of every fold."""
    return int(np.random.SeedSequence([seed, repeat, zlib.crc32(fold.encode()), member]).generate_state(1)[0])


def _run_fold(work: Work, fold: Fold, place: int, total: int) -> dict[str, Any]:
    """Train a fold, or find it trained; returns its rows and figures."""
    started = time.monotonic()
    if work.kind == "site_only":
        return _run_site_only(work, fold)
    folder = work.out / "bundles" / fold.name
    reused = is_complete(folder, fold.fingerprint)
    if not reused:
        _train_fold(work, fold, folder)
    bundle = load_bundle(folder, work.settings["device"])
    slides, patients, without = predict_bags(
        bundle,
        work.bags,
        fold.test,
        site=work.splits.sites,
        label=work.splits.labels,
        repeat=fold.repeat,
        fold=fold.fold,
    )
    info = bundle.info
    link = {key: info["groups"][0][key] for key in ("temperature", "slope") if key in info["groups"][0]}
    figures = {**link, "threshold": info["threshold"], **info["training"]["figures"]}
    score = figures[f"val_{work.outcome.score}"]
    text = "" if score is None else f", validation {SCORES[work.outcome.score]} {score:.2f}"
    how = "already trained" if reused else f"{time.monotonic() - started:.1f} s"
    log.info("%s %d/%d repeat %d fold %s: %s%s", work.name, place, total, fold.repeat, fold.fold, how, text)
    return {
        "slides": slides,
        "patients": patients,
        "without": without,
        "bundle": bundle,
        "reused": reused,
        "figures": figures,
    }


def _train_fold(work: Work, fold: Fold, folder: Path) -> None:
    seed = fold_seed(work.settings["seed"], fold.repeat, fold.fold)
    outcome, labels, scale = work.outcome, work.labels, work.scale(fold)
    groups = strata(work.splits.labels, outcome.kind)
    plan = member_plan(fold.train, fold.val, groups, work.settings["validation"], seed, type(outcome) is ClassOutcome)
    curves: list[list[dict[str, Any]]] = []
    figures: dict[str, Any] = {}
    if work.kind == "mean_pool_lr":
        members, val_outputs, figures["c"] = _fit_mean_pool(work, fold, plan, scale)
    else:
        members, val_outputs, curves, found = _train_members(work, fold, plan, scale)
        figures |= found
    patients = sorted(val_outputs)
    truth = [labels[p] for p in patients]
    outputs = np.array([val_outputs[p] for p in patients]).reshape(len(patients), outcome.outputs)
    link = outcome.link(outputs, truth, scale)
    values = outcome.predict(outputs, link)
    figures[f"val_{outcome.score}"] = outcome.score_of(outputs, truth)
    training = {
        "repeat": fold.repeat,
        "fold": fold.fold,
        "train": fold.train,
        "val": fold.val,
        "members": [{"train": a, "val": b} for a, b in plan],
        "curves": curves,
        "figures": figures,
        "selected_by": "lowest validation loss" if curves else "lowest pooled validation log-loss",
        _validation_key(outcome): {p: [float(number(v)) for v in row] for p, row in zip(patients, values, strict=True)},
    }
    threshold = outcome.threshold(values, truth)
    info = {**_about(work), "fingerprint": fold.fingerprint, "threshold": threshold, "training": training}
    save_bundle(folder, info, [Group(fold.name, link, tuple(members))])


def _validation_key(outcome: Outcome) -> str:
    return "validation_probability" if outcome.classes else "validation_values"


def _fit_mean_pool(
    work: Work, fold: Fold, plan: Plan, scale: Mapping[str, Any]
) -> tuple[list[Any], dict[str, np.ndarray], float]:
    """The linear model on mean-pooled features: (one member, outputs of validation patients, C)."""
    if type(work.outcome) is ClassOutcome:
        classes = work.outcome.outputs
        regression = fit_mean_pool_lr(work.bags, work.labels, fold.train, plan, classes)
        return [as_aggregator(regression, classes)], regression.val_logits, regression.c
    fitted = fit_linear(work.bags, work.outcome, work.labels, fold.train, plan, scale)
    return [as_mean_pool(fitted.scaler, fitted.weight, fitted.bias)], fitted.val_outputs, fitted.c


def _train_members(
    work: Work, fold: Fold, plan: Plan, scale: Mapping[str, Any]
) -> tuple[list[Any], dict[str, np.ndarray], list[Any], dict[str, Any]]:
    members, curves, epochs, guards = [], [], [], []
    outputs: dict[str, list[np.ndarray]] = {}
    for i, (train, val) in enumerate(plan):
        seed = fold_seed(work.settings["seed"], fold.repeat, fold.fold, i + 1)
        objective = make_objective(work.outcome, work.labels, train, scale, work.settings)
        fitted = fit_member(work.bags, objective, train, val, work.settings, seed)
        for patient in val:
            domains = work.domain_of[slice(*work.bags.where[patient])].tolist()
            outputs.setdefault(patient, []).append(
                predict_bag(fitted.model, work.bags.bag(patient), work.bags.sizes(patient), domains)[0]
            )
            work.bags.forget()
        members.append(fitted.model)
        curves.append(fitted.curve)
        epochs.append(fitted.epoch)
        if fitted.invariance is not None:
            guards.append(fitted.invariance)
    found: dict[str, Any] = {"epochs": epochs, **({"invariance": guards} if guards else {})}
    return members, {p: np.mean(rows, axis=0) for p, rows in outputs.items()}, curves, found


def _about(work: Work) -> dict[str, Any]:
    """The part of bundle.json that all bundles of a model share."""
    aggregator = "mean_pool" if work.kind == "mean_pool_lr" else work.settings["aggregator"]
    parameters = model_parameters(aggregator, {} if work.kind == "mean_pool_lr" else work.settings)
    harmonised = None
    if work.kind == "aggregator" and options_of(work.settings)["combat"]:
        names = domain_names(work.bags)
        parameters["domains"] = len(names)
        harmonised = {"column": options_of(work.settings)["domain"], "names": names}
    return {
        **work.context,
        "model": work.name,
        "target": work.outcome.about(),
        "classes": list(work.outcome.classes),
        "positive": work.outcome.classes[-1] if work.outcome.kind == "binary" else None,
        "encoder": work.bags.encoder,
        "stain": {**work.context.get("stain", {}), "method": work.bags.stain["method"]},
        "stain_of_features": work.bags.stain,
        "grid": work.bags.grid or work.context.get("grid", ""),
        "mpp": work.bags.mpp,
        "aggregator": {"name": aggregator, "parameters": parameters, "features": work.bags.dim},
        "settings": work.settings,
        "harmonised": harmonised,
        "cohort_fingerprint": cohort_fingerprint(work),
        "versions": versions(),
    }


def cohort_fingerprint(work: Work) -> str:
    """Identity of the training cohort: patients, labels, and every slide with its embeddings' fingerprint."""
    people = {p: [work.splits.labels[p], _slides(work, p)] for p in sorted(work.splits.labels)}
    return fingerprint("train", cohort=people)


def _run_site_only(work: Work, fold: Fold) -> dict[str, Any]:
    of_site, threshold = _site_model(work, fold)
    slides, patients, without = [], [], []
    for patient in fold.test:
        if work.bags.tiles(patient) == 0:  # tested on the same patients as every other model
            without.append(patient)
            continue
        site = work.splits.sites[patient]
        outputs, values = of_site(site)
        about: dict[str, Any] = {
            "patient_id": patient,
            "site": site,
            "label": work.splits.labels[patient],
            "repeat": fold.repeat,
            "fold": fold.fold,
        }
        row = (work.outcome, outputs, values, threshold)
        patients.append(prediction_row(*row, work.bags.tiles(patient), **about))
        slides += [prediction_row(*row, n, slide_id=slide, **about) for slide, _, n in _slides(work, patient) if n]
    link = {"temperature": 1.0} if type(work.outcome) is ClassOutcome else {}
    figures = {**link, "threshold": threshold, f"val_{work.outcome.score}": None}
    return {
        "slides": slides,
        "patients": patients,
        "without": without,
        "bundle": None,
        "reused": False,
        "figures": figures,
    }


def _site_model(work: Work, fold: Fold) -> tuple[Callable[[str], tuple[Any, np.ndarray]], Threshold]:
    """site -> (outputs, values), and the threshold. Only classes have outputs: the log of the prevalence."""
    if type(work.outcome) is not ClassOutcome:
        values, threshold = fit_site(work.outcome, work.labels, work.splits.sites, fold.train)
        return lambda site: ([None] * work.outcome.outputs, values(site)), threshold
    table, overall = site_prevalence(work.labels, work.splits.sites, fold.train, work.outcome.outputs)

    def of_site(site: str) -> tuple[np.ndarray, np.ndarray]:
        prob = predict_site(table, overall, site)
        return np.log(np.maximum(prob, 1e-12)), prob

    return of_site, site_threshold(overall)


def _write_results(
    work: Work, folds: list[Fold], results: list[dict[str, Any]], task: dict[str, Any], started: float
) -> dict[str, Any]:
    for level in ("slide", "patient"):
        rows = [row for result in results for row in result[f"{level}s"]]
        rows.sort(key=lambda row: (row["repeat"], row["patient_id"], row.get("slide_id", "")))
        write_predictions(work.out / f"predictions_{level}s.csv", rows, prediction_columns(work.outcome, level))
    bundles = [result["bundle"] for result in results]
    curve_columns = (*CURVE_COLUMNS, f"val_{work.outcome.score}")
    write_predictions(work.out / "curves.csv", _curve_rows(folds, bundles, curve_columns), curve_columns)
    kept = {fold.name for fold in folds} if work.kind != "site_only" else set()
    for old in sorted((work.out / "bundles").glob("repeat*_fold*")):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)  # of splits that are no longer
    mark = fingerprint("train", folds=[fold.fingerprint for fold in folds], tested=[fold.test for fold in folds])
    if work.kind != "site_only":
        _save_ensemble(work, bundles, mark)
    without = sorted({p for result in results for p in result["without"]})
    record = {
        "format": "slidemake-training",
        "fingerprint": mark,
        "task": task,
        "model": work.name,
        "kind": work.kind,
        "classes": list(work.outcome.classes),
        "settings": work.settings,
        "folds": [
            {
                "repeat": fold.repeat,
                "fold": fold.fold,
                "fold_name": work.splits.fold_names.get(fold.fold, fold.fold),
                "patients": {"train": len(fold.train), "val": len(fold.val), "test": len(fold.test)},
                "fingerprint": fold.fingerprint,
                "reused": result["reused"],
                **result["figures"],
            }
            for fold, result in zip(folds, results, strict=True)
        ],
        "without_prediction": [{"patient_id": p, "reason": "no tiles"} for p in without],
        "cohort_fingerprint": cohort_fingerprint(work),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "files": file_sums(work.out, ("predictions_slides.csv", "predictions_patients.csv", "curves.csv")),
    }
    write_json(work.out / "train.json", record)
    log.info("%s: done in %.1f s", work.name, record["seconds"])
    return record


def _curve_rows(folds: list[Fold], bundles: Sequence[Bundle | None], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Mean over the members that reached an epoch; each member's own curve is in its bundle.json."""
    rows = []
    for fold, bundle in zip(folds, bundles, strict=True):
        curves = bundle.info["training"]["curves"] if bundle else []
        for epoch in range(max(map(len, curves), default=0)):
            at = [curve[epoch] for curve in curves if epoch < len(curve)]
            row: dict[str, Any] = {"repeat": fold.repeat, "fold": fold.fold, "epoch": epoch + 1}
            for key in columns[3:]:
                known = [point[key] for point in at if point[key] is not None]
                row[key] = number(float(np.mean(known)) if known else None)
            rows.append(row)
    return rows


def _save_ensemble(work: Work, bundles: Sequence[Bundle], mark: str) -> None:
    """bundle/: all members of all folds. Its threshold comes from the pooled inner-validation predictions of all folds
    (never from tested patients); every group keeps the link of its fold."""
    if is_complete(work.out / "bundle", mark):
        return
    key = _validation_key(work.outcome)
    pooled = [(p, row) for b in bundles for p, row in sorted(b.info["training"][key].items())]
    values = np.array([row for _, row in pooled]) if pooled else np.empty((0, work.outcome.outputs + 1))
    threshold = work.outcome.threshold(values, [work.labels[p] for p, _ in pooled])
    training: dict[str, Any] = {
        "folds": [group.name for b in bundles for group in b.groups],
        "patients": sorted({p for b in bundles for p in b.info["training"]["train"]}),
        "threshold_from": "pooled inner-validation predictions of all folds",
        "temperature_from": "inner validation of each fold, kept by group",
    }
    if isinstance(work.outcome, (ClassOutcome, RegressionOutcome)):
        # What conformal sets and intervals at another site are calibrated with: every patient once, as the mean of the
        # members that were not fitted to it, for the bundle predicts the mean of all. Counted once for every fold, a
        # cohort would pass for many times its size.
        of_patient: dict[str, list[Any]] = {}
        for patient, row in pooled:
            of_patient.setdefault(patient, []).append(row)
        people = sorted(of_patient)
        means = [np.mean(of_patient[p], axis=0).tolist() for p in people]
        training["validation"] = {"labels": [work.labels[p] for p in people], "values": means}
    info = {**_about(work), "fingerprint": mark, "threshold": threshold, "training": training}
    save_bundle(work.out / "bundle", info, [group for b in bundles for group in b.groups])
