"""Random sequences of changes, runs, kills and damage over a small cohort; the end is compared with a fresh run.

    python tests/soak/changes.py --sequences 200 --seed 0

A sequence starts from a finished run and draws some of: another configuration (a sweep among them), sheet, slide, mask
or weights (older than the results), a deleted or overwritten file of the results, Snakemake's memory deleted, times of
all results made meaningless, a run from another folder, under another spelling or only up to the embeddings, a run that
is killed. At its end stands a state of which there is a fresh run, and a run that is not disturbed. All files of the
fresh run must be there with the same content. (The paths of slides are part of the results, so all runs are in one
folder, one after the other.) One slide is at an address and fetched. Runs are real; only the interpreter is not started
anew (tests/workflow/warm.py), and the encoder is a toy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cohort import EXCEPT_FILES, LOOPBACK, TOY_RECORD, _same, make_project, rows, slide_site, write_toy_weights
from snakemake_run import CONFIG, GRID, REPO, Project
from storage_servers import Site
from warm import Warm

ENCODER = "toy"
SMALL = {**CONFIG["models"]["abmil"], "encoder": ENCODER}
# What may be set to what; the first is what the sequence starts from.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "model": [{"models": {"abmil": {"hidden": 16}}}, {"models": {"abmil": {"hidden": 24}}}],
    "tissue": [{"tissue": {"focus_samples": 8}}, {"tissue": {"focus_samples": 6}}],
    "stain": [{"stain": {"method": "macenko"}}, {"stain": {"method": "reinhard"}}],
    "tiles": [{"tiling": {"min_tissue": 0.5}}, {"tiling": {"min_tissue": 0.7}}],
    "evaluation": [{"evaluation": {"bootstrap": 100}}, {"evaluation": {"bootstrap": 120}}],
    "explain": [{"explain": {"top_tiles": 3}}, {"explain": {"top_tiles": 2}}],
    "sweep": [{"sweeps": None}, {"sweeps": {"rates": {**SMALL, "learning_rate": [1e-3, 1e-4]}}}],
}
FILES = {"slide": "slides/P03-A.tiff", "mask": "slides/truth/P01-A_tumour16.png", "weights": "toy.pt"}
LONGEST = 25.0  # s after which a run that is to be killed is, unless it has ended
REMOTE = "P04-A"  # the slide that is fetched
SHEETS = ("as it was", "labels", "excluded", "shorter")
FINAL = (  # states that a sequence may end with
    {},
    {"sheet": "labels"},
    {"model": 1, "slide": 1},
    {"tissue": 1, "mask": 1},
    {"tiles": 1, "sheet": "excluded"},
    {"evaluation": 1, "explain": 1, "sheet": "shorter"},
    {"sweep": 1, "weights": 1},
)
NOT_COMPARED = (*EXCEPT_FILES, "digests/", "plan.json", "slidemake.json", ".snakemake")
DELETABLE = (
    *("manifests/screen/r00000.json", "manifests/tissue/r00001.json", f"manifests/tiles/{GRID}/r00000.json"),
    *(f"manifests/embed/{ENCODER}/r00001.json", "manifests/explain/tumour/abmil/r00000.json", "plan.json", "digests"),
    *("cohort/slides.csv", "cohort/passed.json", "cohort/stain_target.json", f"cohort/bags/{ENCODER}.npy"),
    *("tasks/tumour/splits.csv", "tasks/tumour/abmil/train.json", "tasks/tumour/abmil/bundle", "report/index.html"),
    *("tasks/tumour/metrics.json", "tasks/tumour/site_only/predictions_patients.csv", "slides/P04-A/tissue.json"),
    *(f"tiles/{GRID}/P01-A.zarr", f"embeddings/{ENCODER}/P03-A.zarr", "slides/P01-A", "explain/tumour/abmil/P02-A"),
    *("digests/cohort/slides.csv.json", "tasks/tumour/abmil/bundles/repeat0_fold0", "manifests", "slides", "tasks"),
)
OVERWRITTEN = (
    *("cohort/slides.csv", "cohort/failures.csv", "tasks/tumour/splits.csv", "tasks/tumour/metrics.csv"),
    *("tasks/tumour/abmil/predictions_patients.csv", "manifests/tissue/r00000.json", "cohort/stain_target.json"),
    *("tasks/tumour/comparison.json", "digests/tasks/tumour/splits.csv.json", "plan.json"),
)
STEPS = {
    **{"setting": 4, "sheet": 2, "file": 2, "delete": 3, "overwrite": 1, "forget": 1, "times": 1},
    **{"run": 2, "killed run": 5, "part": 1},
}


@dataclass
class Sequence:
    """What was done, and what was wrong in the end."""

    number: int
    steps: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    killed: int = 0
    seconds: float = 0.0


class Stage:
    """The one folder in which everything happens, and the fresh runs of its states."""

    def __init__(self, base: Path, warm: Warm, site: Site):
        self.base, self.warm, self.site = base, warm, site
        self.project = Project(base / "project")
        self.terminal = base / "terminal.txt"
        self.state: dict[str, Any] = {}
        self.sheet: list[dict[str, str]] = []
        self.drawn = base / "drawn"
        self.drawn.mkdir(exist_ok=True)
        self.rows = rows(self.drawn)
        site.files[f"/{REMOTE}.tiff"] = (self.drawn / f"{REMOTE}.tiff").read_bytes()

    def fresh(self, state: dict[str, Any]) -> Path:
        """A run of a state from the beginning, made when it is first asked for."""
        name = "-".join(["fresh", *(f"{key}={value}" for key, value in sorted(state.items()))]).replace(" ", "_")
        kept = self.base / name
        if not kept.exists():
            self._draw()
            for key, value in state.items():
                self.set(key, value)
            if self.run() != 0:
                raise RuntimeError(f"the fresh run of {state} failed: {self.terminal.read_text()[-3000:]}")
            self.project.folder.rename(kept)
        return kept

    def _draw(self) -> None:
        """A project that has not run, with slides of its own and, for two files, another to take their place."""
        shutil.rmtree(self.project.folder, ignore_errors=True)
        places = {row["slide_id"]: f"slides/{Path(row['path']).name}" for row in self.rows}
        places[REMOTE] = f"{self.site.address}/{REMOTE}.tiff"
        sheet = [row | {"path": places[row["slide_id"]]} for row in self.rows]
        models = {"abmil": {"encoder": ENCODER}}
        # to a toy all slides look alike
        tasks = {"tumour": {"splits": {"near_duplicate": 1.0}}}
        project = make_project(self.project.folder, sheet, encoders_file="toy.yaml", models=models, tasks=tasks)
        (project.folder / "toy.yaml").write_text(json.dumps({"encoders": {ENCODER: TOY_RECORD}}))
        subprocess.run(["cp", "-a", str(self.drawn), str(project.folder / "slides")], check=True)
        self._others()
        for choices in SETTINGS.values():
            project.configure(**choices[0])
        self._begin()

    def _others(self) -> None:
        from PIL import Image, ImageOps

        folder = self.project.folder / "others"
        folder.mkdir()
        for name, seed in ((self.project.folder / FILES["weights"], 0), (folder / "1-toy.pt", 1)):
            write_toy_weights(name, seed)
        for name in FILES.values():
            shutil.copy2(self.project.folder / name, folder / f"0-{Path(name).name}")
        slide = (self.project.folder / FILES["slide"]).read_bytes()
        (folder / f"1-{Path(FILES['slide']).name}").write_bytes(slide + b"another scan")
        mask = ImageOps.invert(Image.open(self.project.folder / FILES["mask"]).convert("L"))
        mask.save(folder / f"1-{Path(FILES['mask']).name}")
        for path in folder.iterdir():  # what is put in place has always the same time, as a copy of a backup has
            os.utime(path, (1.5e9, 1.5e9))
        for name in FILES.values():
            os.utime(self.project.folder / name, (1.5e9, 1.5e9))

    def _begin(self) -> None:
        self.state, self.sheet = {}, self.project.rows()

    def begin(self) -> None:
        """The finished run that a sequence starts from."""
        shutil.rmtree(self.project.folder, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.fresh({})), str(self.project.folder)], check=True)
        self._begin()

    def set(self, key: str, value: Any) -> None:
        """Bring one part of the state to a value."""
        self.state[key] = value
        if key in SETTINGS:
            self.project.configure(**SETTINGS[key][value])
        elif key == "sheet":
            self.project.write_sheet(self._sheet(value))
            os.utime(self.project.folder / "slides.csv", (1.4e9, 1.4e9))
        else:
            name = FILES[key]
            shutil.copy2(self.project.folder / "others" / f"{value}-{Path(name).name}", self.project.folder / name)

    def _sheet(self, name: str) -> list[dict[str, str]]:
        swapped = {"tumour": "benign", "benign": "tumour"}
        if name == "labels":
            return [row | {"diagnosis": swapped[row["diagnosis"]]} for row in self.sheet]
        if name == "excluded":
            return [row | {"exclude": "yes" if row["slide_id"] == "P02-B" else ""} for row in self.sheet]
        return self.sheet if name != "shorter" else [row for row in self.sheet if row["slide_id"] != "P02-B"]

    def run(self, *arguments: str, spelling: str = "usual", kill_after: float | None = None) -> int | None:
        """A run; after one that was killed the lock is taken away, as --unlock does."""
        for lock in self.base.rglob(".snakemake/locks/*.lock"):
            lock.unlink()
        folder, config = self.project.folder, "config.yaml"
        extra: list[str] = []
        if spelling == "elsewhere":
            (self.base / "elsewhere").mkdir(exist_ok=True)
            config = str(folder / "config.yaml")
            paths = {"sheet": "slides.csv", "output": "results", "encoders_file": "toy.yaml"}
            extra = ["--config", *(f"{key}={folder}/{name}" for key, name in paths.items())]
            folder = self.base / "elsewhere"
        elif spelling == "other":
            extra = ["--config", f"output={folder}/./results/"]
        command = [*arguments, "--snakefile", str(REPO / "Snakefile"), "--cores", "1", "--configfile", config, *extra]
        return self.warm.run(folder, command, self.terminal, kill_after, **LOOPBACK)

    def compare(self, fresh: Path, sequence: Sequence) -> None:
        """All files of the fresh run, with the same content."""
        for path in sorted((fresh / "results").rglob("*")):
            name = path.relative_to(fresh / "results").as_posix()
            if path.is_dir() or name.startswith(NOT_COMPARED):
                continue
            other = self.project.results / name
            if not other.is_file():
                sequence.lost.append(f"{name} is missing")
            elif not _same(path, other):
                sequence.wrong.append(f"{name} differs")


def step(stage: Stage, rng: np.random.Generator, sequence: Sequence) -> None:
    """One step, drawn."""
    weights = np.array(list(STEPS.values()), float)
    kind = str(rng.choice(list(STEPS), p=weights / weights.sum()))
    results = stage.project.results
    if kind == "setting":
        key = str(rng.choice(list(SETTINGS)))
        value: Any = 1 - int(stage.state.get(key, 0))
        stage.set(key, value)
        kind = f"{key} = {value}"
    elif kind == "sheet":
        value = str(rng.choice(SHEETS))
        stage.set("sheet", value)
        kind = f"sheet: {value}"
    elif kind == "file":
        key = str(rng.choice(list(FILES)))
        value = 1 - int(stage.state.get(key, 0))
        stage.set(key, value)
        kind = f"{key} = {value}"
    elif kind == "delete":
        name = str(rng.choice(DELETABLE))
        path = results / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kind = f"delete {name}"
    elif kind == "overwrite":
        name = str(rng.choice(OVERWRITTEN))
        if (results / name).exists():
            (results / name).write_text((results / name).read_text().replace("0", "1"))
        kind = f"overwrite {name}"
    elif kind == "forget":
        shutil.rmtree(stage.project.folder / ".snakemake", ignore_errors=True)
    elif kind == "times":
        for path in sorted(results.rglob("*")):
            moment = rng.uniform(1e9, 3e9)
            os.utime(path, (moment, moment))
    else:
        spelling = str(rng.choice(["usual", "usual", "other", "elsewhere"]))
        target = ["embeddings"] if kind == "part" else []
        after = float(rng.uniform(1, LONGEST)) if kind == "killed run" else None
        code = stage.run(*target, spelling=spelling, kill_after=after)
        sequence.killed += code is None
        kind = f"{kind} ({spelling}{'' if after is None else f', {after:.0f} s'}): {code}"
    sequence.steps.append(kind)


def run_sequence(stage: Stage, number: int, seed: int, finals: tuple[dict[str, Any], ...] = FINAL) -> Sequence:
    """One sequence, its last run, and what differs from a fresh one."""
    started, sequence = time.monotonic(), Sequence(number)
    rng = np.random.default_rng([seed, number])
    final = finals[int(rng.integers(len(finals)))]
    fresh = stage.fresh(final)
    stage.begin()
    for _ in range(int(rng.integers(2, 6))):
        step(stage, rng, sequence)
    for key in [*SETTINGS, *FILES, "sheet"]:
        default = "as it was" if key == "sheet" else 0
        wanted = final.get(key, default)
        if stage.state.get(key, default) != wanted:
            stage.set(key, wanted)
    stage.terminal.write_text("")
    if stage.run() != 0:
        sequence.wrong.append(f"the last run failed: {stage.terminal.read_text()[-2000:]}")
    stage.compare(fresh, sequence)
    sequence.steps.append(f"end: {final}")
    sequence.seconds = round(time.monotonic() - started, 1)
    if sequence.lost or sequence.wrong:
        kept = stage.base / f"wrong{number}"
        shutil.rmtree(kept, ignore_errors=True)
        stage.project.folder.rename(kept)
        shutil.copy(stage.terminal, kept / "terminal.txt")
    return sequence


def run(
    sequences: int, seed: int, folder: Path, first: int = 0, finals: tuple[dict[str, Any], ...] = FINAL
) -> list[Sequence]:
    """Sequences; a line of JSON for each goes into `folder`/changes.jsonl."""
    done = []
    with Warm() as warm:
        base = folder / "changes"
        base.mkdir(parents=True, exist_ok=True)
        with slide_site(base, {}) as site:
            stage = Stage(base.resolve(), warm, site)
            for number in range(first, first + sequences):
                sequence = run_sequence(stage, number, seed, finals)
                done.append(sequence)
                with open(folder / "changes.jsonl", "a") as handle:
                    handle.write(json.dumps(asdict(sequence)) + "\n")
                print(f"sequence {number}: {'; '.join(sequence.steps)} ({sequence.seconds:.0f} s)", flush=True)
                for what in [*sequence.lost, *sequence.wrong]:
                    print(f"  WRONG {what}", flush=True)
    return done


def summary(done: list[Sequence]) -> dict[str, Any]:
    """Figures for the table of `make soak`."""
    kinds = Counter(step.split(":")[0].split(" ")[0] for sequence in done for step in sequence.steps)
    return {
        "sequences": len(done),
        "steps": dict(kinds),
        "killed": sum(sequence.killed for sequence in done),
        "lost": sum(len(sequence.lost) for sequence in done),
        "wrong": sum(len(sequence.wrong) for sequence in done),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first sequence, to go on in pieces")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slidemake-changes-"))
    found = summary(run(options.sequences, options.seed, folder, options.first))
    print(json.dumps(found))
    return int(bool(found["lost"] or found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
