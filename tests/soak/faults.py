"""Disks that are full, read-only, forbidden, slow or late, at every stage: one clear message, and the next run goes on.

    python tests/soak/faults.py                       as root, who may mount; the others skip what needs that

For every stage its results are taken out of a finished run, the folder that it writes to is spoilt, and the stage is
run: it has to stop with a message and no traceback. Then the folder is mended, the same command has to finish, and
all results have to be those from before.

    full        a tmpfs without a byte left (ENOSPC)
    read-only   a bind mount (EROFS)
    forbidden   a folder of another user's, and root without the right to pass over permissions (EACCES)
    slow        every rename, opening and read of a slide takes a random while
    late        what another process has written shows after 2 s, as on a network file system
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cohort import TESTS, differences, make_project, reference_run
from snakemake_run import CONFIG, ENCODER, GRID, Outcome, Project, environment

RACKS = ("r00000", "r00001")
NOBODY = 65534
MERE_MORTAL = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]  # permissions hold for root, too
WORDS = {"full": "No space", "read-only": "No permission", "forbidden": "No permission"}


@dataclass(frozen=True)
class Stage:
    """What to delete below results/, the folder to spoil, and the files to ask Snakemake for."""

    name: str
    delete: tuple[str, ...]
    spoil: str
    ask: tuple[str, ...]
    may_go_on: bool = False  # without a log, for one
    of: str = "usual"  # the project that has this stage: see `finished_projects`


def _per_rack(name: str, delete: str, spoil: str, where: str, of: str = "usual") -> Stage:
    asked = tuple(f"manifests/{where}/{rack}.json" for rack in RACKS)
    return Stage(name, (delete, f"manifests/{where}/*"), spoil, asked, of=of)


TASK, MODEL = "tasks/tumour", "tasks/tumour/abmil"
_TARGET = Stage("stain target", ("cohort/stain_target.json",), "cohort", ("cohort/stain_target.json",))
STAGES = (
    _per_rack("screen", "slides/*/slide.json", "slides", "screen"),
    _per_rack("tissue", "slides/*/tissue.*", "slides", "tissue"),
    _per_rack("stain", "slides/*/stain.json", "slides", "stain"),
    _TARGET,
    _per_rack("tiles", f"tiles/{GRID}/*", "tiles", f"tiles/{GRID}"),
    _per_rack("embed", f"embeddings/{ENCODER}/*", "embeddings", f"embed/{ENCODER}"),
    Stage("cohort table", ("cohort/slides.csv", "cohort/failures.csv"), "cohort", ("cohort/slides.csv",)),
    Stage("cohort check", ("cohort/passed.json",), "cohort", ("cohort/passed.json",)),
    Stage("splits", (f"{TASK}/splits.*",), "tasks", (f"{TASK}/splits.csv",)),
    Stage("leakage", (f"{TASK}/leakage/*",), "tasks", (f"{TASK}/leakage/{ENCODER}.json",)),
    Stage("shortcuts", (f"{TASK}/shortcuts/*",), "tasks", (f"{TASK}/shortcuts/{ENCODER}.json",)),
    Stage("bags", ("cohort/bags/*",), "cohort", (f"cohort/bags/{ENCODER}.npy",)),
    Stage("train", (f"{MODEL}/*",), "tasks", (f"{MODEL}/train.json", f"{MODEL}/bundle/reference.json")),
    Stage("evaluate", (f"{TASK}/metrics.*", f"{TASK}/curves.json"), "tasks", (f"{TASK}/metrics.json",)),
    Stage("compare", (f"{TASK}/comparison.*",), "tasks", (f"{TASK}/comparison.json",)),
    _per_rack("explain", "explain/tumour/abmil/*", "explain", "explain/tumour/abmil"),
    Stage("report", ("report/index.html",), "report", ("report/index.html",)),
    _per_rack("manifests", "manifests/stain/*", "manifests", "stain"),
    _per_rack("background", "slides/*/background_*", "slides", f"background/{ENCODER}", "optional"),
    Stage("stress", (f"{MODEL}/stress*",), "tasks", (f"{MODEL}/stress.json",), of="optional"),
    Stage("predict", ("predictions/[ps]*.csv",), "predictions", ("predictions/patients.csv",), of="predict"),
    Stage(
        "external",
        ("predictions/metrics.*", "predictions/curves.json"),
        "predictions",
        ("predictions/metrics.json",),
        of="predict",
    ),
    Stage("drift", ("predictions/drift.*",), "predictions", ("predictions/drift.json",), of="predict"),
    Stage("logs", ("logs/make_stain_target.log", *_TARGET.delete), "logs", _TARGET.ask, may_go_on=True),
)


@dataclass(frozen=True)
class Fault:
    """One injected fault, and what was wrong with how it was taken (nothing: as it should be)."""

    stage: str
    kind: str
    lost: list[str]
    wrong: list[str]
    seconds: float


def run_in(project: Project, script: str, command: list[str]) -> tuple[Outcome, Outcome]:
    """Run a shell script in a mount namespace of its own; $@ is the command, `spoilt` and `mended` keep its output."""
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-ec", script, "bash", *command],
        cwd=project.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    if ended.returncode:
        raise RuntimeError(f"the script of this harness failed: {ended.stderr[-800:]}")
    texts = [(project.folder / f"{name}.txt").read_text().rsplit("\n", 2) for name in ("spoilt", "mended")]
    outcomes = [Outcome(int(text[-2]), "\n".join(text[:-2])) for text in texts]
    return outcomes[0], outcomes[1]


RUN_TWICE = """
run() { local code=0; "${@:2}" > $1.new 2>&1 || code=$?; echo >> $1.new; echo $code >> $1.new; cp $1.new $1.txt; }
"""
SCRIPTS = {
    "full": """
        cp -a results/{spoil} kept; mount -t tmpfs -o size=64m,mode=777 tmpfs results/{spoil}
        cp -a kept/. results/{spoil}; rm -rf kept
        dd if=/dev/zero of=results/{spoil}/filler bs=4k status=none 2> /dev/null || true
        run spoilt "$@"
        rm results/{spoil}/filler
        run mended "$@"
        cp -a results/{spoil} kept; umount results/{spoil}; rm -r results/{spoil}; mv kept results/{spoil}""",
    "read-only": """
        mount --bind results/{spoil} results/{spoil}; mount -o remount,ro,bind results/{spoil}
        run spoilt "$@"
        umount results/{spoil}
        run mended "$@" """,
    "forbidden": """
        chown -R {nobody} results/{spoil}; chmod -R a-w,a+rX results/{spoil}
        run spoilt "$@"
        chown -R 0 results/{spoil}; chmod -R u+w results/{spoil}
        run mended "$@" """,
}


def finished_projects(folder: Path) -> dict[str, Project]:
    """Undisturbed runs: the usual one, one with a sweep and optional stages, its model applied to other patients."""
    usual = reference_run(folder)
    optional, predict = Project(folder / "optional"), Project(folder / "predict")
    if not (folder / "projects.done").exists():
        for project in (optional, predict):
            shutil.rmtree(project.folder, ignore_errors=True)
            usual.copy(project.folder)
        small = CONFIG["models"]["abmil"]
        optional.configure(
            stress={"tiles": 2}, background={"tiles": 2}, sweeps={"rates": {**small, "learning_rate": [1e-3, 1e-4]}}
        )
        optional.succeed()
        shutil.move(predict.results / MODEL / "bundle", predict.folder / "bundle")
        predict.write_sheet([row | {"patient_id": f"N{row['patient_id']}"} for row in predict.rows()])
        predict.configure(bundle="bundle", bundle_label="diagnosis", tasks=None, models=None, explain=None)
        predict.succeed()
        (folder / "projects.done").touch()
    return {"usual": usual, "optional": optional, "predict": predict}


def inject(stage: Stage, kind: str, reference: Project, folder: Path) -> Fault:
    """Spoil, run, mend, run, compare."""
    started, lost, wrong = time.monotonic(), [], []
    project = reference.copy(folder / f"{stage.name.replace(' ', '_')}_{kind}")
    for pattern in stage.delete:
        for path in project.results.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (project.results / stage.spoil).mkdir(exist_ok=True)
    command = project.command(*(f"results/{name}" for name in stage.ask))
    script = RUN_TWICE + SCRIPTS[kind].format(spoil=stage.spoil, nobody=NOBODY)
    first, second = run_in(project, script, [*(MERE_MORTAL if kind == "forbidden" else []), *command])
    if first.code == 0 and not stage.may_go_on:
        wrong.append("the run ended well on a spoilt disk")
    if "Traceback" in first.text or (first.code and WORDS[kind] not in first.text):
        wrong.append(f"no clear message: {first.text[-1500:]}")
    if second.code:
        wrong.append(f"the next run does not go on: {second.text[-1500:]}")
    for difference in differences(reference, project):
        (lost if difference.lost else wrong).append(str(difference))
    left = [str(path.relative_to(project.results)) for path in project.results.rglob(".*.tmp-*")]
    wrong += [f"{name} was left behind" for name in left]
    if not lost and not wrong:
        shutil.rmtree(project.folder)
    return Fault(stage.name, kind, lost, wrong, round(time.monotonic() - started, 1))


SLOW_HOOK = """
import builtins, os, random, sys, time
chance = random.Random(os.getpid())
def slowed(call, longest):
    def patient(*arguments, **options):
        if "slidemake" in sys.modules:
            time.sleep(chance.random() * longest)
        return call(*arguments, **options)
    return patient
