"""Is everything in a folder of results there, and as it was written? `python -m slidemake verify results` reads it all.

Checked are all manifests and other JSON with the files that they list (tables, masks, pictures, the report), all tile
and embedding stores, all model bundles; that each lies where it was written for; that every manifest's slides have the
artefacts that it vouches for; and that all is there that the last run wanted (plan.json). What is not looked at is said
at the end. Nothing is changed. Each finding names the file, what is wrong, and what to delete: the next run makes
exactly that again. Exit code 1 when something was found.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slidemake.core.currency import FOLDER as DIGESTS
from slidemake.core.currency import PLAN_FILE
from slidemake.core.failures import SlideFailure
from slidemake.core.files import check_file, check_place, has_checksum, read_json
from slidemake.core.marker import MARKER
from slidemake.core.stages import ARTEFACTS
from slidemake.embedding.background import record_name
from slidemake.jobs.job import available_cpus
from slidemake.jobs.racks import check_ids
from slidemake.stores.integrity import problems
from slidemake.workflow.verify_plan import check_plan, planned_files, what_is_not_covered

STORES = {stage: path.split("/")[0] for stage, path in ARTEFACTS.items() if path.endswith(".zarr")}  # their folders
SLIDE_FILES = {  # by name
    Path(path).name: stage for stage, path in ARTEFACTS.items() if path.endswith(".json") and "{where}" not in path
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `delete`: what to delete so that the next run makes it again."""

    path: Path
    what: str
    delete: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """The word that its line begins with."""
        return "DAMAGED" if self.delete else "ABSENT "

    def __str__(self) -> str:
        return f"{printable(str(self.path))} {printable(self.what)}"


