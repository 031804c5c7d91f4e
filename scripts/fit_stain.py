"""Rule fit_stain: slides of a rack with their tissue -> stain.json each, manifest."""

from pathlib import Path

from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.stain.stage import process_slide

with job(snakemake) as sm:  # noqa: F821
    results, options = Path(sm.params.results), dict(sm.params.options)
    run_rack(
        "stain",
        sm.output.manifest,
        read_manifest(sm.input.manifest, "tissue"),
        lambda record: process_slide(record, results, options),
        rack=sm.wildcards.rack,
        threads=sm.threads,
    )
