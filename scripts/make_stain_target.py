"""Rule make_stain_target: the reference that slides are brought to -> cohort/stain_target.json."""

from pathlib import Path

from slidemake.core.files import write_json
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.stain.stage import make_target

with job(snakemake) as sm:  # noqa: F821
    records = read_manifests(sm.input.manifests, "stain")
    slides = [record["slide_id"] for record in records if record["status"] == "ok"]
    target = sm.params.record or make_target(
        Path(sm.params.results),
        sm.params.target,
        sm.params.options["method"],
        slides,
        sm.params.options.get("also", ()),
    )
    write_json(sm.output.target, target)