def printable(text: str) -> str:
    """Text without control characters: names in results come from sheets and files."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


@dataclass(frozen=True)
class Artefact:
    """Something that a manifest vouches for: its JSON (or store), the fingerprint that it must carry."""

    path: Path
    fingerprint: str
    manifest: Path


class Results:
    """A folder of results, to be checked."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @cached_property
    def manifests(self) -> dict[Path, Any]:
        """Content of every manifest of a rack, or the failure of reading it."""
        found: dict[Path, Any] = {}
        for path in sorted((self.folder / "manifests").rglob("*.json")):
            try:
                manifest = read_json(path)
                if not has_checksum(path):
                    raise SlideFailure("damaged", f"{path} carries no checksum")
                if path.parent != self.folder / "manifests":
                    _ = [record["status"] for record in manifest["slides"]]
                    check_ids(record["slide_id"] for record in manifest["slides"])
                    _checked_place(path, manifest, self.folder)
                check_place(path, manifest)
                found[path] = manifest
            except SlideFailure as failure:
                found[path] = str(failure).removeprefix(f"{path} ")
            except (KeyError, TypeError, ValueError) as error:
                found[path] = f"is no manifest ({type(error).__name__}: {error})"
        return found

    @cached_property
    def vouchers(self) -> dict[Path, tuple[Path, ...]]:
        """{file or store: manifests that vouch for it}."""
        found: dict[Path, list[Path]] = defaultdict(list)
        for artefact in self.artefacts():
            found[artefact.path].append(artefact.manifest)
        return {path: tuple(paths) for path, paths in found.items()}

    def artefacts(self) -> Iterator[Artefact]:
        """What the readable manifests vouch for."""
        for path, manifest in self.manifests.items():
            if isinstance(manifest, str) or path.parent == self.folder / "manifests":
                continue
            stage, *where = path.relative_to(self.folder / "manifests").parts[:-1]
            for record in manifest["slides"]:
                if record["status"] == "ok":
                    place = _artefact(self.folder, stage, where, record["slide_id"])
                    yield Artefact(place, record.get("fingerprint", ""), path)

    def finding(self, path: Path, what: str, *delete: Path) -> Finding:
        return Finding(path, what, (*(delete or (path,)), *self.vouchers.get(path, ())))

    # -- the checks ------------------------------------------------------------------------------------------------

    def check_manifests(self) -> Iterator[Finding]:
        """Manifests themselves, and whether what they vouch for is there."""
        for path, manifest in self.manifests.items():
            if isinstance(manifest, str):
                yield Finding(path, manifest, (path,))
        for artefact in self.artefacts():
            found = _fingerprint(artefact.path)
            if found is None:
                yield self.finding(artefact.path, "is missing, and its manifest vouches for it")
            elif found and found != artefact.fingerprint:
                yield self.finding(artefact.path, "is not what its manifest vouches for (another fingerprint)")

    def check_store(self, store: Path) -> Iterator[Finding]:
        """Every byte of a store."""
        for problem in problems(store, every_byte=True):
            yield self.finding(store, problem)

    def check_json(self, path: Path) -> Iterator[Finding]:
        """A JSON of slides, cohort, tasks or explanations, with the files that it lists."""
        try:
            content = read_json(path)
        except SlideFailure as failure:
            yield self.finding(path, str(failure).removeprefix(f"{path} "), *self.remake(path))
            return
        if isinstance(content, dict) and not has_checksum(path):
            yield self.finding(path, "carries no checksum", *self.remake(path))
        try:
            check_place(path, content)
        except SlideFailure as failure:
            yield self.finding(path, str(failure).removeprefix(f"{path} "), *self.remake(path))
        named = content.get("slide_id") if isinstance(content, dict) else None
        per_slide = path.relative_to(self.folder).parts[0] in ("slides", "explain")  # a folder for each slide
        if per_slide and named is not None and named != path.parent.name:
            yield self.finding(path, f"is of slide {named}", *self.remake(path))
        if not isinstance(content, dict) or (self.folder / DIGESTS) in path.parents:
            return  # what a digest's files are like, `check_plan` sees
        for name in content.get("files", {}):
            try:
                check_file(path.parent / name, content, name)
            except SlideFailure as failure:
                what = str(failure).removeprefix(f"{path.parent / name} ")
                yield Finding(path.parent / name, what, (*self.remake(path), *self.vouchers.get(path, ())))

    def remake(self, path: Path) -> tuple[Path, ...]:
        """What to delete so that a damaged JSON is made again: a bundle goes whole, with its training's record, and a
        slide's tissue or stain with the manifest that vouches for it."""
        if path.name == "bundle.json":
            model = path.parent.parent if path.parent.name == "bundle" else path.parent.parent.parent
            return (path.parent, model / "train.json")
        return (path,)

    def check_bundles(self) -> Iterator[Finding]:
        """Weights without the JSON that describes them."""
        for path in sorted((self.folder / "tasks").rglob("weights.safetensors")):
            described = path.with_name("bundle.json")
            if not described.exists() and not path.parent.name.startswith("."):
                yield self.finding(described, "is missing beside its weights", *self.remake(described))

    def check_bags(self) -> Iterator[Finding]:
        """Packed features without the JSON that says which slide they are of."""
        for path in sorted((self.folder / "cohort" / "bags").glob("[!.]*.npy")):
            described = path.with_suffix(".json")
            if not described.exists():
                yield self.finding(described, "is missing beside its features", path)

    def stores(self) -> list[Path]:
        found = [
            path for folder in sorted(set(STORES.values())) for path in sorted((self.folder / folder).glob("*/*.zarr"))
        ]
        return [path for path in found if not path.name.startswith(".")]

    def jsons(self) -> list[Path]:
        """All JSON but manifests, stores and what work in progress has left."""
        folders = ("slides", "cohort", "tasks", "explain", "predictions", "report", DIGESTS)
        found = [path for folder in folders for path in sorted((self.folder / folder).rglob("*.json"))]
        found += [path for name in (MARKER, PLAN_FILE) if (path := self.folder / name).exists()]
        return [p for p in found if not any(part.startswith(".") for part in p.relative_to(self.folder).parts)]


