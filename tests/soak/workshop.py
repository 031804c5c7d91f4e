"""Good results to damage, and the rules' own scripts, run without Snakemake in a process of their own.

`Workshop.make` draws some slides (and copies real ones, where SLIDEMAKE_TEST_DATA names them) and takes them through
screening, tissue, stain, tiling, embedding with a small encoder, packing, and a bundle. Every case works on a
copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from slidemake.configuration.load import load_configuration, stage_options
from slidemake.core.files import file_sums, read_json, write_json
from slidemake.core.tables import write_table
from slidemake.demo.cohort import demo_rows, draw_demo_slide
from slidemake.embedding.stage import Lane, make_slide_job, process_rack
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.mil.aggregators import build_aggregator
from slidemake.mil.bags import load_bags
from slidemake.mil.bundle import Group, load_bundle, predict, save_bundle
from slidemake.stain.stage import pool_targets
from slidemake.tasks.prediction_table import read_predictions
from slidemake.workflow.plan import read_bundle

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "scripts"
GRID, RACK, ENCODER = "224px_0.5mpp", "r00000", "toy"
LIMIT = 60.0  # seconds that a stage may take on a damaged file (a good one takes less than two)
REAL = ("cmu-1-small-region.svs", "cmu-small_dicom", "boxes.tiff", "prostate_mpp-absurd.tiff")
WITHOUT_MPP = ("boxes", "prostate_mpp-absurd")  # slides to which the sheet gives 0.5 um/px


class Named(SimpleNamespace):
    """As Snakemake's lists: by attribute and by name."""

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def items(self) -> Iterable[tuple[str, Any]]:
        return vars(self).items()


@dataclass(frozen=True)
class Ended:
    """How a stage ended: exit code (None: it did not within the limit), what the terminal showed, seconds."""

    code: int | None
    text: str
    seconds: float


class ToyEncoder:
    """Mean and spread of colour of a tile, in float32: an encoder that costs nothing."""

    record = SimpleNamespace(key=ENCODER, slug=ENCODER, dim=6, grid=GRID)
    identity: ClassVar = {"key": ENCODER, "variant": "default", "weights_sha256": "none"}
    path_name = "eager"

    def forward(self, batch: torch.Tensor, stain: Callable[[Any], Any] | None = None) -> torch.Tensor:
        values = (stain(batch) if stain else batch).float()
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


def apart(work: Callable[[], None], output: Path, limit: float = LIMIT) -> Ended:
    """Run `work` in a process (and session) of its own, its terminal into a file."""
    started = time.monotonic()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            terminal = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(terminal, 1)
            os.dup2(terminal, 2)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(write_end)
    ended = bool(select.select([read_end], [], [], limit)[0])
    os.close(read_end)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status) if ended else None
    return Ended(code, output.read_text(errors="replace"), time.monotonic() - started)


