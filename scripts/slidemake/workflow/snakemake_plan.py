"""Which jobs a run has to do: Snakemake's plan, decided by what determined results (`currency`) and not by times.

`attach` puts itself between Snakemake's list of jobs and its choice among them. Snakemake then runs, in a dry run as in
a real one, every job whose outcome is not what is wanted, and those that follow it. It looks at no time of a file: a
copy, a backup, another clock change nothing. This is the only module that knows Snakemake's insides.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from slidemake.core.currency import (
    DERIVED,
    NO_RECORD,
    Outcome,
    Tree,
    content,
    digest_of,
    identity,
    plan_entry,
    record_file,
    settings_of,
    why_stale,
    write_plan,
    write_record,
)
from slidemake.core.files import read_json_if_whole
from slidemake.workflow.slide_fates import FAILED, Digests, fates, fates_of_current, slide_digests

SHOWN = 6  # reasons that a plan tells
SPINE = ("screen_slides", "detect_tissue", "tile_slides")  # what fails here is not worked on by what follows


class Currency:
    """The outcomes of a run's plan, by Snakemake's jobs, and why those that are not current are not."""

    def __init__(self, workflow: Any, results: Path, in_job: bool):
        self.workflow, self.results, self.in_job = workflow, results, in_job
        self.outcomes: dict[Any, Outcome] = {}
        self.stale: dict[Any, str] = {}
        self.racks: dict[str, list[str]] = {}  # {rack: slides}
        self.excluded: set[str] = set()  # slides that no job works on
        self.owners: Callable[[], Mapping[str, str]] = dict  # {file of the user's: slide}
        self._tree = Tree(results)
        self._all: dict[Any, Outcome] = {}  # those of files that are not kept, too
        self._slides: dict[Any, Digests] = {}
        self._fates: dict[Any, dict[str, str]] = {}

    def look(self, dag: Any) -> None:
        """Compare every outcome of the plan with what is there."""
        digests: dict[Any, str | None] = {}
        self._tree = tree = Tree(self.results)
        for level in dag.toposorted():
            for job in level:
                ours = {other for other in dag.dependencies[job] if digests[other] or other.rule.is_shell}
                before = {digests[other] for other in ours} - {None}
                outcome = outcome_of(job, before, ours, dag, self.results)
                digests[job] = outcome.digest if outcome else None
                if outcome is None:
                    continue
                self._all[job] = outcome
                if not is_kept(job):
                    continue
                self.outcomes[job] = outcome
                if reason := why_stale(outcome, self.results, tree):
                    self.stale[job] = reason

    def slides_of(self, job: Any) -> Digests:
        """What shapes each slide of a job's rack; nothing for a job that has none."""
        if job not in self._slides:
            rack = job.wildcards_dict.get("rack")
            if job not in self._all or rack not in self.racks:
                return {}
            known = [other for other in self.workflow.dag.dependencies[job] if other in self._all]
            same = [other for other in known if other.wildcards_dict.get("rack") == rack]
            same.sort(key=lambda other: self._all[other].files)
            self._slides[job] = slide_digests(
                self._all[job],
                dict(job.params.items()),
                self.racks[rack],
                self.owners(),
                [self.slides_of(other) for other in same],
                [self._all[other].digest for other in known if other not in same],
            )
        return self._slides[job]

    def fates(self) -> list[dict[str, str]]:
        """Of each job of a rack that is to run, {slide: what becomes of it}."""
        jobs = self.workflow.dag.needrun_jobs(exclude_finished=False)
        told = [(job, self._fates_of(job)) for job in jobs if job in self.outcomes and "rack" in job.wildcards_dict]
        # slides that are not explained, or have no background looked at, did not fail
        some = ("explain_slides", "embed_background")
        return [
            {
                slide: fate
                for slide, fate in found.items()
                if slide not in self.excluded and (fate != FAILED or job.rule.name not in some)
            }
            for job, found in told
        ]

    def _fates_of(self, job: Any) -> dict[str, str]:
        if job not in self._fates:
            path = record_file(self.results, self.outcomes[job].files[0])
            there = self._tree.has(path.relative_to(self.results).as_posix())  # folders were listed before
            kept = read_json_if_whole(path) if there else None
            record, now = kept if isinstance(kept, dict) else None, self.slides_of(job)
            before = [other for other in self.workflow.dag.dependencies[job] if other.rule.name in SPINE]
            self._fates[job] = (
                fates(now, record, self._tree, [self._fates_of(other) for other in before])
                if self.workflow.dag.needrun(job)
                else fates_of_current(now, record)
            )
        return self._fates[job]

    def tell(self) -> list[str]:
        """What a plan says of outcomes that are there and are not current; nothing of those that never were."""
        found = {job: why for job, why in self.stale.items() if not why.endswith(" is absent") or self._made(job)}
        if not found:
            return []
        if all(why == NO_RECORD for why in found.values()):
            return [
                f"{self.results} does not say what its results were made with (an older slidemake, or {self.results}/"
                "digests was deleted): all jobs look at them once, and what is finished is found"
            ]
        first = {job: why for job, why in found.items() if why != DERIVED} or found
        kinds = Counter((self.outcomes[job].rule, why) for job, why in first.items())
        lines = [f"{rule}{f' ({n} jobs)' if n > 1 else ''}: {why}" for (rule, why), n in kinds.items()]
        more = [f"and {len(lines) - SHOWN} more reasons: each job says its own"] if len(lines) > SHOWN else []
        return ["not current, and made again with what follows:", *[f"  {line}" for line in lines[:SHOWN] + more]]

    def _made(self, job: Any) -> bool:
        """Whether an outcome of which something is absent had been made before."""
        kept = record_file(self.results, self.outcomes[job].files[0])
        return self._tree.has(kept.relative_to(self.results).as_posix())

    def write_plan(self) -> None:
        """For the jobs of a run that starts, and for `verify`."""
        jobs, dag = set(self.workflow.dag.jobs), self.workflow.dag
        known = ((job, outcome) for job, outcome in self.outcomes.items() if job in jobs)
        write_plan(self.results, (self._with_slides(job, one) if dag.needrun(job) else one for job, one in known))

    def _with_slides(self, job: Any, outcome: Outcome) -> Outcome:
        return replace(outcome, slides=self.slides_of(job))

    def accept(self) -> None:
        """After `snakemake --touch`: the user says that results are current."""
        for job in self.workflow.dag.needrun_jobs(exclude_finished=False):
            if job in self.outcomes:
                write_record(self.results, plan_entry(self._with_slides(job, self.outcomes[job])))


