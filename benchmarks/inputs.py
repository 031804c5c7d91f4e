"""What is measured on: slides that the project draws itself (or one of yours), taken through its own first stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GRID = "224px_0.5mpp"  # of the default encoder
OPTIONS: dict[str, Any] = {
    "store": "pixels",
    "codec": "jpeg",
    "jpeg_quality": 90,
    "jpeg_subsampling": "444",
    "pixels": "scanned",
    "min_tissue": 0.5,
    "min_tiles": 1,
    "shard_tiles": 256,
    "mpp_tolerance": 0.0,
}


@dataclass(frozen=True)
class Slide:
    """A screened slide with its tissue: `results` is the folder of results, `facts` slide.json."""

    slide_id: str
    results: Path
    facts: dict[str, Any]
    tissue: dict[str, Any]

    @property
    def path(self) -> str:
        return self.facts["path"]


def draw(path: Path, side: int) -> None:
    """The first slide of the demo cohort, `side` px wide: a pyramidal JPEG TIFF at 0.5 um/px."""
    from slidemake.demo.cohort import demo_rows, draw_demo_slide

    draw_demo_slide(demo_rows(1)[0], path, side=side)


def mirror(cell: Path, path: Path, copies: int) -> None:
    """A slide like `cell`, mirrored to `copies` x `copies` of its size."""
    import pyvips
    from slidemake.demo.cohort import demo_rows
    from slidemake.demo.scanner import MPP, SITES

    image = pyvips.Image.tiffload(str(cell)).copy_memory()
    across = [image, image.fliphor()] * ((copies + 1) // 2)
    strip = pyvips.Image.arrayjoin(across[:copies], across=copies)
    whole = pyvips.Image.arrayjoin(([strip, strip.flipver()] * ((copies + 1) // 2))[:copies], across=1)
    whole.copy(xres=1000 / MPP, yres=1000 / MPP).tiffsave(
        str(path),
        tile=True,
        tile_width=256,
        tile_height=256,
        pyramid=True,
        compression="jpeg",
        Q=SITES[demo_rows(1)[0]["site"]].quality,
        resunit="cm",
    )


def prepare(slide_id: str, path: Path, results: Path) -> Slide:
    """Screen a slide and find its tissue."""
    from slidemake.cohort.sheet import SlideRow
    from slidemake.configuration.load import load_configuration, stage_options
    from slidemake.core.files import read_json
    from slidemake.slides import screening
    from slidemake.tissue import stage as tissue_stage

    config = load_configuration({"sheet": "slides.csv"}, path.parent)
    screening.screen_slide(SlideRow.for_screening(slide_id, str(path)), {}, results)
    facts = read_json(results / "slides" / slide_id / "slide.json")
    tissue = tissue_stage.process_slide({**facts, "slide_id": slide_id}, results, stage_options(config, "tissue"))
    return Slide(slide_id, results, facts, {"slide_id": slide_id, "fingerprint": tissue["fingerprint"]})


def tile(slide: Slide, grid_name: str = GRID, threads: int = 2, **changes: Any) -> Path:
    """Tile a slide as the workflow does, with its defaults but for `changes`; returns the store."""
    from slidemake.tiles import stage as tiling
    from slidemake.tiles.grid import parse_grid

    tiling.process_slide(slide.tissue, parse_grid(grid_name), slide.results, OPTIONS | changes, threads=threads)
    return slide.results / "tiles" / grid_name / f"{slide.slide_id}.zarr"


def window_and_tiles(slide: Slide, grid_name: str) -> tuple[Any, np.ndarray]:
    """The window of a grid on a slide, and its tissue tiles (N, 2) in level-0 px."""
    from slidemake.tiles.grid import parse_grid, plan_window
    from slidemake.tiles.stage import select_tiles

    facts = slide.facts
    window = plan_window(parse_grid(grid_name), facts["mpp"], [level["downsample"] for level in facts["levels"]])
    folder = slide.results / "slides" / slide.slide_id
    return window, select_tiles(window, facts, folder, OPTIONS["min_tissue"])[0]
