"""Rule compare_stain: tiles with and without normalisation through the encoder -> tasks/<task>/stain.json."""

import logging
from functools import partial
from pathlib import Path

from slidemake.core.files import read_json, write_json
from slidemake.core.tables import read_table
from slidemake.embedding.stage import device_on_demand, known_encoder, make_slide_job, warm_encoder
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.robustness.stain_comparison import cohort_vectors, compare_stain
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    log = logging.getLogger("slidemake")
    results, labels = Path(sm.params.results), read_splits(sm.input.splits).labels
    patient_of = {r["slide_id"]: r["patient_id"] for r in read_table(sm.input.slides) if r["status"] == "ok"}
    record, precision, known = known_encoder(sm.params.encoder, sm.params.place)
    with device_on_demand(sm.params.embedding, sm.params.place, 1) as device:
        make = partial(make_slide_job, results, record, known, sm.params.stain, read_json(sm.input.target), "float32")
        records = read_manifests(sm.input.tiles, "tiles")
        used = [r for r in records if r["status"] == "ok" and patient_of.get(r["slide_id"]) in labels]
        vectors = cohort_vectors(
            [make(r) for r in used],
            partial(warm_encoder, record, device, precision),
            Path(sm.output.result).parent / "stain",
            sm.threads,
            lambda done, total: log.info("stain comparison: %d of %d slides", done, total),
        )
    result = compare_stain(vectors, patient_of, labels, sm.params.seed)
    log.info("stain: %s", result["finding"]["text"])
    write_json(sm.output.result, {"method": sm.params.stain, "encoder": record.slug, **result})
