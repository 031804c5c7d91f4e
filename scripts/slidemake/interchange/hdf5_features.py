"""Features in HDF5: the layouts of TRIDENT, CLAM and STAMP, AnnData's h5ad, and any data sets by their names.

Which layout a file has is seen from its data sets and attributes (`layout_of`), not from its name. Sources of the
layouts: docs/interchange.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slidemake.interchange.features import Features, pairs, positive_number, refused, text, two_dimensional

OBJECTIVE = 10.0  # um per px at a magnification of 1: 20x is 0.5
STAMP_1 = (224, 256.0)  # px and um of a tile of STAMP before it wrote units


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The open file; SlideFailure when it is no HDF5 file, or one that ends too early."""
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        with open(path, "rb") as handle:
            head = handle.read(8)
        if not head:
            raise refused(path, "is empty: not one byte") from error
        what = f"is truncated or damaged ({error})" if head[1:4] == b"HDF" else "is no HDF5 file"
        raise refused(path, what, "Copy it again, or make these features again.") from error
    with file:
        yield file


def layout_of(file: Any) -> str:
    """trident | clam | stamp | h5ad | plain."""
    if "feats" in file:
        return "stamp"
    if "obs" in file and "X" in file:
        return "h5ad"
    if "features" in file and "coords" in file:
        about = file["coords"].attrs
        if "patch_size_level0" in about or "target_magnification" in about:
            return "trident"
        return "clam"
    return "plain"


def trident(path: Path, file: Any) -> Features:
    """`features` and `coords` with the attributes of its tiles. A magnification says um per px by name only."""
    about = file["coords"].attrs
    tile, px = positive_number(about.get("patch_size_level0")), positive_number(about.get("patch_size"))
    overlap = positive_number(about.get("overlap")) or 0.0
    target, level0 = (
        positive_number(about.get("target_magnification")),
        positive_number(about.get("level0_magnification")),
    )
    return Features(
        "trident",
        two_dimensional(file["features"], path),
        pairs(file["coords"][...], path),
        tile=tile,
        stride=tile * (px - overlap) / px if tile and px and px > overlap else None,
        tile_px=int(px) if px else None,
        mpp=OBJECTIVE / target if target else None,
        mpp0=OBJECTIVE / level0 if level0 else None,
        encoder=text(about.get("encoder")) or text(file["features"].attrs.get("encoder")),
        said=_size(about),
    )


def clam(path: Path, file: Any) -> Features:
    """`features` and `coords`; the size of tiles is in CLAM's file of patches, which is looked for beside it."""
    return Features(
        "clam",
        two_dimensional(file["features"], path),
        pairs(file["coords"][...], path),
        **clam_tiles(path, file["coords"].attrs),
    )


