"""Damages good slides, stores, records, bundles and sheets in seeded ways, and looks how the workflow takes it.

    python tests/soak/fuzz.py --cases 500 --seed 0 --jobs 2

A case is one damaged file and the stages that meet it. It ends well in one of these ways, all else is counted as wrong:

    record    the slide has a failure record with a code that fits, and the others went on
    message   the job ended with a message and a non-zero exit code, without a traceback on the terminal
    same      the result is that of the undamaged file (the damage met nothing that counts, or was made good)
    true      a slide was read: its pixels are those that an independent decoder reads from the damaged file

Damage to results must be named by `slidemake verify`, too. The regular tests run some of these cases.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_checks import Wrong, cause, embeddings_of, pixels_are_true, same_store, verify_finds
from mutations import damage, replace, swap
from workshop import ENCODER, GRID, LIMIT, Ended, Workshop

READING = {"missing_file", "unsupported", "unreadable", "truncated", "not_brightfield", "no_mpp", "implausible_mpp"}
DOWNSTREAM = {"too_coarse", "no_tissue", "too_few_tiles", "out_of_memory"}


@dataclass(frozen=True)
class Case:
    """One case and how it ended: `outcome` as above, or "wrong" with `detail` saying what is."""

    number: int
    kind: str
    damage: str
    outcome: str
    detail: str
    seconds: float


def _message(ended: Ended, *names: str) -> str:
    """The outcome of a job that failed: it must say what is wrong and where."""
    if "Traceback" in ended.text:
        raise Wrong(f"a traceback on the terminal: {ended.text[-600:]}")
    if not ended.text.strip():
        raise Wrong("the job failed without a word")
    if ended.code != 1:
        raise Wrong(f"exit code {ended.code}: {ended.text[-300:]}")
    if "stopped: its process" in ended.text:
        raise Wrong(f"the job crashed: {ended.text[-300:]}")
    if " stopped: " in ended.text and ": damaged" not in ended.text and cause(ended.text):
        raise Wrong(f"an unexpected {cause(ended.text)}: {ended.text[-400:]}")
    if names and not any(name in ended.text for name in names):
        raise Wrong(f"the message does not name {' or '.join(names)}: {ended.text[-400:]}")
    return "message"


def _record(failure: dict[str, str], codes: set[str]) -> str:
    if failure["code"] not in codes:
        raise Wrong(f"failure record {failure['code']} at {failure['stage']}: {failure['message']}")
    if not failure["hint"] or not failure["message"]:
        raise Wrong("a failure record without message or hint")
    return "record"


def _ended(ended: Ended) -> Ended:
    if ended.code is None:
        raise Wrong(f"not ended after {LIMIT:g} s: {ended.text[-300:]}")
    return ended


# -- kinds of cases ------------------------------------------------------------------------------------------------


def slide_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged slide under the name of one that was finished: screening to tiles."""
    name = sorted(shop.slides)[int(rng.integers(len(shop.slides)))]
    path = shop.slides[name]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    target = files[int(rng.integers(len(files)))]
    if rng.random() < 0.06:
        others = sorted(p for p in shop.slides.values() if p.is_file() and p != path)
        told = f"{target.name} {replace(target, others[int(rng.integers(len(others)))])}"
    else:
        told = f"{target.name} {damage(target, rng)}"
    for stage in ("screen", "tissue", "stain", "tiles"):
        ended = _ended(shop.run(stage))
        if ended.code:
            raise Wrong(f"{told}: {stage} ended the whole rack: {ended.text[-600:]}")
        if "Traceback" in ended.text:
            raise Wrong(f"{told}: traceback on the terminal in {stage}: {ended.text[-600:]}")
    before, after = good.records("tiles"), shop.records("tiles")
    for other in set(before) - {name}:
        if before[other]["status"] != after[other]["status"] or not same_store(good, shop, other):
            raise Wrong(f"{told}: slide {other}, which was not damaged, has another result")
    record = after[name]
    if record["status"] == "failed":
        return told, _record(record["failure"], READING | DOWNSTREAM)
    unchanged = not path.is_dir() and path.read_bytes() == good.slides[name].read_bytes()
    if record.get("reused") and not unchanged and target.suffix != ".txt":
        raise Wrong(f"{told}: the damaged slide was taken for the one before")
    return told, pixels_are_true(good, shop, name)


