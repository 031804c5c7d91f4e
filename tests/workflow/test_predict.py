"""A trained bundle on slides that it has never seen: from slide file to prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from drawn_slides import draw
from slidemake.core.files import read_json, write_json
from snakemake_run import ENCODER, Project, stamps

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def predicted(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three new slides of two patients, drawn with another seed, predicted with the finished run's bundle."""
    from slidemake.demo.cohort import demo_rows

    project = Project(tmp_path_factory.mktemp("predict") / "project")
    (project.folder / "new").mkdir(parents=True)
    known = {row["slide_id"]: row | {"mishap": ""} for row in demo_rows(8)}
    rows = [known["P01-A"], known["P04-A"], known["P04-A"] | {"slide_id": "P04-B"}]
    for row in rows:
        row["slide_id"] = row["slide_id"].replace("P", "N")
        row["patient_id"] = row["patient_id"].replace("P", "N")
    drawn = draw(project.folder / "new", rows, seed=7)
    project.write_sheet(drawn)
    shutil.copytree(finished.results / "tasks/tumour/abmil/bundle", project.folder / "bundle")
    project.configure(bundle="bundle", bundle_label="diagnosis", tasks=None, models=None, explain=None, rack_size=2)
    project.succeed("predict")
    return project


def test_every_slide_and_patient_is_predicted(predicted: Project):
    slides, patients = predicted.table("predictions/slides.csv"), predicted.table("predictions/patients.csv")
    assert [row["slide_id"] for row in slides] == ["N01-A", "N04-A", "N04-B"]
    assert [row["patient_id"] for row in patients] == ["N01", "N04"]
    limit = json.loads((predicted.folder / "bundle/bundle.json").read_text())["threshold"]
    for row in [*slides, *patients]:
        probability = float(row["prob_tumour"])
        assert abs(probability + float(row["prob_benign"]) - 1) < 1e-6
        assert row["predicted"] == ("tumour" if probability >= limit else "benign")
    tiles = {row["slide_id"]: int(row["tiles"]) for row in slides}
    assert int(patients[1]["tiles"]) == tiles["N04-A"] + tiles["N04-B"]


def test_new_slides_are_processed_as_the_training_slides_were(predicted: Project, finished: Project):
    bundle = json.loads((predicted.folder / "bundle/bundle.json").read_text())
    assert predicted.json("cohort/stain_target.json") == finished.json("cohort/stain_target.json")
    attributes = json.loads((predicted.results / "embeddings" / ENCODER / "N01-A.zarr/zarr.json").read_text())[
        "attributes"
    ]
    assert attributes["encoder"] == bundle["encoder"]
    assert attributes["stain"]["method"] == bundle["stain"]["method"]
    assert not (predicted.results / "tasks").exists()


def test_labelled_sheet_gets_the_metrics_of_the_frozen_bundle(predicted: Project):
    found = predicted.json("predictions/metrics.json")
    bundle = json.loads((predicted.folder / "bundle/bundle.json").read_text())
    assert found["external"]["threshold"] == bundle["threshold"]
    assert found["external"]["bundle"] == bundle["fingerprint"]
    assert (found["patients"], found["class_counts"]) == (2, {"benign": 1, "tumour": 1})
    probability = {row["patient_id"]: float(row["prob_tumour"]) for row in predicted.table("predictions/patients.csv")}
    truth = {row["patient_id"]: row["diagnosis"] for row in predicted.rows()}
    [tumour], [benign] = ([p for p in truth if truth[p] == name] for name in ("tumour", "benign"))
    auroc = found["models"]["abmil"]["scopes"]["pooled"]["metrics"]["auroc"]["value"]
    assert auroc == float(probability[tumour] > probability[benign])


def test_new_slides_are_compared_with_the_training_slides(predicted: Project, finished: Project):
    drift = predicted.json("predictions/drift.json")
    assert drift["training"]["slides"] == len(finished.table("cohort/slides.csv"))
    assert drift["groups"][0]["level"] == "not judged"  # two patients
    assert [row["patient_id"] for row in drift["strangest"]] in (["N01", "N04"], ["N04", "N01"])
    assert all(0 < row["distance"] < 100 for row in drift["strangest"])
    assert "at least 5" in predicted.table("predictions/drift.csv")[0]["reason"]


def test_prediction_is_finished_after_one_run(predicted: Project):
    assert predicted.planned("predict") == {}


def test_bundle_takes_the_embeddings_that_are_there(project: Project):
    """In the folder in which it was trained a bundle is applied without computing an embedding again."""
    project.configure(bundle="results/tasks/tumour/abmil/bundle", tasks=None, models=None)
    before = stamps(project.results / "embeddings"), stamps(project.results / "tiles")
    project.succeed("predict")
    assert (stamps(project.results / "embeddings"), stamps(project.results / "tiles")) == before
    assert len(project.table("predictions/slides.csv")) == 9


def refused(project: Project, tmp_path: Path, **changed: object) -> str:
    """What the terminal shows when the bundle's encoder is another one; no prediction may be made."""
    other = project.copy(tmp_path / "other")
    path = other.folder / "bundle" / "bundle.json"
    info = read_json(path)
    write_json(path, {**info, "encoder": {**info["encoder"], **changed}})
    embeddings, predictions = stamps(other.results / "embeddings"), stamps(other.results / "predictions")
    outcome = other.run("predict")
    assert outcome.code != 0
    assert "Traceback" not in outcome.text
    assert stamps(other.results / "embeddings") == embeddings
    assert stamps(other.results / "predictions").items() <= predictions.items()
    return outcome.text


def test_features_of_other_weights_are_refused(predicted: Project, tmp_path: Path):
    text = refused(predicted, tmp_path, weights_sha256="0" * 64)
    assert "weights" in text
    assert "N01-A" in text


def test_bundle_of_an_unknown_encoder_is_refused(predicted: Project, tmp_path: Path):
    assert "efficientnet_lite9" in refused(predicted, tmp_path, key="efficientnet_lite9")


def test_damaged_bundle_is_refused(predicted: Project, tmp_path: Path):
    other = predicted.copy(tmp_path / "other")
    weights = other.folder / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    outcome = other.run("predict", "--forcerun", "predict_slides")
    assert outcome.code != 0
    assert "weights.safetensors cannot be read" in outcome.text
    assert "Traceback" not in outcome.text