def _checked_place(path: Path, manifest: dict[str, Any], folder: Path) -> None:
    stage = path.relative_to(folder / "manifests").parts[0]
    if manifest["stage"] != stage:
        raise SlideFailure("damaged", f"is a manifest of stage {manifest['stage']}, not of {stage}")
    if manifest.get("rack") != path.stem:
        raise SlideFailure("damaged", f"is the manifest of rack {manifest.get('rack')}")


def _artefact(folder: Path, stage: str, where: list[str], slide_id: str) -> Path:
    for name, of in SLIDE_FILES.items():
        if of == stage:
            return folder / "slides" / slide_id / name
    if stage == "background":
        return folder / "slides" / slide_id / record_name(*where)
    if stage in STORES:
        return folder / STORES[stage] / Path(*where) / f"{slide_id}.zarr"
    return folder / stage / Path(*where) / slide_id / f"{stage}.json"


def _fingerprint(path: Path) -> str | None:
    """Fingerprint in an artefact; "" where it cannot be read (another check says why), None where there is nothing."""
    store = path.suffix == ".zarr"
    file = path / "zarr.json" if store else path
    if not file.exists():
        return None if not path.exists() else ""
    try:
        content = json.loads(file.read_text())
        return str((content["attributes"] if store else content)["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def verify(folder: str | Path, threads: int = 1) -> tuple[list[Finding], dict[str, int]]:
    """All findings, sorted, and how many manifests, stores, bundles, other JSON and planned files were checked."""
    results = Results(folder)
    stores, jsons = results.stores(), results.jsons()
    _ = results.vouchers  # made once, before threads ask for it
    with ThreadPoolExecutor(max(1, threads)) as pool:
        checks: Iterable[list[Finding]] = [
            list(results.check_manifests()),
            list(results.check_bundles()),
            list(results.check_bags()),
            *pool.map(lambda path: list(results.check_store(path)), stores),
            *pool.map(lambda path: list(results.check_json(path)), jsons),
        ]
    found = {f for each in checks for f in each}
    told = {f.path for f in found}
    planned = {path: what for path, what in check_plan(results.folder).items() if path not in told}
    absent = {Finding(path, what, ()) for path, what in planned.items() if not path.exists()}
    changed = {Finding(path, what, (path,)) for path, what in planned.items() if path.exists()}
    findings = sorted(found | absent | changed, key=lambda f: (str(f.path), f.what))
    bundles = sum(path.name == "bundle.json" for path in jsons)
    counts = {
        "manifests": len(results.manifests),
        "stores": len(stores),
        "bundles": bundles,
        "other files": len(jsons) - bundles,
        "planned files": len(planned_files(results.folder)),
    }
    return findings, counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slidemake verify", description=__doc__.splitlines()[0])
    parser.add_argument("results", help="folder of results (the setting `output`)")
    options = parser.parse_args(arguments)
    folder = Path(options.results)
    if not (folder / MARKER).is_file() and not (folder / "manifests").is_dir():
        print(f"{folder} is no folder of slidemake results: it has no {MARKER}.", file=sys.stderr)
        return 2
    findings, counts = verify(folder, available_cpus())
    if not (folder / MARKER).is_file():
        findings.append(Finding(folder / MARKER, "is absent", ()))
    for finding in findings:
        print(f"{finding.kind}  {finding}")
    checked = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not findings:
        print(f"All is there, and as it was written: {checked}.")
    for line in what_is_not_covered(folder):
        print(f"Not looked at: {printable(line)}")
    if not findings:
        return 0
    every = {path for finding in findings for path in finding.delete}
    delete = sorted(path for path in every if not every & set(path.parents))  # what goes with its folder is not named
    print(f"\n{len(findings)} problems in {checked}. To have them made again,", end=" ")
    print("delete what is damaged and what vouches for it, and" * bool(delete), end=" " * bool(delete))
    print("give the same snakemake command as before; whatever is finished is kept" + ":" * bool(delete))
    for path in delete:
        print(f"  rm -r {shlex.quote(printable(str(path)))}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