def clam_tiles(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Size of CLAM's tiles by attributes of their coordinates, here or in `patches/<slide>.h5` in a folder above."""
    if "patch_size" not in about:
        for folder in list(path.parents)[:3]:
            beside = folder / "patches" / f"{path.stem}.h5"
            if beside.exists():
                with open_hdf5(beside) as file:
                    return clam_tiles(path, dict(file["coords"].attrs)) if "coords" in file else {}
        return {}
    px, level = positive_number(about.get("patch_size")), about.get("patch_level")
    downsample = positive_number(about.get("downsample")) or (1.0 if level is not None and int(level) == 0 else None)
    tile = px * downsample if px and downsample else None
    return {"tile": tile, "stride": None, "tile_px": int(px) if px else None}


def stamp(path: Path, file: Any) -> Features:
    """`feats` and `coords`: micrometres, or px of an old version (tiles of 224 px over 256 um).

    Files without a unit are taken for that old version when their tiles lie 224 apart, and are refused otherwise.
    """
    about = file.attrs
    kind = text(about.get("feat_type")) or "tile"
    if kind != "tile":
        raise refused(path, f"holds features of a whole {kind}, not of tiles", "Give STAMP's features of tiles.")
    rows, coords = two_dimensional(file["feats"], path), pairs(file["coords"][...], path)
    px = positive_number(about.get("tile_size_px"))
    um = positive_number(about.get("tile_size_um"))
    if um is None and text(about.get("unit")) == "um":
        um = positive_number(about.get("tile_size"))
    if um is None:
        step = positive_number(about.get("tile_size")) or spacing(coords)
        if len(coords) and (step is None or round(step) != STAMP_1[0]):
            raise refused(
                path,
                f"does not say in which unit its coordinates are, and its tiles lie {step} apart: neither um nor the "
                f"{STAMP_1[0]} px of old versions",
                "Extract the features again with a STAMP that writes tile_size_um.",
            )
        (px, um), coords = STAMP_1, coords / STAMP_1[0] * STAMP_1[1]
    encoder = text(about.get("extractor")) or text(about.get("encoder"))
    version = text(about.get("stamp_version"))
    said = {"stamp_version": version} if version else {}
    found = Features("stamp", rows, coords, "um", tile=um, encoder=encoder, said=said)
    if px:
        found.tile_px, found.mpp = int(px), um / px
    return found


def h5ad(path: Path, file: Any, mapping: Mapping[str, Any]) -> Features:
    """AnnData with a row per tile: X (or obsm), coordinates in obsm `spatial` or in columns x and y of obs."""
    import h5py

    name = mapping.get("features")
    rows = file[name] if name else file["X"]
    if isinstance(rows, h5py.Group):
        raise refused(path, f"holds {name or 'X'} as a sparse matrix; features of tiles are dense")
    coords = None
    if mapping.get("coords"):
        coords = pairs(file[mapping["coords"]][...], path)
    elif "x" in file["obs"] and "y" in file["obs"]:
        coords = pairs(np.stack([file["obs/x"][...], file["obs/y"][...]], 1), path)
    elif "obsm" in file and "spatial" in file["obsm"]:
        raise refused(
            path,
            "has obsm/spatial, which does not say whether it is the corners or the centres of the tiles",
            "Name the coordinates of the top-left corners: features.mapping.coords.",
        )
    return Features("h5ad", two_dimensional(rows, path), coords)


def plain(path: Path, file: Any, mapping: Mapping[str, Any]) -> Features:
    """Any data sets, by the names that the configuration gives; without them the only one of two dimensions."""
    import h5py

    found: dict[str, Any] = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    name = mapping.get("features") or only([n for n, item in found.items() if item.ndim == 2 and item.shape[1] > 2])
    if name is None or name not in found:
        raise refused(path, _unknown(mapping.get("features"), list(found)), NAME_IT)
    coords = mapping.get("coords") or ("coords" if "coords" in found else None)
    if coords is not None and coords not in found:
        raise refused(path, _unknown(coords, list(found)), NAME_IT)
    where = pairs(found[coords][...], path) if coords else None
    return Features("plain", two_dimensional(found[name], path), where, **clam_tiles(path, {}))


NAME_IT = "Name the data sets: features.mapping: {features: ..., coords: ...}."


def only(names: list[str]) -> str | None:
    """The name of a list of one."""
    return names[0] if len(names) == 1 else None


def _unknown(name: str | None, found: list[str]) -> str:
    listed = ", ".join(found[:8]) or "nothing"
    return f"has no data set {name}; it has {listed}" if name else f"is of no known layout; it holds {listed}"


def _size(about: Mapping[str, Any]) -> dict[str, Any]:
    width, height = positive_number(about.get("level0_width")), positive_number(about.get("level0_height"))
    return {"level0": [int(width), int(height)]} if width and height else {}


def spacing(coords: np.ndarray) -> float | None:
    """Distance of neighbouring tiles: the commonest step between the sorted values of x and of y; None for one tile."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)] if len(coords) else []
    values = np.round(np.concatenate(steps), 3) if steps else np.zeros(0)
    if not len(values):
        return None
    found, count = np.unique(values, return_counts=True)
    return float(found[count.argmax()])
