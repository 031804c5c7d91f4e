"""The table of the cohort: first failure wins, duplicates, exclusion, the limit on failures."""

from functools import partial

import pytest
from slidemake.cohort.table import FAILURE_COLUMNS, check_failed_fraction, cohort_rows, failure_rows
from slidemake.core.failures import RunError, SlideFailure
from slidemake.core.files import write_json
from slidemake.core.tables import read_table, write_table
from slidemake.stain.stage import judgement_columns


def ok(slide_id, **figures):
    return {"slide_id": slide_id, "status": "ok", "failure": None, **figures}


def failed(slide_id, stage, code):
    return {
        "slide_id": slide_id,
        "status": "failed",
        "failure": SlideFailure(code, "m").record(slide_id, stage).as_dict(),
    }


@pytest.fixture
def rows(tmp_path):
    sheet = [{"slide_id": name, "path": f"{name}.svs", "patient_id": name, "mpp": ""} for name in "abcde"]
    write_json(tmp_path / "slides" / "a" / "slide.json", {"mpp": 0.25, "vendor": "aperio", "identity": "x"})
    write_json(tmp_path / "slides" / "a" / "tissue.json", {"area_mm2": 12.5})
    write_json(tmp_path / "slides" / "a" / "stain.json", {"status": "none", "reason": "single_stain"})
    manifests = {
        "screen": [ok("a"), ok("b"), failed("c", "screen", "no_mpp"), ok("d")],
        "tissue": [ok("a"), failed("b", "tissue", "no_tissue"), failed("c", "screen", "no_mpp"), ok("d")],
        "tiles g": [ok("a", tiles=7, corrupt=1), failed("b", "tissue", "no_tissue"), ok("d", tiles=3, corrupt=0)],
    }
    return cohort_rows(sheet, manifests, tmp_path, {"d": "a"})


def test_status_and_reason_of_every_slide(rows):
    found = {row["slide_id"]: (row["status"], row["failure_code"], row["failure_stage"]) for row in rows}
    assert found == {
        "a": ("ok", "", ""),
        "b": ("failed", "no_tissue", "tissue"),
        "c": ("failed", "no_mpp", "screen"),
        "d": ("failed", "duplicate", "cohort"),
        "e": ("excluded", "", ""),
    }
    a = rows[0]
    assert (a["mpp"], a["vendor"], a["tissue_mm2"], a["stain_fit"]) == (0.25, "aperio", 12.5, "single_stain")
    assert (a["tiles_g"], a["corrupt_tiles"], a["site"]) == (7, 1, "")


def test_a_slide_whose_stain_is_refused_says_so(tmp_path):
    """As its manifest has it: the record's status is the fit's, `none`."""
    sheet = [{"slide_id": "a", "path": "a.svs", "patient_id": "a", "mpp": ""}]
    empty = dict.fromkeys(("stain_matrix", "max_concentrations", "lab_mean", "lab_std"))
    fit = {"status": "none", "reason": "not_he", "method": "macenko", "white_point": [255.0] * 3, "tissue": {}, **empty}
    write_json(tmp_path / "slides" / "a" / "stain.json", {"slide_id": "a", **fit})
    target = {"status": "ok", "method": "macenko", "hash": "h", "white_point": [255.0] * 3}
    manifests = {"screen": [ok("a")], "stain": [{**ok("a"), "status": "none", "reason": "not_he"}]}
    of_stain = partial(judgement_columns, tmp_path, target)
    (row,) = cohort_rows(sheet, manifests, tmp_path, {}, of_stain)
    assert (row["status"], row["stain_fit"], row["stain_applied"], row["stain_reason"]) == (
        "ok",
        "not_he",
        "none",
        "not_he",
    )
    (row,) = cohort_rows(
        sheet,
        {**manifests, "stain": [failed("a", "stain", "unreadable")]},
        tmp_path,
        {},
        partial(judgement_columns, tmp_path, target),
    )
    assert "stain_applied" not in row


def test_tables_go_round(rows, tmp_path):
    write_table(tmp_path / "slides.csv", rows)
    again = read_table(tmp_path / "slides.csv")
    assert [row["slide_id"] for row in again] == list("abcde")
    assert again[1]["tiles_g"] == ""
    write_table(tmp_path / "failures.csv", failure_rows(rows), FAILURE_COLUMNS)
    assert [row["code"] for row in read_table(tmp_path / "failures.csv")] == ["no_tissue", "no_mpp", "duplicate"]
    write_table(tmp_path / "none.csv", [], FAILURE_COLUMNS)
    assert (tmp_path / "none.csv").read_text() == "slide_id,stage,code,message,hint\n"


def test_too_many_failures_end_the_run_with_what_to_do(rows):
    counts = check_failed_fraction(rows, 0.75, "failures.csv")
    assert counts == {
        "slides": 4,
        "failed": 3,
        "codes": {"no_tissue": 1, "no_mpp": 1, "duplicate": 1},
        "fraction": 0.75,
        "allowed": 0.75,
    }
    with pytest.raises(RunError, match=r"3 of 4 slides failed: 1 duplicate, 1 no_mpp, 1 no_tissue\. More than max"):
        check_failed_fraction(rows, 0.74, "failures.csv")
    assert check_failed_fraction([], 0.0, "failures.csv")["fraction"] == 0.0
