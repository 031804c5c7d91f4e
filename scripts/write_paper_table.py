"""Rule paper_table: results of all tables and models, and the published figures -> one table, ours beside theirs."""

from slidemake.core.files import read_json
from slidemake.jobs.job import job
from slidemake.training.paper_tables import paper_rows, write_paper_table

with job(snakemake) as sm:  # noqa: F821
    results = {tuple(pair): read_json(path) for pair, path in zip(sm.params.pairs, sm.input, strict=True)}
    write_paper_table(paper_rows(results, sm.params.published), sm.output.table, sm.output.markdown)
