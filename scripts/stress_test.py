"""Rule stress_test: fold bundles and tiles of the tested patients -> stress.json, stress.csv."""

import logging
from functools import partial
from pathlib import Path

from slidemake.core.files import read_json
from slidemake.core.tables import read_table
from slidemake.embedding.stage import device_on_demand, known_encoder, make_slide_job, warm_encoder
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.robustness.stress import judge, stress_cohort
from slidemake.robustness.stress_stage import tested_patients, write_stress
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    results, trained, options = Path(sm.params.results), Path(sm.input.trained).parent, dict(sm.params.options)
    record, precision, known = known_encoder(sm.params.encoder, sm.params.place)
    rows = {row["slide_id"]: row for row in read_table(sm.input.slides) if row["status"] == "ok"}
    slides: dict = {}
    for found in read_manifests(sm.input.tiles, "tiles"):
        if found["slide_id"] in rows and found["status"] == "ok":
            slides.setdefault(rows[found["slide_id"]]["patient_id"], []).append(found)
    with device_on_demand(sm.params.embedding, sm.params.place, 1) as device:
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
