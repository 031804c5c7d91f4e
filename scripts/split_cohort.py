"""Rule split_cohort: cohort/slides.csv -> tasks/<task>/splits.csv, splits.json."""

import logging

from slidemake.core.tables import read_table
from slidemake.jobs.job import job
from slidemake.splits.make import make_splits, write_splits
from slidemake.splits.table import fold_table

with job(snakemake) as sm:  # noqa: F821
    rows, task = read_table(sm.input.slides), sm.params.task
    identities = {row["slide_id"]: row["identity"] for row in rows if row.get("identity")}
    splits = make_splits(rows, task, task["splits"], identities)
    logging.getLogger("slidemake").info("folds (%s):\n%s", splits.report["method"], fold_table(splits.report))
    write_splits(splits, sm.output.splits, sm.output.report)
