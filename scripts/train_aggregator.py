"""Rule train_aggregator: packed tiles and folds -> bundles, out-of-fold predictions, learning curves, train.json."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.bags import open_bags
from slidemake.memory import keep_freed_memory
from slidemake.provenance import read_json
from slidemake.splits import read_splits
from slidemake.stain_stage import target_of
from slidemake.tables import read_table
from slidemake.training import train_model

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
