"""Rule check_cohort: cohort/slides.csv -> cohort/passed.json, or a non-zero exit above max_failed_fraction."""

from slidemake.adapter import job
from slidemake.cohort_table import check_failed_fraction
from slidemake.provenance import write_json
from slidemake.tables import check_table, read_table

with job(snakemake) as sm:  # noqa: F821
    rows = read_table(sm.input.slides)
    found = check_failed_fraction(rows, sm.params.max_failed_fraction, sm.input.failures)
    check_table(sm.input.failures)
    write_json(sm.output.passed, found)
