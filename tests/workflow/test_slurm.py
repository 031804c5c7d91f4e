"""A cohort on a real Slurm, from slides to the report, with the accidents of a real cluster on the way.

A cluster of one node is started for this file (`slurm_cluster`), and the workflow is sent to it with profiles/slurm. In
every stage a job is held where it commits a slide, and then something happens to it: it is requeued, cancelled, loses
the process that watches it, its node, or the node's slurmd. Nothing here depends on when: a job is held for as long as
a file is there. In the end the results must be those of an undisturbed run on one machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Job, cluster, die_with_parent, missing, wait_for
from snakemake_run import CONFIG, ENCODER, GRID, PATIENCE, REPO, Project, contents, environment, stamps

pytestmark = pytest.mark.workflow

DRIVER = Path(__file__).with_name("impatient_snakemake.py")
RACK = "r00000"
HELD, DONE = "P02-A", "P01-A"  # the slide at whose commit jobs are held, and the one before it

HOLDS = """
import os, re, sys, time
folder = os.environ["TEST_HOLDS"]
def held(rename):
    def patient(source, target, **options):
        for name in os.listdir(folder) if "SLURM_JOB_ID" in os.environ else ():
            hold = os.path.join(folder, name)
            try:
                here = name.endswith(".hold") and re.search(open(hold).read(), str(target))
            except FileNotFoundError:
                continue
            if here:
                open(f"{hold}.{os.environ['SLURM_JOB_ID']}.{os.getpid()}", "w").close()
                while os.path.exists(hold):
                    time.sleep(0.05)
        return rename(source, target, **options)
    return patient
os.replace, os.rename = held(os.replace), held(os.rename)

from importlib.machinery import PathFinder
class NoDevices:  # the cluster's GPU is one by name only: jobs that are given it compute on the CPU
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "slidemake.jobs.devices":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def executed(module):
            execute(module)
            module.cuda_devices = lambda: []
        spec.loader.exec_module = executed
        return spec
sys.meta_path.insert(0, NoDevices)
"""
# Why a file may differ from the undisturbed run's. All else is the same, byte for byte.
MAY_DIFFER = {
    r"logs/|benchmarks/": "what the jobs said, and their measured times",
    r"manifests/": "other racks, times, and whether a slide was found finished: compared apart from these",
    r"slidemake\.json": "the size of the racks",
    r"digests/|plan\.json": "what determined each rack and what follows; racks are others here",
    r"tasks/\w+/\w+/train\.json": "the time it took: compared apart from that",
    r"run\.lock": "who ran last, and when",
    r"report/": "tells times, and how many slides were found finished",
}
DIFFERS_PER_RUN = ("seconds", "tiles_per_second", "reused", "checksum")  # keys of records


@dataclass
class Story:
    """A run on the cluster: what was done to it, and what came of it."""

    project: Project
    cluster: Cluster
    driver: subprocess.Popen | None = None
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # accident -> stamps of what was finished
    victims: dict[str, str] = field(default_factory=dict)  # accident -> Slurm's id of the job
    jobs: list[Job] = field(default_factory=list)

    @property
    def terminal(self) -> str:
        return (self.project.folder / "terminal.txt").read_text()

    @property
    def holds(self) -> Path:
        return self.project.folder / "holds"

    def environment(self) -> dict[str, str]:
        hook = self.project.folder / "hook"
        path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = environment(PYTHONPATH=path, TEST_HOLDS=str(self.holds))
        return {**env, "PATH": os.pathsep.join([str(self.cluster.bin), env["PATH"]])}

    def start_driver(self, *more: str) -> None:
        """Start Snakemake with profiles/slurm as it is, and what this cluster has not: accounts, and accounting."""
        arguments = ["--workflow-profile", str(REPO / "profiles" / "slurm"), "--cores", "2", "--latency-wait", "20"]
        arguments += ["--slurm-no-account", "--slurm-status-command", "squeue", *more]
        with open(self.project.folder / "terminal.txt", "ab") as terminal:
            self.driver = subprocess.Popen(
                [sys.executable, str(DRIVER), *arguments, "-s", str(REPO / "Snakefile"), "--configfile", "config.yaml"],
                cwd=self.project.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

    def kill_driver(self) -> None:
        assert self.driver
        self.driver.kill()
        self.driver.wait()

    def hold(self, name: str, commit: str) -> None:
        """Hold jobs where they commit what matches a pattern."""
        (self.holds / f"{name}.hold").write_text(commit)

    def release(self, name: str) -> None:
        (self.holds / f"{name}.hold").unlink()

    def held(self, name: str, jobs: int = 1) -> list[str]:
        """Wait until so many jobs are held; returns Slurm's ids of them."""

        def found() -> list[str]:
            assert self.driver
            assert self.driver.poll() is None, f"Snakemake ended\n{self.terminal[-6000:]}"
            ids = {path.name.split(".")[2] for path in self.holds.glob(f"{name}.hold.*")}
            return sorted(ids, key=int) if len(ids) >= jobs else []

        try:
            return wait_for(f"{jobs} jobs held by {name}", found, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.terminal[-3000:]}\n{self.cluster.logs()}") from error

    def finish(self, accident: str, *results: str) -> None:
        """Wait until the slide before the held one is committed (threads work side by side), and note its files."""
        paths = [self.project.results / result for result in results]
        wait_for(f"{results}", lambda: all(path.exists() for path in paths), PATIENCE)
        self.finished[accident] = committed_files(paths)

    def gone(self, name: str) -> None:
        """Wait until the processes that a hold held are gone."""
        pids = [path.name.split(".")[3] for path in self.holds.glob(f"{name}.hold.*")]
        wait_for(f"the end of {pids}", lambda: not any(_runs(pid) for pid in pids))

    def succeed(self) -> None:
        assert self.driver
        code = self.driver.wait(timeout=PATIENCE)
        assert code == 0, f"{self.terminal[-6000:]}\n{self.cluster.logs()}"


