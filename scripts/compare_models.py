"""Rule compare_models: metrics of a task -> comparison.json, comparison.csv (ranks, critical difference)."""

from pathlib import Path

from slidemake.core.files import file_sums, placed, read_json, write_json
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.core.tables import write_table
from slidemake.evaluation.ranking import COLUMNS, compare, comparison_rows
from slidemake.jobs.job import job

with job(snakemake) as sm:  # noqa: F821
    metrics = read_json(sm.input.metrics)
    result = compare(metrics, metrics.get("primary") or "auroc", sm.params.level, sm.params.axes)
    write_table(sm.output.table, comparison_rows(result), COLUMNS)
    about = {"format": "slidemake-comparison", "format_version": 1, "version": STAGE_VERSIONS["compare"]}
    table = Path(sm.output.table)
    about |= {**placed(sm.output.result), "files": file_sums(table.parent, [table.name])}
    write_json(sm.output.result, {**about, **result})
