"""Rule cohort_table: all manifests and the sheet -> cohort/slides.csv, cohort/failures.csv."""

from functools import partial
from pathlib import Path

from slidemake.cohort.sheet import sheet_records
from slidemake.cohort.table import FAILURE_COLUMNS, cohort_rows, failure_rows
from slidemake.core.files import read_json
from slidemake.core.tables import seal_tables, write_table
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.slides.screening import find_duplicates
from slidemake.stain.stage import judgement_columns

with job(snakemake) as sm:  # noqa: F821
    results = Path(sm.params.results)
    screened = read_manifests(sm.input.screen, "screen")
    stages = {"screen": screened}
    stages |= {stage: read_manifests(sm.input[stage], stage) for stage in ("tissue", "stain")}
    for stage in ("tiles", "embed"):
        for path in sm.input[stage]:  # manifests/<stage>/<grid or encoder>/<rack>.json
            stages.setdefault(f"{stage} {Path(path).parent.name}", []).extend(read_manifests([path]))
    imported = [r for name in stages if name.startswith("embed ") for r in stages[name] if "identity" in r]
    duplicates = find_duplicates(screened) | find_duplicates(imported) if sm.params.duplicates == "fail" else {}
    target = read_json(sm.input.target)
    rows = cohort_rows(
        sheet_records(sm.params.sheet), stages, results, duplicates, partial(judgement_columns, results, target)
    )
    write_table(sm.output.slides, rows)
    write_table(sm.output.failures, failure_rows(rows), FAILURE_COLUMNS)
    seal_tables(sm.output.seal, [sm.output.slides, sm.output.failures])
