"""Rule compare_models: metrics of a task -> comparison.json, comparison.csv (ranks, critical difference)."""

from slidemake.adapter import job
from slidemake.cohort_table import write_table
from slidemake.comparison import COLUMNS, compare, comparison_rows
from slidemake.provenance import STAGE_VERSIONS, read_json, write_json

with job(snakemake) as sm:  # noqa: F821
    metrics = read_json(sm.input.metrics)
    result = compare(metrics, metrics.get("primary") or "auroc", sm.params.level, sm.params.axes)
    write_table(sm.output.table, comparison_rows(result), COLUMNS)
    about = {"format": "slidemake-comparison", "format_version": 1, "version": STAGE_VERSIONS["compare"]}
    write_json(sm.output.result, {**about, **result})
