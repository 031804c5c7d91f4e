"""Rule pack_bags: embedding stores of a cohort -> all tiles in one array, which training jobs share."""

from pathlib import Path

from slidemake.core.tables import read_table
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifests
from slidemake.mil.bags import pack_bags

with job(snakemake) as sm:  # noqa: F821
    rows = [row for row in read_table(sm.input.slides) if row["status"] == "ok"]
    folder = Path(sm.params.results) / "embeddings" / sm.wildcards.encoder
    made = {record["slide_id"]: record.get("fingerprint") for record in read_manifests(sm.input.embed)}
    pack_bags(folder, [(row["slide_id"], row["patient_id"]) for row in rows], sm.output.features, made)
