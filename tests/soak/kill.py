"""Kills the workflow, a job, or the process that computes, at seeded random moments, and runs again.

    python tests/soak/kill.py --moments 60 --seed 0

A trial is a run from slides to report that is killed several times, finished, and compared with a run that nobody
disturbed; in turn the usual one, one with a sweep, background and stress tests, one that applies a bundle (prediction,
its metrics, drift), and one whose slides are fetched. Runs that are killed in the middle of a change are in
`changes.py`. Every other trial starts from the beginning, the others from a copy of the finished run without the
results of some stage and all that follow it, so that late stages are met as often as early ones. How it is killed:

    workflow   SIGKILL to Snakemake and all its jobs, as when a machine goes down
    driver     SIGKILL to Snakemake alone: its jobs go on, beside those of the next run
    job        SIGKILL to a job
    engine     SIGKILL to the process in which a job computes, that of embedding where there is one
    preempt    SIGTERM to Snakemake: it has to end in order

Wrong is: a result that is lost or different, a finished slide that was computed again, a store that was not whole, a
run that needs more than the --unlock that its message names, a preempted run that does not end within
`SECONDS_TO_STOP`. The engine of one job is killed once only: a slide whose process is killed again when it is tried
alone is, as far as anybody can tell, one that eats the memory, and gets a failure record.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from cohort import LOOPBACK, TESTS, differences, make_project, reference_run, slide_site
from faults import finished_projects
from slidemake.workflow.verify import verify
from snakemake_run import ENCODER, GRID, Project, environment, kill_group
from storage_servers import Site

KINDS = {"workflow": 0.3, "driver": 0.2, "job": 0.15, "engine": 0.2, "preempt": 0.15}
MOMENT = 10.0  # s, at most, after the first job of a run has started, or after the kill before
EARLY = 0.1  # share of the kills that may come before there is a job
PER_TRIAL = 10  # kills of one run
STAGES = (  # what a run makes, in order, below results/
    ("slides", "manifests/screen", "manifests/tissue", "manifests/stain"),
    ("cohort/stain_target.json", "tiles", "manifests/tiles"),
    ("embeddings", "manifests/embed"),
    ("cohort", "tasks"),
    ("explain", "manifests/explain"),
    ("report", "predictions"),
)
SECONDS_TO_STOP = 30.0  # of a preempted run; seconds are usual, on a busy machine a few more
PATIENCE = 900.0
FINISHED = {  # stage -> (folder, what a slide's result is called)
    "screen": ("slides", "*/slide.json"),
    "tissue": ("slides", "*/tissue.json"),
    "stain": ("slides", "*/stain.json"),
    "tiles": (f"tiles/{GRID}", "[!.]*.zarr/zarr.json"),
    "embed": (f"embeddings/{ENCODER}", "[!.]*.zarr/zarr.json"),
    "explain": ("explain/tumour/abmil", "[!.]*/explain.json"),
    "train": ("tasks/tumour", "*/bundles/[!.]*/bundle.json"),
}


@dataclass(frozen=True)
class Moment:
    """One kill: how, how long after the start of the run, and what was in work."""

    kind: str
    after: float
    running: str


@dataclass
class Trial:
    """One run, killed again and again, and what was wrong with it."""

    number: int
    moments: list[Moment] = field(default_factory=list)
    unlocked: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest_stop: float = 0.0
    seconds: float = 0.0


def jobs_of(project: Project) -> list[psutil.Process]:
    """Processes of this project's jobs, those that supervise before those that work; also orphans."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(f"{project.folder}/.snakemake/scripts/") for word in words):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def rule_of(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return ""
    name = next((word for word in words if ".snakemake/scripts/" in word), "")
    return Path(name).name.split(".", 1)[-1].removesuffix(".py")


def is_worker(process: psutil.Process) -> bool:
    """Whether this is the process in which a job computes, not the one that supervises it."""
    try:
        parent = process.parent()
        return parent is not None and bool(rule_of(parent)) and rule_of(parent) == rule_of(process)
    except psutil.NoSuchProcess:
        return False


def finished(project: Project) -> dict[str, tuple[int, int, int]]:
    """{result of a slide: (inode, mtime, size)}, without those that say that a slide failed."""
    found = {}
    for folder, pattern in FINISHED.values():
        for path in (project.results / folder).glob(pattern):
            try:
                if '"status": "failed"' not in path.read_text():
                    stat = path.stat()
                    found[str(path)] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            except FileNotFoundError:  # just being replaced
                continue
    return found


