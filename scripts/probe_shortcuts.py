"""Rule probe_shortcuts: packed embeddings, folds, cohort table -> what the embeddings know of site and scanner."""

import logging

from slidemake.adapter import job
from slidemake.bags import open_bags
from slidemake.cohort_table import read_table
from slidemake.provenance import write_json
from slidemake.shortcuts import probe_shortcuts, slides_of
from slidemake.splits import read_splits

with job(snakemake) as sm:  # noqa: F821
    slides = slides_of(open_bags(sm.input.bags[0]), read_splits(sm.input.splits).labels, read_table(sm.input.slides))
    result = probe_shortcuts(slides, sm.params.seed)
    for finding in result["findings"]:
        logging.getLogger("slidemake").info("%s: %s", finding["level"], finding["text"])
    write_json(sm.output.report, result)
