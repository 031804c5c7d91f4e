"""The report without a run: hostile text is escaped, empty cohorts are legal, large ones stay readable."""

import re

import pytest
from slidemake.cohort_table import FAILURE_COLUMNS, write_table
from slidemake.provenance import write_json
from slidemake.report import slide_cards, stage_times, write_report

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def results(tmp_path):
    rows = []
    for name, site, status in (("s1", HOSTILE, "ok"), ("s2", "B", "failed"), ("s3", "B", "ok")):
        row = {"slide_id": name, "path": "p", "patient_id": name, "site": site, "mpp": "0.5", "mpp_source": "file"}
        row |= {"status": status, "failure_code": "no_tissue" if status == "failed" else "", "width": "10"}
        rows.append({**row, "height": "20", "tissue_mm2": "1.5", "stain_fit": "macenko", "tiles_224px_0.5mpp": "7"})
    write_table(tmp_path / "cohort" / "slides.csv", rows)
    failure = {"slide_id": "s2", "stage": "tissue", "code": "no_tissue", "message": f"a {HOSTILE}", "hint": "look"}
    write_table(tmp_path / "cohort" / "failures.csv", [failure], FAILURE_COLUMNS)
    records = [
        {"slide_id": "s1", "status": "ok", "seconds": 2.0, "tiles": 7},
        {"slide_id": "s3", "status": "ok", "seconds": 9.0, "tiles": 7, "reused": True},
        {"slide_id": "s2", "status": "failed", "failure": failure},
    ]
    manifest = {"stage": "tiles", "rack": "r00000", "slides": records}
    write_json(tmp_path / "manifests" / "tiles" / "g" / "r00000.json", manifest)
    return tmp_path


def make(results, **changes):
    out = results / "report" / "index.html"
    about = {
        "title": f"A {HOSTILE} title",
        "tasks": {},
        "manifests": [str(results / "manifests" / "tiles" / "g" / "r00000.json")],
        "config": {"key": HOSTILE},
        "encoders": {"e": {"architecture": "a", "weights_sha256": "b"}},
        "stain_pictures": [],
        "command": "snakemake --cores all",
    }
    write_report(results, out, **{**about, **changes})
    return out.read_text()


def test_what_comes_from_outside_is_escaped(results):
    page = make(results)
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # title, heading, site, message
    assert "default-src 'none'" in page


def test_nothing_is_fetched(results):
    page = make(results)
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\((?!data:)", page)


def test_slides_found_finished_do_not_count_as_work(results):
    (stage,) = stage_times(results, [str(results / "manifests" / "tiles" / "g" / "r00000.json")])
    assert (stage["slides"], stage["reused"], stage["seconds"], stage["tiles"]) == (1, 1, 2.0, 7)
    assert stage["rate"] == 3.5


def test_a_large_cohort_shows_failed_slides_first(results):
    rows = [{"slide_id": f"s{i}", "status": "failed" if i == 7 else "ok"} for i in range(9)]
    assert [card["row"]["slide_id"] for card in slide_cards(results, rows, 2)] == ["s7", "s0"]
    assert [card["row"]["slide_id"] for card in slide_cards(results, rows, 9)] == [f"s{i}" for i in range(9)]


def test_an_empty_cohort_is_legal(results):
    (results / "cohort" / "slides.csv").write_text("slide_id,path,patient_id,status\n")
    write_table(results / "cohort" / "failures.csv", [], FAILURE_COLUMNS)
    page = make(results, manifests=[])
    assert "every slide was processed" in page
