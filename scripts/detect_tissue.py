"""Rule detect_tissue: screened slides of a rack -> tissue mask, outlines and figures each, manifest."""

from pathlib import Path

from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.tissue.stage import process_slide

with job(snakemake) as sm:  # noqa: F821
    results, options = Path(sm.params.results), dict(sm.params.options)
    outlines = dict(sm.params.outlines)
    run_rack(
        "tissue",
        sm.output.manifest,
        read_manifest(sm.input.manifest, "screen"),
        lambda record: process_slide(record, results, options, outlines.get(record["slide_id"])),
        rack=sm.wildcards.rack,
        threads=sm.threads,
    )
