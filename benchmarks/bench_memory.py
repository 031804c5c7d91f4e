"""Memory of the stages on a very large slide, each in a process of its own: python bench_memory.py STAGE (see `stage`).

Resident memory is the process's largest, with libraries. Embedding all tiles of such a slide takes minutes: as features
are written as they come, a part of them, larger than what is written at a time, needs what all of them need.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from measure import Row

BAR_MB = 1536
STAGES = ("screen", "tissue", "tile", "embed")


def stage(name: str, slide: str, folder: Path, part: int) -> dict[str, Any]:
    """Run one stage as its job does, on what the stages before have left in `folder`; returns {"tiles"}."""
    from slidemake.core.files import read_json

    if name == "screen":
        from slidemake.cohort.sheet import SlideRow
        from slidemake.slides import screening

        screening.screen_slide(SlideRow.for_screening("large", slide), {}, folder)
        return {}
    facts = read_json(folder / "slides" / "large" / "slide.json")
    if name == "tissue":
        from slidemake.configuration.load import load_configuration, stage_options
        from slidemake.tissue import stage as tissue_stage

        options = stage_options(load_configuration({"sheet": "slides.csv"}, folder), "tissue")
        done = tissue_stage.process_slide({**facts, "slide_id": "large"}, folder, options)
        (folder / "tissue.txt").write_text(done["fingerprint"])
        return {}
    from slidemake.jobs.memory import keep_freed_memory

    keep_freed_memory()
    from inputs import GRID, Slide, tile

    mark = {"slide_id": "large", "fingerprint": (folder / "tissue.txt").read_text()}
    store = folder / "tiles" / GRID / "large.zarr"
    if name == "tile":
        tile(Slide("large", folder, facts, mark))
    from slidemake.stores.tile_store import TileStore

    count = len(TileStore(store))
    if name == "tile":
        return {"tiles": count}
    embed(Slide("large", folder, facts, mark), store, folder, part)
    return {"tiles": min(part, count)}


def embed(slide: Any, store: Path, folder: Path, part: int) -> None:
    import bench_embedding
    from slidemake.encoders.loading import load_encoder
    from slidemake.encoders.registry import load_record
    from slidemake.stores.tile_store import TileStore

    class Part(TileStore):
        def __init__(self, path: Path):
            super().__init__(path)
            self.coords = self.coords[:part]

    from slidemake.embedding import engine as embedding_engine

    embedding_engine.TileStore = Part  # type: ignore[misc]
    encoder = load_encoder(load_record(bench_embedding.ENCODER), "cpu", "fp32")
    bench_embedding.embed(encoder, slide, store, 1, folder / "embedded")


def measure(slide: str, folder: Path, part: int) -> list[Row]:
    """A row per stage: its largest resident memory in MB beside the bar."""
    rows = []
    for name in STAGES:
        command = [sys.executable, __file__, name, slide, str(folder), str(part)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = found["mb"]
        what = f"{name}, {found['tiles']:,} tiles" if "tiles" in found else name
        rows.append(
            Row(
                section="memory",
                name=f"{what}, {found['side']:,} px wide, {found['seconds']:.0f} s",
                figure=size,
                unit="MB",
                beside="1.5 GB",
                limit=BAR_MB,
                ratio=size / BAR_MB,
                cpu_ratio=size / BAR_MB,
                bar=f"<={BAR_MB}",
                absolute=True,
                figures=[size],
                limits=[BAR_MB],
            )
        )
    return rows


if __name__ == "__main__":
    started = time.monotonic()
    answer = stage(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    from slidemake.core.files import read_json

    answer["side"] = read_json(Path(sys.argv[3]) / "slides" / "large" / "slide.json")["width"]
    answer["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**answer, "seconds": time.monotonic() - started}))
