"""A rack: the stable set of slides that one job processes, as a scanner takes them.

`run_rack` is the loop of every per-slide stage. It reads what the stage before said of each slide, passes failed
slides on, works through the others, turns `SlideFailure` into a record and writes the rack's manifest last. What a
stage has already committed is its own to recognise (by fingerprint), so a killed job resumes at the slide where it
stopped.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidemake.core import currency
from slidemake.core.failures import Failure, RunError, SlideFailure, disk_trouble
from slidemake.core.files import check_place, placed, read_json, write_json
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.jobs import isolation, timings

log = logging.getLogger("slidemake")

SLIDE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # as in slides.schema.json
Record = dict[str, Any]  # slide_id, status ("ok" | "failed"), failure (dict | None), and what the stage found


@dataclass(frozen=True)
class Machine:
    """What a run may use: on this machine `cores` and `gpus` (embedding jobs at a time), or a cluster's queue."""

    cores: int = 2
    gpus: int = 0
    cluster: bool = False
    gpu: bool = False  # the driver of a GPU answers on this machine

    def embedding_threads(self, on_gpu: bool) -> int:
        """Threads of an embedding job: all cores without a GPU; GPUs share half of them, the rest tiles other racks."""
        return max(1, self.cores // (2 * max(1, self.gpus))) if on_gpu else self.cores

    def training_threads(self, jobs: int) -> int:
        """Threads of one of so many training jobs that can run at a time, each of which fits its folds side by side."""
        return max(1, min(16, self.cores // (1 if self.cluster else max(1, jobs))))


def auto_rack_size(slides: int, machine: Machine) -> int:
    """Slides per rack for `rack_size: auto`, when a cohort is run for the first time.

    A job has to last long beside what it costs to start it (imports, the model, on a cluster the queue), so a rack
    holds 16 slides, on a cluster, where jobs are many, 8; large cohorts get 128 racks of up to 64 slides, which keeps
    the plan small. On one machine that may be too few racks for many cores or several GPUs: then there is a rack for
    every core and four for every GPU, as long as they hold 4 slides. Racks are filled evenly, with 3 slides at least.
    """
    size = min(64, max(8 if machine.cluster else 16, slides // 128))
    racks = -(-slides // size)
    if not machine.cluster:
        workers = max(machine.cores, 4 * machine.gpus)
        racks = max(racks, min(workers, -(-slides // 4)))
    return max(3, -(-slides // max(1, racks)))


def assign_racks(slide_ids: list[str], size: int) -> dict[str, list[str]]:
    """{rack name: slide ids}, in sheet order: appending a slide touches the last rack only."""
    return {f"r{i // size:05d}": slide_ids[i : i + size] for i in range(0, len(slide_ids), size)}


def read_manifest(path: str | Path, stage: str | None = None) -> list[Record]:
    """Slide records of one rack manifest."""
    try:
        manifest = read_json(path)
        check_place(path, manifest)
        found, rack, slides = manifest["stage"], manifest["rack"], manifest["slides"]
        check_ids(record["slide_id"] for record in slides)
    except (SlideFailure, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"The manifest {path} is damaged ({error}). Delete it and run the same command again."
        ) from error
    if stage is not None and found != stage:
        raise RunError(f"{path} is a manifest of stage {found!r}, not of {stage!r}")
    if re.fullmatch(r"r\d+", Path(path).stem) and rack != Path(path).stem:
        raise RunError(f"{path} is the manifest of rack {rack}. Delete it and run the same command again.")
    return slides


def check_ids(slide_ids: Iterable[Any]) -> None:
    """Ids become names of files: ValueError for one that could lead elsewhere, from a manifest of somebody else's."""
    for slide_id in slide_ids:
        if not isinstance(slide_id, str) or not SLIDE_ID.fullmatch(slide_id):
            raise ValueError(f"{str(slide_id)[:40]!r} is no slide_id")


def read_manifests(paths: Iterable[str | Path], stage: str | None = None) -> list[Record]:
    """Slide records of many racks, in order."""
    return [record for path in paths for record in read_manifest(path, stage)]


def run_rack(
    stage: str,
    manifest: str | Path,
    slides: list[Record],
    work: Callable[[Record], Record],
    *,
    rack: str = "",
    threads: int = 1,
    background: bool = False,
) -> list[Record]:
    """Run `work` on every slide record that has not failed before, write the manifest, return its records.

    `work` gets the record of the stage before and returns this stage's figures for the slide (a dict, JSON-able, that
    carries `fingerprint` and may carry `reused: True` when a finished result was found). With `threads` > 1 slides
    are worked on side by side. A full disk, a missing permission or a `RunError` ends the job at once: no slide is
    to blame, and the slides committed so far are found again. `background`: `work` only waits for what other threads
    do, which then say themselves what they are busy with (`isolation.working_on`).

    A slide that killed an earlier process of this job gets its failure record without being touched. In a process that
    tries one slide alone, `work` is done for that slide only, and no manifest is written.
    """
    done = 0
    lock = threading.Lock()

    def one(before: Record) -> Record:
        nonlocal done
        slide_id = before["slide_id"]
        if before.get("status") == "failed":
            return {"slide_id": slide_id, "status": "failed", "failure": before["failure"]}
        currency.check_wanted(manifest)
        started = time.perf_counter()
        if not background:
            timings.event("begin", slide_id=slide_id)
        failure: Failure | None = None
        figures: Record = {}
        try:
            killer = isolation.condemned(slide_id)
            if killer is not None:
                raise killer
            with nullcontext() if background else isolation.working_on(slide_id):
                figures = work(before)
        except (RunError, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            failure = _as_failure(error, slide_id, stage)
        record = {
            "slide_id": slide_id,
            "status": "failed" if failure else "ok",
            "failure": failure.as_dict() if failure else None,
            "seconds": round(time.perf_counter() - started, 3),
            **figures,
        }
        outcome = "failed" if failure else "reused" if figures.get("reused") else "ok"
        why = {"code": failure.code, "message": failure.message} if failure else {}
        timings.event("slide", slide_id=slide_id, outcome=outcome, seconds=record["seconds"], **why)
        with lock:
            done += 1
            said = f"{failure.code}: {failure.message}" if failure else outcome
            level = logging.WARNING if failure else logging.DEBUG  # on the terminal: failures alone
            place = f"{rack} {done}/{len(slides)}"
            log.log(level, "%s %s %s: %s (%.1f s)", stage, place, slide_id, said, record["seconds"])
        return record

    alone = isolation.tried_alone()
    if alone is not None:
        return [one(slide) for slide in slides if slide["slide_id"] == alone]
    timings.event("rack", stage=stage, slides=sum(s.get("status") != "failed" for s in slides))
    started = time.perf_counter()
    if threads > 1 and len(slides) > 1:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(one, slide) for slide in slides]
            try:
                records = [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    else:
        records = [one(slide) for slide in slides]
    write_json(
        manifest,
        {
            "stage": stage,
            **({} if stage == "fetch" else placed(manifest)),  # a fetched rack is renamed when it is complete
            "rack": rack,
            "version": STAGE_VERSIONS[stage],
            "seconds": round(time.perf_counter() - started, 3),
            "slides": records,
        },
    )
    return records


def _as_failure(error: Exception, slide_id: str, stage: str) -> Failure:
    if isinstance(error, SlideFailure):
        return error.record(slide_id, stage)
    if trouble := disk_trouble(error, f"{stage} worked on slide {slide_id}"):
        raise trouble from error
    if isinstance(error, MemoryError):
        return SlideFailure("out_of_memory", f"{stage} ran out of memory").record(slide_id, stage)
    log.error("%s failed on slide %s:\n%s", stage, slide_id, traceback.format_exc())
    return SlideFailure("crashed", f"{type(error).__name__}: {error}").record(slide_id, stage)
