"""Cohorts of stand-in slides, for measuring what a plan costs: benchmarks/scale.py and tests/workflow/test_scale.py.

A stand-in slide is an empty file. Run as a program, this is Snakemake with `--touch` for whom outputs that are not
there yet are fabricated on the way: a finished run of a large cohort, with all that Snakemake keeps of it, in seconds.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

SITES = ("Northfield", "Harbour", "Ridgeview", "Westgate")
COLUMNS = ("slide_id", "path", "patient_id", "site", "scanner", "scan_date", "mpp", "label")
STAGES = ("screen", "tissue", "stain", "tiles", "embed", "explain")


def stand_in_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows of a sheet: three slides for two patients, four sites, two classes."""
    rows = []
    for number in range(first, first + count):
        patient = number * 2 // 3
        values = (
            *(f"S{number:07d}", f"slides/S{number:07d}.svs", f"P{patient:07d}", SITES[patient % len(SITES)]),
            *("AT2", f"20{10 + patient % 15}-{1 + patient % 12:02d}-{1 + patient % 28:02d}", "0.5"),
            ("benign", "tumour")[patient * 7 // 4 % 2],
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_sheet(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def touch_slides(folder: Path, rows: list[dict[str, str]]) -> None:
    """An empty file for every slide that is not there."""
    (folder / "slides").mkdir(exist_ok=True)
    for row in rows:
        if not (folder / row["path"]).exists():  # with another time it would be another slide
            (folder / row["path"]).touch()


def fabricate(path: Path, rule: str, wildcards: dict[str, str], slide_ids: list[str]) -> None:
    """An output that nobody made: manifests that say that all slides of the rack are done, other files empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = next((name for name in STAGES if f"/manifests/{name}/" in str(path)), None)
    if stage is None:
        path.write_text("{}\n" if path.suffix == ".json" else "")
        return
    facts: dict[str, Any] = {"status": "ok", "failure": None, "seconds": 1.0, "fingerprint": "0" * 32, "tiles": 1000}
    slides = [{"slide_id": slide_id, **facts} for slide_id in slide_ids]
    manifest = {"stage": stage, "rack": wildcards["rack"], "version": 1, "seconds": 1.0, "slides": slides}
    path.write_text(json.dumps(manifest, indent=1))
    vouch(path, stage, slide_ids)


def vouch(manifest: Path, stage: str, slide_ids: list[str]) -> None:
    """Empty files in the place of what a manifest vouches for: plans look whether it is there."""
    from slidemake.core.stages import ARTEFACTS

    steps = list(manifest.parts)
    results, where = Path(*steps[: steps.index("manifests")]), "/".join(steps[steps.index(stage) + 1 : -1])
    for slide_id in slide_ids:
        path = results / ARTEFACTS[stage].format(where=where, slide=slide_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def slide_records(results: Path, slide_ids: list[str]) -> None:
    """The small JSON files of stand-in slides, from which the table of the cohort is made."""
    for slide_id in slide_ids:
        folder = results / "slides" / slide_id
        folder.mkdir(parents=True, exist_ok=True)
        described = {"slide_id": slide_id, "vendor": "aperio", "reader": "pyvips", "width": 80000, "height": 60000}
        described |= {"identity": slide_id, "mpp": 0.5, "mpp_source": "sheet", "objective": 20}
        (folder / "slide.json").write_text(json.dumps(described))
        (folder / "tissue.json").write_text(json.dumps({"slide_id": slide_id, "area_mm2": 120.0}))
        (folder / "stain.json").write_text(json.dumps({"slide_id": slide_id, "status": "ok", "method": "macenko"}))


def main() -> None:
    from slidemake.core.files import read_json
    from snakemake.cli import main as snakemake
    from snakemake.executors.touch import Executor

    with open("slides.csv", newline="") as handle:
        slide_ids = [row["slide_id"] for row in csv.DictReader(handle)]
    touch = Executor.run_job

    def run_job(executor: Any, job: Any) -> None:
        rack = job.wildcards_dict.get("rack")
        of_rack = []
        if rack:
            size = read_json("results/slidemake.json")["rack_size"]
            of_rack = slide_ids[int(rack[1:]) * size : (int(rack[1:]) + 1) * size]
        for output in map(Path, job.output):
            if not output.exists():
                fabricate(output, job.rule.name, job.wildcards_dict, of_rack)
        touch(executor, job)

    Executor.run_job = run_job
    Executor.SLEEPING_TIME = 0
    snakemake([*sys.argv[1:], "--touch"])


if __name__ == "__main__":
    main()
