"""Features in arrays of their own: .npy, .npz, .pt, .parquet, Zarr, with what some tools lay beside them.

A .pt is read by torch with `weights_only`: tensors, and nothing that runs code. Everything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.interchange.features import Features, pairs, positive_number, refused, text, two_dimensional
from slidemake.interchange.hdf5_features import NAME_IT, clam_tiles, only, open_hdf5


def npy(path: Path) -> Features:
    """One array; mapped, not read."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise refused(path, _no_array(path, error), "Save it again with numpy.save, as an array of numbers.") from error
    return Features("plain", two_dimensional(rows, path))


def npz(path: Path, mapping: Mapping[str, Any]) -> Features:
    """Named arrays: `features` and `coords`, or x and y; slide2vec's have their coordinates in a file beside them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy have errors of their own
        raise refused(path, _no_array(path, error), "Save it again with numpy.savez.") from error
    return _of_arrays(path, arrays, mapping)


def pt(path: Path, mapping: Mapping[str, Any]) -> Features:
    """A tensor (tiles, numbers), or a dictionary of tensors."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=None)
    except Exception as error:  # pickle's errors are of many kinds, and so are those of a truncated archive
        unsafe = "weights_only" in str(error).lower() or "unpickl" in type(error).__name__.lower()
        why = (
            "holds more than tensors, as a pickle that could run code" if unsafe else f"does not load ({_short(error)})"
        )
        raise refused(path, why, "Save the tensor alone: torch.save(features, path).") from error
    if isinstance(found, Mapping):
        arrays = {str(key): value.numpy() for key, value in found.items() if isinstance(value, torch.Tensor)}
    elif isinstance(found, torch.Tensor):
        arrays = {
            "features": found.detach().to(torch.float32 if found.dtype == torch.bfloat16 else found.dtype).numpy()
        }
    else:
        raise refused(path, f"holds a {type(found).__name__}, not a tensor of features")
    return _of_arrays(path, arrays, mapping)


def parquet(path: Path, mapping: Mapping[str, Any]) -> Features:
    """A row per tile: a column of lists, or a column per number; columns x and y are coordinates."""
    try:
        import pyarrow.parquet as files
    except ImportError as error:
        raise refused(path, "is a Parquet file, and pyarrow is not installed", "pip install pyarrow") from error
    import pyarrow
    import pyarrow.compute

    try:
        table = files.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise refused(path, f"is no readable Parquet file ({_short(error)})") from error
    columns = table.column_names
    lists = [n for n in columns if pyarrow.types.is_list(table.schema.field(n).type)]
    lists += [n for n in columns if pyarrow.types.is_fixed_size_list(table.schema.field(n).type)]
    name = mapping.get("features") or ("features" if "features" in lists else only(lists))
    if name and name in lists:
        column = table.column(name).combine_chunks()
        lengths = np.asarray(pyarrow.compute.list_value_length(column).fill_null(-1))
        if len(lengths) and lengths.min() != lengths.max():
            raise refused(path, f"has lists of different lengths in column {name}")
        width = int(lengths[0]) if len(lengths) else 1
        rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)
    else:
        numbered = [n for n in columns if n.startswith(name or "feature_") or n.isdigit()]
        if not numbered:
            raise refused(path, f"has no column of features; it has {', '.join(columns[:8])}", NAME_IT)
        rows = np.stack([table.column(n).to_numpy() for n in numbered], 1)
    corner = mapping.get("coords") or ["x", "y"]
    corner = [part.strip() for part in corner.split(",")] if isinstance(corner, str) else corner
    coords = None
    if set(corner) <= set(columns):
        coords = pairs(np.stack([table.column(n).to_numpy() for n in corner], 1), path)
    about = {key.decode(): value.decode("utf-8", "replace") for key, value in (table.schema.metadata or {}).items()}
    return _with_tiles(
        Features("plain", two_dimensional(rows, path), coords, encoder=text(about.get("encoder"))), about
    )


