"""Rule screen_slides: slide files of a rack -> slide.json each, manifest."""

from functools import partial
from pathlib import Path

from slidemake.cohort.sheet import SlideRow
from slidemake.core.addresses import local_copy
from slidemake.interchange.stage import screen_or_pass
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.slides.screening import screen_slide

with job(snakemake) as sm:  # noqa: F821
    results, options = Path(sm.params.results), dict(sm.params.options)
    folder = str(sm.input.get("fetched") or "")
    fetched = {r["slide_id"]: r for r in read_manifest(f"{folder}/manifest.json", "fetch")} if folder else {}
    rows = {row["slide_id"]: dict(row) for row in sm.params.rows if not row["exclude"]}
    for slide_id in fetched:
        rows[slide_id]["path"] = local_copy(folder, slide_id, rows[slide_id]["path"])

    def screened(record):
        row = SlideRow.for_screening(**rows[record["slide_id"]])
        screen = partial(screen_slide, row, options, results, record.get("remote"))
        if not sm.params.get("features"):
            return screen()
        return screen_or_pass(row.slide_id, screen if row.path else None, results)

    run_rack(
        "screen",
        sm.output.manifest,
        [fetched.get(slide_id, {"slide_id": slide_id}) for slide_id in rows],
        screened,
        rack=sm.wildcards.rack,
        threads=sm.threads,
    )
