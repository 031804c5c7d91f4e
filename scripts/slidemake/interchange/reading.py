"""A file or folder of features, whatever made it, opened by its layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slidemake.core.failures import SlideFailure
from slidemake.interchange import array_features as arrays
from slidemake.interchange import hdf5_features as hdf5
from slidemake.interchange.features import Features, refused

# format of the configuration -> layouts that it may be
FORMATS = {
    "trident": ("trident",),
    "clam": ("clam",),
    "stamp": ("stamp",),
    "slide2vec": ("slide2vec",),
    "wsidata": ("wsidata",),
    "raw2features": ("raw2features", "wsidata"),
    "h5ad": ("h5ad",),
    "plain": ("plain", "clam", "slidemake"),
}
HDF5 = (".h5", ".hdf5", ".he5", ".h5ad")


@contextmanager
def open_features(
    path: str | Path, format: str = "auto", mapping: Mapping[str, Any] | None = None
) -> Iterator[Features]:
    """The features of one slide in a file (or a Zarr folder), not yet read; None of what it does not say is guessed.

    format: `auto`, or a key of FORMATS that the file must have. mapping: names of the data sets `features` and
    `coords`. Raises SlideFailure: missing_features, or wrong_features with the reason.
    """
    path, mapping = Path(path), mapping or {}
    if not path.exists():
        raise SlideFailure("missing_features", f"there is no file {path}")
    if path.is_file() and path.stat().st_size == 0:
        raise refused(path, "is empty: not one byte")
    if path.suffix.lower() in HDF5:
        with hdf5.open_hdf5(path) as file:
            yield _checked(path, _of_hdf5(path, file, format, mapping), format)
        return
    yield _checked(path, _of_other(path, mapping), format)


def _of_hdf5(path: Path, file: Any, format: str, mapping: Mapping[str, Any]) -> Features:
    layout = hdf5.layout_of(file)
    if mapping.get("features") and format in ("auto", "plain") and layout != "h5ad":
        layout = "plain"
    try:
        if layout == "h5ad":
            return hdf5.h5ad(path, file, mapping)
        if layout == "plain":
            return hdf5.plain(path, file, mapping)
        return {"trident": hdf5.trident, "clam": hdf5.clam, "stamp": hdf5.stamp}[layout](path, file)
    except (OSError, KeyError, RuntimeError) as error:  # HDF5's own words for a damaged inside
        raise refused(path, f"does not read: {error}", "Copy it again, or make these features again.") from error


def _of_other(path: Path, mapping: Mapping[str, Any]) -> Features:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return arrays.npy(path)
    if suffix == ".npz":
        return arrays.npz(path, mapping)
    if suffix in (".pt", ".pth"):
        return arrays.pt(path, mapping)
    if suffix in (".parquet", ".pq"):
        return arrays.parquet(path, mapping)
    if path.is_dir():
        return _of_folder(path, mapping)
    if suffix in (".pkl", ".pickle"):
        raise refused(path, "is a pickle, which could run code", "Save the features as .npy, .npz, .h5 or .pt.")
    raise refused(
        path, f"is of no known kind ({suffix or 'no suffix'})", "Known: .h5, .h5ad, .npy, .npz, .pt, .parquet, Zarr."
    )


def _of_folder(path: Path, mapping: Mapping[str, Any]) -> Features:
    import zarr

    from slidemake.interchange import spatial_features as spatial

    try:
        group = zarr.open_group(path, mode="r")
    except Exception as error:
        raise refused(path, f"is no Zarr group ({type(error).__name__}: {error})") from error
    try:
        return spatial.spatial(path, group, mapping) if spatial.is_spatial(group) else arrays.zarr_arrays(path, mapping)
    except (OSError, KeyError, ValueError) as error:
        raise refused(path, f"does not read: {error}", "Copy it again, or make these features again.") from error


def _checked(path: Path, found: Features, format: str) -> Features:
    if format != "auto" and found.tool not in FORMATS[format]:
        raise refused(
            path, f"has the layout of {found.tool}, and features.format says {format}", "Set features.format."
        )
    if found.coords is not None and len(found.coords) != found.shape[0]:
        raise refused(path, f"has features of {found.shape[0]} tiles and coordinates of {len(found.coords)}")
    return found
