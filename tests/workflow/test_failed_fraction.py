"""More bad slides than `max_failed_fraction` allows end the run, and what was computed stays."""

from __future__ import annotations

import shutil

import pytest
from snakemake_run import Project, stamps

pytestmark = pytest.mark.workflow


def test_too_many_failures_end_the_run(project: Project):
    project.configure(max_failed_fraction=0.1)
    before = stamps(project.results / "embeddings")
    outcome = project.run()
    assert outcome.code != 0
    assert "3 of 12 slides failed" in outcome.text
    assert "1 no_mpp, 1 no_tissue, 1 truncated" in outcome.text
    assert "results/cohort/failures.csv" in outcome.text
    assert "raise max_failed_fraction" in outcome.text
    assert "Traceback" not in outcome.text
    assert len(project.table("cohort/failures.csv")) == 3
    assert stamps(project.results / "embeddings") == before
    project.configure(max_failed_fraction=0.5)  # the remedy
    assert "embed_tiles" not in project.planned()
    project.succeed("cohort")


def test_missing_files_and_scans_given_twice_are_failures_of_their_slides(project: Project):
    rows = project.rows()
    again = shutil.copy(rows[0]["path"], project.folder / "again.tiff")
    rows[1]["path"] = str(project.folder / "gone.tiff")
    rows[3]["path"] = str(again)
    project.write_sheet(rows)
    project.succeed("cohort")
    failures = {row["slide_id"]: row for row in project.table("cohort/failures.csv")}
    codes = {"P02-A": "missing_file", "P03-A": "duplicate", "P03-B": "no_mpp", "P06-B": "no_tissue"}
    assert {slide: row["code"] for slide, row in failures.items()} == {**codes, "P07-B": "truncated"}
    assert "gone.tiff" in failures["P02-A"]["message"]
    assert "P01-A" in failures["P03-A"]["message"]
