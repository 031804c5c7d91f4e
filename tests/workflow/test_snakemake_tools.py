"""What Snakemake itself offers around a run: lint, report, graph, unlock, and a plan that is cheap."""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections.abc import Callable

import pytest
from snakemake_run import REPO, Project, environment

pytestmark = pytest.mark.workflow

# Findings of --lint that are meant to be there, and why.
JUSTIFIED = {
    "Specify a conda environment or container for each rule": "the rules of the spine do",
    "Param results is a prefix of input or output file but hardcoded": "stores are committed by the jobs themselves, "
    "because Snakemake deletes declared outputs of a job that was killed; the manifest is declared",
    "Param sheet is a prefix of input or output file but hardcoded": "the sheet is an input only where it must exist",
    "Mixed rules and functions in same snakefile": "an input function stands beside the one rule that uses it",
    'Absolute path "/".join([OUTPUT': "not a path: the separator",
    "Environment variable PYTHONPATH used": "added to, for the jobs; a run needs none",
    "Environment variable SLIDEMAKE_SLIDE_SECONDS": "set there, for jobs, because it changes no result",
    "Environment variable SLIDEMAKE_JOB_CPUS used": "set in the line above, for the processes of a cluster's job",
}


def test_lint_finds_nothing_that_is_not_justified(finished: Project):
    outcome = finished.run("--lint")
    findings = re.findall(r"^    \* (.*?)$", outcome.text, re.MULTILINE)
    assert findings, outcome.text
    assert [f for f in findings if not any(f.startswith(known) for known in JUSTIFIED)] == []


def test_every_rule_has_log_and_benchmark(finished: Project):
    text = "\n".join(path.read_text() for path in sorted((REPO / "rules").glob("*.smk")))
    bodies = re.split(r"^ *rule (\w+):", text, flags=re.MULTILINE)
    rules = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    working = {name: body for name, body in rules.items() if "script:" in body}
    assert len(working) > 10
    assert [name for name, body in working.items() if "log:" not in body] == []
    assert [name for name, body in working.items() if "benchmark:" not in body and name != "write_sheet"] == []


def test_report_of_snakemake_holds_ours(project: Project):
    project.succeed("--report", "out.zip")
    with zipfile.ZipFile(project.folder / "out.zip") as archive:
        names = archive.namelist()
    assert any(name.endswith("report.html") for name in names)
    assert any(name.endswith("index.html") for name in names)
    assert any(name.endswith("metrics.csv") for name in names)


def test_graph_of_rules_follows_the_slides(finished: Project):
    text = finished.succeed("--rulegraph").text
    for rule in ("screen_slides", "detect_tissue", "fit_stain", "tile_slides", "embed_tiles", "write_report"):
        assert rule in text


def test_dry_run_leaves_no_trace(new_project: Callable[..., Project]):
    project = new_project()
    assert project.planned()["screen_slides"] == 1
    assert not project.results.exists()


def test_rack_size_one_makes_a_job_per_slide(new_project: Callable[..., Project]):
    jobs = new_project(rack_size=1).planned()
    assert jobs["screen_slides"] == jobs["embed_tiles"] == 12


def test_plan_of_ten_thousand_slides_is_complete(new_project: Callable[..., Project]):
    """The plan is static: all of its jobs are known before the first slide is opened, and nothing is looked up."""
    project = new_project(rack_size=64)
    rows = project.rows()
    project.write_sheet(
        [
            rows[at % 8] | {"slide_id": f"S{at:05d}", "patient_id": f"P{at:05d}", "path": f"slides/S{at:05d}.tiff"}
            for at in range(10_000)
        ]
    )
    measured = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash"]
    outcome = project.run("--dry-run", "--quiet", "rules", prefix=measured)
    assert outcome.code == 0, outcome.text[-2000:]
    assert outcome.jobs()["embed_tiles"] == 157  # ceil(10,000 / 64)


def test_modules_of_cpu_stages_import_no_torch():
    """Half a gigabyte and seconds in every job of the CPU stages, if one of them did."""
    names = ["slides.screening", "tissue.stage", "stain.stage", "tiles.stage", "cohort.table", "splits.make"]
    names += ["evaluation.evaluate", "workflow.plan"]
    program = f"import sys\nfor name in {names}: __import__('slidemake.' + name)\n"
    program += "sys.exit(' '.join(sorted({'torch', 'timm', 'tiatoolbox'} & set(sys.modules))) or 0)"
    found = subprocess.run(
        ["python", "-c", program], env=environment(PYTHONPATH=str(REPO / "scripts")), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
