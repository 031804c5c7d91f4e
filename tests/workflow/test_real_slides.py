"""Real slides (SLIDEMAKE_TEST_DATA): a folder with good and bad ones, and a cohort composed of real tissue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from snakemake_run import ENCODER, Project, cosine, embedding

pytestmark = pytest.mark.workflow

# slide (or the end of its name) -> code of its failure; None: it reaches embeddings
EXPECTED = {
    "cmu-1-small-region": None,
    "cmu-small_dicom": None,
    "prostate_mpp-absurd": "implausible_mpp",
    "cmu-0-overview_mpp3.2": "too_coarse",
    "camelyon-overview_mpp29": "too_coarse",
    "boxes": "implausible_mpp",  # its resolution tag says 72 dpi
    "broken": "unsupported",
    "unopenable": "unsupported",
    "unreadable": "unreadable",
    "small": "no_tissue",  # 16 x 16 px
    "plain-strip-ihc": "no_mpp",
}


def known(slide_id: str) -> str:
    """The name that a slide has in EXPECTED: files of bad/ may carry where they come from in front."""
    return slide_id.rpartition("__")[2]


@pytest.fixture(scope="module")
def real(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The folder of real slides as a cohort: its first sheet by `write_sheet`, then a run to the table."""
    project = Project(tmp_path_factory.mktemp("real") / "project")
    project.folder.mkdir()
    project.configure(tasks=None, models=None, explain=None, max_failed_fraction=1.0)
    project.succeed("write_sheet", "--config", f"slides_folder={real_data / 'slides'}")
    project.succeed("cohort")
    return project


def test_sheet_lists_every_slide(real: Project):
    rows = {known(row["slide_id"]): row for row in real.rows()}
    assert set(rows) == set(EXPECTED)
    assert rows["cmu-1-small-region"]["scan_date"] == "2009-12-29"


def test_each_slide_is_embedded_or_has_the_right_code(real: Project):
    rows = real.table("cohort/slides.csv")
    assert {known(row["slide_id"]): row["failure_code"] or None for row in rows} == EXPECTED
    assert all(row["failure_hint"] for row in rows if row["status"] == "failed")
    stores = {path.stem for path in (real.results / "embeddings" / ENCODER).glob("*.zarr")}
    assert stores == {slide for slide, code in EXPECTED.items() if code is None}


def test_failed_fraction_ends_the_run(real: Project, tmp_path: Path):
    project = real.copy(tmp_path / "project")
    project.configure(max_failed_fraction=0.2)
    outcome = project.run("cohort")
    assert outcome.code != 0
    assert "max_failed_fraction" in outcome.text
    assert len(project.table("cohort/failures.csv")) == 9


def test_svs_and_dicom_of_one_tissue_agree(real: Project):
    """The same region by two formats: the same tiles, and nearly the same features.

    The DICOM is the SVS compressed once more with its colour at half resolution, which moves a tissue pixel by 6.7 grey
    levels on average. So a single tile is compared by whether it finds its twin, and the slide by its mean.
    """
    svs, xy, about = embedding(real, "cmu-1-small-region")
    dicom, other, about_other = embedding(real, "cmu-small_dicom")
    assert about["tile_level0_px"] == about_other["tile_level0_px"]
    places = {tuple(place): at for at, place in enumerate(xy.tolist())}
    pairs = [(places[tuple(place)], at) for at, place in enumerate(other.tolist()) if tuple(place) in places]
    assert len(pairs) >= 0.95 * max(len(svs), len(dicom))
    mine, theirs = svs[[at for at, _ in pairs]], dicom[[at for _, at in pairs]]
    assert cosine(mine.mean(axis=0, keepdims=True), theirs.mean(axis=0, keepdims=True))[0] >= 0.99
    assert cosine(mine, theirs).mean() >= 0.96
    every = np.array([cosine(tile[None], theirs) for tile in mine])
    assert np.array_equal(every.argmax(axis=1), np.arange(len(mine)))


@pytest.mark.slow
def test_composed_cohort_is_learned_and_its_tumour_found(real_data: Path, tmp_path: Path):
    """24 slides of real benign tissue, half with a focus of real adenocarcinoma, patients sharing no source tissue."""
    tool = real_data.parent / "tools" / "compose_cohort.py"
    if not tool.exists():
        pytest.skip(f"{tool} is not there")
    subprocess.run([sys.executable, str(tool), "cohort", "--slides", "24"], cwd=tmp_path, check=True)
    project = Project(tmp_path)
    task = {"label": "label", "positive": "1", "splits": {"folds": 5, "repeats": 1}, "models": ["auto"]}
    project.configure(sheet="cohort/slides.csv", rack_size="auto", tasks={"tumour": None}, models=None, tissue=None)
    project.configure(tasks={"cancer": task}, evaluation=None)
    project.configure(explain={"slides": "positive", "truth": "{folder}/{stem}_tumour16.png"})
    project.succeed()
    models = project.json("tasks/cancer/metrics.json")["models"]
    auroc = {name: model["scopes"]["pooled"]["metrics"]["auroc"] for name, model in models.items()}
    assert auroc["auto"]["value"] >= 0.88
    assert auroc["auto"]["value"] > auroc["mean_pool_lr"]["value"] + 0.1
    assert auroc["shuffled_label"]["low"] <= 0.5 <= auroc["shuffled_label"]["high"]
    found = [record["tile_auroc"] for record in project.manifest("explain", "cancer", "auto")]
    assert len(found) == 12
    assert np.median(found) >= 0.8
