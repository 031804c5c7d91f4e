"""What is told of a run while it goes on: Snakemake's events, lines of jobs, and estimates that keep their word."""

import json
import logging
import random
import re
import statistics
import threading
import time

import pytest
from slidemake.core.words import duration
from slidemake.jobs.racks import Machine
from slidemake.workflow.progress import Estimate, Stage, Watch, estimate
from slidemake.workflow.summary import slides_in_plan


def test_an_estimate_by_hand():
    # Three jobs took 10, 12 and 14 s: mean 12, sd 2. Four are left, two at a time: 24 s. The mean of four future jobs
    # beside the mean of three: 4.30 (t, 2 degrees of freedom) * 2 * sqrt(1/3 + 1/4) = 6.57 s per job, 13.1 s for two.
    found = estimate([(1, 10), (1, 12), (1, 14)], left=4, side_by_side=2)
    assert found.seconds == pytest.approx(24)
    assert (found.low, found.high) == (pytest.approx(24 - 13.14, abs=0.05), pytest.approx(24 + 13.14, abs=0.05))


def test_parts_of_jobs_count_as_parts():
    # 0.25 of a job in 5 s, and a whole one in 20 s: 20 s a job, and no spread at all.
    found = estimate([(1, 20), (0.25, 5)], left=2.75, side_by_side=1)
    assert found.seconds == pytest.approx(55)
    assert found.low == found.high == pytest.approx(55)


def test_fewer_jobs_than_places():
    assert estimate([(1, 60)], left=1, side_by_side=8).seconds == 60, "one job does not get faster by seven idle places"
    assert estimate([(1, 60)], left=0.5, side_by_side=8).seconds == 30
    assert estimate([(1, 60)], left=16, side_by_side=8).seconds == 120


def test_nothing_known_is_said():
    assert estimate([], 3, 1) is None
    assert str(estimate([(1, 60)], 3, 1)) == "about 3 min left (judged by one job)"
    assert estimate([(1, 60)], 0, 1) == Estimate(0, 0, 0)
    assert estimate([(1, 0), (1, 0)], 3, 1) == Estimate(0, 0, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.2, "1 s"), (8.4, "8 s"), (44, "45 s"), (89, "90 s"), (120, "2 min"), (3500, "58 min")],
        *[(7300, "2 h 0 min"), (12_400, "3 h 20 min"), (50_000, "14 h"), (200_000, "2 d 8 h"), (3599, "1 h 0 min")],
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_estimates_keep_their_word(spread):
    """Simulated stages, of which a part is done: the estimate is right on average, and the range holds 95 of 100.

    Log-normal job times, 400 stages: the share of ranges that hold is within 0.95 - 4 * sqrt(0.95 * 0.05 / 400) = 0.906
    for a normal mean; skewed times cost some of that, so that 0.88 is asked for.
    """
    chance, inside, ratios = random.Random(7), 0, []
    for _ in range(400):
        total, done = chance.randint(12, 150), chance.randint(3, 10)
        times = [chance.lognormvariate(4, spread) for _ in range(total)]
        found = estimate([(1, t) for t in times[:done]], total - done, 1)
        truth = sum(times[done:])
        inside += found.low <= truth <= found.high
        ratios.append(found.seconds / truth)
    assert inside / 400 > 0.88
    assert statistics.mean(ratios) == pytest.approx(1, abs=0.05)


# -- the watch ---------------------------------------------------------------------------------------------------------


