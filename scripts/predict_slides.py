"""Rule predict_slides: a bundle and the embeddings of slides never seen -> predictions per slide and per patient."""

import logging
from pathlib import Path

from slidemake.core.tables import read_table, seal_tables, write_table
from slidemake.jobs.job import job
from slidemake.mil.prediction import apply_bundle_to_stores, prediction_columns

with job(snakemake) as sm:  # noqa: F821
    rows = [row for row in read_table(sm.input.slides) if row["status"] == "ok"]
    embeddings = Path(sm.params.results) / "embeddings" / sm.params.encoder
    slides, patients, without, outcome = apply_bundle_to_stores(sm.params.bundle, embeddings, rows)
    if without:
        logging.getLogger("slidemake").warning("no tiles, so no prediction, for patients %s", ", ".join(without))
    write_table(sm.output.slides, slides, prediction_columns(outcome, "slide"))
    write_table(sm.output.patients, patients, prediction_columns(outcome, "patient"))
    seal_tables(sm.output.seal, [sm.output.slides, sm.output.patients])
