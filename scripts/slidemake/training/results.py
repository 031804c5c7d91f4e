"""What a trained model leaves: predictions, learning curves, the bundle of all folds and, last, train.json."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slidemake.core.files import file_sums, fingerprint, placed, versions, write_json
from slidemake.core.tables import write_table
from slidemake.mil.aggregators import model_parameters
from slidemake.mil.automatic import candidates
from slidemake.mil.bundle import Bundle, is_complete, save_bundle
from slidemake.mil.invariance import domain_names, options_of
from slidemake.mil.prediction import prediction_columns
from slidemake.tasks.base import Outcome, number
from slidemake.training.plan import Fold, Work, cohort_fingerprint, resolved
from slidemake.training.words import training_findings

log = logging.getLogger("slidemake")

CURVE_COLUMNS = ("repeat", "fold", "epoch", "train_loss", "val_loss")  # and the validation score


def validation_key(outcome: Outcome) -> str:
    return "validation_probability" if outcome.classes else "validation_values"


def about_model(work: Work) -> dict[str, Any]:
    """The part of bundle.json that all bundles of a model share."""
    harmonised = None
    if work.kind == "aggregator" and options_of(work.settings)["combat"]:
        harmonised = {"column": options_of(work.settings)["domain"], "names": domain_names(work.bags)}
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
        "aggregator": _about_aggregator(work, len(harmonised["names"]) if harmonised else 0),
        "settings": work.settings,
        "harmonised": harmonised,
        "cohort_fingerprint": cohort_fingerprint(work),
        "versions": versions(),
    }


def _about_aggregator(work: Work, domains: int) -> dict[str, Any]:
    """From which `build_aggregator` makes the members again; domains: scanners or sites that are harmonised."""
    if work.kind == "mean_pool_lr":
        return {"name": "mean_pool", "parameters": {}, "features": work.bags.dim}
    kinds = {}
    for candidate, settings in candidates(work.settings, work.outcome.kind).items():
        parameters = model_parameters(settings["aggregator"], resolved(settings, work.outcome))
        kinds[candidate] = {
            "name": settings["aggregator"],
            "parameters": {**parameters, **({"domains": domains} if domains else {})},
        }
    about = kinds.get("", {"name": work.settings["aggregator"], "parameters": {}, "candidates": kinds})
    return {**about, "features": work.bags.dim}


def write_results(
    work: Work, folds: list[Fold], results: list[dict[str, Any]], task: dict[str, Any], started: float
) -> dict[str, Any]:
    for level in ("slide", "patient"):
        rows = [row for result in results for row in result[f"{level}s"]]
        rows.sort(key=lambda row: (row["repeat"], row["patient_id"], row.get("slide_id", "")))
        write_table(work.out / f"predictions_{level}s.csv", rows, prediction_columns(work.outcome, level))
    bundles = [result["bundle"] for result in results]
    curve_columns = (*CURVE_COLUMNS, f"val_{work.outcome.score}")
    write_table(work.out / "curves.csv", _curve_rows(folds, bundles, curve_columns), curve_columns)
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
        **placed(work.out / "train.json"),
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
        "findings": _findings(work, bundles, results),
        "without_prediction": [{"patient_id": p, "reason": "no tiles"} for p in without],
        "cohort_fingerprint": cohort_fingerprint(work),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "files": file_sums(work.out, ("predictions_slides.csv", "predictions_patients.csv", "curves.csv")),
    }
    write_json(work.out / "train.json", record)
    log.info("%s: done in %.1f s", work.name, record["seconds"])
    return record


def _findings(
    work: Work, bundles: Sequence[Bundle | None], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """What training says about itself, in words; logged, too."""
    curves = [bundle.info["training"]["curves"] if bundle else [] for bundle in bundles]
    settings = {**work.settings, **({"aggregator": work.kind} if work.kind != "aggregator" else {})}
    found = training_findings([result["figures"] for result in results], curves, settings)
    for finding in found:
        level = logging.WARNING if finding["level"] == "warning" else logging.INFO
        log.log(level, "%s: %s", work.name, finding["text"])
    return found


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
    key = validation_key(work.outcome)
    pooled = [(p, row) for b in bundles for p, row in sorted(b.info["training"][key].items())]
    values = np.array([row for _, row in pooled]) if pooled else np.empty((0, work.outcome.outputs + 1))
    threshold = work.outcome.threshold(values, [work.labels[p] for p, _ in pooled])
    training: dict[str, Any] = {
        "folds": [group.name for b in bundles for group in b.groups],
        "patients": sorted({p for b in bundles for p in b.info["training"]["train"]}),
        "val": sorted({p for b in bundles for p in b.info["training"]["val"]}),
        "threshold_from": "pooled inner-validation predictions of all folds",
        "temperature_from": "inner validation of each fold, kept by group",
    }
    if work.outcome.form != "curve":
        # What conformal sets and intervals at another site are calibrated with: every patient once, as the mean of the
        # members that were not fitted to it, for the bundle predicts the mean of all. Counted once for every fold, a
        # cohort would pass for many times its size.
        of_patient: dict[str, list[Any]] = {}
        for patient, row in pooled:
            of_patient.setdefault(patient, []).append(row)
        people = sorted(of_patient)
        means = [np.mean(of_patient[p], axis=0).tolist() for p in people]
        labels = [np.asarray(work.labels[p]).tolist() for p in people]
        training["validation"] = {"labels": labels, "values": means}
    info = {**about_model(work), "fingerprint": mark, "threshold": threshold, "training": training}
    save_bundle(work.out / "bundle", info, [group for b in bundles for group in b.groups])
