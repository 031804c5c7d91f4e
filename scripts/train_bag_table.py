"""Rule train_bag_table: a table of bags -> accuracies and out-of-fold scores of repeated cross-validation."""

from slidemake.jobs.job import job
from slidemake.training.paper_tables import train_bag_table

with job(snakemake) as sm:  # noqa: F821
    train_bag_table(sm.input.table, sm.params.options, sm.params.runs, sm.params.folds, sm.output.result)
