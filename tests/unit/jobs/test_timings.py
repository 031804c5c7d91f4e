"""The lines that jobs leave of what they did: written by threads and twins, cut short, damaged, read again."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from slidemake.jobs import timings
from slidemake.jobs.racks import run_rack
from slidemake.jobs.timings import JobRun, fold, job_runs, lines

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def log_file(tmp_path):
    path = tmp_path / "results" / "logs" / "tile_slides" / "224px_0.5mpp" / "r00000.log"
    path.parent.mkdir(parents=True)
    yield path
    timings._diary = None


def events(log_file):
    return list(lines(log_file.with_suffix(".jsonl").read_text()))


def job_in_a_process(tmp_path, body):
    """A rule's script in a process of its own, as Snakemake runs it; returns its results folder and exit code."""
    log_file = tmp_path / "results" / "logs" / "tile_slides" / "r00000.log"
    code = f"""
        import os, signal, sys
        from types import SimpleNamespace
        from slidemake.jobs.job import job
        from slidemake.jobs.racks import run_rack
        from slidemake.core.failures import SlideFailure
        slides = [{{"slide_id": n, "status": "ok"}} for n in "abc"]
        fake = SimpleNamespace(log=[{str(log_file)!r}], rule="tile_slides", threads=2, resources={{"mem_mb": 700}},
                               wildcards={{"rack": "r00000"}})
        def work(record):
            {body}
            return {{"fingerprint": "f"}}
        with job(fake):
            run_rack("tiles", {str(tmp_path / "m.json")!r}, slides, work, rack="r00000")
    """
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    return tmp_path / "results", ended


def test_a_job_leaves_its_times_cpu_and_memory(tmp_path):
    eat = "hold = bytearray(150 << 20); hold[::4096] = b'x' * len(hold[::4096]); sum(range(3_000_000))"
    results, ended = job_in_a_process(tmp_path, eat)
    assert ended.returncode == 0, ended.stderr
    (run,) = job_runs(results)
    assert (run.rule, run.wildcards, run.threads, run.declared_mb) == ("tile_slides", {"rack": "r00000"}, 2, 700)
    assert (run.code, run.slides, run.seen, run.reused, run.failed) == (0, 3, {"a", "b", "c"}, 0, 0)
    assert 150 < run.mb < 600
    assert run.cpu > 0
    assert run.seconds > 0
    assert run.fraction == 1.0


def test_failures_are_one_line_each_on_the_terminal_and_in_the_record(tmp_path):
    fail = "if record['slide_id'] == 'b': raise SlideFailure('no_mpp', 'no um per pixel')"
    results, ended = job_in_a_process(tmp_path, fail)
    assert ended.returncode == 0
    assert ended.stderr.count("no_mpp: no um per pixel") == 1
    assert len(ended.stderr.splitlines()) == 1, "slides that went well are in the log file alone"
    assert " a: ok" in (results / "logs/tile_slides/r00000.log").read_text()
    (run,) = job_runs(results)
    assert (run.failed, len(run.seen)) == (1, 3)
    (line,) = [e for e in events(results / "logs/tile_slides/r00000.log") if e.get("outcome") == "failed"]
    assert (line["slide_id"], line["code"], line["message"]) == ("b", "no_mpp", "no um per pixel")


@pytest.mark.skipif(sys.platform != "linux", reason="work in a process of its own is for Linux")
def test_a_killed_job_has_no_end_and_its_next_run_appends(tmp_path):
    results, ended = job_in_a_process(
        tmp_path, "if record['slide_id'] == 'b': os.kill(os.getppid(), 9); signal.pause()"
    )
    assert ended.returncode == -9
    (killed,) = job_runs(results)
    assert (killed.code, killed.seen, killed.cpu) == (None, {"a"}, None)
    assert killed.fraction == pytest.approx(1 / 3)
    job_in_a_process(tmp_path, "pass")
    first, second = job_runs(results)
    assert (first.code, second.code, second.fraction) == (None, 0, 1.0)


def test_a_crash_costs_its_slide_and_the_record_says_so(tmp_path):
    results, ended = job_in_a_process(tmp_path, "if record['slide_id'] == 'b': os.kill(os.getpid(), 11)")
    assert ended.returncode == 0, ended.stderr
    (run,) = job_runs(results)
    assert (run.code, run.seen, run.failed) == (0, {"a", "b", "c"}, 1)


