"""What runs again when something changes: every row of docs/guide.md#what-runs-again, and every key of the schema.

The rows are in what_runs_again.yaml, whose head says how to add one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from planner import plans
from slidemake.configuration.load import load_configuration
from slidemake.configuration.schema import leaves, resolved
from slidemake.core.files import read_json, write_json
from slidemake.core.stages import STAGE_VERSIONS
from snakemake_run import CONFIG, ENCODER, GRID, REPO, Outcome, Project, environment

pytestmark = pytest.mark.workflow

TABLE = yaml.safe_load(Path(__file__).with_name("what_runs_again.yaml").read_text())
NAMES = {"tasks": "tumour", "models": "abmil", "sweeps": "sweep"}  # what <name> stands for in the cohort of these tests
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Case:
    """A change to be planned: files to put into the project's folder for it, and the rules that have to run."""

    name: str
    files: dict[str, str | None]
    runs: set[str]
    versions: dict[str, int]
    cores: int = 2
    gone: tuple[str, ...] = ()  # files and folders of the project that are not there for it
    replaced: str = ""  # a file of the user's that is another for it
    row: str = ""  # of the table


# -- changes of the sheet and of files ------------------------------------------------------------------------------


def edited(**cells: str) -> Callable[[Rows], Rows]:
    """An edit of the cells of the first slide."""
    return lambda rows: [rows[0] | cells, *rows[1:]]


def new_row(rows: Rows) -> dict[str, str]:
    return rows[0] | {"slide_id": "P99-A", "patient_id": "P99", "path": "no_such_slide.tiff"}


SHEETS: dict[str, Callable[[Rows], Rows]] = {
    "append": lambda rows: [*rows, new_row(rows)],
    "insert": lambda rows: [new_row(rows), *rows],
    "move": lambda rows: [*rows[1:], rows[0]],
    "remove": lambda rows: rows[:-1],
    "exclude": lambda rows: edited(exclude="yes")(rows),
    "label": lambda rows: [row | {"diagnosis": other_class(row)} for row in rows],
    "patient": edited(patient_id="P77"),
    "site": edited(site="Elsewhere"),
    "metadata": lambda rows: [row | {"remark": "new"} for row in rows],
    "outcomes": lambda rows: [row | outcomes(row) for row in rows],
    "mpp": edited(mpp="0.49"),
    "path": edited(path="moved.tiff"),
    "checksum": edited(sha256="0" * 64),
    "outline": edited(tissue_geojson="outline.geojson"),
    "cores": lambda rows: rows,
    "touched": lambda rows: rows,
}
# Files of the project that are not there, or have another content.
RESULTS = "results/"
DELETED: dict[str, tuple[str, ...]] = {
    "deleted manifest": (RESULTS + f"manifests/tiles/{GRID}/r00000.json",),
    "deleted store": (RESULTS + f"embeddings/{ENCODER}/P01-A.zarr",),
    "deleted table": (RESULTS + "cohort/failures.csv",),
    "deleted record": (RESULTS + "slides/P01-A/slide.json",),
    "deleted model": (RESULTS + "tasks/tumour/abmil/bundle/bundle.json",),
}
DAMAGED: dict[str, str] = {"damaged table": RESULTS + "tasks/tumour/metrics.csv"}
# Files of the user's, by the path of the first slide, that others were put in the place of.
REPLACED: dict[str, Callable[[Path], Path]] = {
    "slide": lambda slide: slide,
    "mask": lambda slide: slide.parent / "truth" / f"{slide.stem}_tumour16.png",
}


def other_class(row: dict[str, str]) -> str:
    return {"P01": "benign", "P02": "tumour"}.get(row["patient_id"], row["diagnosis"])


