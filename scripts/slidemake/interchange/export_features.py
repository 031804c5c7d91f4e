"""Features of one slide in the layouts of other tools. Each writer gets a slide and the folder of its format.

Layouts and what is lost in each: docs/interchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slidemake.core.failures import RunError
from slidemake.interchange.stored import StoredSlide


def trident(slide: StoredSlide, encoder: str, folder: Path) -> None:
    """`<mag>x_<px>px_0px_overlap/features_<encoder>/<slide>.h5`, and its `patches/<slide>_patches.h5`."""
    import h5py

    job = folder / f"{slide.magnification}x_{slide.px}px_0px_overlap"
    for name in (f"features_{encoder}/{slide.slide_id}.h5", f"patches/{slide.slide_id}_patches.h5"):
        path = job / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            if name.startswith("features"):
                file["features"] = slide.features.astype(np.float32)
            coords = file.create_dataset("coords", data=slide.coords.astype(np.int64), maxshape=(None, 2))
            coords.attrs.update(
                {
                    "patch_size": slide.px,
                    "patch_size_level0": round(slide.tile),
                    "level0_magnification": slide.magnification0,
                    "target_magnification": slide.magnification,
                    "overlap": 0,
                    "name": slide.slide_id,
                    "savetodir": ".",
                }
            )


def clam(slide: StoredSlide, encoder: str, folder: Path) -> None:
    """`<encoder>/h5_files` and `<encoder>/patches`; sizes of tiles in px of level 0. No pt_files: they are pickles."""
    import h5py

    for name in ("h5_files", "patches"):
        path = folder / encoder / name / f"{slide.slide_id}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            if name == "h5_files":
                file["features"] = slide.features.astype(np.float32)
                file["coords"] = slide.coords.astype(np.int32)
                continue
            coords = file.create_dataset("coords", data=slide.coords.astype(np.int64), maxshape=(None, 2))
            about = {"patch_size": round(slide.tile), "patch_level": 0, "downsample": np.ones(2)}
            coords.attrs.update({**about, "name": slide.slide_id, "save_path": "."})


def stamp(slide: StoredSlide, encoder: str, folder: Path) -> None:
    """`<encoder>/<slide>.h5` as STAMP 2 writes it: float16, places in um. RunError without um per px of level 0."""
    import h5py

    if not slide.mpp0:
        raise RunError(
            f"STAMP gives places in um, and nobody knows the um per px of slide {slide.slide_id}: write it into the "
            "sheet's column mpp, or leave stamp out of export.formats."
        )
    half = slide.features.astype(np.float16)
    if not np.isfinite(half).all():
        raise RunError(f"Features of slide {slide.slide_id} are too large for STAMP's half precision: leave stamp out.")
    (folder / encoder).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / encoder / f"{slide.slide_id}.h5", "w") as file:
        file["feats"] = half
        file["coords"] = (slide.coords * slide.mpp0).astype(np.float32)
        file.attrs.update(
            {
                "stamp_version": "2.4.0",
                "extractor": encoder,
                "unit": "um",
                "tile_size_um": float(slide.px * slide.mpp),
                "tile_size_px": slide.px,
                "code_hash": "slidemake",
                "feat_type": "tile",
            }
        )


def parquet(slide: StoredSlide, encoder: str, folder: Path) -> None:
    """`<encoder>/<slide>.parquet`: a row per tile (x, y, features as a list of fixed length), sizes in the metadata."""
    try:
        import pyarrow
        import pyarrow.parquet as files
    except ImportError as error:
        raise RunError(
            "export.formats: parquet needs pyarrow, which is not installed (pip install pyarrow)."
        ) from error
    flat = pyarrow.array(np.ascontiguousarray(slide.features).reshape(-1))
    columns = {
        "x": pyarrow.array(slide.coords[:, 0]),
        "y": pyarrow.array(slide.coords[:, 1]),
        "features": pyarrow.FixedSizeListArray.from_arrays(flat, slide.features.shape[1]),
    }
    about = {"slide_id": slide.slide_id, "encoder": encoder, "tile_level0_px": slide.tile, "tile_px": slide.px}
    about |= {"mpp": slide.mpp, "mpp_level0": slide.mpp0 or "", "identity": json.dumps(slide.encoder, sort_keys=True)}
    table = pyarrow.table(columns).replace_schema_metadata({key: str(value) for key, value in about.items()})
    (folder / encoder).mkdir(parents=True, exist_ok=True)
    path = folder / encoder / f"{slide.slide_id}.parquet"
    with files.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write(table)


PER_SLIDE: dict[str, Callable[[StoredSlide, str, Path], None]] = {
    "trident": trident,
    "clam": clam,
    "stamp": stamp,
    "parquet": parquet,
}
