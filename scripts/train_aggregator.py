"""Rule train_aggregator: embeddings and folds -> bundles, out-of-fold predictions, learning curves, train.json."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.bags import load_bags
from slidemake.cohort_table import read_table
from slidemake.provenance import read_json
from slidemake.splits import read_splits
from slidemake.training import train_model

with job(snakemake) as sm:  # noqa: F821
    results, splits = Path(sm.params.results), read_splits(sm.input.splits)
    rows = [row for row in read_table(sm.input.slides) if row["status"] == "ok" and row["patient_id"] in splits.labels]
    train_model(
        sm.params.task,
        sm.params.options,
        load_bags(results / "embeddings" / sm.params.encoder, [(row["slide_id"], row["patient_id"]) for row in rows]),
        splits,
        Path(sm.output.manifest).parent,
        {**sm.params.context, "stain_target": read_json(sm.input.target)},
        threads=sm.threads,
        name=sm.wildcards.model,
    )