class Workshop:
    """A folder of results of some slides, and the stages that work on it."""

    def __init__(self, folder: Path):
        self.folder, self.results = folder, folder / "results"
        self.config = load_configuration({"sheet": "slides.csv", "tiling": {"codec": "zstd"}}, REPO)

    @property
    def slides(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in json.loads((self.folder / "slides.json").read_text()).items()}

    @classmethod
    def make(cls, folder: Path, *, drawn: int = 4) -> Workshop:
        """Draw, copy, and run everything once."""
        shop = cls(folder)
        (folder / "slides").mkdir(parents=True)
        slides = {}
        for number, row in enumerate(demo_rows(drawn)[:drawn]):
            path = folder / "slides" / f"{row['slide_id']}.tiff"
            draw_demo_slide({**row, "mishap": ""}, path, side=1024, seed=number)
            slides[row["slide_id"]] = str(path)
        data = os.environ.get("SLIDEMAKE_TEST_DATA")
        for name in REAL if data else ():
            source, target = Path(data) / "slides" / name, folder / "slides" / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            for path in (target, *target.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            slides[name.split(".")[0]] = str(target)
        shutil.rmtree(folder / "slides" / "truth", ignore_errors=True)
        (folder / "slides.json").write_text(json.dumps(slides))
        write_json(shop.results / "slidemake.json", {"format": "slidemake-results", "format_version": 1})
        for stage in ("screen", "tissue", "stain", "target", "tiles", "embed", "table", "pack", "bundle"):
            ended = shop.run(stage)
            assert ended.code == 0, (stage, ended.text)
        return shop

    def copy(self, to: Path) -> Workshop:
        shutil.copytree(self.folder, to)
        slides = {name: str(to / path.relative_to(self.folder)) for name, path in self.slides.items()}
        (to / "slides.json").write_text(json.dumps(slides))
        return Workshop(to)

    def manifest(self, stage: str) -> Path:
        where = {"tiles": f"tiles/{GRID}", "embed": f"embed/{ENCODER}"}.get(stage, stage)
        return self.results / "manifests" / where / f"{RACK}.json"

    def records(self, stage: str) -> dict[str, dict[str, Any]]:
        return {record["slide_id"]: record for record in read_json(self.manifest(stage))["slides"]}

    def run(self, stage: str, limit: float = LIMIT) -> Ended:
        """Run a stage as its rule does, in a process of its own."""
        return apart(partial(getattr(self, f"_{stage}")), self.folder / "terminal.txt", limit)

    def _script(self, rule: str, **given: Any) -> None:
        wildcards = Named(rack=RACK, grid=GRID, encoder=ENCODER)
        about = {"wildcards": wildcards, "threads": 1, "resources": Named(mem_mb=2000)}
        log = [str(self.folder / "logs" / f"{rule}.log")]
        snakemake = Named(rule=rule, log=log, **{**about, **given})
        code = compile((SCRIPTS / f"{rule}.py").read_text(), f"{rule}.py", "exec")
        exec(code, {"snakemake": snakemake, "__name__": "__main__"})

    def _body(self, rule: str) -> Any:
        """For stages that need a model: what their scripts do, with a small one."""
        log = [str(self.folder / "logs" / f"{rule}.log")]
        return job(Named(rule=rule, log=log, resources=Named(mem_mb=2000)))

    def _options(self, stage: str) -> dict[str, Any]:
        return stage_options(self.config, stage)

    def _screen(self) -> None:
        rows = [
            {"slide_id": name, "path": str(path), "exclude": False, "mpp": 0.5 if name in WITHOUT_MPP else None}
            for name, path in self.slides.items()
        ]
        params = Named(rows=rows, options=self._options("screen"), results=str(self.results))
        given = {"input": Named(fetched=[]), "params": params}
        self._script("screen_slides", **given, output=Named(manifest=str(self.manifest("screen"))))

    def _tissue(self) -> None:
        params = Named(results=str(self.results), options=self._options("tissue"), outlines={})
        given = {"input": Named(manifest=str(self.manifest("screen"))), "params": params}
        self._script("detect_tissue", **given, output=Named(manifest=str(self.manifest("tissue"))))

    def _stain(self) -> None:
        params = Named(results=str(self.results), options={"method": "macenko"})
        given = {"input": Named(manifest=str(self.manifest("tissue"))), "params": params}
        self._script("fit_stain", **given, output=Named(manifest=str(self.manifest("stain"))))

    def _target(self) -> None:
        fits = [read_json(path) for path in sorted((self.results / "slides").glob("P*/stain.json"))]
        write_json(self.results / "cohort" / "stain_target.json", pool_targets(fits, "macenko"))

    def _tiles(self) -> None:
        options = self._options("tiles")
        params = Named(results=str(self.results), options=options, scheduler="threads")
        given = {"input": Named(manifest=str(self.manifest("tissue"))), "params": params}
        self._script("tile_slides", **given, output=Named(manifest=str(self.manifest("tiles"))))

    def _embed(self) -> None:
        with self._body("embed_tiles"):
            target = read_json(self.results / "cohort" / "stain_target.json")
            make = partial(
                make_slide_job, self.results, ToyEncoder.record, ToyEncoder.identity, "macenko", target, "float32"
            )
            run = partial(run_rack, "embed", self.manifest("embed"), rack=RACK, background=True)
            tiles = read_manifest(self.manifest("tiles"), "tiles")
            process_rack(tiles, [Lane(ToyEncoder, make, run)], device="cpu", dtype="float32", batch_size=16)

    def _table(self) -> None:
        """A cohort table of what was embedded, and predictions, as later stages have them."""
        names = [name for name, record in self.records("embed").items() if record["status"] == "ok"]
        rows = [{"slide_id": name, "patient_id": name, "status": "ok"} for name in names]
        write_table(self.results / "cohort" / "slides.csv", rows)
        table = [
            {"patient_id": f"p{i}", "site": "", "label": "NY"[i % 2], "repeat": r, "fold": i % 3, "threshold": 0.5}
            | {"prob_N": 0.7 - 0.05 * i, "prob_Y": 0.3 + 0.05 * i, "predicted": "N", "tiles": 3}
            for r in range(2)
            for i in range(8)
        ]
        folder = self.results / "tasks" / "t" / "m"
        write_table(folder / "predictions_patients.csv", table)
        write_json(folder / "train.json", {"files": file_sums(folder, ["predictions_patients.csv"])})

    def _pack(self) -> None:
        slides, embed = str(self.results / "cohort" / "slides.csv"), [str(self.manifest("embed"))]
        given = {"input": Named(slides=slides, embed=embed)}
        output = Named(features=str(self.results / "cohort" / "bags" / f"{ENCODER}.npy"))
        self._script("pack_bags", **given, output=output, params=Named(results=str(self.results)))

    def _bundle(self) -> None:
        parameters = {"hidden": 8, "attention": 4}
        member = build_aggregator("abmil_gated", 6, 2, parameters, 0).eval()
        names = [name for name, record in self.records("embed").items() if record["status"] == "ok"]
        bags = load_bags(self.results / "embeddings" / ENCODER, [(name, name) for name in names])
        info = {
            **{"fingerprint": "f", "encoder": bags.encoder, "stain_of_features": bags.stain, "threshold": 0.5},
            "aggregator": {"name": "abmil_gated", "parameters": parameters, "features": 6},
            **{
                "classes": ["N", "Y"],
                "stain": {},
                "stain_target": {},
                "tissue": {},
                "tiling": {},
                "features": "float32",
            },
        }
        save_bundle(self.results / "tasks/t/m/bundle", info, [Group("a", {"temperature": 1.0}, (member,))])

    def _bags(self) -> None:
        from slidemake.mil.bags import open_bags

        with self._body("train_aggregator"):
            bags = open_bags(self.results / "cohort" / "bags" / f"{ENCODER}.npy")
            np.save(self.folder / "bags.npy", bags.features)

    def _predict(self) -> None:
        with self._body("predict_slides"):
            read_bundle(str(self.results / "tasks/t/m/bundle"))
            bundle = load_bundle(self.results / "tasks/t/m/bundle")
            features = np.random.default_rng(0).normal(120, 40, (9, 6)).astype(np.float32)
            np.save(self.folder / "prob.npy", predict(bundle, features).prob)

    def _evaluate(self) -> None:
        with self._body("evaluate"):
            found = read_predictions(self.results / "tasks/t/m/predictions_patients.csv", "m", "binary")
            np.save(self.folder / "evaluated.npy", found.values)