def zarr_arrays(path: Path, mapping: Mapping[str, Any]) -> Features:
    """Arrays of a Zarr group of version 2 or 3, by name: `features` and `coords`, as slidemake's own stores."""
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
    except Exception as error:
        raise refused(path, f"is no Zarr group ({_short(error)})") from error
    name, corner = mapping.get("features") or "features", mapping.get("coords") or "coords"
    if name not in group:
        raise refused(path, f"has no array {name}; it has {', '.join(sorted(group)[:8]) or 'nothing'}", NAME_IT)
    coords = pairs(group[corner][...], path) if corner in group else None
    about = dict(group.attrs)
    found = Features("slidemake" if about.get("format") == "slidemake-embeddings" else "plain", group[name], coords)
    if found.tool == "slidemake":
        encoder, mpp = about.get("encoder") or {}, about.get("mpp") or {}
        found.tile = positive_number(about.get("tile_level0_px"))
        found.tile_px, found.mpp = encoder.get("tile_px"), encoder.get("mpp")
        found.mpp0, found.encoder = positive_number(mpp.get("source")), encoder.get("key")
    found.rows = two_dimensional(found.rows, path)
    return found


def _of_arrays(path: Path, arrays: dict[str, np.ndarray], mapping: Mapping[str, Any]) -> Features:
    name = mapping.get("features") or ("features" if "features" in arrays else only(list(arrays)))
    if name is None or name not in arrays:
        raise refused(path, f"has no array {name or 'features'}; it has {', '.join(arrays) or 'nothing'}", NAME_IT)
    found = Features("plain", two_dimensional(arrays[name], path))
    corner = mapping.get("coords") or "coords"
    if corner in arrays:
        found.coords = pairs(arrays[corner], path)
    elif {"x", "y"} <= set(arrays):
        found.coords = pairs(np.stack([arrays["x"], arrays["y"]], 1), path)
    elif path.parent.name.startswith("tile_embeddings") or path.with_suffix(".meta.json").exists():
        return slide2vec(path, found, arrays.get("tile_index"))
    elif beside := _clam_coordinates(path):
        found.tool = "clam"
        with open_hdf5(beside) as file:
            found.coords = pairs(file["coords"][...], beside)
            for key, value in clam_tiles(path, dict(file["coords"].attrs)).items():
                setattr(found, key, value)
    return found


def slide2vec(path: Path, found: Features, tile_index: np.ndarray | None) -> Features:
    """Features of slide2vec and soma: coordinates are in `tiles/<slide>.coordinates.npz` of the same run."""
    found.tool = "slide2vec"
    meta = _json(path.with_suffix(".meta.json"))
    found.encoder = text(meta.get("encoder_name")) or text(meta.get("encoder"))
    for folder in list(path.parents)[1:4]:
        beside = folder / "tiles" / f"{path.stem}.coordinates.npz"
        if not beside.exists():
            continue
        with np.load(beside, allow_pickle=False) as file:
            corner = np.stack([file["x"], file["y"]], 1)
            if tile_index is not None:  # the rows may come in another order than the tiles
                at = {int(n): row for row, n in enumerate(file["tile_index"])}
                if set(at) != {int(n) for n in tile_index}:
                    raise refused(path, f"has tiles that {beside.name} does not have, or not all of them")
                corner = corner[[at[int(n)] for n in tile_index]]
        found.coords = pairs(corner, beside)
        about = _json(beside.with_name(f"{path.stem}.coordinates.meta.json"))
        tiling, slide = about.get("tiling") or {}, about.get("slide") or {}
        found.tile, found.stride = (
            positive_number(tiling.get("tile_size_lv0")),
            positive_number(tiling.get("step_px_lv0")),
        )
        px = positive_number(tiling.get("requested_tile_size_px"))
        found.tile_px, found.mpp = int(px) if px else None, positive_number(tiling.get("requested_spacing_um"))
        found.mpp0 = positive_number(slide.get("base_spacing_um"))
        break
    return found


def _clam_coordinates(path: Path) -> Path | None:
    """CLAM's h5_files/<slide>.h5 for its pt_files/<slide>.pt, or its file of patches."""
    places = [path.parent.parent / "h5_files", *(folder / "patches" for folder in list(path.parents)[:3])]
    return next((folder / f"{path.stem}.h5" for folder in places if (folder / f"{path.stem}.h5").exists()), None)


def _with_tiles(found: Features, about: Mapping[str, Any]) -> Features:
    """The size of tiles as our own Parquet files say it."""
    found.tile, found.mpp0 = positive_number(about.get("tile_level0_px")), positive_number(about.get("mpp_level0"))
    px = positive_number(about.get("tile_px"))
    found.tile_px, found.mpp = int(px) if px else None, positive_number(about.get("mpp"))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _no_array(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "is empty: not one byte"
    if "pickle" in str(error).lower() or "python objects" in str(error).lower():
        return "holds Python objects as a pickle, which could run code"
    return f"is no whole NumPy file ({_short(error)})"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
