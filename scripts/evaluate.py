"""Rule evaluate: predictions of every model of a task -> metrics.json, metrics.csv, curves.json."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from slidemake.evaluation import evaluate
from slidemake.failures import RunError


def main(job) -> None:
    """`job` is the `snakemake` object: input.predictions, params.models and .options, output.metrics, .table, .curves."""
    begun = time.perf_counter()
    predictions = job.input.predictions
    predictions = [predictions] if isinstance(predictions, str) else list(predictions)
    with open(job.log[0], "w", encoding="utf-8") as log:
        try:
            result = evaluate(
                predictions,
                list(job.params.models),
                dict(job.params.options),
                Path(job.output.metrics),
                Path(job.output.table),
                Path(job.output.curves),
            )
        except RunError as error:
            log.write(f"{error}\n")
            print(error, file=sys.stderr)
            sys.exit(1)
        except Exception:
            log.write(traceback.format_exc())
            raise
        for finding in result["verdict"]:
            log.write(f"{finding['level']}: {finding['text']}\n")
        log.write(f"{len(result['models'])} models evaluated in {time.perf_counter() - begun:.1f} s\n")


if "snakemake" in globals():
    main(snakemake)  # noqa: F821
