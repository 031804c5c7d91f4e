"""Rule write_report: everything in the results folder -> report/index.html."""

import shlex
from pathlib import Path

from slidemake.adapter import job
from slidemake.report import write_report
from slidemake.report_pictures import encoder_facts, stain_pictures

with job(snakemake) as sm:  # noqa: F821
    results = Path(sm.params.results)
    config = dict(sm.params.config)
    configured = [f"--configfile {shlex.quote(str(path))}" for path in sm.params.configfiles]
    write_report(
        results,
        Path(sm.output.html),
        title=config["report"]["title"],
        tasks=dict(sm.params.tasks),
        manifests=[*sm.input.manifests, *sm.input.explained],
        config=config,
        encoders=encoder_facts(results, sm.params.encoders),
        stain_pictures=stain_pictures(results, Path(sm.output.html).parent, sm.params.grids[0], sm.input.target),
        max_slides=config["report"]["max_slides"],
        command=" ".join(["snakemake --cores all", *configured]),
    )