def test_a_job_that_fails_ends_with_its_code(tmp_path):
    results, ended = job_in_a_process(tmp_path, "raise SystemExit(3)")
    assert ended.returncode == 3
    (run,) = job_runs(results)
    assert run.code == 3
    assert run.fraction == 0.0


def test_damaged_lines_are_passed_over(log_file):
    good = {"event": "start", "run": "x", "time": 5.0, "rule": "r", "wildcards": {}, "threads": 1, "mem_mb": None}
    slide = {"event": "slide", "run": "x", "time": 6.0, "slide_id": "a", "outcome": "ok", "seconds": 1}
    torn = json.dumps(slide)[:30]
    odd = [
        "[1, 2]",
        "7",
        '{"event": 3}',
        '{"event": "slide"}',
        '{"event": "slide", "run": "x", "time": "soon", "slide_id": "b", "outcome": "ok"}',
        '{"event": "end", "run": "x", "time": 9}',
        '{"event": "end", "run": "y", "time": 9, "code": 0, "cpu_seconds": 1, "max_rss_mb": 1}',
        '{"event": "start", "run": "z", "time": 1}',
        '{"event": "start", "run": ["z"], "time": 1, "rule": "r", "wildcards": {}, "threads": 1}',
        '{"event": "rack", "run": "x", "time": 1e12, "slides": 9}',
        '{"event": "rack", "run": "x", "time": NaN, "slides": 9}',
        '{"event": "start", "run": "z", "time": 1, "rule": "$a_{", "wildcards": {}, "threads": 1}',
        "\0\0\0",
        "[" * 100_000,
    ]
    text = "\n".join([json.dumps(good), *odd, json.dumps(slide), torn])
    log_file.with_suffix(".jsonl").write_bytes(text.encode() + b"\xff\xfe")
    (run,) = job_runs(log_file.parents[3])
    assert (run.started, run.ended, run.code, run.seen) == (5.0, 6.0, None, {"a"})


def test_a_start_begins_a_line_whatever_a_killed_job_left(log_file):
    path = log_file.with_suffix(".jsonl")
    path.write_text('{"event": "slide", "run": "old", "ti')
    timings.start(log_file, "tile_slides", {"rack": "r00000"}, 1, None)
    timings.end(0, forked=False)
    assert [e["event"] for e in events(log_file)] == ["start", "end"]
    (run,) = job_runs(log_file.parents[3])
    assert run.code == 0


def test_threads_write_whole_lines(log_file, tmp_path):
    timings.start(log_file, "tile_slides", {"rack": "r00000"}, 8, 10)
    slides = [{"slide_id": f"slide-{n:04d}" * 12, "status": "ok"} for n in range(400)]
    run_rack("tiles", tmp_path / "m.json", slides, lambda r: {}, threads=8)
    written = log_file.with_suffix(".jsonl").read_text().strip().splitlines()
    assert len(written) == len(list(lines("\n".join(written)))) == 2 + 2 * 400  # begin and end of each slide
    runs: dict[str, JobRun] = {}
    fold(runs, events(log_file))
    (run,) = runs.values()
    assert len(run.seen) == run.slides == 400


def test_a_record_that_cannot_be_written_is_told_once_and_stops_nothing(log_file, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(timings.log, "warning", lambda message, *values: told.append(message % values))
    log_file.with_suffix(".jsonl").mkdir()
    timings.start(log_file, "tile_slides", {}, 1, None)
    assert [message.endswith("are not recorded") for message in told] == [True]
    timings.event("slide", slide_id="a")
    timings.end(0, forked=False)
    log_file.with_suffix(".jsonl").rmdir()
    timings.start(log_file, "tile_slides", {}, 1, None)
    os.close(timings._diary.file)
    told.clear()
    timings.event("rack", slides=1)
    timings.event("rack", slides=1)
    assert ["no longer recorded" in message for message in told] == [True]


def test_a_file_that_has_grown_for_years_begins_anew(log_file, monkeypatch):
    monkeypatch.setattr(timings, "LARGEST", 400)
    for _ in range(6):
        timings.start(log_file, "tile_slides", {}, 1, None)
        timings.end(0, forked=False)
        assert log_file.with_suffix(".jsonl").stat().st_size < 400 + 600
    assert 1 <= len(job_runs(log_file.parents[3])) < 6


def test_without_a_log_file_nothing_is_recorded():
    timings.start(None, "write_sheet", {}, 1, None)
    timings.event("rack", slides=1)
    assert timings._diary is None


def test_results_without_any_record(tmp_path):
    assert job_runs(tmp_path) == []