CONSUMERS: dict[str, tuple[str, str]] = {  # artefact -> (stage that reads it, what to forget first)
    "slides/{slide}/slide.json": ("tiles", "tiles/{grid}/{slide}.zarr"),
    "slides/{slide}/tissue.json": ("tiles", "tiles/{grid}/{slide}.zarr"),
    "slides/{slide}/tissue.png": ("tiles", "tiles/{grid}/{slide}.zarr"),
    "slides/{slide}/stain.json": ("embed", "embeddings/{encoder}/{slide}.zarr"),
    "tiles/{grid}/{slide}.zarr": ("embed", "embeddings/{encoder}/{slide}.zarr"),
    "embeddings/{encoder}/{slide}.zarr": ("pack", "cohort/bags/{encoder}.npy"),
}


def artefact_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged store or record of a slide, and the next stage, which must read it."""
    whole = [name for name, record in good.records("embed").items() if record["status"] == "ok"]
    slide, other = (whole[i] for i in rng.permutation(len(whole))[:2])
    pattern = sorted(CONSUMERS)[int(rng.integers(len(CONSUMERS)))]
    stage, forget = CONSUMERS[pattern]
    names = {"grid": GRID, "encoder": ENCODER}
    path = shop.results / pattern.format(slide=slide, **names)
    stray = shop.results / forget.format(slide=slide, **names)
    shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    if rng.random() < 0.2:
        told = f"{path.name} {swap(path, shop.results / pattern.format(slide=other, **names))}"
        stray = shop.results / forget.format(slide=other, **names)
        shutil.rmtree(stray, ignore_errors=True)
        spoilt = {slide, other}
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        target = files[int(rng.integers(len(files)))]
        told, spoilt = f"{target.relative_to(shop.results)} {damage(target, rng)}", {slide}
    verify_finds(good, shop, path, told)
    ended = _ended(shop.run(stage))
    if stage == "pack":
        if ended.code:
            return told, _message(ended, path.name, slide)
        return told, _equal(good, shop, f"cohort/bags/{ENCODER}.npy", told)
    if ended.code:
        raise Wrong(f"{told}: {stage} ended the whole rack: {ended.text[-600:]}")
    after, outcome = shop.records(stage), "same"
    for name in whole:
        if after[name]["status"] == "failed":
            if name not in spoilt:
                raise Wrong(f"{told}: slide {name}, which was not damaged, failed: {after[name]['failure']}")
            outcome = _record(after[name]["failure"], {"damaged"})
        elif stage == "tiles" and not same_store(good, shop, name):
            raise Wrong(f"{told}: another tile store of slide {name} without a word")
        elif stage == "embed" and not np.array_equal(embeddings_of(good, name), embeddings_of(shop, name)):
            raise Wrong(f"{told}: other features of slide {name} without a word")
    return told, outcome


def _equal(good: Workshop, shop: Workshop, name: str, told: str, *, results: bool = True) -> str:
    one, two = ((w.results if results else w.folder) / name for w in (good, shop))
    if not two.is_file() or one.read_bytes() != two.read_bytes():
        raise Wrong(f"{told}: another {name} without a word")
    return "same"


def rerun_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged record of a slide or length of a store, and the stage that wrote it: it is made again."""
    whole = [name for name, record in good.records("embed").items() if record["status"] == "ok"]
    slide = whole[int(rng.integers(len(whole)))]
    choices = {
        "screen": f"slides/{slide}/slide.json",
        "tissue": f"slides/{slide}/{('tissue.json', 'tissue.png', 'tissue.geojson')[int(rng.integers(3))]}",
        "stain": f"slides/{slide}/stain.json",
        "tiles": f"tiles/{GRID}/{slide}.zarr/zarr.json",
        "embed": f"embeddings/{ENCODER}/{slide}.zarr/{('zarr.json', 'features/zarr.json')[int(rng.integers(2))]}",
    }
    stage = sorted(choices)[int(rng.integers(len(choices)))]
    target = shop.results / choices[stage]
    told = f"{choices[stage]} {damage(target, rng)}, then {stage} again"
    if target.is_dir() and stage in ("screen", "tissue", "stain"):
        target.rmdir()  # a folder in the place of a file is for a person to take away
        told += " (the folder deleted)"
    ended = _ended(shop.run(stage))
    if ended.code:
        raise Wrong(f"{told}: {ended.text[-600:]}")
    if shop.records(stage)[slide]["status"] != "ok":
        raise Wrong(f"{told}: {shop.records(stage)[slide]['failure']}")
    one, two = good.results / choices[stage], target
    if stage == "screen":  # holds the path, which differs between the copies
        return told, "same"
    if one.read_bytes() != two.read_bytes() and json.loads(one.read_text()) != json.loads(two.read_text()):
        raise Wrong(f"{told}: it was not made again")
    return told, "same"


