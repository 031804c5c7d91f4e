"""What `slidemake verify` knows of results as a whole: what the last run wanted, and what it cannot judge."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from slidemake.core.currency import CONTENT, FOLDER, PLAN_FILE, content_now, record_file
from slidemake.core.files import read_json_if_whole
from slidemake.core.marker import MARKER

# What no checksum covers, and why that does no harm.
NOT_COVERED = {
    "logs": "what jobs said",
    "benchmarks": "seconds and memory of jobs",
    "fetched": "copies of slides that are being worked on",
    "run.lock": "who runs here",
}


def outcomes(results: Path) -> list[dict[str, Any]]:
    """What the last run that was started wanted to be there (plan.json); nothing where that cannot be read."""
    plan = read_json_if_whole(results / PLAN_FILE)
    return list(plan["outcomes"]) if isinstance(plan, dict) else []


def planned_files(results: Path) -> list[Path]:
    """The declared files of all those outcomes."""
    return [results / name for outcome in outcomes(results) for name in outcome["files"]]


def check_plan(results: Path) -> dict[Path, str]:
    """{file: what is wrong}: absent although the last run wanted it, or not as its job left it."""
    found = {}
    for outcome in outcomes(results):
        record = read_json_if_whole(record_file(results, outcome["files"][0]))
        states = record["files"] if isinstance(record, dict) else {}
        for name in outcome["files"]:
            path = results / name
            if not path.is_file():
                found[path] = f"is absent, and the last run wanted it ({_job(outcome)})"
            elif name in states and (why := _differs(path, *states[name])):
                found[path] = f"{why} ({_job(outcome)})"
    return found


def _job(outcome: dict[str, Any]) -> str:
    return " ".join([outcome["rule"], *map(str, outcome["wildcards"].values())])


def _differs(path: Path, size: int, known: str | None) -> str | None:
    length = path.stat().st_size
    if length != size:
        return f"has {length} bytes instead of {size}"
    if known is not None and length <= CONTENT and content_now(path) != known:
        return "is not as its job wrote it"
    return None


def what_is_not_covered(results: Path) -> list[str]:
    """Lines about files below the results that nothing was compared with."""
    lines = [f"{name} ({why})" for name, why in NOT_COVERED.items() if (results / name).exists()]
    if not outcomes(results):
        lines.append(f"what is absent: {PLAN_FILE} is not there or damaged, so only manifests say what there must be")
    unknown = unknown_files(results)
    if unknown:
        folders = Counter(str(path.parent.relative_to(results)) for path in unknown)
        listed = ", ".join(f"{count} in {folder}" for folder, count in sorted(folders.items())[:6])
        more = ", ..." if len(folders) > 6 else ""
        lines.append(f"{len(unknown)} files that no JSON lists, such as {unknown[0]} ({listed}{more})")
    lines.append("the slides, masks and tables of yours that results were made from")
    return lines


def unknown_files(results: Path) -> list[Path]:
    """Files that neither are a JSON of slidemake's, nor in a store, nor listed by a JSON, nor planned: left over from
    earlier settings, or put there by somebody."""
    known = {results / MARKER, results / PLAN_FILE, *planned_files(results)}
    found = []
    for folder in sorted(results.iterdir()):
        if folder.name in NOT_COVERED or folder.name == FOLDER or folder.name.startswith("."):
            continue
        for path in [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file()):
            inside = path.relative_to(results)
            if path.suffix == ".json" or any(part.endswith(".zarr") for part in inside.parts):
                continue
            found.append(path)
    folders = {place for path in found for place in (path.parent, path.parent.parent)}
    listed = {path for folder in folders for path in _listed_in(folder)}
    return [path for path in found if path not in known | listed]


def _listed_in(folder: Path) -> list[Path]:
    """Files that the JSON in a folder list."""
    described = [read_json_if_whole(path) for path in sorted(folder.glob("*.json"))]
    return [folder / str(name) for one in described if isinstance(one, dict) for name in (one.get("files") or ())]
