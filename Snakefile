"""slidemake: from slides and labels to predictions, explanations and a report.

snakemake --cores all                                  the built-in demo cohort
snakemake --cores all --configfile mine.yaml           your slides (config/config.yaml documents every key)
snakemake --cores all tiles | embeddings | cohort | train | explain | report | export | predict | write_sheet
"""

import os
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

min_version("9.27")
# `workflow.basedir` would be the folder of a workflow that takes this one as a module.
BASE = Path(workflow.current_basedir.get_path_or_uri(secret_free=False))
sys.path.insert(0, str(BASE / "scripts"))
# Jobs must import the library that lies beside this file, not one that happens to be installed from another copy.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])]
)

# A user's --configfile replaces the demo's configuration; it is not merged over it. Values of the command line alone are
# not laid over the demo's either: its tasks, labels and title are not those of a user's slides or bundle.
if not workflow.config_settings.configfiles and not config:

    configfile: str(BASE / "config" / "config.yaml")

elif not workflow.config_settings.configfiles and not {
    "sheet",
    "slides_folder",
    "bundle",
} & set(config):
    sys.exit(
        f"\nslidemake cannot start.\nThe command sets {', '.join(sorted(config))} and names no slides. Add a "
        "configuration, --configfile mine.yaml (the demo's is "
        f"{os.path.relpath(BASE)}/config/config.yaml), or a sheet, --config sheet=slides.csv.\n"
    )


# With --software-deployment-method apptainer (profiles/apptainer); rules name the environment for conda. Not otherwise,
# because Snakemake refuses an image below a folder with a space in its name, also where none is asked for.
if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:

    if " " in str(BASE):
        sys.exit(
            f"\nslidemake cannot start.\nSnakemake takes no container image from {BASE}, because of the space in its "
            "name. Move slidemake to a folder without one, or leave apptainer out.\n"
        )

    container: str(BASE / "envs" / "slidemake.sif")


include: "rules/common.smk"
include: "rules/sheet.smk"
include: "rules/demo.smk"
include: "rules/fetch.smk"
include: "rules/screen.smk"
include: "rules/tissue.smk"
include: "rules/stain.smk"
include: "rules/tiles.smk"
include: "rules/embed.smk"
include: "rules/import.smk"
include: "rules/cohort.smk"
include: "rules/mil.smk"
include: "rules/compare.smk"
include: "rules/explain.smk"
include: "rules/stress.smk"
include: "rules/predict.smk"
include: "rules/report.smk"
include: "rules/export.smk"


# Of a module Snakemake takes the rules, and leaves out what it does when a run starts and ends.
if not workflow.modifier.is_main_snakefile() and not IN_JOB and is_run(sys.argv[1:]):
    start_run([])
    atexit.register(end_run)


onstart:
    start_run(
        str(file)
        for job in workflow.dag.needrun_jobs()
        for file in [*job.output, *job.log, *filter(None, [job.benchmark])]
    )
    CURRENCY.write_plan()


onsuccess:
    end_run()
    if workflow.touch:
        CURRENCY.accept()


onerror:
    end_run()
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
            manifest(PLAN.features_stage, rack, encoder=encoder)
            for encoder in ENCODERS
            for rack in RACKS
        ],


rule train:
    input:
        [
            f"{OUTPUT}/tasks/{task}/{model}/train.json"
            for task in TASKS
            for model in PLAN.models_of(task)
        ],
        [
            f"{OUTPUT}/tasks/{task}/{model}/bundle/reference.json"
            for task in TASKS
            for model in TASKS[task]["models"]
        ],


rule explain:
    input:
        [
            manifest("explain", rack, task=task, model=model)
            for task, model in EXPLAINED.items()
            if model
            for rack in RACKS
        ],


rule report:
    input:
        rules.write_report.output.html,
