"""Rule check_cohort: cohort/slides.csv -> cohort/passed.json, or a non-zero exit above max_failed_fraction."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.cohort_table import check_failed_fraction, read_table
from slidemake.provenance import file_sums, write_json

with job(snakemake) as sm:  # noqa: F821
    rows = read_table(sm.input.slides)
    found = check_failed_fraction(rows, sm.params.max_failed_fraction, sm.input.failures)
    tables = [Path(sm.input.slides).name, Path(sm.input.failures).name]
    write_json(sm.output.passed, {**found, "files": file_sums(Path(sm.output.passed).parent, tables)})
