"""slidemake: from slides and labels to predictions, explanations and a report.

snakemake --cores all                                  the built-in demo cohort
snakemake --cores all --configfile mine.yaml           your slides (config/config.yaml documents every key)
snakemake --cores all embeddings | predict | write_sheet ...
"""

import os
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")
sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))
# Jobs must import the library that lies beside this file, not one that happens to be installed from another copy.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A user's --configfile replaces the demo's configuration; it is not merged over it.
if not workflow.config_settings.configfiles:

    configfile: str(Path(workflow.basedir) / "config" / "config.yaml")


# With --software-deployment-method apptainer (profiles/apptainer); rules name the environment for conda.
container: str(Path(workflow.basedir) / "envs" / "slidemake.sif")


include: "rules/common.smk"
include: "rules/sheet.smk"
include: "rules/demo.smk"
include: "rules/fetch.smk"
include: "rules/screen.smk"
include: "rules/tissue.smk"
include: "rules/stain.smk"
include: "rules/tiles.smk"
include: "rules/embed.smk"
include: "rules/cohort.smk"
include: "rules/mil.smk"
include: "rules/compare.smk"
include: "rules/explain.smk"
include: "rules/stress.smk"
include: "rules/predict.smk"
include: "rules/report.smk"


onstart:
    check_executor()
    try:
        check_writable(
            str(file)
            for job in workflow.dag.needrun_jobs()
            for file in [*job.output, *job.log, *filter(None, [job.benchmark])]
        )
        claim_results(Path(OUTPUT))
    except RunError as error:
        sys.exit(f"\nslidemake cannot start.\n{error}\n")
    if not ON_CLUSTER:
        stop_jobs_on_sigterm()
    mark_results_folder(
        Path(OUTPUT),
        PLAN.rack_size if RACKS else None,
        PLAN.racks_on_disk if REMOTE_RACKS else None,
    )
    WATCH.begin([rule.name for rule in workflow.rules if rule.output])
    if CORES < workflow.cores:
        print(
            f"slidemake: warning: --cores is {workflow.cores}, and this process may use {CORES} CPUs: give --cores {CORES}",
            file=sys.stderr,
        )
    if hint := rack_size_hint(PLAN, MACHINE):
        print(f"slidemake: {hint}", file=sys.stderr)
    for encoder, corpora in PLAN.contamination.items():
        print(f"slidemake: warning: {in_words(encoder, corpora)}", file=sys.stderr)


onsuccess:
    WATCH.end()
    if os.path.exists(f"{OUTPUT}/report/index.html"):
        print(
            f"slidemake: the report is {OUTPUT}/report/index.html", file=sys.stderr
        )


onerror:
    WATCH.end()
    print(
        "slidemake: not everything could be done; the lines that begin with `rule` or name a log file above say why. "
        "What is finished is kept: mend it and run the same command again.",
        file=sys.stderr,
    )


rule all:
    default_target: True
    input:
        f"{OUTPUT}/report/index.html",
        f"{OUTPUT}/predictions/patients.csv" if PLAN.bundle else [],
        [
            f"{OUTPUT}/tasks/{task}/{model}/bundle/reference.json"
            for task in TASKS
            for model in TASKS[task]["models"]
        ],


rule tiles:
    input:
        [manifest("tiles", rack, grid=grid) for grid in GRIDS for rack in RACKS],


rule embeddings:
    input:
        [
            manifest("embed", rack, encoder=encoder)
            for encoder in ENCODERS
            for rack in RACKS
        ],
