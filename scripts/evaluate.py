"""Rule evaluate: patient predictions of every model of a task -> metrics.json, metrics.csv, curves.json."""

import logging
from pathlib import Path

from slidemake.adapter import job
from slidemake.evaluation import evaluate

with job(snakemake) as sm:  # noqa: F821
    files = sm.input.predictions
    result = evaluate(
        [files] if isinstance(files, str) else list(files),
        list(sm.params.models),
        dict(sm.params.options),
        metrics=Path(sm.output.metrics),
        table=Path(sm.output.table),
        curves=Path(sm.output.curves),
        contamination=dict(sm.params.contamination),
        slides=Path(sm.input.slides),
        splits=Path(sm.input.splits),
        graded=sm.params.graded,
    )
    for finding in result["verdict"]:
        logging.getLogger("slidemake").info("%s: %s", finding["level"], finding["text"])
