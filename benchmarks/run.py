"""Measure slidemake beside its limits and its peers: python benchmarks/run.py [--small] [--out FILE.json] [--docs]

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import tables
from peers import find

HERE = Path(__file__).resolve().parent

PACKAGES = ("numpy", "torch", "timm", "zarr", "imagecodecs", "openslide-python", "openslide-bin", "pyvips-binary")
FULL: dict[str, Any] = {
    "turns": {"embedding": 9, "reading": 9, "store": 9, "mil": 9, "tiatoolbox": 3},
    "cell": 4096,  # px; the slide that is read is this, mirrored
    "copies": 4,
    "one": 2,  # the slide that is embedded, in copies
    "small": 2048,
    "slides": 16,  # small ones
    "read": 1000,  # tiles
    "embed": 384,  # tiles in memory
    "eager": 96,  # tiles
    "bags": (200, 1000, 3),  # bags, tiles, epochs
    "members": 8,  # trained to their early stop
    "many": (5000, 5000, 128),  # bags, tiles, features: on disk
    "large": 25,  # the slide for memory, in copies of the cell: 102,400 px
    "part": 8192,  # of its tiles are embedded
    "jpeg": 256,  # tiles
}
SMALL = FULL | {
    "turns": dict.fromkeys(FULL["turns"], 1),
    "cell": 1280,
    "copies": 1,
    "one": 1,
    "small": 1280,
    "slides": 2,
}
SMALL |= {"read": 32, "embed": 16, "eager": 8, "bags": (8, 200, 2)}
SMALL |= {"members": 1, "many": (8, 200, 16), "large": 1, "part": 16, "jpeg": 8}
SECTIONS = ("embedding", "reading", "store", "mil", "tiatoolbox", "jpeg", "memory")


def run_section(name: str, size: dict[str, Any], folder: Path, given: str) -> dict[str, Any]:
    """Measure one section (in this process): {"rows": [...], "sizes": [...], "jpeg": [...]}."""
    from inputs import Slide, mirror

    known = json.loads(given)
    large, one, small, *own = [Slide(**{**s, "results": Path(s["results"])}) for s in known["slides"]]
    turns, rows, sizes, jpeg = size["turns"].get(name, 1), [], [], []
    if name in ("reading", "store", "mil"):
        from slidemake.jobs.memory import keep_freed_memory

        keep_freed_memory()  # as the jobs do, and for whatever is measured beside them in this process
    if name == "reading":
        import bench_reading

        for slide in (large, *own):
            rows += bench_reading.measure(slide, turns, size["read"])
    elif name == "store":
        import bench_store

        for slide in (large, *own):
            found, more = bench_store.measure(slide, turns, size["read"] // 3, folder)
            rows, sizes = rows + found, sizes + more
    elif name == "embedding":
        import bench_embedding

        rows = bench_embedding.measure(one, small, size, folder, known["peers"])
    elif name == "mil":
        import bench_mil

        rows = bench_mil.measure(size, turns, folder, known["peers"])
    elif name == "jpeg":
        import bench_jpeg

        jpeg = bench_jpeg.measure(one, size["jpeg"])
    elif name == "memory":
        import bench_memory

        path = Path(known["large"] or folder / "large.tiff")
        if not known["large"]:
            mirror(Path(known["cell"]), path, size["large"])
        rows = bench_memory.measure(str(path), folder / "large", size["part"])
    else:
        import bench_tiatoolbox

        rows = bench_tiatoolbox.measure(large, turns, size["read"] // 3)
    return {"rows": [row.as_dict() for row in rows], "sizes": sizes, "jpeg": jpeg}


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
    axes.set_xlabel("ratio; a short line is its bar\n(green: met, red: missed, yellow: unclear)")
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
    parser.add_argument("--large", help="a very large slide for memory, instead of one that is drawn (100 s)")
    parser.add_argument(
        "--peers-python",
        nargs="*",
        default=[],
        metavar="PYTHON",
        help="interpreters of environments that peers are installed in (see docs/performance.md)",
    )
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md, too")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", nargs=3, help=argparse.SUPPRESS)  # name, folder, what is given
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    if arguments.section:
        name, folder, given = arguments.section
        Path(folder, "found.json").write_text(json.dumps(run_section(name, size, Path(folder), given)))
        return
    sections = [s for s in SECTIONS if s in arguments.sections]
    if "tiatoolbox" in sections and (arguments.small or importlib.util.find_spec("tiatoolbox") is None):
        sections.remove("tiatoolbox")  # its import alone takes 10 s of CPU time
    peers = find([sys.executable, *arguments.peers_python]) if not arguments.small else {}
    if "tiatoolbox" not in sections:
        peers.pop("tiatoolbox", None)
    results = earlier(arguments.out, sections, size) | {"machine": machine(), "size": size}
    results["peers"] |= {name: entry["version"] for name, entry in peers.items()}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        given = json.dumps(
            {
                "slides": prepare(size, Path(scratch), arguments.slide),
                "cell": str(Path(scratch, "cell.tiff")),
                "large": arguments.large and str(Path(arguments.large).resolve()),
                "peers": peers,
            }
        )
        with ThreadPoolExecutor(2 if arguments.small else 1) as pool:  # figures of a small run mean nothing anyway
            jobs = [pool.submit(child, name, arguments.small, Path(scratch) / name, given) for name in sections]
            for name, job in zip(sections, jobs, strict=True):
                try:
                    found, seconds = job.result()
                except subprocess.CalledProcessError as error:
                    failed.append(name)  # said at the end; the other sections are worth having
                    print(f"{name} failed: exit code {error.returncode}", file=sys.stderr)
                    continue
                results["rows"] += [{"run": name, **row} for row in found["rows"]]
                results["sizes"] += found["sizes"]
                results["jpeg"] = found["jpeg"] or results["jpeg"]
                results["sections"][name] = seconds
                print(
                    f"{name}: {seconds['seconds']} s, others used {seconds['others']:.0%} of the machine",
                    file=sys.stderr,
                )
    results["rows"].sort(key=lambda row: SECTIONS.index(row["run"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["rows"], arguments.out.with_suffix(".png"))
    print(tables.everything(results))
    if failed:
        raise SystemExit(f"sections that failed, see above: {', '.join(failed)}")
    if arguments.docs:
        tables.write_docs(results, HERE.parent / "docs" / "performance.md")


def earlier(out: Path, sections: list[str], size: dict[str, Any]) -> dict[str, Any]:
    """Results of the other sections of an earlier run on the same machine, of the same sizes, to which these are added.

    The number of turns may be another one, which every row says.
    """

    def sizes(of: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in of.items() if key != "turns"})

    found = json.loads(out.read_text()) if out.is_file() else {}
    if sizes(found.get("size") or {}) != sizes(size) or found.get("machine") != machine():
        return {"rows": [], "sizes": [], "jpeg": [], "peers": {}, "sections": {}}
    kept = [row for row in found["rows"] if row["run"] not in sections]
    times = {name: seconds for name, seconds in found["sections"].items() if name not in sections}
    about = {"jpeg": found.get("jpeg", []), "peers": found.get("peers", {})}
    return {"rows": kept, "sizes": [] if "store" in sections else found["sizes"], "sections": times, **about}


def child(name: str, small: bool, folder: Path, given: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a section in a process of its own; returns what it found, and how long and how undisturbed it was."""
    folder.mkdir()
    command = [sys.executable, str(HERE / "run.py"), "--section", name, str(folder), given, *(["--small"] * small)]
    started, neighbours = time.monotonic(), Neighbours()
    subprocess.run(command, check=True)
    seconds = {"seconds": round(time.monotonic() - started, 1), "others": neighbours.share()}
    return json.loads((folder / "found.json").read_text()), seconds


if __name__ == "__main__":
    main()
