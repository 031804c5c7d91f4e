"""What the hint of every failure says is done, slide by slide, and the next run with the default target has it.

One cohort holds a slide for each hint that can be followed here; all are followed at once. Not among them are
`not_brightfield`, which has no remedy, and the reports of `crashed`, of which the way back is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from slidemake.core.failures import CODES
from snakemake_run import Project, environment
from storage_servers import http_site

pytestmark = [pytest.mark.workflow, pytest.mark.long]

LOOPBACK = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
# slide, named by its code -> (stage that fails, words of its hint)
FAILS = {
    "missing_file": ("screen", "Check the path column of the sheet: relative paths start at the sheet's own folder."),
    "unreachable": ("fetch", "The slide could not be fetched. See that address, network and credentials"),
    "wrong_checksum": ("screen", "correct the sha256 in the sheet, or the file."),
    "unsupported": ("screen", "Convert it to a pyramidal TIFF (vips tiffsave --tile --pyramid)."),
    "unreadable": ("screen", "its pixels do not decode. Copy it again from the scanner or the archive."),
    "truncated": ("screen", "Copy it again and compare the sizes."),
    "no_mpp": ("screen", "Write the slide's um per pixel into the mpp column of the sheet, or set"),
    "no_mpp-default": ("screen", "or set screening.default_mpp."),
    "implausible_mpp": ("screen", "Write the true um per pixel (0.05 to 10) into the mpp column of the sheet."),
    "too_coarse": ("tiles", "use a grid with a larger mpp."),
    "no_tissue": ("tissue", "If tissue was missed, give your own outline in the tissue_geojson column."),
    "implausible_colours": ("tissue", "if it is as it should be, give an outline in the tissue_geojson column."),
    "too_few_tiles": ("tiles", "Lower tiling.min_tissue or tiling.min_tiles, or exclude the slide."),
    "duplicate": ("cohort", "keep one row, or set exclude on the other."),
    "out_of_memory": ("tissue", "and run again with --forcerun and the name of its rule."),
    "too_slow": ("tissue", "raise slide_seconds and run again with --forcerun detect_tissue."),
    "damaged": ("stain", "`python -m slidemake verify` with the folder of the results names every such file, and what"),
    "crashed": ("tissue", "Where it is mended, run again with --forcerun and the name of the rule."),
}
# A library with a defect, too little memory and a slow machine: when the tissue of these slides is committed.
HOOK = """
import os, time
def ill(rename):
    def replaced(source, target, **options):
        slide, name = str(target).split("/")[-2:] if "/" in str(target) else ("", "")
        if name == "tissue.json" and slide == "crashed":
            raise ValueError("a defect")
        if name == "tissue.json" and slide == "out_of_memory":
            raise MemoryError
        if name == "tissue.json" and slide == "too_slow":
            time.sleep(10_000)
        return rename(source, target, **options)
    return replaced
