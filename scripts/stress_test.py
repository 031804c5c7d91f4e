"""Rule stress_test: fold bundles and tiles of the tested patients -> stress.json, stress.csv."""

import logging
from functools import partial
from pathlib import Path

from slidemake.core.files import read_json
from slidemake.core.tables import read_table
from slidemake.embedding.stage import make_slide_job, warm_encoder
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.registry import EncoderRecord, identity, weights_sha256
from slidemake.encoders.runtime import effective_precision
from slidemake.jobs.devices import claimed_device
from slidemake.jobs.job import job
from slidemake.jobs.memory import keep_freed_memory
from slidemake.jobs.racks import read_manifests
from slidemake.robustness.stress import judge, stress_cohort
from slidemake.robustness.stress_stage import tested_patients, write_stress
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # before torch allocates
    import torch

    torch.set_num_threads(1)
    results, trained, options = Path(sm.params.results), Path(sm.input.trained).parent, dict(sm.params.options)
    record = EncoderRecord.from_dict(dict(sm.params.encoder))
    rows = {row["slide_id"]: row for row in read_table(sm.input.slides) if row["status"] == "ok"}
    slides: dict = {}
    for found in read_manifests(sm.input.tiles, "tiles"):
        if found["slide_id"] in rows and found["status"] == "ok":
            slides.setdefault(rows[found["slide_id"]]["patient_id"], []).append(found)
    with claimed_device(sm.params.embedding["device"]) as device:
        precision = effective_precision(sm.params.embedding["precision"], record.precision, torch.device(device))
        known = identity(record, weights_sha256(resolve_weights(record)), precision)
        target = read_json(sm.input.target)
        make_job = partial(make_slide_job, results, record, known, sm.params.stain, target, "float32")
        splits, most = read_splits(sm.input.splits), options["patients"]
        patients = tested_patients(splits, slides, trained, make_job, known, most, rows)
        probabilities = stress_cohort(
            patients,
            partial(warm_encoder, record, device, precision),
            options,
            known,
            trained / "stress",
            sm.threads,
            lambda done, total: logging.getLogger("slidemake").info("stress: %d of %d patients", done, total),
        )
    result = judge(patients, probabilities, options["corruptions"], dict(sm.params.evaluation))
    about = {"model": sm.wildcards.model, "options": options}
    write_stress(result, about, sm.output.result, sm.output.table)
