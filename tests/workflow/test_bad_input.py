"""Bad input: one clear message that says what to do, a non-zero exit, and nothing that was computed is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from snakemake_run import CONFIG, GRID, Project, environment, stamps

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def spoilable(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One copy of the finished run for all tests below: none of them may change its results."""
    return finished.copy(tmp_path_factory.mktemp("bad_input") / "project")


@pytest.fixture
def refused(spoilable: Project, finished: Project) -> Callable[..., str]:
    """Runs the project and returns what the terminal shows, after checking how a refusal looks."""
    shutil.copy(finished.folder / "slides.csv", spoilable.folder / "slides.csv")
    (spoilable.folder / "config.yaml").unlink()
    spoilable.configure(**CONFIG)
    before = stamps(spoilable.results)

    def run(*arguments: str, **env: str) -> str:
        outcome = spoilable.run(*arguments, **env)
        assert outcome.code != 0
        assert "Traceback" not in outcome.text, outcome.text
        assert "slidemake cannot start." in outcome.text, outcome.text
        assert len(outcome.text.splitlines()) < 20, outcome.text
        assert stamps(spoilable.results) == before
        return outcome.text

    return run


def test_missing_sheet(spoilable: Project, refused: Callable[..., str]):
    (spoilable.folder / "slides.csv").unlink()
    text = refused()
    assert "slides.csv" in text
    assert "write_sheet" in text


def test_missing_label_column(spoilable: Project, refused: Callable[..., str]):
    spoilable.configure(tasks={"tumour": {"label": "diagnoses"}})
    text = refused()
    assert "diagnoses" in text
    assert "diagnosis" in text  # did you mean


def test_missing_required_column(spoilable: Project, refused: Callable[..., str]):
    spoilable.write_sheet([{k: v for k, v in row.items() if k != "path"} for row in spoilable.rows()])
    assert "path" in refused()


def test_several_problems_are_reported_at_once(spoilable: Project, refused: Callable[..., str]):
    rows = spoilable.rows()
    rows[1]["slide_id"] = rows[0]["slide_id"]
    rows[3]["slide_id"] = "../../etc/passwd"
    spoilable.write_sheet([row | {"mpp": "half" if at == 5 else ""} for at, row in enumerate(rows)])
    text = refused()
    assert "P01-A" in text  # twice
    assert "etc/passwd" in text  # a path, not a name
    assert "half" in text  # not a number
    assert all(f"row {row}" in text for row in (3, 5, 7))


def test_labels_with_one_class(spoilable: Project, refused: Callable[..., str]):
    spoilable.write_sheet([row | {"diagnosis": "tumour"} for row in spoilable.rows()])
    assert "one class" in refused()


def test_fewer_patients_than_folds(spoilable: Project, refused: Callable[..., str]):
    spoilable.configure(tasks={"tumour": {"splits": {"folds": 5}}})
    text = refused()
    assert "folds" in text
    assert "4" in text


def test_unknown_encoder(spoilable: Project, refused: Callable[..., str]):
    spoilable.configure(models={"abmil": {"encoder": "efficientnet_lite"}})
    text = refused()
    assert "efficientnet_lite" in text
    assert "did you mean efficientnet_lite0" in text


def test_unknown_configuration_key(spoilable: Project, refused: Callable[..., str]):
    spoilable.configure(tiling={"min_tisue": 0.3}, tisue={"method": "otsu"})
    text = refused()
    assert "did you mean min_tissue" in text
    assert "did you mean tissue" in text


