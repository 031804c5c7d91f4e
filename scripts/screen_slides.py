"""Rule screen_slides: slide files of a rack -> slide.json each, manifest."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.cohort import SlideRow
from slidemake.racks import run_rack
from slidemake.screening import screen_slide

with job(snakemake) as sm:  # noqa: F821
    rows = {row["slide_id"]: SlideRow.for_screening(**row) for row in sm.params.rows if not row["exclude"]}
    run_rack(
        "screen",
        sm.output.manifest,
        [{"slide_id": slide_id} for slide_id in rows],
        lambda record: screen_slide(rows[record["slide_id"]], dict(sm.params.options), Path(sm.params.results)),
        rack=sm.wildcards.rack,
        threads=sm.threads,
    )