READERS = {"screen": "tissue", "tissue": "tiles", "tiles": "embed"}


def manifest_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged manifest, and the stage that reads it."""
    stage = sorted(READERS)[int(rng.integers(len(READERS)))]
    path = shop.manifest(stage)
    if rng.random() < 0.15:
        others = [s for s in READERS if s != stage]
        told = f"manifest of {stage} {replace(path, shop.manifest(others[int(rng.integers(len(others)))]))}"
    else:
        told = f"manifest of {stage} {damage(path, rng)}"
    if path.exists():  # one that is gone is missed by Snakemake, which makes it again
        verify_finds(good, shop, path, told)
    ended = _ended(shop.run(READERS[stage]))
    if ended.code:
        return told, _message(ended, path.name)
    if shop.manifest(stage).read_text() and good.records(stage) != shop.records(stage):
        raise Wrong(f"{told}: read without a word")
    return told, "same"


TABLES = {
    "tasks/t/m/bundle/bundle.json": ("predict", "prob.npy"),
    "tasks/t/m/bundle/weights.safetensors": ("predict", "prob.npy"),
    f"cohort/bags/{ENCODER}.npy": ("bags", "bags.npy"),
    f"cohort/bags/{ENCODER}.json": ("bags", "bags.npy"),
    "tasks/t/m/predictions_patients.csv": ("evaluate", "evaluated.npy"),
    "tasks/t/m/train.json": ("evaluate", "evaluated.npy"),
}


def bundle_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged bundle, packed array or table of predictions, and the job that reads it."""
    name = sorted(TABLES)[int(rng.integers(len(TABLES)))]
    stage, result = TABLES[name]
    told = f"{name} {damage(shop.results / name, rng)}"
    verify_finds(good, shop, shop.results / name, told)
    ended = _ended(shop.run(stage))
    if ended.code:
        return told, _message(ended, Path(name).name, Path(name).parent.name)
    return told, _equal(good, shop, result, told, results=False)


def sheet_case(good: Workshop, shop: Workshop, rng: np.random.Generator) -> tuple[str, str]:
    """A damaged sample sheet: refused with rows and columns, or read as the csv module reads it."""
    from fuzz_checks import sheet_is_true

    sheet = shop.folder / "slides.csv"
    lines = ["slide_id,path,patient_id,site,mpp,diagnosis"]
    names = sorted(shop.slides)
    lines += [f"{name},{shop.slides[name]},P{i},S{i % 2},0.5,{'NY'[i % 2]}" for i, name in enumerate(names)]
    sheet.write_text("\n".join(lines) + "\n")
    told = f"slides.csv {damage(sheet, rng)}"
    return told, sheet_is_true(sheet, told)


