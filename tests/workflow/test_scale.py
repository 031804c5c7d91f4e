"""What a plan costs as cohorts grow, counted and not timed: calls, looks at files, jobs, memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from snakemake_run import PER_SLIDE, REPO, Outcome, Project, environment

sys.path.insert(0, str(REPO / "benchmarks"))

from stand_ins import stand_in_rows, touch_slides, write_sheet

pytestmark = pytest.mark.workflow

SIZES = (64, 128, 256)
# A dry run of a new cohort, completion by stand-ins, the run with nothing to do, counted:
# {step: [calls, stats, lists and openings]}
COUNT = """
import cProfile, json, os, pstats, subprocess, sys
from snakemake.cli import main as snakemake
common = ["--snakefile", sys.argv[1] + "/Snakefile", "--cores", "2", "--configfile", "config.yaml", "--quiet"]
os.chdir(sys.argv[2])
found = {}
def counted(step, arguments):
    profile = cProfile.Profile()
    try:
        profile.runcall(snakemake, [*arguments, *common])
    except SystemExit as end:
        assert not end.code, end.code
    calls = pstats.Stats(profile)
    def of(*looks):
        return sum(row[1] for (_, _, name), row in calls.stats.items() if any(look in name for look in looks))
    stats, others = of("posix.stat", "posix.lstat"), of("posix.listdir", "posix.scandir", "io.open")
    found[step] = [calls.prim_calls, stats, others]
counted("new", ["--dry-run"])
subprocess.run([sys.executable, sys.argv[1] + "/benchmarks/stand_ins.py", *common], check=True)
counted("nothing to do", [])
json.dump(found, open("counts.json", "w"))
"""


def cohort(folder, slides, rack_size, files=True):
    project = Project(folder)
    folder.mkdir()
    task = {"label": "label", "positive": "tumour", "splits": {"folds": 2, "repeats": 1}}
    project.configure(rack_size=rack_size, tasks={"tumour": None, "outcome": task})
    rows = stand_in_rows(slides)
    write_sheet(folder / "slides.csv", rows)
    if files:
        touch_slides(folder, rows)
    return project


def counts(project):
    command = [sys.executable, "-c", COUNT, str(REPO), str(project.folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads((project.folder / "counts.json").read_text())


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Counts of three cohorts, each twice as large as the one before, in racks of four."""
    base = tmp_path_factory.mktemp("grown")
    counts(cohort(base / "first", 16, 4))  # Python compiles what is new here, and looks at more files
    return [counts(cohort(base / f"of{size}", size, 4)) for size in SIZES]


@pytest.mark.parametrize("step", ["new", "nothing to do"])
@pytest.mark.parametrize("what", ["calls", "looks at files"])
def test_the_plan_grows_linearly(grown, step, what):
    """Twice the slides more cost twice the calls more; a part that is quadratic would show (it did, by 7 %)."""
    small, medium, large = (found[step][what != "calls"] for found in grown)
    assert medium > small
    assert (large - medium) / (medium - small) == pytest.approx(2, rel=0.03)


def test_few_looks_at_files(grown):
    """On a network file system a look can cost a millisecond. Here a rack of four slides has six jobs, and what each of
    them was made with is one more file to open and one to look at."""
    for step in ("new", "nothing to do"):
        stats, others = ((grown[2][step][n] - grown[1][step][n]) / (SIZES[2] - SIZES[1]) for n in (1, 2))
        assert stats <= 12, f"{stats} looks at files for each slide"
        assert others <= 6, f"{others} lists and openings for each slide"


# The peak of a child counts the process that it was forked from: a small one, not a test session of gigabytes.
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stderr=subprocess.STDOUT)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def test_ten_thousand_slides(tmp_path):
    """Planned in 157 racks, a job for each and stage, in less than 500 MB."""
    project = cohort(tmp_path / "large", 10_000, "auto", files=False)
    with open(tmp_path / "terminal.txt", "w") as out:
        command = project.command("--dry-run", "--quiet", "rules")
        watched = [sys.executable, "-c", PEAK, *command]
        done = subprocess.run(
            watched, cwd=project.folder, stdout=out, stderr=subprocess.PIPE, env=environment(), text=True
        )
    text = (tmp_path / "terminal.txt").read_text()
    assert done.returncode == 0, text[-3000:] + done.stderr
    jobs = Outcome(0, text).jobs()
    assert {rule: jobs[rule] for rule in PER_SLIDE} == dict.fromkeys(PER_SLIDE, 157)
    assert sum(jobs.values()) < 157 * 6 + 20
    assert int(done.stderr.split()[-1]) / 1024 < 500


def test_appended_slides_concern_the_racks_they_fall_in(tmp_path):
    """Ten slides more in a finished cohort of 40 in racks of 16: they fill the third rack, and open a fourth."""
    project = cohort(tmp_path / "cohort", 40, 16)
    finish = ("--quiet", "--snakefile", str(REPO / "Snakefile"), "--cores", "2", "--configfile", "config.yaml")
    program = str(REPO / "benchmarks" / "stand_ins.py")
    subprocess.run([sys.executable, program, *finish], cwd=project.folder, env=environment(), check=True)
    assert project.planned() == {}
    rows = stand_in_rows(50)
    touch_slides(project.folder, rows)
    write_sheet(project.folder / "slides.csv", rows)
    jobs = project.planned()
    assert {rule: jobs[rule] for rule in PER_SLIDE} == dict.fromkeys(PER_SLIDE, 2)
