"""A cohort from slides to the report in one run, and what a second run finds to do."""

from __future__ import annotations

from collections import Counter
from html import escape

import pytest
from snakemake_run import ENCODER, GRID, PER_SLIDE, Project

pytestmark = pytest.mark.workflow

SPOILT = {"P03-B": "no_mpp", "P06-B": "no_tissue", "P07-B": "truncated"}


def test_run_ends_in_a_report_that_names_every_slide(finished: Project):
    page = (finished.results / "report" / "index.html").read_text()
    assert all(row["slide_id"] in page for row in finished.rows())


def test_what_training_says_of_itself_is_in_the_report(finished: Project):
    page = (finished.results / "report" / "index.html").read_text()
    said = [line["text"] for line in finished.json("tasks/tumour/abmil/train.json")["findings"]]
    assert all(escape(text).replace("&#x27;", "&#39;") in page for text in said)


def test_every_rule_ran(finished: Project):
    from snakemake_run import Outcome

    jobs = Outcome(0, (finished.folder / "terminal.txt").read_text()).jobs()
    assert set(PER_SLIDE) <= set(jobs)
    assert jobs["train_aggregator"] == 5  # the model and the four controls
    assert all(jobs[rule] == 1 for rule in PER_SLIDE)


def test_every_job_left_its_times(finished: Project):
    from slidemake.jobs.timings import job_runs
    from snakemake_run import Outcome

    jobs = Outcome(0, (finished.folder / "terminal.txt").read_text()).jobs()
    runs = job_runs(finished.results)
    assert Counter(run.rule for run in runs) == {rule: count for rule, count in jobs.items() if rule != "all"}
    assert all(run.code == 0 and run.mb and run.cpu for run in runs)
    assert {run.rule: len(run.seen) for run in runs}["screen_slides"] == len(finished.rows())
    assert 'id="timeline"' in (finished.results / "report" / "index.html").read_text()


def test_each_bad_slide_is_told_once(finished: Project):
    text = (finished.folder / "terminal.txt").read_text()
    for slide_id, code in SPOILT.items():
        assert text.count(f"{slide_id}: {code}") == 1


def test_each_bad_slide_has_its_code_and_a_hint(finished: Project):
    failures = finished.table("cohort/failures.csv")
    assert {row["slide_id"]: row["code"] for row in failures} == SPOILT
    assert all(row["message"] and row["hint"] and row["stage"] for row in failures)
    assert finished.json("cohort/passed.json")["codes"] == dict.fromkeys(SPOILT.values(), 1)


def test_good_slides_are_embedded_and_predicted(finished: Project):
    good = {row["slide_id"] for row in finished.rows()} - set(SPOILT)
    stores = {path.stem for path in (finished.results / "embeddings" / ENCODER).glob("*.zarr")}
    assert stores == good == {path.stem for path in (finished.results / "tiles" / GRID).glob("*.zarr")}
    assert {row["slide_id"] for row in finished.table("tasks/tumour/abmil/predictions_slides.csv")} == good
    assert all(record["tiles"] > 0 for record in finished.manifest("embed", ENCODER) if record["status"] == "ok")


def test_patients_are_predicted_out_of_fold(finished: Project):
    rows = finished.table("tasks/tumour/abmil/predictions_patients.csv")
    folds = {row["patient_id"]: row["fold"] for row in finished.table("tasks/tumour/splits.csv")}
    assert {row["patient_id"]: row["fold"] for row in rows} == folds
    assert len(rows) == 8
    for row in rows:
        assert abs(float(row["prob_tumour"]) + float(row["prob_benign"]) - 1) < 1e-6


def test_metrics_have_the_model_and_the_controls(finished: Project):
    models = finished.json("tasks/tumour/metrics.json")["models"]
    assert {"abmil", "mean_pool_lr", "instance_linear", "site_only", "shuffled_label"} <= set(models)
    assert models["abmil"]["scopes"]["pooled"]["metrics"]["auroc"]["value"] is not None


def test_bundle_holds_all_that_a_new_slide_needs(finished: Project):
    folder = finished.results / "tasks" / "tumour" / "abmil" / "bundle"
    assert {path.name for path in folder.iterdir()} == {"bundle.json", "weights.safetensors", "reference.json"}
    info = finished.json("tasks/tumour/abmil/bundle/bundle.json")
    assert info["classes"] == ["benign", "tumour"]
    assert {"encoder", "grid", "stain", "stain_target", "tissue", "tiling", "threshold"} <= set(info)
    assert len(info["groups"]) == 2  # one for each fold


def test_every_good_slide_is_explained_and_tumour_is_compared(finished: Project):
    records = finished.manifest("explain", "tumour", "abmil")
    explained = [record["slide_id"] for record in records if record["status"] == "ok"]
    assert len(explained) == len(finished.rows()) - len(SPOILT)
    for slide in explained:
        names = {path.name for path in (finished.results / "explain/tumour/abmil" / slide).iterdir()}
        assert {"scores.csv", "heatmap.png", "heatmap.geojson", "explain.json"} <= names
    assert any(record.get("tile_auroc") is not None for record in records)


def test_nothing_is_written_beside_the_slides(finished: Project):
    from pathlib import Path

    slides = [Path(row["path"]) for row in finished.rows()]
    assert {path.name for path in slides[0].parent.iterdir()} == {*(path.name for path in slides), "truth"}


def test_second_run_has_nothing_to_do(project: Project):
    outcome = project.succeed()
    assert "Nothing to be done" in outcome.text
    assert outcome.jobs() == {}