KINDS: dict[str, tuple[Callable[[Workshop, Workshop, np.random.Generator], tuple[str, str]], float]] = {
    "slide": (slide_case, 0.35),
    "artefact": (artefact_case, 0.25),
    "rerun": (rerun_case, 0.08),
    "manifest": (manifest_case, 0.08),
    "bundle": (bundle_case, 0.12),
    "sheet": (sheet_case, 0.12),
}


def run_case(good: Workshop, number: int, seed: int, scratch: Path, only: str | None = None) -> Case:
    """Case `number` of a seed: the same damage every time."""
    import time

    rng = np.random.default_rng([seed, number])
    shares = np.array([share for _, share in KINDS.values()])
    kind = only or list(KINDS)[int(rng.choice(len(KINDS), p=shares / shares.sum()))]
    shop = good.copy(scratch / f"seed{seed}_case{number}")
    started = time.monotonic()
    try:
        told, outcome = KINDS[kind][0](good, shop, rng)
        detail = ""
    except Wrong as wrong:
        told, outcome, detail = "", "wrong", str(wrong)
    except Exception as error:  # of this harness, or of what it calls in its own process: not as it should be
        told, outcome, detail = "", "wrong", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    if outcome != "wrong":
        shutil.rmtree(shop.folder)
    return Case(number, kind, told, outcome, detail, round(seconds, 2))


def run(cases: int, seed: int, jobs: int = 1, only: str | None = None, folder: Path | None = None) -> list[Case]:
    """All cases, on `jobs` processes. What ended wrong keeps its folder (seed<seed>_case<number>). A line of
    JSON for each goes into `folder`/fuzz.jsonl.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="slidemake-fuzz-"))
    if not (folder / "good" / "made").exists():
        Workshop.make(folder / "good")
        (folder / "good" / "made").touch()
    command = [sys.executable, __file__, "--seed", str(seed), "--folder", str(folder)]
    command += ["--only", only] if only else []
    workers = [
        subprocess.Popen([*command, "--share", f"{k},{jobs},{cases}"], stdout=subprocess.PIPE, text=True)
        for k in range(jobs)
    ]
    found = []
    for worker in workers:
        text, _ = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"a fuzzing process ended with {worker.returncode}")
        found += [Case(**json.loads(line)) for line in text.splitlines()]
    with open(folder / "fuzz.jsonl", "a") as handle:
        handle.writelines(json.dumps(asdict(case)) + "\n" for case in found)
    return sorted(found, key=lambda case: case.number)


def table(cases: list[Case]) -> str:
    """How the cases of each kind ended."""
    outcomes = ("record", "message", "same", "true", "wrong")
    lines = [f"{'kind':<10}{'cases':>7}" + "".join(f"{o:>9}" for o in outcomes) + f"{'slowest':>10}"]
    for kind in [*KINDS, "all"]:
        mine = [case for case in cases if kind in (case.kind, "all")]
        if mine:
            count = Counter(case.outcome for case in mine)
            slowest = max(case.seconds for case in mine)
            lines.append(
                f"{kind:<10}{len(mine):>7}" + "".join(f"{count[o]:>9}" for o in outcomes) + f"{slowest:>9.1f}s"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=sorted(KINDS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        first, step, cases = map(int, options.share.split(","))
        good = Workshop(options.folder / "good")
        for number in range(first, cases, step):
            print(json.dumps(asdict(run_case(good, number, options.seed, options.folder, options.only))), flush=True)
        return 0
    cases = run(options.cases, options.seed, options.jobs, options.only, options.folder)
    print(table(cases))
    for case in sorted(cases, key=lambda case: -case.seconds)[:3]:
        print(f"slow: case {case.number} ({case.kind}, {case.seconds:.1f} s): {case.damage}")
    for case in cases:
        if case.outcome == "wrong":
            print(f"WRONG case {case.number} ({case.kind}): {case.detail}")
    return int(any(case.outcome == "wrong" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