def outcomes(row: dict[str, str]) -> dict[str, str]:
    """Columns for tasks that are not of classes: two findings, a depth in mm, and survival."""
    number = int(row["patient_id"][1:])
    marker, event = str(number % 2), str(number // 2 % 2)
    return {"marker": marker, "invasion": event, "depth": f"{number}.5", "os_time": f"{number}", "os_event": event}


def as_csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# -- another value for a setting ------------------------------------------------------------------------------------


def row_of(key: str) -> dict[str, Any] | None:
    """The first row whose `keys` match a setting."""
    return next((row for row in TABLE["rows"] if any(fnmatchcase(key, p) for p in row.get("keys", ()))), None)


def another(part: dict[str, Any], value: Any) -> Any:
    """A value of the schema's `part` that is not `value`."""
    part = resolved(part)
    options = part.get("enum", [])
    if options:
        return next(option for option in options if option != value)
    kinds = part.get("type", ())
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if "boolean" in kinds:
        return not value
    if "array" in kinds and value:
        return value[:-1]
    if kinds & {"integer", "number"}:
        low, high = part.get("minimum", part.get("exclusiveMinimum", 0)), part.get("maximum", 10**9)
        tries = [(value or low) + 1, (value or low) * 1.25, (low + high) / 2, value and value - 1]
        numbers = [int(n) if "integer" in kinds else n for n in tries if n is not None]
        return next(n for n in numbers if n != value and low < n <= high and n % part.get("multipleOf", n) == 0)
    if "string" in kinds:
        return f"another {value}"
    raise LookupError


def with_setting(config: dict[str, Any], key: str, value: Any) -> None:
    steps = key.split(".")
    steps = [NAMES[steps[n - 1]] if step == "<name>" else step for n, step in enumerate(steps)]
    for step in steps[:-1]:
        config = config.setdefault(step, {})
    config[steps[-1]] = value
    if value is None:
        del config[steps[-1]]


def setting(config: dict[str, Any], key: str) -> Any:
    steps = key.split(".")
    for n, step in enumerate(steps):
        config = (config or {}).get(NAMES[steps[n - 1]] if step == "<name>" else step)
    return config


# -- cases ----------------------------------------------------------------------------------------------------------


def expected(names: list[str]) -> set[str]:
    """Rules, with lists of rules by name written out."""
    lists = TABLE["rules"]
    return {rule for name in names for rule in (expected(lists[name]) if name in lists else [name])}


def cases(rows: Rows) -> list[Case]:
    """All changes of the table, on the cohort of `finished`."""
    found = []
    complete = load_configuration({**CONFIG, "sheet": "slides.csv"}, REPO)
    for key, part in leaves():
        row = row_of(key)
        if row is None:
            continue  # reported by its own test
        if len(resolved(part).get("enum", (1, 2))) == 1:
            continue  # it has no other value yet
        values = row.get("values", {})
        value = values[key] if key in values else another(part, setting(complete, key))
        config = deepcopy(CONFIG)
        with_setting(config, key, value)
        for other, its in row.get("with", {}).get(key, {}).items():
            with_setting(config, other, its)
        files = {"config.yaml": yaml.safe_dump(config)}
        if "sheet" in row:
            files["slides.csv"] = as_csv(SHEETS[row["sheet"]](rows))
        runs = row.get("runs_of", {}).get(key, row["runs"])
        found.append(Case(f"{key}: {value}", files, expected(runs), {}, row=row["change"]))
    for row in TABLE["rows"]:
        for name in row.get("cases", ()):
            runs = expected(row.get("runs_of", {}).get(name, row["runs"]))
            files = {"slides.csv": as_csv(SHEETS[name](rows))} if name in SHEETS else {}
            files |= {DAMAGED[name]: "another"} if name in DAMAGED else {}
            gone, cores = DELETED.get(name, ()), 1 if name == "cores" else 2
            replaced = str(REPLACED[name](Path(rows[0]["path"]))) if name in REPLACED else ""
            found.append(Case(name, files, runs, {}, cores, gone, replaced, row["change"]))
        for stage, runs in row.get("versions", {}).items():
            found.append(Case(f"version of {stage}", {}, expected(runs), {stage: STAGE_VERSIONS[stage] + 1}))
    return found


def prepare(project: Project, rows: Rows) -> Rows:
    """Files that changes name; the first slide becomes the project's own."""
    (project.folder / "other.csv").write_text((project.folder / "slides.csv").read_text())
    record = yaml.safe_load((REPO / "scripts" / "slidemake" / "encoders" / "encoders.yaml").read_text())["encoders"][
        ENCODER
    ]
    changed = {"encoders": {ENCODER: {**record, "mean": [0.4, 0.4, 0.4]}}}
    (project.folder / "encoders.yaml").write_text(yaml.safe_dump(changed))
    (project.folder / "outline.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    shutil.copy(rows[0]["path"], project.folder / "moved.tiff")
    bundle = project.folder / "bundle"
    shutil.copytree(project.results / "tasks" / NAMES["tasks"] / NAMES["models"] / "bundle", bundle)
    info = read_json(bundle / "bundle.json")  # of a cohort elsewhere: how good it is on its own patients nobody may ask
    info["training"]["patients"] = [f"elsewhere-{patient}" for patient in info["training"]["patients"]]
    write_json(bundle / "bundle.json", info)
    return rows


def test_every_setting_has_a_row():
    missing = [key for key, _ in leaves() if row_of(key) is None]
    assert not missing, f"add {missing} to `keys` of a row of {Path(__file__).with_name('what_runs_again.yaml')}"


def test_every_stage_has_a_version_in_the_table():
    told = {stage for row in TABLE["rows"] for stage in row.get("versions", {})}
    assert told == set(STAGE_VERSIONS)


def test_every_row_is_tried():
    tests = "".join(path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    for row in TABLE["rows"]:
        elsewhere = row.get("tested_by")
        assert row.get("cases") or row.get("keys") or row.get("versions") or elsewhere, row["change"]
        assert elsewhere is None or f"\ndef {elsewhere}(" in tests, elsewhere
    for name in (name for row in TABLE["rows"] for name in row.get("cases", ())):
        assert name in {*SHEETS, *DELETED, *DAMAGED, *REPLACED}, name


def as_elsewhere(text: str, folder: Path) -> str:
    """A configuration for another working folder: all paths are absolute, that of the results leads through a link."""
    config = yaml.safe_load(text)
    for key in ("sheet", "encoders_file", "bundle", "slides_folder"):
        if config.get(key):
            config[key] = str(folder / config[key])
    for task in config["tasks"].values():
        if task.get("splits", {}).get("file"):
            task["splits"]["file"] = str(folder / task["splits"]["file"])
    config["output"] = f"{folder}/link/../link//{config['output']}/"
    return yaml.safe_dump(config)


def make_uncomfortable(project: Project) -> None:
    """Nothing that Snakemake goes by is left: its memory is gone, files have times of the past and of the future."""
    shutil.rmtree(project.folder / ".snakemake")
    (project.folder / "link").symlink_to(project.folder)
    (project.folder / "elsewhere").mkdir()
    times = random.Random(0)
    for path in sorted(project.results.rglob("*")):
        moment = times.uniform(1e9, 3e9)
        os.utime(path, (moment, moment))


def one_a_row(every: list[Case]) -> list[Case]:
    """The first case of each row of the table."""
    return list({case.row: case for case in reversed(every)}.values())


@pytest.mark.parametrize("chosen", [one_a_row, pytest.param(list, marks=pytest.mark.long)])
def test_what_runs_again(project: Project, chosen: Callable[[list[Case]], list[Case]]):
    """A dry run for every change shows exactly the rules that the table names: from another folder, with other
    spellings of all paths, without Snakemake's memory, with times that mean nothing, changed files being older than all
    results.
    """
    rows = prepare(project, project.rows())
    make_uncomfortable(project)
    folder = project.folder
    tried = [Case("nothing", {}, set(), {}), *chosen(cases(rows))]
    requests = [
        {
            "folder": str(folder),
            "cwd": str(folder / "elsewhere"),
            "files": case.files
            | {"config.yaml": as_elsewhere(case.files.get("config.yaml") or yaml.safe_dump(CONFIG), folder)},
            "gone": case.gone,
            "replaced": [case.replaced],
            "versions": case.versions,
            "arguments": [
                *("--snakefile", str(REPO / "Snakefile"), "--cores", str(case.cores)),
                *("--configfile", str(folder / "config.yaml")),
            ],
        }
        for case in tried
    ]
    requests.append(requests[0] | {"cwd": str(folder), "files": {}})  # the comfortable case
    tried.append(Case("nothing, as before", {}, set(), {}))
    wrong = []
    for case, (code, text) in zip(tried, plans(requests, environment()), strict=True):
        planned = set(Outcome(code, text).jobs()) - {"all"}
        if code != 0 or planned != case.runs:
            more, less = sorted(planned - case.runs), sorted(case.runs - planned)
            wrong.append(f"{case.name}: also runs {more}, does not run {less}" + ("" if code == 0 else text[-1500:]))
    assert not wrong, "\n" + "\n".join(wrong)
