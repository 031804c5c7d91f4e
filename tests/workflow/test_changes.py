"""What a change of the configuration or of the sheet runs again, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from snakemake_run import CONFIG, ENCODER, GRID, PER_SLIDE, Project, contents, stamps

pytestmark = pytest.mark.workflow

SPOILT = ("P03-B", "P06-B", "P07-B")
EVALUATION = {"evaluate", "compare_models", "describe_training", "write_report"}
LEARNING = {"train_aggregator", "explain_slides"} | EVALUATION


def test_aggregator_reruns_only_what_follows_the_embeddings(project: Project):
    project.configure(models={"abmil": {"hidden": 24}})
    jobs = project.planned()
    assert set(jobs) == LEARNING
    assert jobs["explain_slides"] == 1


def test_epochs_of_one_model_leave_another_model_alone(project: Project):
    """A second model is trained by itself: the first, its controls and the splits stay."""
    project.configure(
        models={"plain": {"aggregator": "mean_pool_lr"}}, tasks={"tumour": {"models": ["abmil", "plain"]}}
    )
    jobs = project.planned()
    assert set(jobs) == {"train_aggregator"} | EVALUATION
    assert jobs["train_aggregator"] == 1


def test_stain_method_reruns_stain_and_embedding_but_no_tiles(project: Project):
    project.configure(stain={"method": "reinhard"})
    jobs = project.planned()
    assert set(jobs) >= {"fit_stain", "make_stain_target", "embed_tiles"} | LEARNING
    assert not set(jobs) & {"screen_slides", "detect_tissue", "tile_slides"}
    tiles = stamps(project.results / "tiles")
    before = {record["slide_id"]: record.get("fingerprint") for record in project.manifest("embed", ENCODER)}
    project.succeed("embeddings")
    assert stamps(project.results / "tiles") == tiles  # not one file written again
    for record in project.manifest("embed", ENCODER):
        assert not record.get("reused")
        if record["status"] == "ok":
            assert record["fingerprint"] != before[record["slide_id"]]


def test_min_tissue_reruns_tiles_and_what_follows(project: Project):
    project.configure(tiling={"min_tissue": 0.8})
    jobs = project.planned()
    assert set(jobs) >= {"tile_slides", "embed_tiles"} | LEARNING
    assert not set(jobs) & {"screen_slides", "detect_tissue", "fit_stain"}
    before = {record["slide_id"]: record.get("tiles") for record in project.manifest("tiles", GRID)}
    project.succeed("tiles")
    after = {record["slide_id"]: record.get("tiles") for record in project.manifest("tiles", GRID)}
    assert sum(filter(None, after.values())) < sum(filter(None, before.values()))


def test_report_title_rewrites_the_report_only(project: Project):
    project.configure(report={"title": "Another title"})
    assert set(project.planned()) == {"write_report"}


def test_order_of_keys_and_written_defaults_rerun_nothing(project: Project):
    defaults = {"min_tissue": 0.5, "codec": "jpeg", "store": "pixels"}
    project.configure(tiling=defaults, stain=CONFIG["stain"], tissue=None, screening={"reader": "auto"})
    project.configure(tissue={"method": "density", "focus_samples": 8}, explain=None)
    project.configure(explain={"top_tiles": 3, "truth": "{folder}/truth/{stem}_tumour16.png"})
    assert set(project.planned()) <= {"write_report"}


def test_labels_rerun_no_work_on_slides(project: Project):
    rows = project.rows()
    for row in rows:  # one patient of each class changes sides
        row["diagnosis"] = {"P01": "benign", "P02": "tumour"}.get(row["patient_id"], row["diagnosis"])
    project.write_sheet(rows)
    jobs = project.planned()
    assert not set(jobs) & set(PER_SLIDE), jobs
    assert {"cohort_table", "split_cohort"} | LEARNING <= set(jobs)


def test_touched_code_reruns_nothing(project: Project, tmp_path: Path):
    """A git checkout gives every script a new time; the stages' versions say what has really changed."""
    from snakemake_run import REPO

    clone = tmp_path / "clone"
    for name in ("Snakefile", "rules", "scripts", "config", "profiles", "docs"):
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, clone / name, copy_function=shutil.copy)
        elif source.exists():
            clone.mkdir(exist_ok=True)
            shutil.copy(source, clone / name)
    outcome = project.succeed("--dry-run", "--snakefile", str(clone / "Snakefile"))
    assert outcome.jobs() == {}, outcome.text


