"""Are results current? What determined every outcome of a job is kept with it, and compared with what is wanted now.

An outcome is what one job leaves: its declared files, and the stores or records that they vouch for. Its digest is over
the settings of its job (params), the files of the user's that it reads, and the digests of the outcomes that it is made
from, so that a change travels. A job writes the digest that was planned for it, last, into
`digests/<first file>.json`; planning compares. So nothing hangs on times, on Snakemake's memory, or on how the folder
is spelled, and what was interrupted, deleted or overwritten is noticed (docs/decisions/0014-digests.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from slidemake.core.failures import RunError
from slidemake.core.files import read_json, read_json_if_whole, write_json
from slidemake.core.stages import ARTEFACTS

PLAN_FILE = "plan.json"  # in the results folder: what the last run that was started wanted to be there
FOLDER = "digests"
CONTENT = 4 << 20  # bytes up to which an outcome's file is compared by content; a larger one by its length
MANY = 1000  # files of a slide that is a folder, of which size and time are looked at
# Params that shape no result: where results are (their folder may move), how things are fetched, what is only shown,
# paths of files whose content counts (they are inputs), and on which device things are computed: a precision that
# somebody set is among the settings, and what `auto` chose once stays for all of the results (`workflow.place`).
NOT_DETERMINING = {"results", "fetching", "configfiles", "slides", "sheet", "bundle", "files", "made", "place"}
PATHS = ("sheet", "bundle", "encoders_file")  # of the configuration, as the report shows it
# Failures of slides at an address that may be over by the next run, and nothing here would have changed.
PASSING = {"unreachable", "missing_file", "wrong_checksum"}


@dataclass(frozen=True)
class Outcome:
    """What a job has to leave, and what determines it.

    files: declared outputs, relative to the results folder; the first names the record. settings: {param: hash}.
    read: {file of the user's: identity}. after: digests of the outcomes that it is made from, as one.
    """

    rule: str
    wildcards: dict[str, str]
    files: list[str]
    settings: dict[str, str]
    read: dict[str, str] = field(default_factory=dict)
    after: str = ""
    made: tuple[str, ...] = ()  # files outside of the results folder that the job makes
    slides: dict[str, list[str]] = field(default_factory=dict)  # of a rack's: what shapes each slide (slide_fates)

    @property
    def digest(self) -> str:
        return digest_of([self.settings, self.read, self.after])

    @property
    def name(self) -> str:
        """How a message calls it: the rule and its wildcards."""
        return " ".join([self.rule, *self.wildcards.values()])


def digest_of(value: Any) -> str:
    """32 hex digits of anything that can be written as JSON (other values as their text)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def settings_of(params: Mapping[str, Any]) -> dict[str, str]:
    """{param: hash} of a job's params that its outcome depends on."""
    found = {name: value for name, value in params.items() if name not in NOT_DETERMINING}
    if isinstance(found.get("config"), dict):  # of the report: however paths are spelled, and wherever all of it lies
        shown = dict(found["config"])
        folder = os.path.realpath(shown.pop("output", "."))
        files = {key: os.path.relpath(os.path.realpath(shown[key]), folder) for key in PATHS if shown.get(key)}
        found["config"] = shown | files
    return {name: digest_of(value)[:12] for name, value in found.items()}


# -- files of the user's ----------------------------------------------------------------------------------------------


@cache
def identity(path: str) -> str:
    """Size and time (ns) of a file, "absent" where there is none: another one differs, newer or older. Of a folder
    (DICOM, OME-Zarr) and of an .mrxs, whose pixels are in the folder of its name, all files count; of many the first.

    Looked at once in the life of a process.
    """
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    if path.lower().endswith(".mrxs") and os.path.isdir(path[: -len(".mrxs")]):
        return digest_of([found.st_size, found.st_mtime_ns, identity(path[: -len(".mrxs")])])[:12]
    if not stat.S_ISDIR(found.st_mode):
        return f"{found.st_size} {found.st_mtime_ns}"
    files = sorted(_files(path))
    return digest_of([[name, size, time] for name, size, time in files[:MANY]])[:12] + f" {len(files)}"


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            try:
                found = os.stat(os.path.join(root, name))
            except OSError:
                continue
            yield os.path.join(os.path.relpath(root, folder), name), found.st_size, found.st_mtime_ns


@cache
def content(path: str) -> str:
    """Hash of a file's bytes, for the few files that are read as a whole anyway; "absent" where there is none."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:32]
    except OSError:
        return "absent"


# -- records ----------------------------------------------------------------------------------------------------------


def record_file(results: Path, first: str) -> Path:
    """Where the digest of an outcome is kept."""
    return results / FOLDER / (first if first.endswith(".json") else f"{first}.json")


def write_record(results: Path, entry: Mapping[str, Any], retry: Iterable[str] = ()) -> None:
    """Keep the digest of an outcome that is complete. `entry`: of the plan. retry: slides to be tried again.

    A job that a cluster started twice writes the same files beside its twin (only measured times differ). Whichever
    writes the record last looks again afterwards, so in the end the record is of the files that are there.
    """
    kept = {key: entry[key] for key in ("rule", "wildcards", "digest", "settings", "read", "after")}
    where = record_file(results, entry["files"][0])
    files = {name: _state(results / name) for name in entry["files"]}
    while True:
        vouches = _vouched(results, entry["files"])
        told = {"vouches": vouches, "retry": sorted(retry), "slides": entry.get("slides", {})}
        write_json(where, {**kept, "files": files, **told})
        written, files = files, {name: _state(results / name) for name in entry["files"]}
        if files == written:
            return


def _state(path: Path) -> list[Any]:
    """Length and, unless it is large, content of a file."""
    size = path.stat().st_size
    return [size, content_now(path) if size <= CONTENT else None]


def content_now(path: Path) -> str:
    """Hash of a file's bytes, as they are now."""
    return content.__wrapped__(str(path))


def _vouched(results: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """{pattern: slides}: artefacts that the manifests of an outcome vouch for, and the models of a training."""
    found: dict[str, list[str]] = {}
    for name in files:
        steps = name.split("/")
        if steps[0] == "manifests" and len(steps) > 2:
            pattern = ARTEFACTS[steps[1]].replace("{where}", "/".join(steps[2:-1]))
            slides = read_json(results / name)["slides"]
            found[pattern] = [record["slide_id"] for record in slides if record["status"] == "ok"]
        elif steps[0] == "tasks" and steps[-1] == "train.json":
            folder = results.joinpath(*steps[:-1])
            models = [p for p in sorted(folder.glob("bundle*/**/*")) if p.suffix in (".json", ".safetensors")]
            inside = [p.relative_to(folder).as_posix() for p in models if p.name != "reference.json"]
            found["/".join([*steps[:-1], "{slide}"])] = inside
    return found


def passing_failures(results: Path, files: Iterable[str]) -> list[str]:
    """Slides of a screening manifest that could not be fetched, which another run may change."""
    return [
        record["slide_id"]
        for name in files
        if name.startswith("manifests/screen/")
        for record in read_json(results / name)["slides"]
        if (failure := record["failure"]) and failure["stage"] == "fetch" and failure["code"] in PASSING
    ]


# -- comparing --------------------------------------------------------------------------------------------------------


class Tree:
    """What is in a folder, looked at once for each folder in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        if parent not in self._names:
            try:
                self._names[parent] = set(os.listdir(self.folder / parent))
            except OSError:
                self._names[parent] = set()
        return name in self._names[parent]


def why_stale(outcome: Outcome, results: Path, tree: Tree) -> str | None:
    """Why an outcome is not what is wanted now; None when it is."""
    for name in outcome.files:
        if not tree.has(name):
            return f"{name} is absent"
    for path in outcome.made:
        if identity(path) == "absent":
            return f"{path} is absent"
    kept = record_file(results, outcome.files[0])
    if not tree.has(kept.relative_to(results).as_posix()):
        return NO_RECORD
    record = read_json_if_whole(kept)
    if not isinstance(record, dict):
        return f"{kept} is damaged"
    if record["digest"] != outcome.digest:
        return _difference(record, outcome)
    for name, (size, known) in record["files"].items():
        path = results / name
        if path.stat().st_size != size or (known is not None and content_now(path) != known):
            return f"{name} is not as it was written"
    for pattern, slides in record["vouches"].items():
        for slide in slides:
            if not tree.has(pattern.replace("{slide}", slide)):
                return f"{pattern.replace('{slide}', slide)} is absent"
    if record["retry"]:
        return f"{_first(record['retry'])} could not be fetched and is tried again"
    return None


DERIVED = "what it is made from is not what it was"
NO_RECORD = "nothing is kept of what it was made with, so it is looked at"


def _difference(record: Mapping[str, Any], outcome: Outcome) -> str:
    settings = _changed(record["settings"], outcome.settings)
    read = _changed(record["read"], outcome.read)
    if settings:
        names = [f"the version of {outcome.rule}" if name == "version" else name for name in settings]
        return f"other settings: {', '.join(names)}"
    if read:
        return f"another file: {_first(read)}"
    return DERIVED


def _changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*one, *two} if one.get(key) != two.get(key))


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan_entry(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plan.json has it."""
    return {
        "rule": outcome.rule,
        "wildcards": outcome.wildcards,
        "files": outcome.files,
        "digest": outcome.digest,
        "settings": outcome.settings,
        "read": outcome.read,
        "after": outcome.after,
        **({"slides": outcome.slides} if outcome.slides else {}),
    }


def write_plan(results: Path, outcomes: Iterable[Outcome]) -> None:
    """Say in the results folder what a run that starts wants to be there, for its jobs and for `verify`."""
    entries = sorted((plan_entry(outcome) for outcome in outcomes), key=lambda entry: entry["files"][0])
    plan = {"format": 1, "outcomes": entries}
    if read_json_if_whole(results / PLAN_FILE) != plan:
        write_json(results / PLAN_FILE, plan)


@dataclass
class Ticket:
    """A job's place in the plan of its run.

    Snakemake may be killed and leave its jobs behind, and the next run may want something else. Such a job does no harm
    to it: it ends before its next slide (`check_wanted`), and keeps no digest of what it left.
    """

    results: Path
    entry: dict[str, Any]
    made_from: dict[str, str]  # {first file: digest} of the outcomes that this one is made from, as planned
    seen: tuple[int, ...] = ()  # which plan.json was looked at

    def wanted(self) -> bool:
        """Whether the plan that counts now wants of this job what the plan of its run did."""
        seen = _stamp(self.results / PLAN_FILE)
        if seen != self.seen:
            plan = read_json_if_whole(self.results / PLAN_FILE)
            now = _entry_of(plan, self.entry["files"][0]) if plan else self.entry
            if now is None or now["digest"] != self.entry["digest"]:
                return False
            self.seen = seen
        return True

    def done(self) -> bool:
        """The outcome is complete: keep what determined it. Not where another run wants something else by now, or a job
        that another run left behind has written what this one is made from: the next run looks.
        """
        kept = {name: read_json_if_whole(record_file(self.results, name)) for name in self.made_from}
        same = all(isinstance(one, dict) and one["digest"] == self.made_from[name] for name, one in kept.items())
        if not same or not self.wanted():
            return False
        write_record(self.results, self.entry, passing_failures(self.results, self.entry["files"]))
        return True


_ticket: Ticket | None = None  # of the job that this process does


def begin(outputs: Iterable[str], params: Mapping[str, Any], inputs: Iterable[str] = ()) -> Ticket | None:
    """A job starts: from now on its outcome is nobody's. Returns its ticket, None where no plan has it: a job outside
    of a run of the workflow, or one whose settings were changed after its run was planned (the next run looks again).
    """
    global _ticket
    _ticket = None
    files = [os.path.abspath(path) for path in outputs]
    results = next((p for p in Path(files[0]).parents if (p / PLAN_FILE).exists()), None) if files else None
    if results is None:
        return None
    first = Path(files[0]).relative_to(results).as_posix()
    record_file(results, first).unlink(missing_ok=True)
    seen = _stamp(results / PLAN_FILE)
    plan = read_json_if_whole(results / PLAN_FILE) or {"outcomes": []}
    entry = _entry_of(plan, first)
    if entry is None or entry["settings"] != settings_of(params):
        return None
    read = {os.path.relpath(os.path.abspath(str(path)), results) for path in inputs}
    made_from = {one["files"][0]: one["digest"] for one in plan["outcomes"] if read & set(one["files"])}
    _ticket = Ticket(results, entry, made_from, seen)
    return _ticket


def check_wanted(output: str | Path) -> None:
    """RunError in the job that writes `output`, once another run has begun that wants something else of it."""
    if _ticket is None or os.path.relpath(os.path.abspath(output), _ticket.results) not in _ticket.entry["files"]:
        return
    if not _ticket.wanted():
        raise RunError(
            f"Another run has begun on {_ticket.results} that wants something else of {_ticket.entry['rule']} (other "
            "settings, sheet or files). This job is of an earlier run, and ends here; what is finished is kept."
        )


def _entry_of(plan: Mapping[str, Any], first: str) -> dict[str, Any] | None:
    return next((entry for entry in plan["outcomes"] if entry["files"][0] == first), None)


def _stamp(path: Path) -> tuple[int, ...]:
    """Which file this is: another one after every rename into place."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)