class Run:
    """A run as Snakemake logs it, and jobs as they leave lines."""

    def __init__(self, folder, machine, **stats):
        self.folder, self.said = folder, []
        self.watch = Watch(machine, every=3600, tell=self.said.append)
        self.log("run_info", stats={**stats, "total": sum(stats.values())})
        self.watch.begin(stats)
        self.watch.end()  # the thread; tests look themselves

    def log(self, event, **about):
        record = logging.makeLogRecord({"event": event, **about})
        self.watch.handle(record)

    def start(self, jobid, rule, rack, threads=1):
        path = self.folder / f"{rule}/{rack}.log"
        path.parent.mkdir(exist_ok=True)
        about = {"rule_name": rule, "wildcards": {"rack": rack}, "threads": threads, "log": [str(path)]}
        self.log("job_info", jobid=jobid, **about)
        return path.with_suffix(".jsonl")

    def report(self):
        """The report, whatever the time since the run began."""
        return [re.sub("running for [^,;]+", "running", line) for line in self.watch.report()]

    @staticmethod
    def write(path, run, slides, every, outcome="ok", end=None, of=4):
        """Lines of a job that began at 1000 and did a slide every so many seconds."""
        start = {"event": "start", "run": run, "time": 1000, "rule": "r", "wildcards": {}, "threads": 1, "mem_mb": 9}
        rows = [start, {"event": "rack", "run": run, "time": 1000, "stage": "tiles", "slides": of}]
        about = {"code": "no_mpp", "message": "none"} if outcome == "failed" else {}
        for n in range(slides):
            row = {"event": "slide", "run": run, "time": 1000 + every * (n + 1), "slide_id": f"{run}{n}"}
            rows.append({**row, "outcome": outcome, "seconds": every, **about})
        if end is not None:
            rows.append({"event": "end", "run": run, "time": end, "code": 0, "cpu_seconds": 1.0, "max_rss_mb": 100})
        with open(path, "a") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))


def test_progress_of_a_run_on_one_machine(tmp_path):
    run = Run(tmp_path, Machine(cores=4), tile_slides=4, embed_tiles=4, write_report=1)
    assert run.report() == []
    first = run.start(1, "tile_slides", "r0", threads=2)
    run.watch.look()
    assert run.report() == [
        "slidemake: running; not yet known: tile_slides, embed_tiles, write_report",
        "slidemake:   tile_slides       0/4 jobs                         no estimate yet",
    ]
    run.write(first, "a", slides=2, every=10)
    run.watch.look()
    # Half a rack in 20 s: 40 s a rack; 3.5 racks are left, two side by side (4 cores, 2 threads): 70 s.
    assert run.report() == [
        "slidemake: running, at least 70 s left; not yet known: embed_tiles, write_report",
        "slidemake:   tile_slides       0/4 jobs, 2 slides               about 70 s left (judged by one job)",
    ]
    first.unlink()
    run.write(first, "a", slides=4, every=10, end=1040)
    run.log("job_finished", job_id=1)
    second = run.start(2, "tile_slides", "r1", threads=2)
    run.write(second, "b", slides=4, every=10, end=1040)
    run.log("job_finished", job_id=2)
    assert run.report()[1] == (
        "slidemake:   tile_slides       2/4 jobs, 8 slides               about 40 s left"  # alike: no range
    )
    run.start(3, "tile_slides", "r2", threads=2)
    run.log("job_error", jobid=3)
    assert "2/4 jobs, 8 slides, 1 jobs failed" in run.report()[1]
    for jobid, rule in enumerate(["tile_slides", *["embed_tiles"] * 4, "write_report"], start=4):
        run.write(run.start(jobid, rule, f"r{jobid}"), f"j{jobid}", slides=4, every=5, end=1020)
        run.log("job_finished", job_id=jobid)
    assert run.report() == []