os.replace, os.rename = ill(os.replace), ill(os.rename)
"""


def outline(path: Path, corner: int, side: int) -> str:
    """A square of `side` px, as QuPath exports it."""
    a, b = corner, corner + side
    square = {"type": "Polygon", "coordinates": [[[a, a], [b, a], [b, b], [a, b], [a, a]]]}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square}]}))
    return path.name


def picture(source: Path) -> np.ndarray:
    return pyvips.Image.new_from_file(str(source)).numpy()[..., :3]


def save(path: Path, image: np.ndarray, mpp: float | None = 0.5) -> None:
    """A pyramid as scanners write it; mpp None: its size is not said."""
    per_mm = 1000 / (mpp or 0.5)
    held = pyvips.Image.new_from_array(np.ascontiguousarray(image))
    held = held.copy(interpretation="srgb", xres=per_mm, yres=per_mm)
    held.tiffsave(str(path), tile=True, pyramid=True, compression="jpeg", Q=90, resunit="cm")
    if mpp is None:
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for page in tiff.pages:
                page.tags["ResolutionUnit"].overwrite(1)


def spoil(folder: Path, source: Path) -> dict[str, dict[str, str]]:
    """The slides, each with the trouble that it is named after: {name: what the sheet says of it}."""
    image = picture(source)
    said = {name: {"path": f"{name}.tiff"} for name in ("good", *sorted(set(FAILS) - {"unreachable"}), "unreachable")}
    for number, name in enumerate(said):
        shifted = np.roll(image, 3 * number, 1)  # no two are the same scan
        save(folder / f"{name}.tiff", shifted, None if name.startswith("no_mpp") else 0.5)
    archive = folder / "archive"
    archive.mkdir()
    for name in ("unreadable", "truncated"):
        shutil.copy2(folder / f"{name}.tiff", archive)
    said["missing_file"]["path"] = "slides/missing_file.tiff"
    said["wrong_checksum"]["sha256"] = "0" * 64
    pyvips.Image.new_from_file(str(folder / "unsupported.tiff")).write_to_file(str(folder / "unsupported.webp"))
    said["unsupported"] |= {"path": "unsupported.webp", "mpp": "0.5"}
    with tifffile.TiffFile(folder / "unreadable.tiff") as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with open(folder / "unreadable.tiff", "r+b") as handle:
        for at, count in places:
            handle.seek(at)
            handle.write(b"\x55" * count)
    os.truncate(folder / "truncated.tiff", (folder / "truncated.tiff").stat().st_size // 2)
    save(folder / "implausible_mpp.tiff", np.roll(image, 1, 0), 25400 / 72)
    said["too_coarse"]["mpp"] = "0.6"
    save(folder / "no_tissue.tiff", np.clip(image.astype(int) // 40 + 236, 0, 255).astype(np.uint8))
    save(folder / "implausible_colours.tiff", image // 3)
    said["too_few_tiles"]["tissue_geojson"] = outline(folder / "small.geojson", 700, 150)
    shutil.copy(folder / "good.tiff", folder / "duplicate.tiff")
    return said


def remedies(folder: Path, said: dict[str, dict[str, str]], site: str) -> dict[str, Callable[[], Any]]:
    """What each hint says, done to the sheet or the file."""

    def sheet(name: str, **cells: str) -> Callable[[], None]:
        return lambda: said[name].update(cells)

    def copied(name: str) -> Callable[[], Any]:
        return lambda: shutil.copy2(folder / "archive" / f"{name}.tiff", folder)  # with its old time

    def converted() -> None:
        held = pyvips.Image.new_from_file(str(folder / "unsupported.webp"))
        held.tiffsave(str(folder / "converted.tiff"), tile=True, pyramid=True)
        said["unsupported"]["path"] = "converted.tiff"

    whole = hashlib.sha256((folder / "wrong_checksum.tiff").read_bytes()).hexdigest()
    return {
        "missing_file": sheet("missing_file", path="missing_file.tiff"),
        "unreachable": sheet("unreachable", path=f"{site}/unreachable.tiff"),
        "wrong_checksum": sheet("wrong_checksum", sha256=whole),
        "unsupported": converted,
        "unreadable": copied("unreadable"),
        "truncated": copied("truncated"),
        "no_mpp": sheet("no_mpp", mpp="0.5"),
        "implausible_mpp": sheet("implausible_mpp", mpp="0.5"),
        "no_tissue": sheet("no_tissue", tissue_geojson=outline(folder / "missed.geojson", 300, 800)),
        "implausible_colours": sheet("implausible_colours", tissue_geojson=outline(folder / "given.geojson", 300, 800)),
        "duplicate": sheet("duplicate", exclude="yes"),
    }


def write_rows(project: Project, said: dict[str, dict[str, str]]) -> None:
    columns = ("path", "mpp", "sha256", "tissue_geojson", "exclude")
    project.write_sheet(
        [{"slide_id": name} | {key: cells.get(key, "") for key in columns} for name, cells in said.items()]
    )


def failures(project: Project) -> dict[str, dict[str, str]]:
    return {row["slide_id"]: row for row in project.table("cohort/failures.csv")}


def verified(project: Project) -> list[str]:
    """What verify prints to be done."""
    command = [sys.executable, "-m", "slidemake", "verify", "results"]
    done = subprocess.run(command, cwd=project.folder, env=environment(), capture_output=True, text=True, timeout=300)
    return [line for line in done.stdout.splitlines() if line.startswith("  rm -r ")]


def test_hints_are_done_word_for_word_and_the_next_run_has_the_slides(
    new_project: Callable[..., Project], sheet_rows: list[dict[str, str]]
):
    project = new_project(slides=1, tasks=None, explain=None, max_failed_fraction=1.0, slide_seconds=30)
    folder = project.folder
    said = spoil(folder, Path(sheet_rows[0]["path"]))
    # slides that are tried again by themselves in a rack of their own: the others are looked at for their hints' sake
    project.configure(rack_size=len(said) - 1, remote={"attempts": 1}, tiling={"min_tissue": 0.5})
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    ill = os.pathsep.join([str(folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with http_site({"/unreachable.tiff": (folder / "unreachable.tiff").read_bytes()}) as site:
        said["unreachable"]["path"] = "http://127.0.0.1:9/unreachable.tiff"
        write_rows(project, said)
        project.succeed("results/manifests/tissue/r00000.json", **LOOPBACK, PYTHONPATH=ill)
        mask = project.results / "slides" / "damaged" / "tissue.png"
        mask.write_bytes(mask.read_bytes()[:-20] + bytes(20))
        project.succeed(**LOOPBACK, PYTHONPATH=ill)
        found = failures(project)
        told = {name: (row["stage"], row["hint"]) for name, row in found.items()}
        assert {name: stage for name, (stage, _) in told.items()} == {name: stage for name, (stage, _) in FAILS.items()}
        for name, (_, words) in FAILS.items():
            assert found[name]["code"] == name.split("-")[0]
            assert words in told[name][1], (name, told[name])

        # memory, machine and library: nothing of the run's own has changed, so that it has to be told
        project.configure(slide_seconds=900)
        project.succeed("--forcerun", "detect_tissue", **LOOPBACK)
        assert {"out_of_memory", "too_slow", "crashed"} & set(failures(project)) == set()

        for line in verified(project):
            subprocess.run(shlex.split(line), check=True, cwd=folder)
        for remedy in remedies(folder, said, site.address).values():
            remedy()
        write_rows(project, said)
        (folder / "grid.yaml").write_text("encoders: {efficientnet_lite0: {mpp: 0.6}}\n")
        project.configure(
            encoders_file="grid.yaml", screening={"default_mpp": 0.5}, tiling={"min_tissue": 0.1}, max_failed_fraction=0
        )
        project.succeed(**LOOPBACK)
    assert failures(project) == {}
    slides = {row["slide_id"]: row["status"] for row in project.table("cohort/slides.csv")}
    assert slides == dict.fromkeys(said, "ok") | {"duplicate": "excluded"}


def test_every_hint_is_done_or_has_none_to_do():
    assert {name.split("-")[0] for name in FAILS} == set(CODES) - {"not_brightfield"}
