"""What `slidemake verify` prints is done word for word, for a file of each kind, and the default target makes it again.

One finished cohort serves all kinds. Each is damaged alone: verify names it, what it prints is executed, and the plan
finds the job that makes it not current. Then all are damaged at once, and one run with the default target has to bring
back everything as it was.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slidemake.core.currency import Outcome, Tree, why_stale
from slidemake.core.failures import RunError
from slidemake.core.files import read_json
from slidemake.core.marker import MARKER, read_marker
from slidemake.workflow.verify import main
from snakemake_run import REPO, Project

sys.path.insert(0, str(REPO / "tests" / "soak"))

from cohort import differences

pytestmark = [pytest.mark.workflow, pytest.mark.long]

# kind of file (the first that the pattern finds) -> rule that makes it again; "" for what planning itself mends
KINDS = {
    "manifests/screen/r*.json": "screen_slides",
    "manifests/tissue/r*.json": "detect_tissue",
    "manifests/stain/r*.json": "fit_stain",
    "manifests/tiles/*/r*.json": "tile_slides",
    "manifests/embed/*/r*.json": "embed_tiles",
    "manifests/explain/*/*/r*.json": "explain_slides",
    "slides/P01-A/slide.json": "screen_slides",
    "slides/P01-A/thumbnail.jpg": "screen_slides",
    "slides/P01-A/tissue.json": "detect_tissue",
    "slides/P01-A/tissue.png": "detect_tissue",
    "slides/P01-A/tissue.geojson": "detect_tissue",
    "slides/P01-A/tissue.jpg": "detect_tissue",
    "slides/P01-A/stain.json": "fit_stain",
    "tiles/*/P01-A.zarr/zarr.json": "tile_slides",
    "tiles/*/P01-A.zarr/pixels/c/0/0/0/0": "tile_slides",
    "embeddings/*/P01-A.zarr/features/c/0/0": "embed_tiles",
    "cohort/slides.csv": "cohort_table",
    "cohort/failures.csv": "cohort_table",
    "cohort/tables.json": "cohort_table",
    "cohort/passed.json": "check_cohort",
    "cohort/stain_target.json": "make_stain_target",
    "cohort/bags/*.npy": "pack_bags",
    "cohort/bags/*.places": "pack_bags",
    "cohort/bags/*.json": "pack_bags",
    "tasks/*/splits.csv": "split_cohort",
    "tasks/*/splits.json": "split_cohort",
    "tasks/*/leakage/*.json": "check_leakage",
    "tasks/*/shortcuts/*.json": "probe_shortcuts",
    "tasks/*/abmil/train.json": "train_aggregator",
    "tasks/*/abmil/predictions_patients.csv": "train_aggregator",
    "tasks/*/abmil/predictions_slides.csv": "train_aggregator",
    "tasks/*/abmil/curves.csv": "train_aggregator",
    "tasks/*/abmil/bundle/bundle.json": "train_aggregator",
    "tasks/*/abmil/bundle/weights.safetensors": "train_aggregator",
    "tasks/*/abmil/bundles/*/bundle.json": "train_aggregator",
    "tasks/*/abmil/bundles/*/weights.safetensors": "train_aggregator",
    "tasks/*/abmil/bundle/reference.json": "describe_training",
    "tasks/*/metrics.json": "evaluate",
    "tasks/*/metrics.csv": "evaluate",
    "tasks/*/curves.json": "evaluate",
    "tasks/*/comparison.json": "compare_models",
    "tasks/*/comparison.csv": "compare_models",
    "explain/*/*/P01-A/explain.json": "explain_slides",
    "explain/*/*/P01-A/scores.csv": "explain_slides",
    "explain/*/*/P01-A/heatmap.png": "explain_slides",
    "explain/*/*/P01-A/heatmap.geojson": "explain_slides",
    "explain/*/*/P01-A/top.jpg": "explain_slides",
    "explain/*/*/P01-A/bottom.jpg": "explain_slides",
    "report/index.html": "write_report",
    "report/report.json": "write_report",
    "report/stain/*.jpg": "write_report",
    "digests/tasks/*/splits.csv.json": "split_cohort",
    "plan.json": "",
    MARKER: "",
}
# Of runs with the optional stages, and of a bundle that is applied to other patients.
OPTIONAL = {
    "manifests/background/*/r*.json": "embed_background",
    "slides/P01-A/background_*.json": "embed_background",
    "tasks/*/abmil/stress.json": "stress_test",
    "tasks/*/abmil/stress.csv": "stress_test",
    "tasks/*/stain.json": "compare_stain",
}
APPLIED = {
    "predictions/patients.csv": "predict_slides",
    "predictions/slides.csv": "predict_slides",
    "predictions/tables.json": "predict_slides",
    "predictions/metrics.json": "evaluate_bundle",
    "predictions/metrics.csv": "evaluate_bundle",
    "predictions/curves.json": "evaluate_bundle",
    "predictions/drift.json": "watch_drift",
    "predictions/drift.csv": "watch_drift",
}


def damage(path: Path) -> None:
    """Change a byte in the middle, time kept: a disk does not tell."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def printed(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines that verify prints, run in the project's folder as a user would."""
    monkeypatch.chdir(project.folder)
    capsys.readouterr()
    main(["results"])
    return capsys.readouterr().out.splitlines()