def test_the_end_of_a_run_tells_of_slides_and_of_a_report_that_was_written(tmp_path):
    run = Run(tmp_path, Machine(cores=4), screen_slides=2, tile_slides=1, write_report=1)
    for jobid, outcome in [(1, "reused"), (2, "ok")]:
        run.write(run.start(jobid, "screen_slides", f"r{jobid}"), "a", slides=3, every=1, outcome=outcome, end=1010)
        run.log("job_finished", job_id=jobid)
    run.write(run.start(3, "tile_slides", "r1"), "a", slides=1, every=1, outcome="failed", end=1010)
    run.log("job_finished", job_id=3)
    # a0 failed at a later stage, a1 and a2 were computed by one job and found by another
    assert run.watch.summary(tmp_path, 5) == ["of 5 slides 2 computed, 1 failed, 2 not looked at"]
    run.start(4, "write_report", "")
    run.log("job_error", jobid=4)
    assert len(run.watch.summary(tmp_path, 5)) == 1, "no report was written"
    run.start(4, "write_report", "")
    run.log("job_finished", job_id=4)
    assert run.watch.summary(tmp_path, 5)[1] == f"the report is {tmp_path}/report/index.html"


def test_a_plan_is_told_in_slides(tmp_path):
    racks = {"r0": ["a", "b"], "r1": ["c", "d", "e"], "r2": ["f"]}
    for name in "abc":
        (tmp_path / "slides" / name).mkdir(parents=True)
    planned = [{"a": "found", "b": "failed"}, {"a": "found", "b": "looked at"}, dict.fromkeys("cde", "looked at")]
    assert slides_in_plan(racks, planned, tmp_path) == (
        "of 6 slides 2 will be computed for the first time, 2 will be looked at (computed where a change concerns "
        "them, else found finished), 1 will be found finished, 1 are not concerned"
    )
    assert slides_in_plan(racks, [{"a": "failed", "d": "failed"}, {"c": "computed"}], tmp_path) == (
        "of 6 slides 2 will be computed (1 of them new), 1 failed, and nothing has changed of them, 3 are not concerned"
    )
    assert slides_in_plan(racks, [], tmp_path / "none") == "of 6 slides 6 are not concerned"
    assert slides_in_plan({}, [], tmp_path) is None
    told = []
    watch = Watch(Machine(), tell=told.append)
    watch.on_plan = lambda: "of 6 slides 6 are not concerned"
    watch.emit(logging.makeLogRecord({"event": "run_info", "stats": {"total": 0}}))
    assert told == ["slidemake: of 6 slides 6 are not concerned"]


def test_a_slide_that_is_long_in_work_is_named(tmp_path):
    run = Run(tmp_path, Machine(cores=1), tile_slides=1)
    path = run.start(1, "tile_slides", "r0")
    run.write(path, "a", slides=1, every=1)
    with open(path, "a") as handle:
        for slide_id, ago in (("a0", 900), ("a1", 300), ("a2", 5)):
            began = {"event": "begin", "run": "a", "time": time.time() - ago, "slide_id": slide_id}
            handle.write(json.dumps(began) + "\n")
        handle.write(json.dumps({**began, "event": "slide", "slide_id": "a0", "outcome": "ok"}) + "\n")
    run.watch.look()
    assert run.report()[2:] == ["slidemake:     slide a1 has been in work for 5 min"]


def test_earlier_runs_of_a_job_do_not_count(tmp_path):
    run = Run(tmp_path, Machine(cores=1), tile_slides=2)
    path = tmp_path / "tile_slides" / "r0.jsonl"
    path.parent.mkdir()
    run.write(path, "old", slides=4, every=1000, end=9000)
    run.start(1, "tile_slides", "r0")
    run.watch.look()
    assert "0/2 jobs  " in run.report()[1]
    assert "no estimate yet" in run.report()[1]
    run.write(path, "new", slides=4, every=5, end=1020)
    run.log("job_finished", job_id=1)
    assert "about 20 s left" in run.report()[1]


def test_a_job_that_is_tried_again_is_left_to_do(tmp_path):
    run = Run(tmp_path, Machine(cores=1), tile_slides=2)
    run.write(run.start(1, "tile_slides", "r0"), "a", slides=4, every=5, end=1020)
    run.log("job_finished", job_id=1)
    run.start(2, "tile_slides", "r1")
    run.log("job_error", jobid=2)
    assert run.report() == [], "nothing is left that can be done"
    run.write(run.start(2, "tile_slides", "r1"), "b", slides=2, every=5)
    run.watch.look()
    assert " ".join(run.report()[1].split()) == "slidemake: tile_slides 1/2 jobs, 6 slides about 10 s left"


