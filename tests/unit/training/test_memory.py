"""Training on a cohort that is larger than memory may be: in a process of its own, whose peak is measured."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys
import numpy as np
from slidemake.mil.bags import open_bags, places_of
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.core.files import file_sums, write_json
from pathlib import Path

bags, tiles, dim = 300, 600, 1280  # 0.46 GB of float16
path = Path(sys.argv[1]) / "packed.npy"
names = [f"{i:04d}" for i in range(bags)]
np.lib.format.open_memmap(path, "w+", np.float16, (bags * tiles, dim)).flush()  # holes: it takes no room on the disk
about = {"encoder": {}, "slides": names, "patients": names, "sizes": [tiles] * bags}
with open(places_of(path), "wb") as handle:
    np.save(handle, np.zeros((bags * tiles, 2), np.int32))
files = file_sums(path.parent, [places_of(path).name])
write_json(path.with_suffix(".json"), {"format": "slidemake-bags", **about, "files": files})
settings = {**DEFAULTS, "epochs": 1, "min_epochs": 1, "tile_fraction": 0.5}

def peak(count):
    cohort = open_bags(path, in_memory_bytes=1)
    labels = {name: i % 2 for i, name in enumerate(names[:count])}
    objective = class_objective(labels, sorted(labels), 2, settings)
    fit_member(cohort, objective, sorted(labels), [], settings, seed=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(json.dumps([peak(8), peak(bags)]))
"""


def test_memory_does_not_grow_with_the_cohort(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    few, all_of_them = json.loads(done.stdout)
    assert all_of_them < few + 60  # MB, of 460 that were read