def _runs(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def committed_files(paths: list[Path]) -> dict[str, Any]:
    """{file: stamp} of files, and of all files of folders: equal only if nothing was written again."""
    found: dict[str, Any] = {}
    for path in paths:
        if path.is_dir():
            found |= {f"{path}/{name}": stamp for name, stamp in stamps(path).items()}
        else:
            found[str(path)] = stamps(path.parent)[path.name]
    return found


@pytest.fixture(scope="module")
def story(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The cohort of `finished`, run on a cluster."""
    if lacking := missing():
        pytest.skip(f"Slurm is not installed (no {', '.join(lacking)}): apt-get install slurm-wlm munge")
    pytest.importorskip("snakemake_executor_plugin_slurm")
    project = Project(tmp_path_factory.mktemp("slurm") / "project")
    for folder in (project.folder, project.folder / "hook", project.folder / "holds"):
        folder.mkdir()
    (project.folder / "hook" / "sitecustomize.py").write_text(HOLDS)
    project.configure(**{**CONFIG, "rack_size": 6})
    project.write_sheet(finished.rows())
    with cluster() as running:
        story = Story(project, running)
        try:
            tell(story)
            story.jobs = running.jobs()
        finally:
            if story.driver and story.driver.poll() is None:
                story.kill_driver()
        yield story


def tell(story: Story) -> None:
    """Run the cohort, with an accident in every stage."""
    slurm = story.cluster
    story.hold("requeued", rf"slides/{HELD}/slide\.json$")
    story.hold("cancelled", rf"slides/{HELD}/tissue\.json$")
    story.hold("twin", rf"tiles/{GRID}/{HELD}\.zarr$")
    story.hold("node", rf"embeddings/{ENCODER}/{HELD}\.zarr$")
    story.hold("slurmd", r"tasks/tumour/abmil/train\.json$")
    story.start_driver("--jobs", "1")
    assert story.driver
    assert story.driver.wait(timeout=PATIENCE) != 0
    story.start_driver()

    (job,) = story.held("requeued")  # as preemption does it
    story.victims["requeued"] = job
    story.finish("requeued", f"slides/{DONE}/slide.json")
    slurm.command("scontrol", "requeue", job)
    story.gone("requeued")
    story.release("requeued")

    (job,) = story.held("cancelled")
    story.victims["cancelled"] = job
    story.finish("cancelled", f"slides/{DONE}/tissue.json", f"slides/{DONE}/tissue.png")
    slurm.command("scancel", job)
    story.gone("cancelled")
    story.release("cancelled")

    (job,) = story.held("twin")  # its driver dies; the next one does not know that it runs
    story.victims["twin"] = job
    story.finish("twin", f"tiles/{GRID}/{DONE}.zarr")
    story.kill_driver()
    story.project.succeed("--unlock")
    story.start_driver()
    story.victims["other twin"] = next(other for other in story.held("twin", jobs=2) if other != job)
    story.release("twin")

    (job,) = story.held("node")
    story.victims["node"] = job
    story.finish("node", f"embeddings/{ENCODER}/{DONE}.zarr")
    slurm.kill_node()
    story.gone("node")
    story.release("node")
    slurm.start_node()

    (job,) = story.held("slurmd")
    story.victims["slurmd"] = job
    slurm.kill_slurmd()
    slurm.start_daemon("slurmd")
    story.release("slurmd")

    story.succeed()


def job(story: Story, accident: str) -> Job:
    (found,) = [job for job in story.jobs if job.id == story.victims[accident]]
    return found


def records(folder: Path) -> dict[str, Any]:
    """{manifest folder: {slide: record}} without what differs from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        for record in json.loads(path.read_text())["slides"]:
            stage = path.parent.relative_to(folder).as_posix()
            found.setdefault(stage, {})[record["slide_id"]] = without_times(record)
    return found


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in DIFFERS_PER_RUN}


def test_results_are_those_of_an_undisturbed_local_run(story: Story, finished: Project):
    mine, theirs = contents(story.project.results), contents(finished.results)
    compared = [name for name in theirs if not any(re.match(pattern, name) for pattern in MAY_DIFFER)]
    assert len(compared) > 100
    assert [name for name in compared if name not in mine] == []
    assert [name for name in compared if mine[name] != theirs[name]] == []
    left = {name for name in mine if not any(re.match(pattern, name) for pattern in MAY_DIFFER)}
    assert left == set(compared)  # no half-written file either
    assert records(story.project.results / "manifests") == records(finished.results / "manifests")
    for path in sorted((finished.results / "tasks").rglob("train.json")):
        there = story.project.results / path.relative_to(finished.results)
        assert without_times(json.loads(there.read_text())) == without_times(json.loads(path.read_text()))
    assert "<h1" in mine["report/index.html"].decode()


def test_every_byte_is_as_it_was_written(story: Story):
    from slidemake.workflow.verify import verify

    findings, _ = verify(story.project.results)
    assert findings == []


def test_finished_slides_were_not_computed_again(story: Story):
    assert set(story.finished) == {"requeued", "cancelled", "twin", "node"}
    for accident, before in story.finished.items():
        assert before, accident
        assert committed_files([Path(path) for path in before]) == before, accident


def test_requeued_job_goes_on_and_snakemake_does_not_notice(story: Story):
    victim = job(story, "requeued")
    assert (victim.state, victim.fields["Restarts"]) == ("COMPLETED", "1")
    assert "Error in rule screen_slides" not in story.terminal


def test_cancelled_job_is_sent_again_with_more_memory_and_time(story: Story):
    victim = job(story, "cancelled")
    assert victim.state == "CANCELLED"
    assert "Error in rule detect_tissue" in story.terminal
    again = [j for j in story.jobs if j.rule == f"detect_tissue_wildcards_{RACK}" and int(j.id) > int(victim.id)]
    assert [j.state for j in again] == ["COMPLETED"]
    assert memory(again[0]) == 2 * 2000
    assert minutes(again[0]) == 2 * minutes(victim) == 2 * (10 + 2 * 6)
    log = story.project.folder / "slurm_logs" / "rule_detect_tissue"
    assert "received SIGTERM" in "".join(path.read_text() for path in log.rglob("*.log"))


def test_twins_do_not_harm_each_other(story: Story):
    first, second = job(story, "twin"), job(story, "other twin")
    assert {first.state, second.state} == {"COMPLETED"}
    assert first.rule.startswith("tile_slides")
    assert second.rule.startswith("tile_slides")
    seconds = {path.name for path in story.holds.glob("twin.hold.*")}
    assert len(seconds) == 2  # both were about to commit the same slide


def test_job_of_a_dead_node_is_run_again(story: Story):
    victim = job(story, "node")
    assert (victim.state, victim.fields["Restarts"]) == ("COMPLETED", "1")
    assert "Error in rule embed_tiles" not in story.terminal


def test_job_outlives_slurmd(story: Story):
    victim = job(story, "slurmd")
    assert (victim.state, victim.fields["Restarts"]) == ("COMPLETED", "0")


def test_embedding_asks_for_a_gpu_and_goes_to_its_partition(story: Story):
    for found in story.jobs:
        gpu = found.rule.startswith("embed_tiles")
        assert found.fields["Partition"] == ("gpu" if gpu else "cpu"), found.rule
        assert ("gpu:1" in found.fields.get("TresPerJob", "")) == gpu, found.rule


def test_racks_of_a_stage_are_one_array(story: Story):
    arrays = [found for found in story.jobs if found.rule.startswith("screen_slides")]
    assert [found.fields["ArrayTaskId"] for found in sorted(arrays, key=lambda j: j.fields["ArrayTaskId"])] == [
        "1",
        "2",
    ]
    assert len({found.fields["ArrayJobId"] for found in arrays}) == 1
    assert {found.fields["NumCPUs"] for found in arrays} == {"2"}


def test_arrays_that_would_hang_do_not_start(story: Story):
    assert "jobs=1 would make them hang" in story.terminal


def memory(job: Job) -> int:
    """MB that a job asked for."""
    return int(re.search(r"mem=(\d+)M", job.fields["TRES"])[1])  # type: ignore[index]


def minutes(job: Job) -> int:
    hours, minutes, _ = job.fields["TimeLimit"].split(":")
    return 60 * int(hours) + int(minutes)
