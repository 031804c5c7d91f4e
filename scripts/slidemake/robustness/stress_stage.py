"""The files around `stress`: fold bundles, tile stores and stain fits in, stress.json and stress.csv out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slidemake.core.bundle_place import check_unseen
from slidemake.core.files import file_sums, placed, write_json
from slidemake.core.spacing import thinned
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.embedding.engine import SlideJob
from slidemake.mil.bundle import Bundle, check_features, load_bundle
from slidemake.robustness.stress import Patient
from slidemake.splits.make import TRAIN, VAL, Splits

log = logging.getLogger("slidemake")


def tested_patients(
    splits: Splits,
    slides: Mapping[str, list[dict[str, Any]]],
    trained: Path,
    make_job: Callable[[dict[str, Any]], SlideJob],
    identity: Mapping[str, Any],
    most: int | None,
    rows: Mapping[str, Mapping[str, str]],
) -> list[Patient]:
    """The patients that the first repeat tests, with the models of their folds; at most `most`, evenly spaced.

    slides: {patient: records of the tiling stage}; rows: {slide_id: row of slides.csv}. RunError when encoder or stain
    are not those that a model was trained on.
    """
    repeat = min(splits.folds)
    folds = {p: f for p, f in sorted(splits.folds[repeat].items()) if f not in (TRAIN, VAL) and slides.get(p)}
    chosen = thinned(list(folds), most or len(folds))
    bundles: dict[str, Bundle] = {}
    patients = []
    for patient in chosen:
        fold = folds[patient]
        if fold not in bundles:
            bundles[fold] = load_bundle(trained / "bundles" / f"repeat{repeat}_fold{fold}", of_run=True)
            check_unseen([p for p in chosen if folds[p] == fold], bundles[fold].info, f"the model of fold {fold}")
        bundle = bundles[fold]
        jobs = tuple(make_job(record) for record in slides[patient])
        for job in jobs:
            check_features(bundle.info, identity, job.stain_info, f"slide {job.slide_id}")
        by = bundle.domain
        domains = {job.slide_id: rows[job.slide_id].get(by) or "" for job in jobs} if by else {}
        patients.append(Patient(patient, bundle.outcome.encode(splits.labels[patient]), bundle, jobs, domains))
    return patients


def write_stress(result: Mapping[str, Any], about: Mapping[str, Any], out: str | Path, table: str | Path) -> None:
    """Write stress.csv, then stress.json."""
    from slidemake.core.tables import write_table
    from slidemake.robustness.stress import COLUMNS, table_rows

    write_table(table, table_rows(result), COLUMNS)
    first = {"format": "slidemake-stress", "format_version": 1, "version": STAGE_VERSIONS["stress"]}
    first |= {**placed(out), "files": file_sums(Path(table).parent, [Path(table).name])}
    write_json(out, {**first, **about, **result})
    for line in result["conclusion"]:
        log.log(logging.INFO if line["level"] == "ok" else logging.WARNING, "stress: %s", line["text"])
