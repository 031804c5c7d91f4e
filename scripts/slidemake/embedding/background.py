"""The background-only control: can the label be told from what lies beside the tissue?

A sample of tiles without tissue (glass, pen, edges of the coverslip) of every slide goes through the same encoder, as
it is: nothing is stain-normalised, for there is no stain. A classifier of the slides' mean vectors then sees how a
slide was made and scanned, and nothing of the disease: it has to be at chance (`background_control`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidemake.core.failures import SlideFailure
from slidemake.core.files import fingerprint, read_json_if_whole, read_slide_record, write_json
from slidemake.jobs import isolation
from slidemake.tiles.grid import Grid, Window, boxes, slide_window, tile_positions
from slidemake.tissue.geometry import tissue_fractions

if TYPE_CHECKING:
    from slidemake.embedding.forward import Forward


def record_name(encoder: str) -> str:
    """Name of the file in a slide's folder; `encoder` is the folder name of the encoder."""
    return f"background_{encoder}.json"


def background_tiles(
    window: Window, slide: Mapping[str, Any], mask: np.ndarray, scale: tuple[float, float], count: int, seed: Sequence
) -> np.ndarray:
    """(n, 2) level-0 positions, n <= count, of tiles of the grid without any tissue, drawn at random and sorted.

    Tiles whose neighbours have none either are taken first: at the rim of the tissue there may be some that the mask
    has missed. mask (h, w) bool and scale (level-0 px per mask px) are the tissue stage's.
    """
    coords = tile_positions(window, slide["width"], slide["height"], slide["bounds"])
    inside = boxes(coords, window)
    around = inside + np.array([-1.0, -1.0, 2.0, 2.0]) * np.tile(window.size_level0, 2)
    empty = tissue_fractions(mask, scale, inside) == 0
    far = tissue_fractions(mask, scale, around) == 0
    order = np.random.default_rng(list(seed)).permutation(len(coords))
    chosen = [*order[far[order]], *order[(empty & ~far)[order]]][:count]
    return coords[np.sort(np.array(chosen, int))]


def embed_background(
    record: Mapping[str, Any],
    grid: Grid,
    results: Path,
    encoder: str,
    identity: Mapping[str, Any],
    options: Mapping[str, Any],
    tolerance: float,
    forward: Callable[[], Forward],
) -> dict[str, Any]:
    """Mean feature of a slide's background, in slides/<slide_id>/background_<encoder>.json; a finished one is kept.

    `record` is the tissue stage's; `encoder` the folder name and `identity` the identity of the encoder; options:
    tiles, seed; `forward()` gives the warm encoder. A slide without such tiles gets `vector` None: it takes no part.
    Raises SlideFailure too_coarse, unreadable.
    """
    from slidemake.slides.opening import open_screened
    from slidemake.tiles.reading import read_tiles
    from slidemake.tissue.stage import read_mask

    slide_id = record["slide_id"]
    folder = results / "slides" / slide_id
    mark = fingerprint(
        "background",
        tissue=record["fingerprint"],
        grid=grid.name,
        tolerance=tolerance,
        encoder=dict(identity),
        options=dict(options),
    )
    done = read_json_if_whole(folder / record_name(encoder))
    if done and done.get("fingerprint") == mark:
        return {"fingerprint": mark, "tiles": len(done["coords"]), "reused": True}
    slide = read_slide_record(folder, "slide.json")
    window = slide_window(grid, slide, tolerance)
    mask, described = read_mask(folder)
    seed = [options["seed"], int(slide["identity"][:8], 16)]
    scale = tuple(described["level0_per_mask_px"])
    coords = background_tiles(window, slide, mask, scale, options["tiles"], seed)
    vector = None
    if len(coords):
        with open_screened(slide) as reader:
            tiles, good = read_tiles(reader, coords, window)
        if not good.any():
            raise SlideFailure("unreadable", f"none of {len(coords)} tiles of background decodes")
        with isolation.unhurried():
            coords, tiles, model = coords[good], tiles[good], forward()
            features = [model(tiles[i : i + model.batch], None) for i in range(0, len(tiles), model.batch)]
        vector = np.concatenate(features).mean(axis=0, dtype=np.float64)
    content = {"slide_id": slide_id, "fingerprint": mark, "encoder": encoder, "grid": grid.name}
    content |= {"coords": coords, "vector": None if vector is None else [float(f"{v:.6g}") for v in vector]}
    write_json(folder / record_name(encoder), content)
    return {"fingerprint": mark, "tiles": len(coords)}


def background_vectors(results: Path, encoder: str, records: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """{slide_id: mean feature (D,)} of the slides that have background, by the records of the background stage."""
    found = {}
    for record in records:
        if record["status"] == "ok" and record["tiles"]:
            stored = read_slide_record(results / "slides" / record["slide_id"], record_name(encoder))
            found[record["slide_id"]] = np.asarray(stored["vector"], np.float64)
    return found
