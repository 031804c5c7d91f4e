"""Rule fetch_slides: addresses of a rack's slides -> the slides, each in a folder of its own, with a manifest."""

import os
import shutil
from pathlib import Path

from slidemake.jobs import isolation
from slidemake.jobs.job import job
from slidemake.jobs.racks import run_rack
from slidemake.slides.remote import alone, get_slide

with job(snakemake) as sm:  # noqa: F821
    folder, options = Path(sm.output.slides), dict(sm.params.fetching)
    # Snakemake empties an output before a job and after one that failed: what has come is kept beside it
    staging = folder.with_name(f"{folder.name}+coming")
    rows = {row["slide_id"]: row for row in sm.params.rows}
    remedy = "The next run tries again: give the same command."
    with alone(folder.with_name(f"{folder.name}+lock")):
        if not (folder / "manifest.json").exists():  # otherwise a twin of this job made it, and it may be in use
            run_rack(
                "fetch",
                staging / "manifest.json",
                [{"slide_id": slide_id} for slide_id in rows],
                lambda record: get_slide(rows[record["slide_id"]], Path(sm.params.results), staging, options, remedy),
                rack=sm.wildcards.rack,
                threads=options["connections"],
            )
            if isolation.tried_alone() is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(staging, folder)
