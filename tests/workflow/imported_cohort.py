"""The features of a finished run as another tool would have left them, and a project that imports them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import yaml
from feature_files import write_trident
from slidemake.mil.bags import open_embeddings
from slidemake.stores.arrays import StoredArray
from snakemake_run import ENCODER, Project


def import_features_of(project: Project, folder: Path, sheet: Path) -> Project:
    """A new project whose slides are not there: features of `project` in TRIDENT's layout, its sheet without paths."""
    other = Project(folder)
    folder.mkdir()
    for store in sorted((project.results / "embeddings" / ENCODER).glob("[!.]*.zarr")):
        features, attrs = open_embeddings(store)
        side = attrs["tile_level0_px"][0]
        about = {"patch_size": 224, "patch_size_level0": side, "level0_width": None, "level0_height": None}
        about |= {"level0_magnification": 20, "target_magnification": 20}
        coords = StoredArray(store, "coords").read().astype(np.int64)
        write_trident(folder / "features" / f"{store.stem}.h5", features.read().astype(np.float32), coords, **about)
    with open(sheet, newline="", encoding="utf-8") as handle:
        rows = [{k: v for k, v in row.items() if k != "path"} for row in csv.DictReader(handle)]
    other.write_sheet(rows)
    config = yaml.safe_load((project.folder / "config.yaml").read_text())
    config |= {"sheet": "slides.csv", "features": {"encoder": ENCODER, "folder": f"{folder}/features/{{slide_id}}.h5"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return other
