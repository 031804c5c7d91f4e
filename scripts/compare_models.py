"""Rule compare_models: metrics of a task -> comparison.json, comparison.csv (ranks, critical difference)."""

from slidemake.adapter import job
from slidemake.cohort_table import write_table
from slidemake.comparison import COLUMNS, compare, comparison_rows
from slidemake.provenance import STAGE_VERSIONS, read_json, write_json

HEADLINES = (
    "auroc",
    "c_index",
    "kappa",
    "macro_auroc",
    "pearson",
    "r2",
)  # of each type of task, the first that is there

with job(snakemake) as sm:  # noqa: F821
    metrics = read_json(sm.input.metrics)
    there = {name for m in metrics["models"].values() for name in m["scopes"]["pooled"]["metrics"]}
    headline = next((name for name in HEADLINES if name in there), "auroc")
    result = compare(metrics, headline, sm.params.level, sm.params.axes)
    write_table(sm.output.table, comparison_rows(result), COLUMNS)
    about = {"format": "slidemake-comparison", "format_version": 1, "version": STAGE_VERSIONS["compare"]}
    write_json(sm.output.result, {**about, **result})