def test_gated_encoder_without_access(spoilable: Project, refused: Callable[..., str], tmp_path: Path):
    """Said before any slide is read: the results of the run before are untouched, and nothing was started."""
    spoilable.configure(models={"abmil": {"encoder": "uni"}})
    text = refused(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert "uni" in text.lower()
    assert "MahmoodLab/UNI" in text
    assert "Building DAG" not in text


def test_results_of_another_format(spoilable: Project, refused: Callable[..., str], finished: Project):
    other = spoilable.folder / "other"
    other.mkdir()
    (other / "slidemake.json").write_text(json.dumps({"format": "slidemake-results", "format_version": 99}))
    (other / "precious.txt").write_text("keep")
    spoilable.configure(output="other")
    text = refused()
    assert "99" in text
    assert "incompatible" in text
    assert sorted(path.name for path in other.iterdir()) == ["precious.txt", "slidemake.json"]


def test_output_inside_a_file(spoilable: Project, refused: Callable[..., str]):
    spoilable.configure(output="slides.csv/results")
    assert "slides.csv" in refused()


def own_mounts() -> bool:
    """Whether this user may mount a file system in a mount namespace of its own."""
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_output_that_cannot_be_written(spoilable: Project, refused: Callable[..., str], tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir()
    prefix: list[str] = []
    if os.geteuid() == 0:  # whom no permission stops; a read-only file system does
        if not own_mounts():
            pytest.skip("this root may not mount a read-only file system")
        prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o ro,size=1m tmpfs "{locked}" && exec "$@"', "sh"]
    else:
        locked.chmod(0o555)
    spoilable.configure(output=str(locked / "results"))
    outcome = spoilable.run(prefix=prefix)
    assert outcome.code != 0
    assert "Traceback" not in outcome.text
    assert "cannot be written" in outcome.text
    assert "output" in outcome.text


def test_demo_sheet_is_not_overwritten(spoilable: Project, refused: Callable[..., str]):
    """`write_sheet` makes a sheet, and never touches one that is there."""
    before = (spoilable.folder / "slides.csv").read_bytes()
    outcome = spoilable.run("write_sheet", "--config", f"slides_folder={spoilable.folder}")
    assert outcome.code != 0
    assert "is there already and is not overwritten" in outcome.text
    assert "Traceback" not in outcome.text
    assert (spoilable.folder / "slides.csv").read_bytes() == before


# -- no space ------------------------------------------------------------------------------------------------------


def check_no_space(text: str) -> None:
    assert "No space" in text, text[-3000:]
    assert "finished slides are kept" in text
    assert "Traceback" not in text


@pytest.mark.skipif(not own_mounts(), reason="needs the right to mount a small file system")
def test_full_disk_ends_the_run_and_the_next_one_goes_on(new_project: Callable[..., Project]):
    """On a file system of 2.5 MB not all tiles fit; with more space the same command finishes, on what was there."""
    project = new_project()
    project.results.mkdir()
    command = project.command("tiles")
    script = """
        mount -t tmpfs -o size=2500k tmpfs results || exit 90
        "$@" > first.txt 2>&1; echo $? > first.code
        ls -i -d results/slides/*/tissue.json results/tiles/*/*.zarr > first.found 2> /dev/null
        mount -o remount,size=200m results || exit 90
        "$@" > second.txt 2>&1; code=$?
        ls -i -d results/slides/*/tissue.json results/tiles/*/*.zarr > second.found 2> /dev/null
        cp -a results kept
        exit $code"""
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command], cwd=project.folder, env=environment(), timeout=900
    )
    assert (project.folder / "first.code").read_text().strip() != "0"
    check_no_space((project.folder / "first.txt").read_text())
    assert ended.returncode == 0, (project.folder / "second.txt").read_text()[-3000:]
    found = ((project.folder / f"{n}.found").read_text() for n in ("first", "second"))
    first, second = ({line.strip() for line in text.splitlines()} for text in found)
    assert any(line.endswith(".zarr") for line in first)
    assert first <= second  # same files, by inode
    assert len(list((project.folder / "kept/tiles" / GRID).glob("*.zarr"))) == 9


def test_file_size_limit_is_no_space_either(new_project: Callable[..., Project]):
    """A quota on the size of files (here 100 kB; a tile store's shard is larger) is nobody's slide's fault."""
    project = new_project(slides=2, tasks=None)
    outcome = project.run("tiles", prefix=["bash", "-c", 'ulimit -f 100; exec "$@"', "bash"])
    assert outcome.code != 0
    check_no_space(outcome.text)
    assert not list((project.results / "tiles").rglob("*.zarr"))
    project.succeed("tiles")
    assert [record["status"] for record in project.manifest("tiles", GRID)] == ["ok", "ok"]
