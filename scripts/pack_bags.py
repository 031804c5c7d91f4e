"""Rule pack_bags: embedding stores of a cohort -> all tiles in one array, which training jobs share."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.bags import pack_bags
from slidemake.racks import read_manifests
from slidemake.tables import read_table

with job(snakemake) as sm:  # noqa: F821
    rows = [row for row in read_table(sm.input.slides) if row["status"] == "ok"]
    folder = Path(sm.params.results) / "embeddings" / sm.wildcards.encoder
    made = {record["slide_id"]: record.get("fingerprint") for record in read_manifests(sm.input.embed, "embed")}
    pack_bags(folder, [(row["slide_id"], row["patient_id"]) for row in rows], sm.output.features, made)
