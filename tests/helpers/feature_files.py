"""Files of features as other tools lay them out, written by their documented layouts (docs/interchange.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def grid_coords(count: int, step: int, across: int = 4) -> np.ndarray:
    """(count, 2) corners of tiles in rows, int64."""
    index = np.arange(count)
    return np.stack([index % across, index // across], 1).astype(np.int64) * step + step


def write_trident(path: Path, features: np.ndarray, coords: np.ndarray, **about: Any) -> Path:
    import h5py

    said = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
    said |= {"overlap": 0, "name": path.stem, "level0_width": 100000, "level0_height": 100000, **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.asarray(features)
        file["coords"] = np.asarray(coords)
        file["coords"].attrs.update({key: value for key, value in said.items() if value is not None})
    return path


def write_clam(folder: Path, slide: str, features: np.ndarray, coords: np.ndarray, pt: bool = False) -> Path:
    """CLAM's h5_files, its pt_files where asked for, and the patches that say how large a tile is."""
    import h5py

    for name in ("feats/h5_files", "feats/pt_files", "patches"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "feats/h5_files" / f"{slide}.h5", "w") as file:
        file["features"], file["coords"] = features.astype(np.float32), coords.astype(np.int32)
    with h5py.File(folder / "patches" / f"{slide}.h5", "w") as file:
        file["coords"] = coords.astype(np.int64)
        file["coords"].attrs.update({"patch_size": 256, "patch_level": 0, "downsample": np.array([1.0, 1.0])})
    if not pt:
        return folder / "feats/h5_files" / f"{slide}.h5"
    import torch

    torch.save(torch.from_numpy(features.astype(np.float32)), folder / "feats/pt_files" / f"{slide}.pt")
    return folder / "feats/pt_files" / f"{slide}.pt"


def write_stamp(path: Path, features: np.ndarray, coords: np.ndarray, **about: Any) -> Path:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = features, coords
        file.attrs.update(about)
    return path


STAMP_2 = {
    "stamp_version": "2.4.0",
    "extractor": "uni",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "feat_type": "tile",
}


def write_slide2vec(folder: Path, slide: str, features: np.ndarray, coords: np.ndarray, order: np.ndarray) -> Path:
    """A run of slide2vec in npz: rows of features in `order` of the tiles."""
    import json

    (folder / "tiles").mkdir(parents=True, exist_ok=True)
    (folder / "tile_embeddings").mkdir(exist_ok=True)
    n = len(coords)
    np.savez_compressed(
        folder / "tiles" / f"{slide}.coordinates.npz",
        tile_index=np.arange(n, dtype=np.int32),
        x=coords[:, 0].astype(np.int64),
        y=coords[:, 1].astype(np.int64),
        tissue_fractions=np.ones(n, np.float32),
    )
    tiling = {"requested_tile_size_px": 224, "requested_spacing_um": 0.5, "tile_size_lv0": 448, "step_px_lv0": 448}
    about = {"tiling": tiling, "slide": {"base_spacing_um": 0.25}}
    (folder / "tiles" / f"{slide}.coordinates.meta.json").write_text(json.dumps(about))
    path = folder / "tile_embeddings" / f"{slide}.npz"
    np.savez_compressed(path, features=features[order], tile_index=order.astype(np.int32))
    path.with_suffix(".meta.json").write_text(json.dumps({"sample_id": slide, "encoder_name": "uni"}))
    return path
