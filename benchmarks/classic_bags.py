"""The default model on classic bags of instances: is it as good as attention where bags are not made of tiles?

    python benchmarks/classic_bags.py run OUT [--runs 2] TABLE...       # one JSON each run and table; resumes
    python benchmarks/classic_bags.py kather FILE.mat OUT [--seeds 3]   # tables of bags with known instances
    python benchmarks/classic_bags.py convert FILE.mat OUT.csv          # Fox, Tiger, Elephant as in PRTools' MIL box
    python benchmarks/classic_bags.py table OUT                         # of what was run

A table is a CSV without header: label (0 or 1), name of the bag, features of one instance a row (as
`training/paper_tables.py` reads it). On the same five folds: the candidates of `aggregator: auto`, `auto`, gated
attention on features divided one by one (the default before) by the trainer's own code, and the plainest loop of gated
attention (`yardstick.py`), one model a fold. Figures are AUROC within folds. The interval of a difference is Nadeau and
Bengio's corrected t over the folds of all runs: training sets overlap.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat
from scipy.stats import t as student
from slidemake.mil.automatic import CANDIDATES
from slidemake.splits.make import make_splits
from slidemake.statistics.temperature import auroc
from slidemake.training.paper_tables import read_bag_table
from training import BEFORE, TASKS, train_fold
from yardstick import Bag, train

FOLDS = 5
MODELS = {**CANDIDATES, "before": BEFORE}
BAGS, TILES, SHARE = 60, 50, 0.06  # bags, tiles of each on average, share of tumour in positive ones


def write_bags(path: Path, features: np.ndarray, bag: np.ndarray, label: np.ndarray) -> None:
    """features (N, D), bag and its label (N,) of every instance."""
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        for values, name, positive in zip(features, bag, label, strict=True):
            writer.writerow([int(positive), name, *(format(v, ".7g") for v in values)])


def convert(source: Path, out: Path) -> None:
    """A data set of PRTools: `nlab` 2 marks instances of positive bags."""
    x = loadmat(source, squeeze_me=True, struct_as_record=False)["x"]
    write_bags(out, x.data, [f"b{k}" for k in x.ident.milbag], x.nlab == 2)


def kather(source: Path, out: Path, seeds: int) -> None:
    """Bags of real colorectal tiles by their texture: a few tumour tiles among those of the seven other tissues."""
    found = loadmat(source)
    features, tissue = found["source_array"].T, found["target_array"].argmax(0)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        tumour, other = rng.permutation(np.flatnonzero(tissue == 0)), rng.permutation(np.flatnonzero(tissue > 0))
        rows, bags, labels = [], [], []
        for k in range(BAGS):
            count = int(rng.integers(TILES // 2, 3 * TILES // 2))
            few = max(1, round(SHARE * count)) if k % 2 else 0
            rows += [*tumour[:few], *other[: count - few]]
            tumour, other = tumour[few:], other[count - few :]
            bags += [f"b{k:03d}"] * count
            labels += [k % 2] * count
        write_bags(out / f"kather{seed}.csv", features[rows], np.array(bags), np.array(labels))


def run(path: Path, repeat: int) -> dict[str, Any]:
    """AUROC of every model in every fold."""
    bags, labels = read_bag_table(path)
    rows = [{"slide_id": n, "patient_id": n, "site": "s", "label": "NY"[labels[n]]} for n in labels]
    splits = make_splits(rows, "label", {"folds": FOLDS, "repeats": 1, "seed": repeat})
    whole = {n: Bag(n, bags.bag(n), np.zeros(bags.tiles(n)), labels[n]) for n in labels}
    found: dict[str, list[float]] = {}
    for name in splits.tested(0):
        fold = train_fold(TASKS["binary"], bags, splits, 0, name, MODELS)
        scores = {model: outputs[:, 1] - outputs[:, 0] for model, outputs in fold.outputs.items()}
        learned, _, tested = splits.parts(0, name)
        model, mean, deviation = train([whole[n] for n in learned])
        with torch.no_grad():
            scores["plain"] = np.array(
                [float(model(torch.from_numpy((bags.bag(n) - mean) / deviation))[0]) for n in tested]
            )
        for which, score in scores.items():
            area = auroc(score, np.array(fold.truth) == 1)
            assert area is not None
            found.setdefault(which, []).append(area)
    return {"set": path.stem, "bags": len(labels), "run": repeat, "auroc": found}


def difference(values: np.ndarray) -> str:
    """Mean of differences (folds of all runs,) with the corrected interval."""
    error = values.std(ddof=1) * np.sqrt(1 / len(values) + 1 / (FOLDS - 1))
    half = student.ppf(0.975, len(values) - 1) * error
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def table(out: Path) -> None:
    """Markdown of all runs."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*_run*.json"))]
    names = ["auto", "before", "plain", *CANDIDATES]
    print(f"| bags | {' | '.join(names)} | `auto` minus before | `auto` minus plain |\n|{'---|' * (len(names) + 3)}")
    for which in sorted({found["set"] for found in runs}):
        of = [found for found in runs if found["set"] == which]
        auroc = {name: np.concatenate([found["auroc"][name] for found in of]) for name in names}
        cells = [f"{auroc[name].mean():.3f}" for name in names]
        apart = [difference(auroc["auto"] - auroc[name]) for name in ("before", "plain")]
        print(f"| {which} ({of[0]['bags']}; {len(of)} runs) | {' | '.join([*cells, *apart])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "kather", "convert", "table"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_intermixed_args()  # options may stand among tables
    torch.set_num_threads(1)
    if asked.what == "convert":
        convert(*asked.paths)
    elif asked.what == "kather":
        kather(*asked.paths, asked.seeds)
    elif asked.what == "table":
        table(*asked.paths)
    else:
        out, *tables = asked.paths
        out.mkdir(parents=True, exist_ok=True)
        for repeat in range(asked.runs):
            for path in tables:
                result = out / f"{path.stem}_run{repeat}.json"
                if not result.exists():
                    result.write_text(json.dumps(run(path, repeat)))
                    print(result, flush=True)


if __name__ == "__main__":
    main()
