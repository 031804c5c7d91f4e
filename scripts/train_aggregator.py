"""Rule train_aggregator: packed tiles and folds -> bundles, out-of-fold predictions, learning curves, train.json."""

from pathlib import Path

from slidemake.core.files import read_json
from slidemake.core.tables import read_table
from slidemake.jobs.job import job
from slidemake.jobs.memory import keep_freed_memory
from slidemake.mil.bags import open_bags
from slidemake.splits.make import read_splits
from slidemake.stain.stage import target_of
from slidemake.training.train import train_model

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # before torch allocates: weights and gradients would be unmapped at every step
    splits = read_splits(sm.input.splits)
    column = sm.params.options["invariance"]["domain"]
    domains = {row["slide_id"]: row.get(column) or "" for row in read_table(sm.input.slides)}
    method = sm.params.context["stain"]["method"]
    train_model(
        sm.params.task,
        sm.params.options,
        open_bags(sm.input.bags[0]).of_patients(splits.labels).with_domains(domains),
        splits,
        Path(sm.output.manifest).parent,
        {**sm.params.context, "stain_target": target_of(read_json(sm.input.target), method)},
        threads=sm.threads,
        name=sm.wildcards.model,
    )
