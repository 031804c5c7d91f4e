"""Rule check_leakage: folds and packed embeddings -> a report; slides that look identical across folds stop the run."""

import logging

from slidemake.core.files import placed, write_json
from slidemake.jobs.job import job
from slidemake.mil.bags import open_bags
from slidemake.robustness.near_duplicates import near_duplicates, stop_at_copies, warnings_of
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    found = near_duplicates(open_bags(sm.input.bags[0]), read_splits(sm.input.splits), sm.params.threshold)
    stop_at_copies(found)
    for warning in warnings_of(found):
        logging.getLogger("slidemake").warning("%s", warning)
    write_json(sm.output.report, {**found, **placed(sm.output.report)})
