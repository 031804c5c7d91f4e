"""Features of another tool, without a slide on the disk, to the report: as if slidemake had embedded them itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from imported_cohort import import_features_of
from snakemake_run import ENCODER, Project

pytestmark = pytest.mark.workflow
WHERE = f"{ENCODER}-imported"


@pytest.fixture(scope="module")
def imported(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished cohort's features, one of the files cut short and one of nobody."""
    project = import_features_of(
        finished, tmp_path_factory.mktemp("imported") / "project", finished.folder / "slides.csv"
    )
    project.configure(stain=None)
    files = sorted((project.folder / "features").glob("*.h5"))
    (project.folder / "features" / "nobody.h5").write_bytes(files[0].read_bytes())
    outcome = project.succeed()
    assert "1 files of features are of no slide of the sheet: nobody.h5" in outcome.text
    return project


def test_metrics_are_those_of_our_own_embedding(finished: Project, imported: Project):
    ours, theirs = (p.json("tasks/tumour/metrics.json")["models"] for p in (finished, imported))
    assert ours.keys() == theirs.keys()
    for name, model in ours.items():
        assert theirs[name]["scopes"] == model["scopes"], name


def test_no_slide_is_looked_for_tiled_or_normalised(imported: Project):
    assert not (imported.results / "tiles").exists()
    assert not (imported.results / "manifests" / "tissue").exists()
    assert all(record["absent"] for record in imported.manifest("screen") if record["status"] == "ok")


def test_heatmaps_lie_over_the_places_of_tiles(imported: Project):
    explained = [r for r in imported.manifest("explain", "tumour", "abmil") if r["status"] == "ok"]
    assert explained
    for record in explained:
        folder = imported.results / "explain" / "tumour" / "abmil" / record["slide_id"]
        assert (folder / "heatmap.png").exists()
        assert not (folder / "top.jpg").exists()


def test_the_report_says_so(imported: Project):
    page = (imported.results / "report" / "index.html").read_text()
    assert "were imported, not made here: files of trident; tiles of 112 µm" in page
    assert "slidemake looked for no tissue and normalised no stain" in page
    assert "Detected tissue" not in page


def test_a_file_that_is_cut_short_is_a_failure_and_nothing_else_runs(imported: Project, tmp_path: Path):
    project = imported.copy(tmp_path / "project")
    assert project.planned() == {}
    victim = next(r["slide_id"] for r in project.manifest("import", WHERE) if r["status"] == "ok")
    path = imported.folder / "features" / f"{victim}.h5"  # copies of the project share these files
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    assert set(project.planned("cohort")) == {"import_features", "cohort_table", "check_cohort"}
    project.run("cohort")
    path.write_bytes(whole)
    (failure,) = [row for row in project.table("cohort/failures.csv") if row["slide_id"] == victim]
    assert (failure["stage"], failure["code"]) == ("import", "wrong_features")
    assert "truncated" in failure["message"]
    others = [r for r in project.manifest("import", WHERE) if r["status"] == "ok"]
    assert others
    assert all(record["reused"] for record in others)


def test_a_bundle_of_imported_features_takes_no_others(imported: Project, tmp_path: Path):
    project = imported.copy(tmp_path / "project")
    bundle = {"bundle": "results/tasks/tumour/abmil/bundle", "output": "results_new", "tasks": None}
    project.configure(**bundle, features=None)
    refused = project.run("predict")
    assert refused.code != 0
    assert "give those of the new slides" in refused.text
    project.configure(features={"encoder": ENCODER, "folder": f"{imported.folder}/features/{{slide_id}}.h5"})
    project.succeed("predict")
    assert (project.folder / "results_new" / "predictions" / "patients.csv").exists()