class Killer:
    """Runs a project and kills it."""

    def __init__(self, project: Project, target: str, rng: np.random.Generator, trial: Trial):
        self.project, self.target, self.rng, self.trial = project, target, rng, trial
        self.known: dict[str, tuple[int, int, int]] = {}
        self.orphans: set[int] = set()  # jobs that a run left behind
        self.spared: set[int] = set()  # processes that supervise an engine that was killed
        self.twins = False  # a job that was left behind may commit what the next run is computing, too

    def run_and_kill(self) -> bool:
        """One run with one kill or more. Whether it came to its end."""
        started = time.monotonic()
        process = self.project.start(self.target)
        while True:
            kind = str(self.rng.choice(list(KINDS), p=list(KINDS.values())))
            early, pause = self.rng.random() < EARLY, self.rng.uniform(0, MOMENT)
            while not early and process.poll() is None and not self.starting_jobs():
                time.sleep(0.05)
            moment = time.monotonic() + pause
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.02)
            if process.poll() is not None or not self._kill(kind, process, started):
                break
            if kind in ("workflow", "driver", "preempt"):
                break
        process.wait()
        self.check(f"after {self.trial.moments[-1].kind if self.trial.moments else 'nothing'}")
        return process.returncode == 0

    def starting_jobs(self) -> list[psutil.Process]:
        """Jobs of this run, not those that an earlier one left behind."""
        return [job for job in jobs_of(self.project) if job.pid not in self.orphans]

    def _kill(self, kind: str, process: subprocess.Popen, started: float) -> bool:
        """Kill; whether somebody was there to be killed."""
        jobs = jobs_of(self.project)
        victims = [job for job in jobs if is_worker(job) == (kind == "engine")]
        running = ", ".join(sorted({rule_of(job) for job in jobs} - {""})) or "nothing"
        if kind in ("job", "engine"):
            preferred = [job for job in victims if rule_of(job) == "embed_tiles"]
            victims = [job for job in preferred or victims if job.ppid() not in self.spared]
            if not victims:
                return True  # try another moment
            victim = victims[int(self.rng.integers(len(victims)))]
            running = rule_of(victim)
            try:
                self.spared.add(victim.ppid() if kind == "engine" else 0)
                victim.kill()
            except psutil.NoSuchProcess:
                return True
        elif kind == "workflow":
            kill_group(process)
        elif kind == "driver":
            process.kill()
            self.twins = True
            self.orphans |= {job.pid for job in jobs}
        else:
            process.send_signal(signal.SIGTERM)
        after = round(time.monotonic() - started, 2)
        self.trial.moments.append(Moment(kind, after, running))
        if kind == "preempt":
            stopping = time.monotonic()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                kill_group(process)
            took = time.monotonic() - stopping
            self.trial.slowest_stop = max(self.trial.slowest_stop, round(took, 1))
            if took > SECONDS_TO_STOP:
                self.trial.wrong.append(f"{took:.0f} s from SIGTERM to the end, with {running} in work")
            if not self.twins and jobs_of(self.project):
                self.trial.wrong.append("jobs were left behind by a preempted run")
        return True

    def check(self, when: str) -> None:
        """No finished result was written again, and none is less than whole."""
        now = finished(self.project)
        for path, stamp in self.known.items():
            name = Path(path).relative_to(self.project.results).as_posix()
            if path not in now:
                self.trial.lost.append(f"{name} is gone {when}")
            elif now[path] != stamp and not (self.twins and name.startswith("slides/")):
                self.trial.wrong.append(f"{name} was computed again {when}")
        self.known = now
        if not jobs_of(self.project) and (self.project.results / "slidemake.json").exists():
            findings, _ = verify(self.project.results)
            self.trial.wrong += [f"{finding} {when}" for finding in findings]

    def finish(self, limit: int = 4) -> None:
        """Run to the end as a user does: the same command, and what the message says."""
        for _ in range(limit):
            outcome = self.project.run(self.target)
            self.check("in an undisturbed run")
            if outcome.code == 0:
                return
            if not self.unlock(outcome.text):
                self.trial.wrong.append(f"the run does not go on: {outcome.text[-1500:]}")
                return
        self.trial.wrong.append("the run does not go on")

    def unlock(self, text: str) -> bool:
        """Type the command that the message names, if it names one."""
        named = re.search(r"^  snakemake (--unlock .*)$", text, re.MULTILINE)
        if named is None:
            return False
        command = [*self.project.command()[:3], *shlex.split(named[1])]
        ended = subprocess.run(command, cwd=self.project.folder, env=environment(), capture_output=True, text=True)
        self.trial.unlocked += 1
        if ended.returncode:
            self.trial.wrong.append(f"--unlock failed: {ended.stderr[-600:]}")
        return True

    def unlock_if_asked(self) -> None:
        """After a kill the message asks for --unlock, or the run may go on at once. The first time in a trial the
        command is taken from the message; then its effect is enough.
        """
        locks = self.project.folder / ".snakemake" / "locks"
        if self.trial.unlocked:
            for lock in locks.glob("*.lock"):
                lock.unlink()
        elif any(locks.glob("*.lock")):
            outcome = self.project.run(self.target)
            if outcome.code and not self.unlock(outcome.text):
                self.trial.wrong.append(f"no way out is named: {outcome.text[-1500:]}")

    def wait_for_orphans(self) -> None:
        until = time.monotonic() + PATIENCE
        while jobs := jobs_of(self.project):
            if time.monotonic() > until:
                self.trial.wrong.append(f"jobs that were left behind do not end: {[rule_of(job) for job in jobs]}")
                return
            time.sleep(0.2)


