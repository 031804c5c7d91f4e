"""The report without a run: hostile text is escaped, empty cohorts are legal, large ones stay readable."""

import json
import re

import pytest
from slidemake.cohort.table import FAILURE_COLUMNS
from slidemake.core.files import write_json
from slidemake.core.tables import write_table
from slidemake.jobs.timings import job_runs
from slidemake.report.page import slide_cards, stage_times, template_environment, training_section, write_report
from slidemake.report.timeline import POINTS, busy_times, running, timeline_section, working_time

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


def test_what_models_say_of_their_training_is_told_once(tmp_path):
    """Models that say the same share a sentence; the control on shuffled labels, which must fail, says nothing."""
    same = {"level": "note", "code": "epoch_last", "text": "The last epoch was kept."}
    own = {"level": "warning", "code": "never_falls", "text": f"It never fell {HOSTILE}."}
    for model, findings in (("a", [same]), ("b", [own, same]), ("shuffled_label", [own])):
        write_json(tmp_path / model / "train.json", {"findings": findings})
    found = training_section(tmp_path, ["a", "b", "shuffled_label", "untrained"])
    assert [(line["level"], line["text"]) for line in found] == [
        ("note", "Training of a, b: The last epoch was kept."),
        ("warning", f"Training of b: It never fell {HOSTILE}."),
    ]


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


def job_lines(results, name, *runs):
    """Lines of a job's runs: (rule, start, seconds, exit code or None, memory in MB)."""
    path = results / "logs" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (rule, start, seconds, code, mb) in enumerate(runs):
        about = {"rule": rule, "wildcards": {}, "threads": 2, "mem_mb": 1500}
        lines.append({"event": "start", "run": f"{n}", "time": start, **about})
        slide = {"event": "slide", "slide_id": "s1", "outcome": "ok", "seconds": 1}
        lines.append({**slide, "run": f"{n}", "time": start + seconds})
        if code is not None:
            ended = {"code": code, "cpu_seconds": seconds, "max_rss_mb": mb}
            lines.append({"event": "end", "run": f"{n}", "time": start + seconds, **ended})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_timeline_of_two_sessions(results):
    assert timeline_section(results) is None
    job_lines(results, "tile_slides/r0", ("tile_slides", 1000, 40, None, 0), ("tile_slides", 90_000, 60, 0, 300))
    job_lines(results, "tile_slides/r1", ("tile_slides", 1010, 50, 0, 500))
    job_lines(results, "embed_tiles/r1", ("embed_tiles", 1030, 30, 1, 900))
    job_lines(results, "write_report", ("write_report", 90_060, 0, None, 0))  # the job that writes this very report
    section = timeline_section(results)
    # 1000 to 1060, then 90,000 to 90,060: two sessions of a minute each.
    assert (section["seconds"], section["sessions"], section["cpu"], section["mb"]) == (120, 2, 140, 900)
    tiles, embed = section["stages"]
    wanted = {"rule": "tile_slides", "jobs": 2, "killed": 1, "failed": 0, "slides": 3, "seconds": 150, "median": 55}
    assert tiles == tiles | wanted | {"longest": 60, "cpu": 110, "use": 0.5, "mb": 500, "typical_mb": 400}
    assert (embed["jobs"], embed["failed"], embed["declared_mb"]) == (0, 1, 1500)
    page = make(results)
    assert 'href="#timeline"' in page
    assert "<td>55 s, 60 s</td>" in page
    assert "<td>400, 500, 1,500 MB</td>" in page
    assert "<td>1, 0</td>" in page


def test_jobs_side_by_side_by_hand(results):
    # 0 to 4 and 2 to 6: one, two, one; a pause of 100 s is cut out; then one from 6 (106) to 8.
    job_lines(results, "a", ("r", 0, 4, 0, 1), ("r", 2, 4, 0, 1), ("r", 106, 2, 0, 1))
    runs = job_runs(results)
    sessions = busy_times(runs)
    assert sessions == [(0, 6), (106, 108)]
    assert working_time([1, 6, 50, 106, 107], sessions).tolist() == [1, 6, 6, 6, 7]
    times, jobs = running(runs, sessions)
    assert times.tolist() == [0, 2, 4, 6, 6, 8]
    assert jobs.tolist() == [1, 2, 1, 0, 1, 0]


def test_thousands_of_jobs_are_drawn_in_few_steps(results):
    job_lines(results, "a", *[("r", n * 10, 5, 0, 1) for n in range(4000)])
    runs = job_runs(results)
    sessions = busy_times(runs)
    times, jobs = running(runs, sessions)
    assert len(times) == len(jobs) == POINTS + 1
    # The area under the curve is the time that jobs ran: 4,000 times 5 s.
    assert float((jobs[:-1] * (times[1:] - times[:-1])).sum()) == pytest.approx(20_000, rel=1e-6)
    assert len(timeline_section(results)["figure"]) < 200_000


def test_counts_of_labels_that_are_numbers_are_told_from_the_labels():
    counts = template_environment().filters["counts"]
    assert counts({"benign": 12, "tumour": 17}) == "12 benign, 17 tumour"
    assert counts({"1": 2, "2": 4}) == "label 1: 2, label 2: 4"


def test_a_verdict_about_many_models_is_folded():
    alike = template_environment().filters["alike"]
    lines = [{"level": "note", "code": "size", "text": "few"}]
    lines += [{"level": "warning", "code": "not_better", "text": f"m{i}"} for i in range(5)]
    lines += [
        {"level": "good", "code": "not_better", "text": "another level"},
        {"level": "note", "code": "end", "text": ""},
    ]
    assert alike(lines) == [(lines[0], []), (lines[1], lines[2:6]), (lines[6], []), (lines[7], [])]
    assert alike(lines[:4]) == [(line, []) for line in lines[:4]]
    assert alike([]) == []
