"""Rule describe_training: a model's training slides -> reference.json beside its bundle, which `watch_drift` reads."""

from pathlib import Path

from slidemake.adapter import job
from slidemake.bags import open_bags
from slidemake.bundle import read_info
from slidemake.cohort_table import read_table
from slidemake.outcomes import load_outcome
from slidemake.reference import make_reference, write_reference

with job(snakemake) as sm:  # noqa: F821
    reference = make_reference(
        open_bags(sm.input.bags[0]),
        load_outcome(read_info(Path(sm.output.reference).parent)),
        read_table(sm.input.predictions),
        read_table(sm.input.slides),
        sm.params.results,
    )
    write_reference(reference, sm.output.reference)
