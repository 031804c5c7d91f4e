"""All long harnesses, one table: moments killed, cases fuzzed, faults injected, results lost, wrong results.

    make soak                                            everything: an hour or more on 2 cores
    python tests/soak/soak.py --only kill --moments 10   a part; the table is over all that is in --folder

Every harness appends a line of JSON per trial, case or fault to a file in the folder, so that a soak may be run in
pieces, and the table made at the end. The exit code is 1 when a result was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HARNESSES = ("kill", "fuzz", "faults", "changes")


def run(name: str, folder: Path, options: argparse.Namespace) -> None:
    """One harness, in a process of its own, on seeds that were not yet used in this folder."""
    done = lines(folder / f"{name}.jsonl")
    command = [sys.executable, str(HERE / f"{name}.py"), "--folder", str(folder)]
    if name == "kill":
        command += ["--seed", str(options.seed), "--first", str(len(done)), "--moments", str(options.moments)]
    elif name == "changes":
        command += ["--seed", str(options.seed), "--first", str(len(done)), "--sequences", str(options.sequences)]
    elif name == "fuzz":
        command += ["--seed", str(options.seed + len(done)), "--cases", str(options.cases)]
    subprocess.run(command, check=False)  # what was wrong is in its file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(folder: Path) -> dict[str, Any]:
    """Counts over everything that was done in a folder."""
    trials, cases, faults, sequences = (lines(folder / f"{name}.jsonl") for name in HARNESSES)
    kinds = Counter(moment["kind"] for trial in trials for moment in trial["moments"])
    bad = [case for case in cases if case["outcome"] == "wrong"]
    return {
        "moments": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items())),
        "killed_runs": len(trials),
        "slowest_stop": max((trial["slowest_stop"] for trial in trials), default=0.0),
        "cases": len(cases),
        "outcomes": dict(sorted(Counter(case["outcome"] for case in cases).items())),
        "sequences": len(sequences),
        "sequence_steps": sum(len(sequence["steps"]) - 1 for sequence in sequences),
        "sequence_kills": sum(sequence["killed"] for sequence in sequences),
        "faults": len(faults),
        "fault_kinds": dict(sorted(Counter(fault["kind"] for fault in faults).items())),
        "lost": sum(len(item["lost"]) for item in [*trials, *faults, *sequences]),
        "wrong": sum(len(item["wrong"]) for item in [*trials, *faults, *sequences]) + len(bad),
    }


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def table(found: dict[str, Any]) -> str:
    """The table, as docs/reliability.md has it."""
    rows = [
        ("moments killed", found["moments"], f"{found['killed_runs']} runs: {_in_words(found['kinds'])}"),
        (
            "sequences of changes",
            found["sequences"],
            f"{found['sequence_steps']} steps, {found['sequence_kills']} runs killed",
        ),
        ("cases fuzzed", found["cases"], _in_words(found["outcomes"])),
        ("faults injected", found["faults"], _in_words(found["fault_kinds"])),
        ("results lost", found["lost"], "must be 0"),
        ("wrong results", found["wrong"], "must be 0"),
    ]
    head = ["| what | number | of which |", "|---|---|---|"]
    return "\n".join(head + [f"| {what} | {number} | {words} |" for what, number, words in rows])


def machine() -> str:
    """What this ran on, in a few words."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GB, {platform.system()}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[*HARNESSES, "table"], default=list(HARNESSES))
    parser.add_argument("--moments", type=int, default=60)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name != "table":
            print(f"== {name}", flush=True)
            run(name, options.folder.resolve(), options)
    found = figures(options.folder)
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine()}\n\n{table(found)}")
    return int(bool(found["lost"] or found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
