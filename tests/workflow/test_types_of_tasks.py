"""Tasks of every type beside each other, from the sheet to the report, with the controls that look at the background;
then one of their bundles on other patients whose outcome is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from snakemake_run import ENCODER, Project

pytestmark = pytest.mark.workflow

SPLITS = {"folds": 2, "repeats": 1}
TASKS = {
    "tumour": None,
    "purity": {"type": "regression", "label": "purity", "unit": "%", "splits": SPLITS},
    "grade": {"type": "ordinal", "label": "grade", "splits": SPLITS},
    "death": {"type": "survival", "label": "os", "unit": "months", "splits": SPLITS},
    "receptors": {"type": "multilabel", "labels": ["er", "pr"], "splits": SPLITS},
}
PRIMARY = {"purity": "r2", "grade": "kappa", "death": "c_index", "receptors": "auroc"}


def with_outcomes(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Outcomes of eight patients that follow the diagnosis, with a missing label and censored times."""
    patients = sorted({row["patient_id"] for row in rows})
    for row in rows:
        number, tumour = patients.index(row["patient_id"]), row["diagnosis"] == "tumour"
        row["purity"] = f"{10 + 60 * tumour + number}"
        row["grade"] = f"{1 + tumour + (number > 3)}"
        row["os_time"], row["os_event"] = f"{40 - 20 * tumour - number}", str(int(tumour or number % 4 == 1))
        row["er"], row["pr"] = str(int(tumour)), "" if number == 5 else str(int(number > 3))
    return rows


@pytest.fixture(scope="module")
def every_type(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = finished.copy(tmp_path_factory.mktemp("types") / "project")
    project.write_sheet(with_outcomes(project.rows()))
    project.configure(tasks=TASKS, background={"tiles": 3}, explain={"slides": "none"})
    before = project.planned()
    assert not set(before) & {"screen_slides", "tile_slides", "embed_tiles"}
    project.succeed()
    return project


def test_every_task_has_its_metrics_controls_and_differences(every_type: Project):
    for task, primary in PRIMARY.items():
        metrics = every_type.json(f"tasks/{task}/metrics.json")
        assert (metrics["type"], metrics["primary"]) == (TASKS[task]["type"], primary)
        assert {"abmil", "mean_pool_lr", "shuffled_label"} <= set(metrics["models"])
        assert metrics["patients"] == 8
        pooled = metrics["models"]["abmil"]["scopes"]["pooled"]["metrics"][primary]
        assert (pooled["value"] is None) == (pooled["reason"] is not None)
        compared = {c["reference"]: c for c in metrics["comparisons"] if c["model"] == "abmil"}
        assert compared["mean_pool_lr"]["p_holm"] is not None
        json.dumps(metrics, allow_nan=False)
        assert metrics["models"]["abmil"]["subgroups"]["site"]["groups"]
        rows = every_type.table(f"tasks/{task}/metrics.csv")
        assert not any(value.lower() in ("nan", "inf") for row in rows for value in row.values())
    # 2 folds of 4 patients have fewer validation patients than an interval of 90 % needs, and say so
    assert "are needed" in every_type.json("tasks/purity/metrics.json")["models"]["abmil"]["intervals"]["reason"]


def test_the_background_is_embedded_and_looked_at(every_type: Project):
    records = every_type.manifest("background", ENCODER)
    good = {r["slide_id"] for r in every_type.manifest("tissue") if r["status"] == "ok"}
    assert {r["slide_id"] for r in records if r["status"] == "ok"} == good
    for slide in good:
        found = every_type.json(f"slides/{slide}/background_{ENCODER}.json")
        assert len(found["coords"]) == 3
        assert len(found["vector"]) == 1280
    shortcuts = every_type.json(f"tasks/grade/shortcuts/{ENCODER}.json")
    assert shortcuts["background"]["patients"] == 8
    assert shortcuts["background"]["finding"] in shortcuts["findings"]
    assert not (every_type.results / "tasks/death/shortcuts").exists()  # probes are of classes


def test_the_report_has_every_task(every_type: Project):
    page = (every_type.results / "report" / "index.html").read_text()
    for task in PRIMARY:
        assert f"<h2>Task: {task}</h2>" in page
    assert page.count("Is one model better than another?") == 4
    assert "Background-only control" in page
    assert "No conformal intervals: a fold has" in page
    assert "Probabilities of er (abmil)" in page
    assert "Before: the probabilities of the bare logits" in page
    assert "seen / expected" in page


def test_a_survival_bundle_on_patients_of_known_outcome(every_type: Project, tmp_path: Path):
    """The same slides as those of other patients: nothing of them is computed again but the predictions."""
    project = every_type.copy(tmp_path / "new")
    shutil.move(project.results / "tasks/death/abmil/bundle", project.folder / "bundle")
    rows = [row | {"patient_id": f"N{row['patient_id']}"} for row in project.rows()]
    project.write_sheet(rows)
    project.configure(bundle="bundle", bundle_label="os", tasks=None, models=None, background=None, explain=None)
    jobs = project.planned()
    assert not set(jobs) & {"screen_slides", "detect_tissue", "tile_slides"}
    project.succeed()
    metrics = project.json("predictions/metrics.json")
    assert metrics["type"] == "survival"
    assert metrics["external"]["label"] == "os"
    times = {row["patient_id"]: float(row["os_time"]) for row in rows}
    assert metrics["patients"] == len(times) == 8
    assert metrics["class_counts"]["with the event"] == sum(
        int(next(r["os_event"] for r in rows if r["patient_id"] == p)) for p in times
    )
    assert "External cohort" in (project.results / "report" / "index.html").read_text()
