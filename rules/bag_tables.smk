"""Bags given as tables instead of slides: a workflow of its own, for the figures of papers on classic MIL data sets.

snakemake -s rules/bag_tables.smk --cores 2 --configfile config/cohorts/abmil_classic.yaml --config tables_folder=DIR
"""

import os
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")
ROOT = Path(workflow.basedir).parent
sys.path.insert(0, str(ROOT / "scripts"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])]
)

from slidemake.training.paper_tables import load_recipe
from slidemake.core.failures import RunError
from slidemake.core.stages import STAGE_VERSIONS

try:
    RECIPE = load_recipe(config)
except RunError as error:
    sys.exit(f"\nslidemake cannot start.\n{error}\n")

OUTPUT, PAIRS = RECIPE.output, RECIPE.pairs


wildcard_constraints:
    data_set=r"[A-Za-z0-9_.-]+",
    model=r"[A-Za-z0-9_.-]+",


rule paper_table:
    """Accuracies of all data sets and models beside the published ones, with the difference."""
    default_target: True
    input:
        [f"{OUTPUT}/{data_set}/{model}.json" for data_set, model in PAIRS],
    output:
        table=f"{OUTPUT}/table.csv",
        markdown=f"{OUTPUT}/table.md",
    log:
        f"{OUTPUT}/logs/paper_table.log",
    benchmark:
        f"{OUTPUT}/benchmarks/paper_table.tsv"
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 500 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        pairs=[list(pair) for pair in PAIRS],
        published=RECIPE.published,
    message:
        "Writing ours beside theirs to {output.table}"
    script:
        "../scripts/write_paper_table.py"


rule train_bag_table:
    """Repeated cross-validation of one aggregator on one table."""
    input:
        table=lambda wildcards: RECIPE.tables[wildcards.data_set],
    output:
        result=f"{OUTPUT}/{{data_set}}/{{model}}.json",
    log:
        f"{OUTPUT}/logs/train_bag_table/{{data_set}}/{{model}}.log",
    benchmark:
        f"{OUTPUT}/benchmarks/train_bag_table/{{data_set}}/{{model}}.tsv"
    conda:
        "../envs/slidemake.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 1500 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,
    params:
        options=lambda wildcards: RECIPE.models[wildcards.model],
        runs=RECIPE.runs,
        folds=RECIPE.folds,
        version=STAGE_VERSIONS["train"],
    message:
        "Training {wildcards.model} on {wildcards.data_set}"
    script:
        "../scripts/train_bag_table.py"
