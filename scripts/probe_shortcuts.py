"""Rule probe_shortcuts: packed embeddings, folds, cohort table -> what the embeddings know of site and scanner."""

import logging
from pathlib import Path

from slidemake.core.files import placed, write_json
from slidemake.core.tables import read_table
from slidemake.embedding.background import background_vectors
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.mil.bags import open_bags
from slidemake.robustness.background_control import background_control
from slidemake.robustness.shortcuts import probe_shortcuts, slides_of
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    labels, rows = read_splits(sm.input.splits).labels, read_table(sm.input.slides)
    result = probe_shortcuts(slides_of(open_bags(sm.input.bags[0]), labels, rows), sm.params.seed)
    if sm.input.background:
        records = read_manifests(sm.input.background, "background")
        vectors = background_vectors(Path(sm.params.results), sm.wildcards.encoder, records)
        result["background"] = background_control(vectors, labels, rows, sm.params.seed)
        result["findings"].append(result["background"]["finding"])
    for finding in result["findings"]:
        logging.getLogger("slidemake").info("%s: %s", finding["level"], finding["text"])
    write_json(sm.output.report, {**result, **placed(sm.output.report)})