def test_appended_slide_is_the_only_one_computed(project: Project):
    rows = project.rows()
    source = Path(rows[0]["path"])
    new = project.folder / "P09-A.tiff"
    shutil.copy(source, new)
    with open(new, "r+b") as handle:  # another scan: the same picture with other bytes behind it
        handle.seek(0, 2)
        handle.write(b"another scan")
    project.write_sheet([*rows, rows[0] | {"slide_id": "P09-A", "patient_id": "P09", "path": str(new)}])
    stores = [f"tiles/{GRID}", f"embeddings/{ENCODER}", "slides"]
    before = [stamps(project.results / store) for store in stores]
    project.succeed("embeddings")
    for store, known in zip(stores, before, strict=True):
        now = stamps(project.results / store)
        kept = {name for name in known if name.split("/")[0] not in SPOILT}  # bad slides are looked at again
        assert {name: now.get(name) for name in kept} == {name: known[name] for name in kept}
        assert {name.split("/")[0].removesuffix(".zarr") for name in set(now) - set(known)} == {"P09-A"}
    for stage in (("screen",), ("tissue",), ("stain",), ("tiles", GRID), ("embed", ENCODER)):
        for record in project.manifest(*stage):
            if record["slide_id"] == "P09-A":
                assert record["status"] == "ok"
                assert not record.get("reused")
            elif record["status"] == "ok":
                assert record["reused"] is True, (stage, record)


def test_slide_replaced_under_its_name(project: Project):
    """Slides in another folder are looked at again and found finished; one with other bytes is computed again."""
    folder = project.folder / "moved"
    folder.mkdir()
    rows = project.rows()
    for row in rows:
        row["path"] = shutil.copy(row["path"], folder / Path(row["path"]).name)
    project.write_sheet([{**row, "path": str(row["path"])} for row in rows])
    before = contents(project.results / "embeddings")
    project.succeed("embeddings")
    assert contents(project.results / "embeddings") == before
    ok = [record for record in project.manifest("screen") if record["status"] == "ok"]
    assert ok
    assert all(record["reused"] for record in ok)

    replaced, other = rows[0], rows[-1]
    fingerprints = {record["slide_id"]: record.get("fingerprint") for record in project.manifest("embed", ENCODER)}
    Path(replaced["path"]).write_bytes(Path(other["path"]).read_bytes() + b"another scan")
    os.utime(replaced["path"], (1e9, 1e9))  # as a copy that keeps times has it: older than all results
    project.succeed("embeddings")
    for stage in (("screen",), ("tissue",), ("stain",), ("tiles", GRID), ("embed", ENCODER)):
        for record in project.manifest(*stage):
            if record["slide_id"] == replaced["slide_id"]:
                assert not record.get("reused"), stage
            elif record["status"] == "ok":
                assert record["reused"] is True, (stage, record)
    record = project.manifest("embed", ENCODER)[0]
    assert record["slide_id"] == replaced["slide_id"]
    assert record["fingerprint"] != fingerprints[replaced["slide_id"]]


def test_removed_slide_leaves_the_results_and_keeps_its_files(project: Project):
    rows, gone = project.rows(), "P02-B"
    project.write_sheet([row for row in rows if row["slide_id"] != gone])
    files = ["slides", f"tiles/{GRID}", f"embeddings/{ENCODER}", "explain/tumour/abmil"]
    before = {name: stamps(project.results / name) for name in files}
    mentioned = [path for path in tables_and_pages(project) if gone in path.read_text()]
    assert {path.name for path in mentioned} >= {"slides.csv", "predictions_slides.csv", "index.html", "r00000.json"}
    project.succeed()
    for name in files:
        now = stamps(project.results / name)
        assert {k: v for k, v in now.items() if gone in k} == {k: v for k, v in before[name].items() if gone in k} != {}
    assert [path for path in tables_and_pages(project) if gone in path.read_text()] == []


def tables_and_pages(project: Project) -> list[Path]:
    """Every table, manifest and page of the cohort as a whole: not the folders of single slides, nor the logs."""
    whole = ("cohort", "tasks", "manifests", "report")
    ends = (".csv", ".json", ".html")
    return [p for name in whole for p in sorted((project.results / name).rglob("*")) if p.suffix in ends]


def test_excluded_slide_leaves_the_cohort(project: Project):
    rows = project.rows()
    project.write_sheet([row | {"exclude": "true" if row["slide_id"] == "P02-B" else ""} for row in rows])
    embeddings = stamps(project.results / "embeddings")
    project.succeed("cohort")
    status = {row["slide_id"]: row["status"] for row in project.table("cohort/slides.csv")}
    assert status["P02-B"] == "excluded"
    assert [slide for slide, state in status.items() if state == "excluded"] == ["P02-B"]
    assert stamps(project.results / "embeddings") == embeddings