def attach(workflow: Any, results: Path, in_job: bool) -> Currency:
    """Let digests decide which of the jobs below `results` run, whatever Snakemake decides of others.

    To be called before Snakemake lists its jobs. As a module of another workflow there is no moment when a run starts:
    its plan is then written as soon as it is made.
    """
    from snakemake.settings.types import RerunTrigger

    currency = Currency(workflow, results, in_job)
    build, main = workflow._build_dag, workflow.modifier.is_main_snakefile()

    def build_dag() -> None:
        dag = workflow.dag
        choose = dag.update_needrun

        check = dag.check_output_mtime

        async def update_needrun(create_inventory: bool = False) -> None:
            if not in_job and not currency.outcomes:
                currency.look(dag)
                dag.forcefiles.update(str(file) for job in currency.stale for file in job.output)
            with without_times(currency.outcomes):
                await choose(create_inventory=create_inventory)
            for job, why in currency.stale.items():
                if dag.needrun(job):
                    dag._reason[job] = because(why)

        async def check_output_mtime(job: Any, outputs: Any) -> None:
            """Snakemake would fail a job whose inputs are from the future, as after a clock was set back."""
            if job not in currency.outcomes and not in_job:
                await check(job, outputs)

        # What is left to Snakemake: environments that it makes itself. Params and inputs are in the digests.
        if main:
            workflow.dag_settings.rerun_triggers = frozenset({RerunTrigger.SOFTWARE_ENV})
        dag.update_needrun, dag.check_output_mtime = update_needrun, check_output_mtime
        build()
        runs = not in_job and workflow.executor_plugin is not None and not workflow.dryrun
        if runs and currency.outcomes and not (main and any(dag.needrun_jobs())):
            currency.write_plan()  # of a run that has something to do, `onstart` writes it
        for line in currency.tell():
            print(f"slidemake: {line}" if not line.startswith(" ") else line, file=sys.stderr)

    workflow._build_dag = build_dag
    return currency


def without_times(jobs: Mapping[Any, Any]) -> Any:
    """Snakemake compares no times of the files of these jobs for as long as this lasts."""
    from snakemake.jobs import Job

    known = Job.output_mintime.fget

    async def oldest(job: Any) -> Any:
        return None if job in jobs else await known(job)

    return patch.object(Job, "output_mintime", property(oldest))


def because(why: str) -> Any:
    """A reason of Snakemake's for a job to run, in our words."""
    from snakemake.jobs import Reason

    own = {
        "__slots__": (),
        "__str__": lambda self: f"Finished (was: {why})" if self.finished else why,
        "get_names": lambda self: iter(["not current"]),
    }
    reason = type("Because", (Reason,), own)()
    reason.forced, reason.derived = True, False
    return reason


def is_kept(job: Any) -> bool:
    """Whether a job's outcome is a result, with a digest: slides that are fetched are not."""
    return bool(job.rule.is_script and job.output and not any(f.flags.get("temp") for f in job.output))


def outcome_of(job: Any, before: Iterable[str | None], ours: Container[Any], dag: Any, results: Path) -> Outcome | None:
    """What a job of Snakemake's has to leave; None for targets, for jobs that only say when others may start, and for
    those of a workflow that this one is a module of."""
    if not job.rule.is_script or not job.output or not all(str(f).startswith(f"{results}/") for f in job.output):
        return None
    made_by_jobs = {str(file) for other, files in dag.dependencies[job].items() if other in ours for file in files}
    params = dict(job.params.items())
    return Outcome(
        rule=job.rule.name,
        wildcards=dict(job.wildcards_dict),
        files=[os.path.relpath(file, results) for file in job.output],
        settings=settings_of(params),
        read=_read(job, params, made_by_jobs),
        after=digest_of(sorted(str(one) for one in before)),
        made=tuple(params.get("made") or ()),
    )


def _read(job: Any, params: dict[str, Any], made_by_jobs: set[str]) -> dict[str, str]:
    """Identity of the user's files that a job reads. Of a rack: by size and time, under their paths. Of the cohort,
    which are few and small: by content, under the name of the input, wherever they lie.
    """
    of_rack = "rack" in job.wildcards_dict
    found = {os.path.abspath(path): identity(os.path.abspath(path)) for path in params.get("files") or ()}
    for name, value in job.input.items():
        files = [value] if isinstance(value, str) else list(value)
        for number, file in enumerate(str(item) for item in files):
            if file not in made_by_jobs and of_rack:
                found[os.path.abspath(file)] = identity(os.path.abspath(file))
            elif file not in made_by_jobs:
                found[name if number == 0 else f"{name} {number + 1}"] = content(os.path.abspath(file))
    return found
