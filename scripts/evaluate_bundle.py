"""Rule evaluate_bundle: a bundle's predictions and the outcomes in the sheet -> metrics of the external cohort."""

import logging
from pathlib import Path

from slidemake.core.files import read_json
from slidemake.evaluation.external import evaluate_external
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    result = evaluate_external(
        Path(sm.input.patients),
        Path(sm.input.slides),
        read_json(sm.input.bundle),
        sm.params.label,
        dict(sm.params.options),
        metrics=Path(sm.output.metrics),
        table=Path(sm.output.table),
        curves=Path(sm.output.curves),
    )
    for finding in result["verdict"]:
        logging.getLogger("slidemake").info("%s: %s", finding["level"], finding["text"])