def stale(results: Path) -> set[str]:
    """Rules whose outcomes are not as the last run's plan wants them."""
    tree, found = Tree(results), set()
    for entry in read_json(results / "plan.json")["outcomes"]:
        names = ("rule", "wildcards", "files", "settings", "read", "after")
        if why_stale(Outcome(**{name: entry[name] for name in names}), results, tree):
            found.add(entry["rule"])
    return found


@pytest.fixture(scope="module")
def cohorts(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Undisturbed runs, made when they are asked for: the usual one, one with optional stages, a bundle applied."""
    made = {"usual": finished}

    def make(name: str) -> Project:
        if name not in made:
            project = made[name] = finished.copy(tmp_path_factory.mktemp(name) / "undisturbed")
            if name == "optional":
                project.configure(stress={"tiles": 2}, background={"tiles": 2}, stain={"compare": True})
            else:
                shutil.move(project.results / "tasks/tumour/abmil/bundle", project.folder / "bundle")
                project.write_sheet([row | {"patient_id": f"N{row['patient_id']}"} for row in project.rows()])
                project.configure(bundle="bundle", bundle_label="diagnosis", tasks=None, models=None, explain=None)
            project.succeed()
        return made[name]

    return make


@pytest.mark.parametrize(("cohort", "kinds"), [("usual", KINDS), ("optional", OPTIONAL), ("applied", APPLIED)])
def test_remedies_are_done_word_for_word_and_make_everything_again(
    cohort, kinds, cohorts, tmp_path, monkeypatch, capsys
):
    undisturbed = cohorts(cohort)
    project = undisturbed.copy(tmp_path / "project")
    results, kept = project.results, project.folder / "kept"
    assert printed(project, monkeypatch, capsys)[0].startswith("All is there, and as it was written")
    assert stale(results) == set()
    shutil.copytree(results, kept, copy_function=shutil.copy2)
    for pattern, rule in kinds.items():
        [path, *_] = sorted(results.glob(pattern)) or [None]
        assert path is not None, f"no file of the kind {pattern}"
        damage(path)
        lines = printed(project, monkeypatch, capsys)
        store = next((p for p in path.parents if p.suffix == ".zarr"), path)
        named = store.relative_to(project.folder).as_posix()
        assert any(line.startswith("DAMAGED") and named in line for line in lines), (pattern, lines)
        if pattern == MARKER:
            with pytest.raises(RunError, match=r"does not match its checksum|not valid JSON"):
                read_marker(results)
        removals = [line for line in lines if line.startswith("  rm -r ")]
        assert removals, (pattern, lines)
        for line in removals:
            subprocess.run(shlex.split(line), check=True, cwd=project.folder)
        if rule:
            assert rule in stale(results), (pattern, removals, stale(results))
        restore(kept, results)
    for pattern in kinds:
        damage(sorted(results.glob(pattern))[0])
    for line in [line for line in printed(project, monkeypatch, capsys) if line.startswith("  rm -r ")]:
        subprocess.run(shlex.split(line), check=True, cwd=project.folder)
    project.succeed()
    # what lay behind a damaged description is seen once that is whole again: at most one round more
    lines = printed(project, monkeypatch, capsys)
    if not lines[0].startswith("All is there"):
        for line in [line for line in lines if line.startswith("  rm -r ")]:
            subprocess.run(shlex.split(line), check=True, cwd=project.folder)
        project.succeed()
        lines = printed(project, monkeypatch, capsys)
    assert lines[0].startswith("All is there, and as it was written"), lines
    of_times = ("digests/", "plan.json")  # hashes of files that hold seconds
    assert [d for d in differences(undisturbed, project) if not d.path.startswith(of_times)] == []


def restore(kept: Path, results: Path) -> None:
    shutil.rmtree(results)
    shutil.copytree(kept, results, copy_function=shutil.copy2)