def test_a_torn_line_is_read_when_it_is_whole(tmp_path):
    run = Run(tmp_path, Machine(cores=1), tile_slides=2)
    path = run.start(1, "tile_slides", "r0")
    run.write(path, "a", slides=4, every=5)
    text = path.read_text()
    for cut in range(0, len(text), 37):
        path.write_text(text[:cut])
        run.watch.look()
    path.write_text(text)
    run.watch.look()
    assert "4 slides" in run.report()[1]


def test_on_a_cluster_each_failure_is_told_once_as_it_happens(tmp_path):
    run = Run(tmp_path, Machine(cores=4, cluster=True), tile_slides=8)
    paths = [run.start(jobid, "tile_slides", f"r{jobid}") for jobid in range(3)]
    run.write(paths[0], "a\u001b[31m", slides=1, every=3, outcome="failed")
    run.watch.look()
    run.watch.look()
    assert run.said == ["slidemake: tile_slides r0: slide a\\x1b[31m0 failed (no_mpp): none"]
    run.write(paths[0], "a\u001b[31m", slides=1, every=3, outcome="failed")
    run.log("job_error", jobid=0)
    assert len(run.said) == 1
    assert run.watch.side_by_side("tile_slides") == 3, "as many as ran at a time"


def test_gpus_limit_embedding(tmp_path):
    run = Run(tmp_path, Machine(cores=16, gpus=2), embed_tiles=8, embed_tiles_224px=3, tile_slides=8)
    for jobid, rule in enumerate(["embed_tiles", "embed_tiles_224px", "tile_slides"]):
        run.start(jobid, rule, "r0", threads=2)
    assert [run.watch.side_by_side(rule) for rule in ("embed_tiles", "embed_tiles_224px", "tile_slides")] == [2, 2, 8]


def test_odd_events_do_not_stop_a_run(tmp_path, capsys):
    run = Run(tmp_path, Machine(), tile_slides=1)
    run.log("job_info", jobid=1)
    assert "KeyError" in capsys.readouterr().err, "a defect is shown, by logging's own means"
    run.log("job_finished", job_id=77)
    run.log("job_info", jobid=2, rule_name="new_rule", wildcards=None, threads=None, log=None)
    run.log("job_finished", job_id=2)
    run.log("progress", done=1, total=2)
    run.log(None)
    assert isinstance(run.watch.stages["new_rule"], Stage)


def test_a_dry_run_is_not_followed(tmp_path):
    watch = Watch(Machine())
    watch.handle(logging.makeLogRecord({"event": "job_info", "jobid": 1}))
    assert watch.jobs == {}
    watch.end()


def test_the_thread_tells_and_ends(tmp_path):
    told = threading.Event()
    said = []
    watch = Watch(Machine(cores=1), every=0.01, tell=lambda text: (said.append(text), told.set()))
    watch.handle(logging.makeLogRecord({"event": "run_info", "stats": {"tile_slides": 2, "all": 1, "total": 3}}))
    watch.begin(["tile_slides"])
    about = {"jobid": 1, "rule_name": "tile_slides", "wildcards": {}, "threads": 1, "log": []}
    watch.handle(logging.makeLogRecord({"event": "job_info", **about}))
    assert told.wait(60)
    watch.end()
    assert not watch._thread.is_alive()
    assert "tile_slides" in said[0]
    assert "all" not in said[0].split()
    assert len(said) == 1, "what has not changed is not told again"


def test_no_reports_when_they_are_not_wanted():
    watch = Watch(Machine(), every=0)
    watch.begin(["tile_slides"])
    assert watch._thread is None
