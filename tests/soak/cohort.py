"""The cohort of the long harnesses: small drawn slides, a reference run, and what must be equal to it in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))

from slidemake.demo.cohort import SHEET_COLUMNS, demo_rows, draw_demo_slide
from snakemake_run import CONFIG, Project
from storage_servers import Site, http_site

TESTS = Path(__file__).resolve().parents[1]
SIDE = 1024  # px: some tiles a slide
# What differs between two undisturbed runs, and why. All else must be the same, byte for byte.
EXCEPT_FILES = {
    "digests/": "what files were when they were written, with the keys below",
    "benchmarks/": "seconds and memory of every job",
    "logs/": "times, and what was found finished",
    "report/": "shows seconds and dates",
    "run.lock": "who ran last, and when",
}
EXCEPT_KEYS = {
    "seconds": "how long it took",
    "tiles_per_second": "how fast it was",
    "reused": "whether it was found finished",
    "trace": "when the slide was last written",
    "checksum": "is over the keys above as well",
}


def rows(folder: Path, patients: int = 4) -> list[dict[str, str]]:
    """Rows of a sheet, whose slides are drawn into `folder`: one per patient, and one without mpp, which must fail."""
    found = [row | {"mishap": ""} for row in demo_rows(24) if row["slide_id"].endswith("-A")][:patients]
    for number, row in enumerate(found):
        row["diagnosis"] = ("tumour", "benign")[number % 2]
    found.insert(2, {**found[1], "slide_id": f"{found[1]['patient_id']}-B", "mishap": "no_mpp"})
    for row in found:
        row["path"] = str(folder / f"{row['slide_id']}.tiff")
        if not Path(row["path"]).exists():
            draw_demo_slide(row, row["path"], side=SIDE, seed=0)
    return [{column: row[column] for column in SHEET_COLUMNS} for row in found]


def make_project(folder: Path, sheet: list[dict[str, str]], **changes: Any) -> Project:
    """A project that has not run; its slides are in racks of three."""
    folder.mkdir(parents=True)
    project = Project(folder)
    project.configure(**CONFIG)
    project.configure(**{"rack_size": 3, **changes})
    project.write_sheet(sheet)
    return project


def reference_run(folder: Path, target: str = "all", patients: int = 4, **changes: Any) -> Project:
    """The undisturbed run; one that is there already is taken as it is."""
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    sheet = rows(folder / "slides", patients)
    project = Project(folder / "reference")
    if not (folder / "reference.done").exists():
        project = make_project(folder / "reference", sheet, **changes)
        project.succeed(target)
        (folder / "reference.done").touch()
    return project


@contextmanager
def slide_site(folder: Path, files: dict[str, bytes]) -> Iterator[Site]:
    """An HTTP server on the loopback, at the same address whenever it is started for this folder: addresses are part of
    results."""
    kept = folder / "port"
    with http_site(files, int(kept.read_text()) if kept.exists() else 0) as site:
        kept.write_text(site.address.rsplit(":", 1)[1])
        yield site


LOOPBACK = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
TOY_RECORD = {
    "title": "Bands of colour and texture",
    "source": {"kind": "file", "file": "toy.pt"},
    "loader": "torchscript",
    "tile_px": 224,
    "mpp": 0.5,
    "transform": {"resize": 224, "crop": 224, "interpolation": "bicubic"},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "variant": "pooled",
    "variants": {"pooled": {"pooling": "output", "dim": 16}},
    "precision": "fp32",
    "licence": "our own",
    "gated": False,
    "stain": "allowed",
}


def write_toy_weights(path: Path, seed: int) -> None:
    """An encoder that costs next to nothing: 16 random filters, averaged over the tile."""
    import torch

    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 16, stride=16), torch.nn.Hardtanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    torch.jit.trace(net, torch.zeros(1, 3, 224, 224)).save(str(path))


@dataclass(frozen=True)
class Difference:
    """A file of the reference that is missing or different in the other run, or one that the reference has not."""

    path: str
    lost: bool

    def __str__(self) -> str:
        return f"{self.path} {'is missing' if self.lost else 'differs'}"


def differences(reference: Project, other: Project) -> list[Difference]:
    """All files of results that are not as in the reference run."""
    names, others = (_files(project.results) for project in (reference, other))
    found = [Difference(name, name in names) for name in sorted(names ^ others)]
    for name in sorted(names & others):
        if not _same(reference.results / name, other.results / name):
            found.append(Difference(name, False))
    return found


def _files(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(tuple(EXCEPT_FILES))}


def _same(one: Path, two: Path) -> bool:
    if one.read_bytes() == two.read_bytes():
        return True
    if one.suffix != ".json":
        return False
    return _kept(json.loads(one.read_text())) == _kept(json.loads(two.read_text()))


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items() if key not in EXCEPT_KEYS}
    return [_kept(item) for item in value] if isinstance(value, list) else value
