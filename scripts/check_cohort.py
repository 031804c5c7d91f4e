"""Rule check_cohort: cohort/slides.csv -> cohort/passed.json, or a non-zero exit above max_failed_fraction."""

from slidemake.cohort.table import check_failed_fraction
from slidemake.core.files import write_json
from slidemake.core.tables import check_table, read_table
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    rows = read_table(sm.input.slides)
    found = check_failed_fraction(rows, sm.params.max_failed_fraction, sm.input.failures)
    check_table(sm.input.failures)
    write_json(sm.output.passed, found)
