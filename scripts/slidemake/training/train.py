"""Training a model on every fold of every repeat: bundles, out-of-fold predictions, learning curves.

In each fold the tested patients are set aside. The other patients are dealt to 1 / validation inner folds, and as many
members (or `members`) are trained, each early-stopped on the inner fold that it did not see. The members together are
the fold's model (mean of outputs). Every training patient is thereby predicted once by a member that was not fitted to
it, and what turns outputs into predictions (temperature, baseline hazard) and the threshold come from these pooled
predictions: with 24 patients a single validation set would be four or five, on which a threshold is noise. Two biases
remain, both small: the epoch was chosen on the same patients, and one member's logits are a little noisier than the
ensemble's, so the temperature is, if anything, too cautious. The tested fold is used for nothing but its predictions.
Where the split names val patients, members differ by seed only and use those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from slidemake.mil.automatic import heaviest
from slidemake.mil.bags import Bags
from slidemake.mil.bundle import Group, is_complete, load_bundle, save_bundle
from slidemake.mil.prediction import predict_bags, prediction_row
from slidemake.splits.make import Splits
from slidemake.tasks.base import SCORES, Threshold, number
from slidemake.tasks.labels import strata
from slidemake.training.class_baselines import (
    as_aggregator,
    as_mean_pool,
    fit_mean_pool_lr,
    predict_site,
    site_prevalence,
    site_threshold,
)
from slidemake.training.linear_baseline import fit_linear
from slidemake.training.members import FoldModels, train_fold_models
from slidemake.training.plan import Fold, Plan, Work, fold_seed, make_fold, member_plan, prepare, slides_of
from slidemake.training.results import about_model, validation_key, write_results
from slidemake.training.site_baseline import fit_site
from slidemake.training.words import agreement

log = logging.getLogger("slidemake")


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
    options  `fitting.DEFAULTS` overridden; "control": one of `tasks.controls.TRAINED` makes it that control
    context  what a bundle must carry besides (grid, stain with its target, tissue, tiling options)
    threads  folds trained at once; the result does not depend on it

    A fold whose bundle carries the same fingerprint is not trained again. RunError for a training side that nothing can
    be learned from (one class, no event), a patient in two folds, features that cannot be trained on.
    """
    started = time.monotonic()
    work = prepare(task, options, bags, splits, Path(out_dir), context, name)
    folds = [make_fold(work, r, f) for r in sorted(work.splits.folds) for f in work.splits.tested(r)]
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
        # NumPy's sums, too, hang on how many threads share them, which is the machine's or the scheduler's to say
        with (
            threadpool_limits(1, user_api="blas"),
            ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            results = list(pool.map(lambda item: _run_fold(work, item[1], item[0], len(folds)), enumerate(folds, 1)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
    return write_results(work, folds, results, dict(task), started)


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
    link = {key: info["groups"][0][key] for key in ("temperature", "intercept", "slope") if key in info["groups"][0]}
    group = bundle.groups[0]
    scores = np.array([row["member_scores"] for row in patients])
    agree = agreement(scores[:, heaviest(group.parts)] if len(scores) else scores)
    figures = {**link, "threshold": info["threshold"], **info["training"]["figures"], "agreement": agree}
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
    plan = member_plan(
        fold.train,
        fold.val,
        strata(work.splits.labels, outcome.kind),
        work.settings["validation"],
        seed,
        every_stratum=outcome.by_class,
        members=work.settings["members"],
    )
    if work.kind == "mean_pool_lr":
        fitted, val_outputs, c = _fit_mean_pool(work, fold, plan, scale)
        found = FoldModels(fitted, (), val_outputs, [], {"c": c})
    else:
        found = train_fold_models(work, fold, plan, scale)
    val_outputs, figures = found.outputs, dict(found.figures)
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
        "curves": found.curves,
        "figures": figures,
        "selected_by": "lowest validation loss" if found.curves else "lowest pooled validation log-loss",
        validation_key(outcome): {p: [float(number(v)) for v in row] for p, row in zip(patients, values, strict=True)},
    }
    threshold = outcome.threshold(values, truth)
    info = {**about_model(work), "fingerprint": fold.fingerprint, "threshold": threshold, "training": training}
    save_bundle(folder, info, [Group(fold.name, link, tuple(found.models), found.parts)])


def _fit_mean_pool(
    work: Work, fold: Fold, plan: Plan, scale: Mapping[str, Any]
) -> tuple[list[Any], dict[str, np.ndarray], float]:
    """The linear model on mean-pooled features: (one member, outputs of validation patients, C)."""
    if work.outcome.by_class:
        classes = work.outcome.outputs
        regression = fit_mean_pool_lr(work.bags, work.labels, fold.train, plan, classes)
        return [as_aggregator(regression, classes)], regression.val_logits, regression.c
    fitted = fit_linear(work.bags, work.outcome, work.labels, fold.train, plan, scale)
    return [as_mean_pool(fitted.scaler, fitted.weight, fitted.bias)], fitted.val_outputs, fitted.c


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
        slides += [prediction_row(*row, n, slide_id=slide, **about) for slide, _, n in slides_of(work, patient) if n]
    link = {"temperature": 1.0} if work.outcome.by_class else {}
    figures = {**link, "threshold": threshold, f"val_{work.outcome.score}": None, "agreement": None}
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
    if not work.outcome.by_class:
        values, threshold = fit_site(work.outcome, work.labels, work.splits.sites, fold.train)
        return lambda site: ([None] * work.outcome.outputs, values(site)), threshold
    table, overall = site_prevalence(work.labels, work.splits.sites, fold.train, work.outcome.outputs)

    def of_site(site: str) -> tuple[np.ndarray, np.ndarray]:
        prob = predict_site(table, overall, site)
        return np.log(np.maximum(prob, 1e-12)), prob

    return of_site, site_threshold(overall)
