"""Random sequences of changes, runs, kills and damage over a small cohort; the end is compared with a fresh run.

    python tests/soak/changes.py --sequences 200 --seed 0

A sequence starts from a finished run and draws some of: another configuration (a sweep among them), sheet, slide, mask
or weights (older than the results), a deleted or overwritten file of the results, Snakemake's memory deleted, times of
all results made meaningless, a run from another folder, under another spelling or only up to the embeddings, a run that
is killed in some rule (each in its turn), in the middle of a change that asks for it. At its end stands a state of
which there is a fresh run, a dry run, and a run that is not disturbed. All files of the fresh run must be there with
the same content, and the run must do what the dry run said of slides. (The paths of slides are part of the results, so
all runs are in one folder, one after the other.) One slide is at an address and fetched. Runs are real; only the
interpreter is not started anew (tests/workflow/warm.py), the encoder is a toy, and what is not compared is not drawn
(`plain.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from choices import (
    DELETABLE,
    ENCODER,
    FILES,
    FINAL,
    KILLED_IN,
    NOT_COMPARED,
    OVERWRITTEN,
    REMOTE,
    SETTINGS,
    SHEETS,
    STEPS,
    WORKED,
)
from cohort import LOOPBACK, TOY_RECORD, _same, make_project, rows, slide_site, write_toy_weights
from snakemake_run import REPO, Project
from storage_servers import Site
from warm import Warm


@dataclass
class Sequence:
    """What was done, and what was wrong in the end."""

    number: int
    steps: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    killed: int = 0
    killed_in: list[str] = field(default_factory=list)
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
        for seed in (0, 1):
            if not (base / f"{seed}-toy.pt").exists():  # the same weights are not the same bytes twice
                write_toy_weights(base / f"{seed}-toy.pt", seed)

    def fresh(self, state: dict[str, Any]) -> Path:
        """A run of a state from the beginning, made when it is first asked for."""
        name = "-".join(["fresh", *(f"{key}={value}" for key, value in sorted(state.items()))]).replace(" ", "_")
        kept = self.base / name
        if kept.exists():
            return kept
        trained = "results/tasks/tumour/abmil/bundle"
        if state:
            shutil.copytree(self.fresh({}) / trained, self.base / "bundle", dirs_exist_ok=True)
        self._draw()
        if state:
            (self.base / "bundle").rename(self.project.folder / "bundle")
        for key, value in state.items():
            self.set(key, value)
        if self.run() != 0:
            raise RuntimeError(f"the fresh run of {state} failed: {self.terminal.read_text()[-3000:]}")
        if not state:  # what is applied is the model of the run that all begin with
            shutil.copytree(self.project.folder / trained, self.project.folder / "bundle")
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
        shutil.copy2(self.base / "0-toy.pt", self.project.folder / FILES["weights"])
        shutil.copy2(self.base / "1-toy.pt", folder)
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

    def run(self, *arguments: str, spelling: str = "usual", kill_in: tuple[str, float] | None = None) -> int | None:
        """A run; after one that was killed the lock is taken away, as --unlock does."""
        for lock in self.base.rglob(".snakemake/locks/*.lock"):
            lock.unlink()
        folder, config = self.project.folder, "config.yaml"
        extra: list[str] = []
        if spelling == "elsewhere":
            (self.base / "elsewhere").mkdir(exist_ok=True)
            config = str(folder / "config.yaml")
            paths = {"sheet": "slides.csv", "output": "results", "encoders_file": "toy.yaml"}
            if self.state.get("bundle"):
                paths["bundle"] = "bundle"
            extra = ["--config", *(f"{key}={folder}/{name}" for key, name in paths.items())]
            folder = self.base / "elsewhere"
        elif spelling == "other":
            extra = ["--config", f"output={folder}/./results/"]
        command = [*arguments, "--snakefile", str(REPO / "Snakefile"), "--cores", "1", "--configfile", config, *extra]
        return self.warm.run(folder, command, self.terminal, kill_in, **LOOPBACK)

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


def step(stage: Stage, rng: np.random.Generator, sequence: Sequence, rules: Iterator[str]) -> None:
    """One step, drawn."""
    weights = np.array(list(STEPS.values()), float)
    kind = str(rng.choice(list(STEPS), p=weights / weights.sum()))
    results = stage.project.results
    if kind == "setting":
        kind = change(stage, str(rng.choice(list(SETTINGS))))
    elif kind == "sheet":
        kind = change(stage, kind, str(rng.choice(SHEETS)))
    elif kind == "file":
        kind = change(stage, str(rng.choice(list(FILES))))
    elif kind == "delete":
        kind = delete(results, str(rng.choice(DELETABLE)))
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
        kind = started(stage, rng, sequence, kind, next(rules) if kind == "killed run" else None)
    sequence.steps.append(kind)


def started(stage: Stage, rng: np.random.Generator, sequence: Sequence, kind: str, rule: str | None) -> str:
    """A run, under some spelling, up to some target; with `rule` it is killed there, in the middle of a change."""
    spelling = str(rng.choice(["usual", "usual", "other", "elsewhere"]))
    if rule is None:
        code = stage.run(*(["embeddings"] if kind == "part" else []), spelling=spelling)
        return f"{kind} ({spelling}): {code}"
    wanted = "bundle" if rule in ("predict_slides", "watch_drift") else ""
    if int(stage.state.get("bundle", 0)) != bool(wanted):  # with a bundle nothing is trained
        stage.set("bundle", int(bool(wanted)))
    asked = KILLED_IN[rule]
    if asked.startswith("delete "):
        asked = delete(stage.project.results, asked.removeprefix("delete "))
    elif asked == "sheet":
        asked = change(stage, asked, str(rng.choice([name for name in SHEETS if name != stage.state.get("sheet")])))
    elif not wanted:
        asked = change(stage, asked, 1 if asked in ("sweep", "background", "stress") else None)
    seconds = float(rng.uniform(0, WORKED))
    code = stage.run(spelling=spelling, kill_in=(rule, seconds))
    sequence.killed += code is None
    if code is None:
        sequence.killed_in.append(rule)
    return f"{asked}, and killed in {rule} after {seconds:.1f} s ({spelling}): {'killed' if code is None else code}"


def change(stage: Stage, key: str, value: Any = None) -> str:
    """Another value for a part of the state."""
    if value is None:
        value = 1 - int(stage.state.get(key, 0))
    stage.set(key, value)
    return f"{key} = {value}"


def delete(results: Path, name: str) -> str:
    """Take a file or folder away from the results."""
    path = results / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return f"delete {name}"


def every_rule(seed: int, number: int) -> Iterator[str]:
    """The rules in which runs are killed: all of them, shuffled, again and again, over the sequences of a seed."""
    names = list(KILLED_IN)
    np.random.default_rng(seed).shuffle(names)
    return islice(cycle(names), 2 * number % len(names), None)


def foretold(dry: str, run: str) -> list[str]:
    """Where a run did not do what the dry run before it had said of slides, by what both say."""
    said = [re.findall(r"^slidemake: of \d+ slides (.*)$", text, re.MULTILINE)[-1:] for text in (dry, run)]
    words = [re.findall(r"(\d+) ([a-z]+ ?[a-z]* ?[a-z]*)", text[0] if text else "") for text in said]
    plan, done = (Counter({what: int(count) for count, what in found}) for found in words)
    computed, found, looked = (plan[f"will be {what}"] for what in ("computed", "found", "looked"))
    well = (
        computed <= done["computed"] + done["failed"] <= computed + looked + plan["failed"]
        and found <= done["found finished"] <= found + looked
    )
    return [] if well else [f"the dry run said {said[0]}, and the run {said[1]}"]


def run_sequence(stage: Stage, number: int, seed: int, finals: tuple[dict[str, Any], ...] = FINAL) -> Sequence:
    """One sequence, its last run, and what differs from a fresh one."""
    began, sequence = time.monotonic(), Sequence(number)
    rng = np.random.default_rng([seed, number])
    final = finals[int(rng.integers(len(finals)))]
    fresh = stage.fresh(final)
    stage.begin()
    rules = every_rule(seed, number)
    for _ in range(int(rng.integers(2, 5))):
        step(stage, rng, sequence, rules)
    for key in [*SETTINGS, *FILES, "sheet"]:
        default = "as it was" if key == "sheet" else 0
        wanted = final.get(key, default)
        if stage.state.get(key, default) != wanted:
            stage.set(key, wanted)
    texts, codes = [], []
    for arguments in (["--dry-run"], []):
        stage.terminal.write_text("")
        codes.append(stage.run(*arguments))
        texts.append(stage.terminal.read_text())
    sequence.wrong += foretold(*texts) if codes == [0, 0] else [f"the last run failed: {texts[-1][-2000:]}"]
    stage.compare(fresh, sequence)
    sequence.steps.append(f"end: {final}")
    sequence.seconds = round(time.monotonic() - began, 1)
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
    with Warm(Path(__file__).with_name("plain.py")) as warm:
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
