"""TIAToolbox's patch extractor and Macenko normaliser beside ours, on the same tiles."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from bench_embedding import stain_transform
from bench_reading import our_reader
from inputs import GRID, Slide, window_and_tiles
from measure import Row, compare, in_turns


def extractor(slide: Slide, window: Any, coords: np.ndarray) -> float:
    """Patches around the same points (its patch starts (side - 1) // 2 px before the point)."""
    from tiatoolbox.tools.patchextraction import get_patch_extractor

    half = int((window.tile_px - 1) / 2)
    patches = get_patch_extractor(
        "point",
        input_img=slide.path,
        locations_list=np.concatenate([coords + half, np.zeros((len(coords), 1), int)], axis=1),
        patch_size=window.tile_px,
        resolution=window.level,
        units="level",
    )
    count = 0
    for patch in patches:
        count += patch.shape == (window.tile_px, window.tile_px, 3)
    return count


def measure(slide: Slide, repeats: int, most: int) -> list[Row]:
    import torch
    from slidemake.jobs.memory import keep_freed_memory
    from slidemake.slides.opening import open_slide
    from slidemake.stain.fit import StainTransform
    from slidemake.stain.on_device import apply_stain
    from slidemake.tiles.reading import read_tiles
    from tiatoolbox.data import stain_norm_target
    from tiatoolbox.tools.stainnorm import get_normalizer

    keep_freed_memory()
    torch.set_num_threads(1)
    window, coords = window_and_tiles(slide, GRID)
    coords = coords[:most]
    with open_slide(slide.path, reader=slide.facts["reader"]) as reader:
        tiles = read_tiles(reader, coords[: min(most, 96)], window)[0]
    theirs, values = get_normalizer("macenko"), StainTransform.from_dict(stain_transform())
    theirs.fit(stain_norm_target())

    def normalise() -> float:
        for tile in tiles:
            theirs.transform(tile.copy())
        return len(tiles)

    def ours() -> float:
        for start in range(0, len(tiles), 16):
            apply_stain(torch.from_numpy(tiles[start : start + 16]).permute(0, 3, 1, 2), values)
        return len(tiles)

    tasks = {
        "read": partial(our_reader, slide, window, coords, 1),
        "extract": partial(extractor, slide, window, coords),
        "stain": ours,
        "normalise": normalise,
    }
    times = in_turns(tasks, repeats)
    reading = partial(compare, "reading", f"read {slide.slide_id} {GRID.replace('_', ' ')}, 1 thread", "tiles/s")
    return [
        reading(times["read"], "TIAToolbox patch extractor", times["extract"]),
        compare(
            "stain", "Macenko", "tiles/s", times["stain"], "TIAToolbox Macenko (fits every tile)", times["normalise"]
        ),
    ]
