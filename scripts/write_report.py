"""Rule write_report: everything in the results folder -> report/index.html."""

import shlex
from pathlib import Path

from slidemake.core.files import file_sums, placed, write_json
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.jobs.job import job
from slidemake.report.page import write_report
from slidemake.report.pictures import encoder_facts, stain_pictures

with job(snakemake) as sm:  # noqa: F821
    results = Path(sm.params.results)
    config = dict(sm.params.config)
    configured = [f"--configfile {shlex.quote(str(path))}" for path in sm.params.configfiles]
    html = Path(sm.output.html)
    pictures = stain_pictures(results, html.parent, sm.params.grids[0], sm.input.target) if sm.params.grids else []
    write_report(
        results,
        html,
        title=config["report"]["title"],
        tasks=dict(sm.params.tasks),
        manifests=[*sm.input.manifests, *sm.input.explained],
        config=config,
        encoders=encoder_facts(results, sm.params.encoders),
        stain_pictures=pictures,
        max_slides=config["report"]["max_slides"],
        command=" ".join(["snakemake --cores all", *configured]),
    )
    names = [html.name, *(Path(picture["path"]).relative_to(html.parent).as_posix() for picture in pictures)]
    about = {"format": "slidemake-report", "format_version": 1, "version": STAGE_VERSIONS["report"]}
    write_json(sm.output.seal, {**about, **placed(sm.output.seal), "files": file_sums(html.parent, names)})
