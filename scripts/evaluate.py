"""Rule evaluate: patient predictions of every model of a task -> metrics.json, metrics.csv, curves.json."""

import logging
from pathlib import Path

from slidemake.evaluation.evaluate import evaluate
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    files = sm.input.predictions
    predictions = [files] if isinstance(files, str) else list(files)
    models, options, kind = list(sm.params.models), dict(sm.params.options), sm.params.type
    outputs = {
        "metrics": Path(sm.output.metrics),
        "table": Path(sm.output.table),
        "curves": Path(sm.output.curves),
        "contamination": dict(sm.params.contamination),
    }
    about = {"slides": Path(sm.input.slides), "splits": Path(sm.input.splits), "split": sm.params.split}
    result = evaluate(predictions, models, kind, options, **outputs, **about)
    for finding in result["verdict"]:
        logging.getLogger("slidemake").info("%s: %s", finding["level"], finding["text"])
