"""Measure slidemake beside its limits and its peers: python benchmarks/run.py [--small] [--out FILE.json]

Every section runs in a process of its own (allocator and threads are a process's), everything in a section in turns.
With --sections, results of the other sections that FILE.json has are kept.
Prints a table; writes raw results to FILE.json (default benchmarks/results.json) and a plot beside it (.png).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

PACKAGES = ("numpy", "torch", "timm", "zarr", "imagecodecs", "openslide-python", "openslide-bin", "pyvips-binary")
FULL: dict[str, Any] = {
    "repeats": 3,
    "cell": 4096,  # px; the slide that is read is this, mirrored
    "copies": 4,
    "one": 2,  # the slide that is embedded, in copies
    "small": 2048,
    "slides": 16,  # small ones
    "read": 1000,  # tiles
    "embed": 384,  # tiles in memory
    "eager": 96,  # tiles
    "bags": (200, 1000, 3),  # bags, tiles, epochs
}
SMALL = FULL | {"repeats": 1, "cell": 1280, "copies": 1, "one": 1, "small": 1280, "slides": 2}
SMALL |= {"read": 32, "embed": 16, "eager": 8, "bags": (8, 200, 2)}
SECTIONS = ("embedding", "reading", "store", "mil", "tiatoolbox")


def run_section(name: str, size: dict[str, Any], folder: Path, slides: str) -> dict[str, Any]:
    """Measure one section (in this process): {"rows": [...], "sizes": [...]}."""
    from inputs import Slide

    large, one, small, *own = [Slide(**{**s, "results": Path(s["results"])}) for s in json.loads(slides)]
    repeats, rows, sizes = size["repeats"], [], []
    if name == "reading":
        import bench_reading

        for slide in (large, *own):
            rows += bench_reading.measure(slide, repeats, size["read"])
    elif name == "store":
        import bench_store

        for slide in (large, *own):
            found, more = bench_store.measure(slide, repeats, size["read"] // 3, folder)
            rows, sizes = rows + found, sizes + more
    elif name == "embedding":
        import bench_embedding

        rows = bench_embedding.measure(one, small, size, folder)
    elif name == "mil":
        import bench_mil

        rows = bench_mil.measure(*size["bags"], repeats)
    else:
        import bench_tiatoolbox

        rows = bench_tiatoolbox.measure(large, repeats, size["read"] // 3)
    return {"rows": [row.as_dict() for row in rows], "sizes": sizes}


def prepare(size: dict[str, Any], folder: Path, own: str | None) -> list[dict[str, Any]]:
    """Draw and screen the slides: a large one to read, one to embed, a small one, and the caller's own."""
    from inputs import draw, mirror
    from inputs import prepare as screened

    draw(folder / "cell.tiff", size["cell"])
    if size["small"] == size["cell"]:
        shutil.copy(folder / "cell.tiff", folder / "small.tiff")
    else:
        draw(folder / "small.tiff", size["small"])
    mirror(folder / "cell.tiff", folder / "drawn.tiff", size["copies"])
    mirror(folder / "cell.tiff", folder / "one.tiff", size["one"])
    paths = [(name, folder / f"{name}.tiff") for name in ("drawn", "one", "small")]
    paths += [("own", Path(own).resolve())] if own else []
    slides = [screened(name, path, folder / "results") for name, path in paths]
    return [{"slide_id": s.slide_id, "results": str(s.results), "facts": s.facts, "tissue": s.tissue} for s in slides]


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, versions."""
    import psutil

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    installed = {}
    for package in (*PACKAGES, "tiatoolbox"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "absent"
    return {
        "processor": names[0] if names else platform.processor(),
        "avx512": "avx512f" in flags,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "packages": installed,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Neighbours:
    """How much of the machine others used meanwhile: their CPU time as a share of all cores' time."""

    def __init__(self) -> None:
        self.start, self.own, self.busy = time.monotonic(), self._own(), self._busy()

    @staticmethod
    def _own() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    @staticmethod
    def _busy() -> float:
        import psutil

        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)

    def share(self) -> float:
        import psutil

        others = (self._busy() - self.busy) - (self._own() - self.own)
        return round(max(0.0, others) / ((time.monotonic() - self.start) * (psutil.cpu_count() or 1)), 3)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | measured | beside | that | ratio | by CPU time | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bar = "" if not row["bar"] else f"{row['bar']}: {row['verdict']}"
        lines.append(
            f"| {row['name']} | {number(row['figure'])} {row['unit']} | {row['beside']} | {number(row['limit'])} "
            f"| {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | {bar} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to limits and peers, on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 0.28 * len(rows) + 1.2))
    colours = {"met": "#2a7f3f", "missed": "#b5482f", "unclear": "#d9a520", "": "#7a8794"}
    places = range(len(rows))[::-1]
    axes.barh(places, [max(r["ratio"], 1e-3) for r in rows], color=[colours[r["verdict"]] for r in rows], height=0.7)
    axes.set_yticks(places, [f"{r['name']}  /  {r['beside']}" for r in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_ylim(-1, len(rows))
    axes.axvline(1.0, color="black", linewidth=0.8)
    for place, row in zip(places, rows, strict=True):
        axes.text(max(row["ratio"], 1e-3), place, f" {row['ratio']:.2f}", va="center", fontsize=7)
        if row["bar"] and not row["absolute"]:
            axes.plot([float(row["bar"][2:])] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axes.set_xlabel(
        "ratio (green: bar met in every turn, red: in none, yellow: turns disagree; a short line is the bar)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small",
        action="store_true",
        help="a check that everything runs, two sections at once and without TIAToolbox: its figures mean nothing",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json", metavar="FILE.json")
    parser.add_argument("--slide", help="a slide of your own (JPEG TIFF, 0.5 um/px) for reading and stores, besides")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", nargs=3, help=argparse.SUPPRESS)  # name, folder, slides: one section, as a child
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    if arguments.section:
        name, folder, slides = arguments.section
        Path(folder, "found.json").write_text(json.dumps(run_section(name, size, Path(folder), slides)))
        return
    sections = [s for s in SECTIONS if s in arguments.sections]
    if "tiatoolbox" in sections and (arguments.small or importlib.util.find_spec("tiatoolbox") is None):
        sections.remove("tiatoolbox")  # its import alone takes 10 s of CPU time
    results = earlier(arguments.out, sections, size) | {"machine": machine(), "size": size}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        slides = json.dumps(prepare(size, Path(scratch), arguments.slide))
        with ThreadPoolExecutor(2 if arguments.small else 1) as pool:  # figures of a small run mean nothing anyway
            jobs = [pool.submit(child, name, arguments.small, Path(scratch) / name, slides) for name in sections]
            for name, job in zip(sections, jobs, strict=True):
                found, seconds = job.result()
                results["rows"] += [{"run": name, **row} for row in found["rows"]]
                results["sizes"] += found["sizes"]
                results["sections"][name] = seconds
                print(
                    f"{name}: {seconds['seconds']} s, others used {seconds['others']:.0%} of the machine",
                    file=sys.stderr,
                )
    results["rows"].sort(key=lambda row: SECTIONS.index(row["run"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["rows"], arguments.out.with_suffix(".png"))
    print(table(results["rows"]))
    if results["sizes"]:
        print("\n| slide | codec | kB per tile of 256 px |\n|---|---|---|")
        for entry in results["sizes"]:
            print(f"| {entry['slide']} | {entry['codec']} | {entry['bytes_per_tile'] / 1000:.1f} |")


def earlier(out: Path, sections: list[str], size: dict[str, Any]) -> dict[str, Any]:
    """Results of the other sections of an earlier run of the same size, to which these are added."""
    found = json.loads(out.read_text()) if out.is_file() else {}
    if json.dumps(found.get("size")) != json.dumps(size) or found.get("machine") != machine():
        return {"rows": [], "sizes": [], "sections": {}}
    kept = [row for row in found["rows"] if row["run"] not in sections]
    times = {name: seconds for name, seconds in found["sections"].items() if name not in sections}
    return {"rows": kept, "sizes": [] if "store" in sections else found["sizes"], "sections": times}


def child(name: str, small: bool, folder: Path, slides: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a section in a process of its own; returns what it found, and how long and how undisturbed it was."""
    folder.mkdir()
    command = [sys.executable, str(HERE / "run.py"), "--section", name, str(folder), slides, *(["--small"] * small)]
    started, neighbours = time.monotonic(), Neighbours()
    subprocess.run(command, check=True)
    seconds = {"seconds": round(time.monotonic() - started, 1), "others": neighbours.share()}
    return json.loads((folder / "found.json").read_text()), seconds


if __name__ == "__main__":
    main()
