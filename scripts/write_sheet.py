"""Rule write_sheet: a folder of slides -> a first sample sheet; an existing one is never overwritten."""

from slidemake.core.failures import RunError
from slidemake.jobs.job import job
from slidemake.slides.first_sheet import write_sheet

with job(snakemake) as sm:  # noqa: F821
    if not sm.params.folder:
        raise RunError(
            "Say where the slides are: snakemake write_sheet --cores 1 --config slides_folder=DIR sheet=NEW.csv"
        )
    write_sheet(sm.params.folder, sm.params.sheet)
