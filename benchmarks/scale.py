"""What a cohort's size costs before any work is done: python benchmarks/scale.py [--slides 100 1000 ...] [--out FILE]

For each size a cohort of stand-in slides is planned, finished by stand-ins, and looked at: a dry run of everything,
the complete run with nothing to do, the plan after 10 slides were appended. Those 10, and the slides of the last rack
before them, are real (small, drawn): the run that adds them is done for real up to the table of the cohort. Prints
tables, and writes benchmarks/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from stand_ins import slide_records, stand_in_rows, touch_slides, write_sheet

HERE = Path(__file__).resolve().parent
REPO = HERE.parent

CONFIG = """\
sheet: slides.csv
output: results
max_failed_fraction: 1.0
tasks:
  outcome: {label: label, positive: tumour, splits: {repeats: 1}}
"""
EMBED = "results/manifests/embed/efficientnet_lite0"
READ_SHEET = """
import sys, time
from slidemake.cohort.sheet import read_sheet
task = {"label": "label", "positive": "tumour", "splits": {"folds": 5}}
started = time.perf_counter()
read_sheet(sys.argv[1], ["label"], {"outcome": task})
print(time.perf_counter() - started)
"""


@dataclass
class Cost:
    """One command: seconds of wall clock and CPU, peak resident memory (MB), and the jobs it planned by rule."""

    seconds: float
    cpu: float
    mb: float
    jobs: dict[str, int] = field(default_factory=dict)
    text: str = ""


def measured(command: list[str], folder: Path) -> Cost:
    """Run a command to its end."""
    environment = {**os.environ, "PYTHONPATH": str(REPO / "scripts"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        text = out.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed in {folder}:\n{text[-3000:]}")
    table = re.search(r"^job +count\n-+ +-+\n(.*?)^total ", text, re.DOTALL | re.MULTILINE)
    pairs = [line.split() for line in table[1].splitlines() if line.strip()] if table else []
    jobs = {name: int(count) for name, count in pairs}
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, jobs, text)


def snakemake(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "snakemake")) -> Cost:
    run = [sys.executable, *program, *arguments, "--snakefile", str(REPO / "Snakefile")]
    return measured([*run, "--cores", "2", "--configfile", "config.yaml"], folder)


def real_slides(folder: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Draw small slides for rows of stand-ins; returns the rows with the paths of the drawn files."""
    from slidemake.demo.cohort import demo_rows, draw_demo_slide

    drawn = [row for row in demo_rows(2 * len(rows)) if not row["mishap"]]
    for number, row in enumerate(rows):
        row |= {"path": f"slides/{row['slide_id']}.tiff", "mpp": "0.5"}
        draw_demo_slide({**drawn[number], "slide_id": row["slide_id"]}, folder / row["path"], side=1024, seed=number)
    return rows


def measure(slides: int, run: bool, appended: int = 10) -> dict[str, Any]:
    """All figures of a cohort of `slides`; with `run` the slides that are appended are computed, too."""
    from slidemake.jobs.racks import Machine, assign_racks, auto_rack_size
    from slidemake.jobs.timings import job_runs

    size = auto_rack_size(slides, Machine(cores=2))
    rows = stand_in_rows(slides + appended)
    racks = assign_racks([row["slide_id"] for row in rows[:slides]], size)
    last, found = list(racks)[-1], {"slides": slides, "rack_size": size, "racks": len(racks)}
    with tempfile.TemporaryDirectory(prefix="scale-") as where:
        folder = Path(where)
        (folder / "config.yaml").write_text(CONFIG)
        first_real = slides - len(racks[last]) if run else len(rows)
        touch_slides(folder, rows[:first_real])
        if run:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a parent's memory counts in that of a child
                rows[first_real:] = pool.submit(real_slides, folder, rows[first_real:]).result()
        write_sheet(folder / "slides.csv", rows[:slides])
        checked = measured([sys.executable, "-c", READ_SHEET, "slides.csv"], folder)
        found["sheet"] = {"seconds": float(checked.text), "mb": checked.mb}
        found["dry run, nothing done"] = _figures(snakemake(folder, "--dry-run"))
        found["plan of one job"] = _figures(snakemake(folder, f"results/manifests/screen/{last}.json", "--dry-run"))
        if run:
            snakemake(folder, f"{EMBED}/{last}.json")  # the real slides, for real
            slide_records(folder / "results", [row["slide_id"] for row in rows[:first_real]])
        snakemake(folder, program=(str(HERE / "stand_ins.py"),))
        found["dry run, all done"] = _figures(snakemake(folder, "--dry-run"))
        found["run, nothing to do"] = _figures(snakemake(folder))
        assert not found["run, nothing to do"]["jobs"], found["run, nothing to do"]["jobs"]
        found["files"] = files(folder)
        write_sheet(folder / "slides.csv", rows)
        found["dry run, 10 appended"] = _figures(snakemake(folder, "--dry-run"))
        if run:
            before = time.time()
            found["run, 10 appended, to the table"] = _figures(snakemake(folder, "cohort"))
            found["computed"] = computed(folder, before)
            (made,) = [job for job in job_runs(folder / "results") if job.rule == "cohort_table" and job.code == 0]
            found["cohort_table"] = {"seconds": made.seconds, "cpu": made.cpu, "mb": made.mb}
    return found