def run_trial(number: int, seed: int, folder: Path, reference: Project, moments: int, target: str = "all") -> Trial:
    """One trial with up to `moments` kills. What was wrong keeps its folder."""
    trial, started = Trial(number), time.monotonic()
    rng = np.random.default_rng([seed, number])
    if number % 2 == 0:
        project = make_project(folder / f"trial{number}", reference.rows())
        shutil.copy(reference.folder / "config.yaml", project.folder / "config.yaml")
        if (reference.folder / "bundle").exists():
            shutil.copytree(reference.folder / "bundle", project.folder / "bundle")
    else:
        project = reference.copy(folder / f"trial{number}")
        for names in STAGES[int(rng.integers(1, len(STAGES))) :]:
            for name in names:
                path = project.results / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    killer = Killer(project, target, rng, trial)
    killer.known = finished(project)
    while len(trial.moments) < moments:
        if killer.run_and_kill():
            break
        killer.unlock_if_asked()
    killer.finish()
    killer.wait_for_orphans()
    if killer.twins:
        killer.finish()  # what orphans wrote last is newer than what was made of it
    for difference in differences(reference, project):
        (trial.lost if difference.lost else trial.wrong).append(str(difference))
    trial.seconds = round(time.monotonic() - started, 1)
    if not trial.lost and not trial.wrong:
        shutil.rmtree(project.folder)
    return trial


def run(moments: int, seed: int, folder: Path, first: int = 0, per_trial: int = PER_TRIAL) -> list[Trial]:
    """Trials until there were as many moments; a line of JSON for each goes into `folder`/kill.jsonl."""
    with slide_site(folder, {}) as site:
        os.environ.update(LOOPBACK)
        references = [*finished_projects(folder).values(), fetching_project(folder, site)]
        return run_trials(references, moments, seed, folder, first, per_trial)


def fetching_project(folder: Path, site: Site) -> Project:
    """An undisturbed run of the same slides, at addresses."""
    rows = reference_run(folder).rows()
    site.files.update({f"/{Path(row['path']).name}": Path(row["path"]).read_bytes() for row in rows})
    project = Project(folder / "fetching")
    if not (folder / "fetching.done").exists():
        shutil.rmtree(project.folder, ignore_errors=True)
        make_project(project.folder, [row | {"path": f"{site.address}/{Path(row['path']).name}"} for row in rows])
        project.succeed()
        (folder / "fetching.done").touch()
    return project


def run_trials(
    references: list[Project], moments: int, seed: int, folder: Path, first: int, per_trial: int
) -> list[Trial]:
    """Trials with the references in turn."""
    trials: list[Trial] = []
    while sum(len(trial.moments) for trial in trials) < moments:
        left = moments - sum(len(trial.moments) for trial in trials)
        number = first + len(trials)
        reference = references[number % len(references)]
        trial = run_trial(number, seed, folder, reference, min(per_trial, left))
        trials.append(trial)
        with open(folder / "kill.jsonl", "a") as handle:
            handle.write(json.dumps(asdict(trial)) + "\n")
        told = Counter(moment.kind for moment in trial.moments)
        print(f"trial {trial.number}: {dict(told)}, {trial.seconds:.0f} s", flush=True)
        for what in [*trial.lost, *trial.wrong]:
            print(f"  WRONG {what}", flush=True)
    return trials


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Figures for the table of `make soak`."""
    kinds = Counter(moment.kind for trial in trials for moment in trial.moments)
    return {
        "moments": sum(kinds.values()),
        "kinds": dict(kinds),
        "runs": len(trials),
        "unlocked": sum(trial.unlocked for trial in trials),
        "slowest_stop": max((trial.slowest_stop for trial in trials), default=0.0),
        "lost": sum(len(trial.lost) for trial in trials),
        "wrong": sum(len(trial.wrong) for trial in trials),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to go on in pieces")
    parser.add_argument("--per-trial", type=int, default=PER_TRIAL)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slidemake-kill-"))
    os.chdir(TESTS)
    found = summary(run(options.moments, options.seed, folder, options.first, options.per_trial))
    print(json.dumps(found))
    return int(bool(found["lost"] or found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
