"""A small cohort with every type of label, all following the share of shifted tiles of a patient."""

from __future__ import annotations

from typing import Any

import numpy as np
from mil_cohort import ENCODER, QUICK, STAIN
from slidemake.mil.bags import Bags, make_bags

TASKS: dict[str, dict[str, Any]] = {
    "regression": {"type": "regression", "label": "age", "unit": "years"},
    "ordinal": {"type": "ordinal", "label": "grade", "order": ["low", "middle", "high"]},
    "multilabel": {"type": "multilabel", "labels": ["er", "pr"]},
    "cox": {"type": "survival", "label": "os", "unit": "months"},
    "discrete": {"type": "survival", "label": "os", "method": "discrete", "bins": 3},
}
FAST = {**QUICK, "epochs": 12, "min_epochs": 6, "tile_fraction": 1.0, "learning_rate": 1e-2, "bags_per_step": 2}


def rows_and_bags(n: int = 36, dim: int = 6, seed: int = 0) -> tuple[list[dict[str, str]], Bags]:
    """n patients of one slide with 8 to 15 tiles; the sites say nothing."""
    rng = np.random.default_rng(seed)
    rows, features = [], []
    for i in range(n):
        severity, count = (i * 7 % n) / n, int(rng.integers(8, 16))
        x = rng.normal(size=(count, dim))
        x[: round(severity * count), :2] += 3
        died, left = rng.exponential(20 * np.exp(-4 * severity)), rng.exponential(25)
        rows.append(
            {
                "slide_id": f"P{i:03d}",
                "patient_id": f"P{i:03d}",
                "site": f"s{i % 3}",
                "age": f"{50 + 20 * severity + rng.normal():.2f}",
                "grade": ["low", "middle", "high"][int(3 * severity)],
                "os_time": f"{min(died, left) + 0.1:.1f}",
                "os_event": str(int(died <= left)),
                "er": "" if i % 8 == 3 else str(int(severity > 0.5)),
                "pr": "yes" if severity + 0.2 * rng.normal() > 0.4 else "no",
            }
        )
        features.append(x)
    names = [row["slide_id"] for row in rows]
    packed = np.concatenate(features).astype(np.float32)
    return rows, make_bags(packed, names, names, [len(x) for x in features], ENCODER, STAIN, grid="8px")
