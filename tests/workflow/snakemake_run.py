"""Real Snakemake runs of small drawn cohorts: what the workflow tests share.

A `Project` is a folder as a user has it: a sheet, a configuration, and the results that Snakemake makes there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 900  # seconds after which a run is taken to hang; no test is about time
PER_SLIDE = ("screen_slides", "detect_tissue", "fit_stain", "tile_slides", "embed_tiles")
GRID, ENCODER = "224px_0.5mpp", "efficientnet_lite0"

CONFIG: dict[str, Any] = {
    "sheet": "slides.csv",
    "output": "results",
    "rack_size": 16,  # the whole cohort in one rack
    "max_failed_fraction": 0.5,
    "tissue": {"focus_samples": 8},
    "stain": {"method": "macenko"},  # by default nothing is normalised, and that stage would have no work
    "tasks": {
        "tumour": {"label": "diagnosis", "positive": "tumour", "splits": {"folds": 2, "repeats": 1}},
    },
    "models": {
        "abmil": {
            "aggregator": "abmil_gated",
            "hidden": 16,
            "attention": 8,
            "epochs": 4,
            "min_epochs": 2,
            "min_tiles": 4,
            "tile_fraction": 1.0,
        }
    },
    "evaluation": {"bootstrap": 100},
    "explain": {"truth": "{folder}/truth/{stem}_tumour16.png", "top_tiles": 3},
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code and all that the terminal showed."""

    code: int
    text: str

    def jobs(self) -> dict[str, int]:
        """{rule: jobs} of the table that Snakemake prints before a (dry) run; empty when there is nothing to do."""
        table = re.search(r"^job +count\n-+ +-+\n(.*?)^total ", self.text, re.DOTALL | re.MULTILINE)
        if table is None:
            return {}
        return {name: int(count) for name, count in (line.split() for line in table[1].splitlines() if line.strip())}


@dataclass(frozen=True)
class Project:
    """A folder with slides.csv, config.yaml and what the runs leave there."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def configure(self, **changes: Any) -> None:
        """Write config.yaml: the tests' configuration with sections updated (None removes a key)."""
        path = self.folder / "config.yaml"
        config = yaml.safe_load(path.read_text()) if path.exists() else json.loads(json.dumps(CONFIG))
        path.write_text(yaml.safe_dump(_merged(config, changes), sort_keys=False))

    def write_sheet(self, rows: list[dict[str, str]]) -> None:
        with open(self.folder / "slides.csv", "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def rows(self) -> list[dict[str, str]]:
        with open(self.folder / "slides.csv", newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    def command(self, *arguments: str, cores: int = 2) -> list[str]:
        """The command line; targets come before --configfile, which takes every word behind it."""
        snakefile = () if "--snakefile" in arguments else ("--snakefile", str(REPO / "Snakefile"))
        run = [sys.executable, "-m", "snakemake", *arguments, *snakefile]
        return [*run, "--cores", str(cores), "--configfile", "config.yaml"]

    def run(self, *arguments: str, cores: int = 2, prefix: list[str] | None = None, **env: str) -> Outcome:
        """Run Snakemake in the folder to its end."""
        ended = subprocess.run(
            [*(prefix or []), *self.command(*arguments, cores=cores)],
            cwd=self.folder,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        return Outcome(ended.returncode, ended.stdout)

    def succeed(self, *arguments: str, **env: str) -> Outcome:
        """Run, and expect it to go well."""
        outcome = self.run(*arguments, **env)
        assert outcome.code == 0, outcome.text[-6000:]
        return outcome

    def planned(self, *arguments: str) -> dict[str, int]:
        """{rule: jobs} that a run would execute now, without the target rule."""
        jobs = self.succeed("--dry-run", *arguments).jobs()
        return {rule: count for rule, count in jobs.items() if rule != "all"}

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        """Start Snakemake in a process group of its own, to be killed."""
        with open(self.folder / "terminal.txt", "ab") as terminal:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env=environment(**env),
                stdout=terminal,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def manifest(self, *where: str) -> list[dict[str, Any]]:
        """Records of a stage: `manifest("tiles", GRID)` is manifests/tiles/<grid>/*.json."""
        paths = sorted((self.results / "manifests" / Path(*where)).glob("*.json"))
        return [record for path in paths for record in json.loads(path.read_text())["slides"]]

    def table(self, path: str) -> list[dict[str, str]]:
        """Rows of a CSV below results/."""
        with open(self.results / path, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    def json(self, path: str) -> Any:
        return json.loads((self.results / path).read_text())

    def copy(self, to: Path) -> Project:
        """A copy to change, modification times and Snakemake's memory included."""
        subprocess.run(["cp", "-a", str(self.folder), str(to)], check=True)
        return Project(to)


def environment(**extra: str) -> dict[str, str]:
    """The tests' environment without what a surrounding Snakemake or pytest would leave in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SNAKEMAKE", "PYTEST", "COV"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", **extra}


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = _merged(config[key], value)
        else:
            config[key] = value
    return config


def kill_group(process: subprocess.Popen) -> None:
    """kill -9 for Snakemake and every job it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """{relative path: (inode, mtime in ns, size)} of every file: equal only if nothing was written again."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[path.relative_to(folder).as_posix()] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """{relative path: bytes} of the files below a folder that match."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def embedding(project: Project, slide_id: str, encoder: str = ENCODER) -> tuple[Any, Any, dict[str, Any]]:
    """(features as float64, coords, attributes) of a slide's embedding store."""
    import numpy as np
    import zarr

    group = zarr.open_group(project.results / "embeddings" / encoder / f"{slide_id}.zarr", mode="r")
    return np.asarray(group["features"][:], np.float64), np.asarray(group["coords"][:]), dict(group.attrs)


def cosine(a: Any, b: Any) -> Any:
    """Row by row."""
    import numpy as np

    return (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
