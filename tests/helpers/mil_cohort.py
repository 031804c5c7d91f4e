"""Small cohorts of bags with a planted signal, for the tests of training, bundles and baselines."""

from __future__ import annotations

import numpy as np
from slidemake.mil.bags import Bags, make_bags
from slidemake.splits.make import Splits, make_splits

ENCODER = {"key": "toy", "variant": None, "weights_sha256": "a" * 64, "transform_sha256": "b" * 64, "dim": 8}
STAIN = {"method": "macenko", "target": "t"}
QUICK = {
    "hidden": 16,
    "attention": 8,
    "epochs": 16,
    "min_epochs": 8,
    "patience": 5,
    "learning_rate": 5e-3,
    "min_tiles": 8,
}


INFO = {
    "fingerprint": "f",
    "encoder": ENCODER,
    "stain_of_features": STAIN,
    "aggregator": {"name": "abmil_gated", "parameters": {"hidden": 16, "attention": 8}, "features": 8},
    "classes": ["N", "Y"],
    "threshold": 0.4,
}


def planted(
    n: int = 24, dim: int = 8, signal: float = 4.0, seed: int = 0, mean_shift: float = 0.0, slides: int = 3
) -> tuple[Bags, Splits]:
    """n patients with 1 to `slides` slides of 5 to 14 tiles; in positives a fifth of the tiles is shifted by `signal`.

    mean_shift moves all tiles of positives instead. Three sites that say nothing about the label.
    """
    rng = np.random.default_rng(seed)
    width = len(str(n - 1))  # names sort as they are made
    rows, names, patients, sizes, features = [], [], [], [], []
    for i in range(n):
        for k in range(1 + i % slides):
            count = int(rng.integers(5, 15))
            x = rng.normal(size=(count, dim))
            if i % 2:
                x[: max(1, count // 5), :2] += signal
                x += mean_shift
            rows.append(
                {
                    "slide_id": f"P{i:0{width}d}_{k}",
                    "patient_id": f"P{i:0{width}d}",
                    "site": f"s{(i // 2) % 3}",
                    "label": "NY"[i % 2],
                }
            )
            names.append(rows[-1]["slide_id"])
            patients.append(rows[-1]["patient_id"])
            sizes.append(count)
            features.append(x)
    bags = make_bags(np.concatenate(features).astype(np.float32), names, patients, sizes, ENCODER, STAIN, grid="8px")
    return bags, make_splits(rows, "label", {"folds": 3, "repeats": 2})
