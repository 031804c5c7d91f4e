"""Every profile: its options are Snakemake's, and the cohort can be planned with it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake_run import PER_SLIDE, REPO, Project, environment

pytestmark = pytest.mark.workflow

PROFILES = sorted(path.parent.name for path in (REPO / "profiles").glob("*/profile.yaml"))
# Laid over another profile (--profile), or instead of profiles/default (--workflow-profile).
OVERLAYS = ("apptainer", "conda")
# What Snakemake asks these programs before it plans. The real ones are not needed for a plan, nor to be had here.
STAND_INS = {
    "conda": """case "$*" in
        "info --json") echo '{"conda_prefix": "/opt/conda", "platform": "linux-64"}' ;;
        "--version") echo "conda 25.1.1" ;;
        *) echo '{"get": {"channel_priority": "strict"}}' ;;
    esac""",
    "apptainer": 'echo "apptainer version 1.3.6"',
}


def profile(name: str) -> dict[str, Any]:
    """Options of a profile, without the template's own words."""
    found = yaml.safe_load((REPO / "profiles" / name / "profile.yaml").read_text())
    return {key: value for key, value in found.items() if not key.startswith("__")}


@pytest.fixture
def stand_ins(tmp_path: Path) -> str:
    """PATH with programs that are asked for and not used."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), environment()["PATH"]])


@pytest.mark.parametrize("name", PROFILES)
def test_options_are_those_of_snakemake(name: str):
    from snakemake.cli import get_argument_parser

    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    assert [key for key in profile(name) if f"--{key}" not in known] == []


def test_profiles_that_replace_the_default_keep_what_it_is_for():
    kept = {"scheduler", "rerun-incomplete", "keep-going", "show-failed-logs"}
    default = profile("default")
    for name in set(PROFILES) - set(OVERLAYS):
        assert {key: profile(name).get(key) for key in kept} == {key: default[key] for key in kept}, name


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("default", b"sheet: s.csv\nremote: &r {a: *r}", "line 2: *r holds itself"),
        ("gpu", b"a: " + b"[" * 5000, "nested more than 50 deep"),
        ("slurm", "sheet: Präparate.csv".encode("latin-1"), "mine.yaml is not UTF-8 (line 1). Save it as UTF-8"),
    ],
)
def test_configuration_is_looked_at_before_snakemake_reads_it(name: str, content: bytes, says: str, tmp_path: Path):
    """Which would end in a traceback."""
    (tmp_path / "mine.yaml").write_bytes(content)
    command = ["snakemake", "--snakefile", str(REPO / "Snakefile"), "--configfile", "mine.yaml", "--cores", "1"]
    command += ["--workflow-profile", str(REPO / "profiles" / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "slidemake cannot start." in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", PROFILES)
def test_cohort_is_planned(name: str, new_project: Callable[..., Project], stand_ins: str):
    option = "--profile" if name in OVERLAYS else "--workflow-profile"
    outcome = new_project().run("--dry-run", option, str(REPO / "profiles" / name), PATH=stand_ins)
    assert outcome.code == 0, outcome.text[-3000:]
    jobs = outcome.jobs()
    assert jobs["embed_tiles"] == jobs["write_report"] == 1
    if name == "conda":
        assert re.search(r"Conda environment \S*envs/slidemake.yaml will be created", outcome.text)


def test_overlays_go_together_with_slurm(new_project: Callable[..., Project], stand_ins: str):
    both = ["--profile", str(REPO / "profiles/conda"), "--workflow-profile", str(REPO / "profiles/slurm")]
    outcome = new_project().run("--dry-run", *both, PATH=stand_ins)
    assert outcome.code == 0, outcome.text[-3000:]
    assert "Conda environment" in outcome.text


def test_rules_name_their_environment():
    """For --software-deployment-method conda; a rule that does not runs in the environment of Snakemake itself."""
    text = "\n".join(path.read_text() for path in sorted((REPO / "rules").glob("*.smk")))
    bodies = re.split(r"^ *rule(?: (\w+))?:\n", text, flags=re.MULTILINE)
    rules = {name or "embed_tiles": body for name, body in zip(bodies[1::2], bodies[2::2], strict=True)}
    of_the_cohort = ("cohort_table", "check_cohort", "split_cohort", "pack_bags", "train_aggregator", "evaluate")
    for name in (*PER_SLIDE, *of_the_cohort, "explain_slides", "predict_slides", "write_report"):
        assert '"../envs/slidemake.yaml"' in rules[name], name


def test_partitions_for_slurm_are_what_its_plugin_reads():
    from snakemake_executor_plugin_slurm.partitions import read_partition_file

    config = REPO / "profiles" / "slurm" / profile("slurm")["slurm-partition-config"]
    partitions = {partition.name: partition.limits for partition in read_partition_file(config)}
    assert partitions["cpu"].max_gpu == 0
    assert partitions["cpu"].max_runtime == 24 * 60
    assert partitions["gpu"].max_gpu == 8


def test_executor_without_a_shared_file_system_is_refused(new_project: Callable[..., Project]):
    storage = [
        "--shared-fs-usage",
        "sources",
        "--default-storage-provider",
        "s3",
        "--default-storage-prefix",
        "s3://x/y",
    ]
    outcome = new_project().run(
        "--dry-run", "--workflow-profile", str(REPO / "profiles" / "slurm"), *storage, PATH=environment()["PATH"]
    )
    assert outcome.code != 0
    assert "need a file system that they all share" in outcome.text
    assert "Traceback" not in outcome.text


def test_pod_runs_a_cohort(new_project: Callable[..., Project], tmp_path: Path):
    """The command of profiles/kubernetes/job.yaml, in a shell: the paths of the image are those of this repository."""
    job = yaml.safe_load((REPO / "profiles" / "kubernetes" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    names = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    gpus = next(entry["value"] for entry in container["env"] if entry["name"] == "GPUS")
    assert int(gpus) == container["resources"]["limits"]["nvidia.com/gpu"]
    (script,) = container["args"]
    assert set(re.findall(r"/opt/slidemake/\S+", script)) == {
        "/opt/slidemake/Snakefile",
        "/opt/slidemake/profiles/gpu",
    }
    script = script.replace("/opt/slidemake", shlex.quote(str(REPO))).replace(
        "exec snakemake", "exec snakemake --dry-run"
    )
    project = new_project()
    (project.folder / "config.yaml").rename(project.folder / "mine.yaml")
    ended = subprocess.run(
        [*container["command"], script],
        cwd=project.folder,
        env=environment(CPUS="32", GPUS=gpus),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert re.search(r"^embed_tiles +1$", ended.stdout, re.MULTILINE)