os.replace, os.rename = slowed(os.replace, 0.5), slowed(os.rename, 0.5)
builtins.open = slowed(builtins.open, 0.02)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "slidemake.slides.formats.openslide_reader":  # the readers are imported: make them slow
            sys.meta_path.remove(self)
            import slidemake.slides.reader as reader
            reader.SlideReader.read = slowed(reader.SlideReader.read, 0.2)
        return None
sys.meta_path.insert(0, Finder())
"""
LATE_HOOK = """
import builtins, errno, io, os, stat, time
HERE, LATE = os.environ["TEST_LATE"] + "/", 2.0
own, real_stat, real_open = set(), os.stat, builtins.open
def name(path):
    return os.path.abspath(os.fspath(path)) if isinstance(path, (str, bytes, os.PathLike)) else None
def hidden(path):
    path = name(path)
    if not isinstance(path, str) or not path.startswith(HERE):
        return False
    if path in own or any(path.startswith(mine + "/") for mine in own):
        return False
    part = HERE.rstrip("/")
    for piece in path[len(HERE):].split("/"):
        part += "/" + piece
        try:
            found = real_stat(part)
            # a plain folder is seen at once by who tries to make it, which is what everybody does
            seen = stat.S_ISDIR(found.st_mode) and not part.endswith(".zarr")
            if not seen and time.time() - found.st_ctime < LATE and (part == path or part.endswith(".zarr")):
                return True
        except OSError:
            return False
    return False
