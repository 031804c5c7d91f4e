"""How often the shortcut probes give a false alarm, and how often they see a planted confounder.

    .venv/bin/python benchmarks/alarms.py --cohorts 200

Cohorts are drawn as slides' mean embeddings are: many features that go together, a site that shifts them, a label that
shifts them less. Without confounding the label is dealt at random, at every site with the same chance; with it, a share
of the patients is given its site's label (two sites have each), and the others' is dealt at random. Printed: the share
of the cohorts with each warning, and a 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from slidemake.robustness.shortcuts import Slides, probe_shortcuts
from slidemake.statistics.reliability import wilson_interval

FEATURES, SHARED, SITES = 300, 12, 4
NULLS = 19  # permutations of the probes: enough for p = 0.05, and sites are told with far less
ALARMS = ("shortcut_site", "optimism")


def cohort(seed: int, patients: int, confound: float) -> Slides:
    """A slide of each patient; the site shifts embeddings three times as far as the label."""
    rng = np.random.default_rng([seed, patients, round(100 * confound)])
    site = rng.permutation(np.arange(patients) % SITES)
    label = np.where(rng.random(patients) < confound, site % 2, rng.integers(2, size=patients))
    x = rng.normal(size=(patients, SHARED)) @ rng.normal(size=(SHARED, FEATURES))
    x += rng.normal(size=x.shape) + 3 * rng.normal(size=(SITES, FEATURES))[site]
    x += np.outer(2 * label - 1, rng.normal(size=FEATURES))
    people = tuple(f"P{i:04d}" for i in range(patients))
    return Slides(x, people, tuple("nt"[k] for k in label), tuple("ABCD"[k] for k in site), ("one",) * patients)


def warned(seed: int, patients: int, confound: float) -> list[str]:
    """Codes of the warnings about a cohort."""
    found = probe_shortcuts(cohort(seed, patients, confound), seed, NULLS)["findings"]
    return [finding["code"] for finding in found if finding["level"] == "warning"]


def main() -> None:
    """Print a table of alarms by size of the cohort and confounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--patients", type=int, nargs="+", default=[24, 80, 200], help="in a cohort")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"| patients | confounded | {' | '.join(ALARMS)} | either |\n|{'---|' * (len(ALARMS) + 3)}")
    for patients in options.patients:
        for confound in (0.0, 0.85):
            one = partial(warned, patients=patients, confound=confound)
            with ProcessPoolExecutor(options.workers) as pool:
                found = list(pool.map(one, range(options.cohorts)))
            counts = Counter(code for codes in found for code in set(codes))
            counts["either"] = sum(any(code in codes for code in ALARMS) for codes in found)
            cells = []
            for code in (*ALARMS, "either"):
                low, high = wilson_interval(counts[code], len(found))
                cells.append(f"{counts[code] / len(found):.3f} ({low:.3f} to {high:.3f})")
            print(f"| {patients} | {confound:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
