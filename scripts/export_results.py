"""Rule export_results: embeddings, folds, predictions and heatmaps -> exports/<format>/, exports/export.json."""

import logging
from pathlib import Path

from slidemake.core.failures import RunError
from slidemake.interchange.export import FORMATS, export_run
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    if not sm.params.formats:
        raise RunError(f"export.formats is empty: name one or more of {', '.join(FORMATS)}.")
    export_run(
        Path(sm.params.results),
        list(sm.params.formats),
        list(sm.params.encoders),
        dict(sm.params.tasks),
        Path(sm.output.manifest),
        logging.getLogger("slidemake").info,
    )