def late(call):
    def wrapper(path, *arguments, **options):
        if hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return call(path, *arguments, **options)
    return wrapper
def opened(path, mode="r", *arguments, **options):
    if isinstance(mode, str) and set(mode) & set("wax+"):
        own.add(name(path))
    elif hidden(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return real_open(path, mode, *arguments, **options)
def owned(call):
    def wrapper(source, target, **options):
        own.add(name(target))
        return call(source, target, **options)
    return wrapper
os.replace, os.rename = owned(os.replace), owned(os.rename)
os.stat, builtins.open, io.open = late(os.stat), opened, opened
class Finder:
    def find_spec(self, module, path=None, target=None):
        if module == "slidemake.stores.integrity":
            import sys
            sys.meta_path.remove(self)
            from slidemake.core import files
            files.on_network = lambda path: True
        return None
import sys
sys.meta_path.insert(0, Finder())
"""


def whole_run(kind: str, hook: str, reference: Project, folder: Path, **env: str) -> Fault:
    """A run from slides to report on a disk that a `sitecustomize` makes slow, or late."""
    started = time.monotonic()
    project = make_project(folder / kind, reference.rows())
    shutil.copy(reference.folder / "config.yaml", project.folder / "config.yaml")
    (project.folder / "hook").mkdir()
    (project.folder / "hook" / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(project.folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcome = project.run("--latency-wait", "20", PYTHONPATH=path, TEST_LATE=str(project.results), **env)
    wrong = [] if outcome.code == 0 else [f"the run failed: {outcome.text[-1500:]}"]
    found = differences(reference, project)
    lost = [str(difference) for difference in found if difference.lost]
    wrong += [str(difference) for difference in found if not difference.lost]
    return Fault("all", kind, lost, wrong, round(time.monotonic() - started, 1))


def may_mount() -> bool:
    """Whether this user may mount in a namespace of its own, and become another user."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def run(folder: Path, kinds: list[str], stages: list[str] | None = None) -> list[Fault]:
    """Every kind at every stage; a line of JSON for each goes into `folder`/faults.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    projects = finished_projects(folder)
    faults: list[Fault] = []
    for kind in kinds:
        if kind in SCRIPTS:
            chosen = [stage for stage in STAGES if stages is None or stage.name in stages]
            found = (inject(stage, kind, projects[stage.of], folder) for stage in chosen)
        else:
            hook = {"slow": SLOW_HOOK, "late": LATE_HOOK}[kind]
            found = (whole_run(kind, hook, projects["usual"], folder) for _ in range(1))
        for fault in found:
            faults.append(fault)
            with open(folder / "faults.jsonl", "a") as handle:
                handle.write(json.dumps(asdict(fault)) + "\n")
            print(f"{fault.kind} at {fault.stage}: {fault.seconds:.0f} s", flush=True)
            for what in [*fault.lost, *fault.wrong]:
                print(f"  WRONG {what}", flush=True)
    return faults


def summary(faults: list[Fault]) -> dict[str, Any]:
    """Figures for the table of `make soak`."""
    kinds = {kind: sum(fault.kind == kind for fault in faults) for kind in {fault.kind: 0 for fault in faults}}
    lost, wrong = (sum(len(getattr(fault, name)) for fault in faults) for name in ("lost", "wrong"))
    return {"faults": len(faults), "kinds": kinds, "lost": lost, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=[*SCRIPTS, "slow", "late"], choices=[*SCRIPTS, "slow", "late"])
    parser.add_argument("--stages", nargs="*", choices=[stage.name for stage in STAGES])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slidemake-faults-"))
    os.chdir(TESTS)
    kinds = [kind for kind in options.kinds if kind not in SCRIPTS or may_mount()]
    if kinds != options.kinds:
        print("This user may not mount: full, read-only and forbidden disks are left out.", file=sys.stderr)
    found = summary(run(folder, kinds, options.stages))
    print(json.dumps(found))
    return int(bool(found["lost"] or found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
