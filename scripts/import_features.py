"""Rule import_features: files of features of a rack's slides -> an embedding store each, manifest."""

from pathlib import Path

from slidemake.encoders.registry import EncoderRecord
from slidemake.interchange.stage import import_slide
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack

with job(snakemake) as sm:  # noqa: F821
    results, options = Path(sm.params.results), dict(sm.params.options)
    record = EncoderRecord.from_dict(dict(sm.params.encoder))
    rows = {row["slide_id"]: dict(row) for row in sm.params.rows}
    files = dict(sm.params.sources)
    run_rack(
        "import",
        sm.output.manifest,
        read_manifest(sm.input.screen, "screen"),
        lambda before: import_slide(rows[before["slide_id"]], files[before["slide_id"]], record, options, results),
        rack=sm.wildcards.rack,
        threads=sm.threads,
    )