def _figures(cost: Cost) -> dict[str, Any]:
    return {key: value for key, value in asdict(cost).items() if key != "text"}


def computed(folder: Path, since: float) -> dict[str, Any]:
    """Racks and slides that jobs since then worked on: {stage: {"racks", "computed", "found finished"}}."""
    result: dict[str, Any] = {}
    for path in sorted((folder / "results/manifests").rglob("r*.json")):
        if path.stat().st_mtime < since:
            continue
        stage = path.relative_to(folder / "results/manifests").parts[0]
        records = json.loads(path.read_text())["slides"]
        counts = Counter("found finished" if r.get("reused") else r["status"] for r in records)
        row = result.setdefault(stage, {"racks": 0})
        row["racks"] += 1
        for name, count in counts.items():
            row[name] = row.get(name, 0) + count
    return result


def files(folder: Path) -> dict[str, int]:
    """Files by what keeps them: Snakemake, and us for each rack; slides are counted elsewhere."""
    results = folder / "results"
    places = {"Snakemake's memory": folder / ".snakemake/metadata", "manifests": results / "manifests"}
    return {name: sum(1 for path in place.rglob("*") if path.is_file()) for name, place in places.items()}


def jobs_without_work(slides: int) -> dict[str, Any]:
    """A real run of all per-slide stages on slides that do not exist: what jobs cost beside their work."""
    with tempfile.TemporaryDirectory(prefix="scale-") as where:
        folder = Path(where)
        (folder / "config.yaml").write_text(CONFIG.split("tasks:")[0])
        write_sheet(folder / "slides.csv", stand_in_rows(slides))
        cost = snakemake(folder, "cohort")
    return {"slides": slides, **_figures(cost)}


def table(results: list[dict[str, Any]]) -> str:
    """The figures as a table, a row for each size."""
    runs = ("dry run, nothing done", "run, nothing to do", "dry run, 10 appended")
    lines = ["| slides | in a rack | jobs | sheet | " + " | ".join(runs) + " |", "|---" * 7 + "|"]
    for row in results:
        cells = [f"{row['slides']:,}", f"{row['rack_size']}", f"{sum(row[runs[0]]['jobs'].values()):,}"]
        cells.append(f"{row['sheet']['seconds']:.2f} s")
        cells += [f"{row[r]['seconds']:.1f} s ({row[r]['cpu']:.1f}), {row[r]['mb']:.0f} MB" for r in runs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 1000, 10_000, 50_000])
    parser.add_argument("--jobs", type=int, nargs="*", default=[100], help="sizes of real runs without any work")
    parser.add_argument(
        "--plans", action="store_true", help="plans only: the slides that are appended are not computed"
    )
    parser.add_argument("--out", type=Path, default=HERE / "scale.json")
    options = parser.parse_args()
    results = []
    for slides in options.slides:
        results.append(measure(slides, run=not options.plans))
        print(json.dumps(results[-1]), file=sys.stderr)
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.platform()}
    found = {"about": about, "plans": results, "jobs without work": [jobs_without_work(n) for n in options.jobs]}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(results))
    for row in found["jobs without work"]:
        print(f"{row['slides']} slides that are not there, {sum(row['jobs'].values())} jobs: {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
