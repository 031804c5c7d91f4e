"""Rule explain_slides: fold bundles and embeddings of a rack's slides -> scores, heatmaps, tile galleries, manifest."""

from pathlib import Path

from slidemake.core.tables import read_table
from slidemake.explain.stage import Explainer
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.slides.remote import fetch_row
from slidemake.splits.make import read_splits

with job(snakemake) as sm:  # noqa: F821
    import torch

    torch.set_num_threads(sm.threads)
    rows = {row["slide_id"]: row for row in read_table(sm.params.slides) if row["status"] == "ok"}
    results, trained = Path(sm.params.results), Path(sm.input.trained).parent
    out = results / "explain" / sm.wildcards.task / sm.wildcards.model
    remote = {row["slide_id"]: row for row in sm.params.remote}
    explainer = Explainer(
        results,
        sm.params.encoder,
        trained,
        read_splits(sm.input.splits),
        dict(sm.params.options),
        out,
        fetch=lambda slide_id, folder: fetch_row(remote[slide_id], folder, dict(sm.params.fetching)),
    )
    slides = [record for record in read_manifest(sm.input.embed) if record["slide_id"] in rows]
    run_rack(
        "explain",
        sm.output.manifest,
        [record for record in slides if explainer.wanted(rows[record["slide_id"]], sm.params.task.get("positive"))],
        lambda record: explainer.process(record, rows[record["slide_id"]]),
        rack=sm.wildcards.rack,
    )
