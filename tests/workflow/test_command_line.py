"""What the command says: whose configuration it is, which target, from which folder, as a module."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slidemake.demo.cohort import SHEET_COLUMNS, demo_rows
from snakemake_run import REPO, Outcome, Project, environment

pytestmark = pytest.mark.workflow


def plan(folder: Path, *arguments: str, snakefile: Path = REPO / "Snakefile") -> Outcome:
    """What Snakemake shows when it is called in `folder`."""
    command = ["snakemake", "--snakefile", str(snakefile), "--cores", "1", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout + done.stderr)


def test_slides_named_on_the_command_line_are_not_the_demo(new_project: Callable[..., Project]):
    """Neither its tasks (which want a column `diagnosis`) nor its title are theirs."""
    project = new_project(slides=2)
    (project.folder / "config.yaml").unlink()
    rows = [{key: row[key] for key in ("slide_id", "path")} for row in project.rows()]
    project.write_sheet(rows)
    found = plan(project.folder, "--dry-run", "--config", "sheet=slides.csv")
    assert found.code == 0, found.text
    assert found.jobs()["embed_tiles"] == 1
    assert not {"draw_demo_slides", "train_aggregator"} & set(found.jobs())
    assert "draw_demo_slides" in plan(project.folder, "--dry-run").jobs(), "nothing named: the demo"


def test_a_demo_that_has_run_has_nothing_to_do(tmp_path: Path):
    """Its slides and the masks of their truth are drawn by the run, after its plan has looked for them."""
    project = Project(tmp_path)
    project.configure(demo={"side": 1536, "seed": 0})
    rows = [{column: row[column] for column in SHEET_COLUMNS} for row in demo_rows(8)]
    project.write_sheet([row | {"path": f"demo_slides/{row['slide_id']}.tiff"} for row in rows])
    project.succeed("explain")
    assert list((project.folder / "demo_slides" / "truth").glob("*.png"))
    assert project.planned("explain") == {}


def test_values_alone_are_not_laid_over_the_demo(tmp_path: Path):
    found = plan(tmp_path, "--dry-run", "--config", "output=elsewhere", "rack_size=2")
    assert found.code != 0
    assert "Traceback" not in found.text
    assert "The command sets output, rack_size and names no slides." in found.text
    demo = f"{os.path.relpath(REPO, tmp_path)}/config/config.yaml"
    assert f"(the demo's is {demo})" in found.text
    assert (
        "draw_demo_slides" in plan(tmp_path, "--dry-run", "--config", "output=elsewhere", "--configfile", demo).jobs()
    )


def test_command_of_the_readme_for_prediction_knows_no_demo(finished: Project, tmp_path: Path):
    bundle, sheet = finished.results / "tasks/tumour/abmil/bundle", finished.folder / "slides.csv"
    words = ["predict", "--dry-run", "--config", f"bundle={bundle}", f"sheet={sheet}", "output=results_new"]
    found = plan(tmp_path, *words)
    assert found.code == 0, found.text
    assert found.jobs()["predict_slides"] == 1
    assert "draw_demo_slides" not in found.jobs()


@pytest.mark.parametrize(
    ("target", "last", "not_there"),
    [
        ("train", "describe_training", "explain_slides"),
        ("explain", "explain_slides", "write_report"),
        ("report", "write_report", "predict_slides"),
        ("cohort", "check_cohort", "split_cohort"),
    ],
)
def test_targets(new_project: Callable[..., Project], target: str, last: str, not_there: str):
    jobs = new_project().planned(target)
    assert jobs[last] == 1
    assert not_there not in jobs


def test_below_a_folder_with_a_space(tmp_path: Path):
    """Snakemake takes no container image from there; none is named where none is asked for."""
    here = tmp_path / "my clone"
    here.mkdir()
    for name in ("rules", "scripts", "config", "envs", "profiles", "Snakefile", "docs"):
        (here / name).symlink_to(REPO / name)
    found = plan(here, "--dry-run", snakefile=here / "Snakefile")
    assert found.code == 0, found.text
    assert found.jobs()["draw_demo_slides"] == 1
    found = plan(here, "--dry-run", "--sdm", "apptainer", snakefile=here / "Snakefile")
    assert found.code != 0
    assert "Move slidemake to a folder without one" in found.text


def test_as_a_module_of_another_workflow(new_project: Callable[..., Project]):
    """From plan to finished slides, with the names of rules changed, and the results marked as by a run of its own."""
    project = new_project(slides=1, tasks=None, models=None, explain=None)
    about = f'module slidemake:\n    snakefile: "{REPO}/Snakefile"\n    config: config\n\n'
    about += "use rule * from slidemake as slides_*\n\n"
    about += "use rule fit_stain from slidemake as slides_fit_stain with:\n    threads: 1\n"
    (project.folder / "Snakefile").write_text(about)
    target = "results/manifests/tissue/r00000.json"
    found = plan(project.folder, target, "--configfile", "config.yaml", snakefile=project.folder / "Snakefile")
    assert found.code == 0, found.text
    assert found.jobs() == {"slides_screen_slides": 1, "slides_detect_tissue": 1}
    assert [record["status"] for record in project.manifest("tissue")] == ["ok"]
    assert project.json("slidemake.json")["rack_size"] == 16
    assert "of 1 slides 1 computed" in found.text
