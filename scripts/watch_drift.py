"""Rule watch_drift: predicted slides and a bundle's reference -> drift.json, drift.csv."""

import logging
from pathlib import Path

from slidemake.drift.stage import watch_drift
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    found = watch_drift(
        sm.params.bundle,
        sm.input.slides,
        sm.input.patients,
        Path(sm.params.results) / "embeddings" / sm.params.encoder,
        sm.params.results,
        sm.output.drift,
        sm.output.table,
    )
    for line in found["conclusion"]:
        log = logging.getLogger("slidemake")
        log.log(logging.INFO if line["level"] == "ok" else logging.WARNING, "drift: %s", line["text"])
