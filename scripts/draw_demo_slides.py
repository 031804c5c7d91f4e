"""Rule draw_demo_slides: sheet of the demo -> its slides and truth masks, manifest."""

from slidemake.demo.cohort import draw_demo_cohort, rows_of_sheet, slides_folder
from slidemake.jobs.job import job

if __name__ == "__main__":  # worker processes import this file again
    with job(snakemake) as sm:  # noqa: F821
        rows = rows_of_sheet(sm.input.sheet)
        draw_demo_cohort(
            rows,
            slides_folder(sm.input.sheet, rows),
            sm.output.manifest,
            side=sm.params.side,
            seed=sm.params.seed,
            processes=sm.threads,
        )
