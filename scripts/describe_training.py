"""Rule describe_training: a model's training slides -> reference.json beside its bundle, which `watch_drift` reads."""

from pathlib import Path

from slidemake.core.tables import read_table
from slidemake.drift.reference import make_reference, training_predictions, validation_values, write_reference
from slidemake.jobs.job import job
from slidemake.mil.bags import open_bags
from slidemake.mil.bundle import read_info
from slidemake.tasks.registry import load_outcome

with job(snakemake) as sm:  # noqa: F821
    folder = Path(sm.output.reference).parent
    info = read_info(folder, of_run=True)
    outcome, trained = load_outcome(info), info["training"]["patients"]
    tested = read_table(sm.input.predictions)
    labels = {row["patient_id"]: row["label"] for row in read_table(sm.input.splits)}
    predictions = training_predictions(outcome, trained, tested, validation_values(folder.parent), labels)
    reference = make_reference(
        open_bags(sm.input.bags[0]),
        outcome,
        trained,
        predictions,
        read_table(sm.input.slides),
        sm.params.results,
        tested_only={row["patient_id"] for row in tested} - set(trained),
    )
    write_reference(reference, sm.output.reference)
