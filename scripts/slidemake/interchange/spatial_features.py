"""Features in SpatialData stores: LazySlide's (wsidata) beside a slide, native and exported ones of raw2features.

Tables are AnnData in Zarr, read by their own documented layout; rows of a table find their tiles by the tiles' ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.interchange.features import Features, pairs, positive_number, refused, two_dimensional
from slidemake.interchange.hdf5_features import NAME_IT, only


def is_spatial(group: Any) -> bool:
    return "tables" in group or ("grids" in group and "features" in group)


def spatial(path: Path, group: Any, mapping: Mapping[str, Any]) -> Features:
    """The features that a store holds, of `mapping["features"]` where it holds several."""
    if "tables" in group:
        return _of_tables(path, group, mapping)
    return _raw2features(path, group, mapping)


def _raw2features(path: Path, group: Any, mapping: Mapping[str, Any]) -> Features:
    models = sorted(group["features"])
    model = mapping.get("features") or only(models)
    if model not in models:
        raise refused(path, f"holds features of {', '.join(models) or 'nothing'}", "Set features.mapping.features.")
    rows = group["features"][model]
    grids = [name for name in sorted(group["grids"]) if len(group["grids"][name]["coords"]) == rows.shape[0]]
    grid = mapping.get("coords") or rows.attrs.get("grid") or only(grids)
    if grid not in group["grids"]:
        raise refused(path, f"does not say which of its grids {model} has", "Set features.mapping.coords to its name.")
    about = {**dict(group.attrs), **dict(group["grids"][grid].attrs)}
    px = positive_number(about.get("tile_px") or about.get("patch_size"))
    return Features(
        "raw2features",
        two_dimensional(rows, path),
        pairs(group["grids"][grid]["coords"][...], path),
        tile=positive_number(about.get("tile_level0_px") or about.get("patch_size_level0")),
        tile_px=int(px) if px else None,
        mpp=positive_number(about.get("mpp") or about.get("target_mpp")),
        mpp0=positive_number(about.get("mpp_level0")),
        encoder=str(model),
    )


def _of_tables(path: Path, group: Any, mapping: Mapping[str, Any]) -> Features:
    """A table per encoder (LazySlide: X), or one with an array per encoder (raw2features: obsm)."""
    tables = {name: group["tables"][name] for name in sorted(group["tables"])}
    found = {name: table["X"] for name, table in tables.items() if _dense(table.get("X"))}
    for name, table in tables.items():
        if "obsm" in table:
            inner = {key: table["obsm"][key] for key in table["obsm"] if key.startswith("X_")}
            found |= {f"{name}/{key.removeprefix('X_')}": array for key, array in inner.items()}
    wanted = mapping.get("features")
    near = [n for n in found if wanted in (n, n.split("/")[-1], n.removesuffix("_tiles"))] if wanted else list(found)
    name = only(near)
    if name is None:
        raise refused(
            path, f"holds features in {', '.join(found) or 'no table'}", "Set features.mapping.features to one."
        )
    table = tables[name.split("/")[0]]
    tiles = _region(table)
    about = ((group.attrs.get("tile_spec") or {}).get(tiles)) or {}
    coords = _coordinates(path, table, tiles)
    down = positive_number(about.get("base_downsample")) or 1.0
    width, step = positive_number(about.get("base_width")), positive_number(about.get("base_stride_width"))
    px, shrunk = positive_number(about.get("width")), positive_number(about.get("ops_downsample"))
    if width is None and px and shrunk:
        width = px * shrunk * down
        stride = positive_number(about.get("stride_width"))
        step = stride * shrunk * down if stride else None
    corners, side = coords
    properties = group.attrs.get("wsi") or group.attrs.get("slide_properties") or {}
    return Features(
        "wsidata",
        two_dimensional(found[name], path),
        corners,
        tile=width or side,
        stride=step,
        tile_px=int(px) if px else None,
        mpp=positive_number(about.get("mpp")),
        mpp0=positive_number(properties.get("mpp")) if isinstance(properties, Mapping) else None,
        encoder=name.split("/")[-1].removesuffix("_tiles"),
    )


def _dense(array: Any) -> bool:
    return getattr(array, "ndim", 0) == 2 and array.shape[1] > 0


def _region(table: Any) -> str:
    """Name of the shapes that a table's rows are of."""
    region = dict(table["uns"]["spatialdata_attrs"].attrs).get("region") if "uns" in table else None
    if region is None and "uns" in table and "spatialdata_attrs" in table["uns"]:
        stored = table["uns"]["spatialdata_attrs"].get("region")
        region = None if stored is None else np.asarray(stored[...]).reshape(-1)[0]
    return str(region if region is not None else "tiles")


def _coordinates(path: Path, table: Any, tiles: str) -> tuple[np.ndarray, float | None]:
    """Top-left corners of a table's rows and the side of a tile, by its own columns or by the shapes it points to."""
    obs = table["obs"]
    if "x" in obs and "y" in obs:
        return pairs(np.stack([obs["x"][...], obs["y"][...]], 1), path), None
    shapes = path / "shapes" / tiles / "shapes.parquet"
    if not shapes.exists():
        raise refused(path, f"has no shapes {tiles} for its table of features")
    try:
        import pyarrow.parquet as files
    except ImportError as error:
        raise refused(
            path, "keeps its tiles in a Parquet file, and pyarrow is not installed", "pip install pyarrow"
        ) from error
    import shapely

    rows = files.read_table(shapes)
    boxes = shapely.bounds(shapely.from_wkb(rows.column("geometry").to_numpy(zero_copy_only=False)))
    corners, side = boxes[:, :2], float(np.median(boxes[:, 2] - boxes[:, 0])) if len(boxes) else None
    if "tile_id" not in rows.column_names or "tile_id" not in obs:
        if len(corners) != table["X"].shape[0]:
            raise refused(path, f"has {table['X'].shape[0]} rows of features for {len(corners)} tiles, and no tile_id")
        return corners, side
    at = {str(tile): row for row, tile in enumerate(rows.column("tile_id").to_pylist())}
    wanted = [str(tile) for tile in np.asarray(obs["tile_id"][...]).tolist()]
    missing = [tile for tile in wanted if tile not in at]
    if missing:
        raise refused(path, f"has features of tile {missing[0]}, which is not among its tiles", NAME_IT)
    return corners[[at[tile] for tile in wanted]], side
