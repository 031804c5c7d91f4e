"""Models of the trainer on cohorts composed of real tiles in feature space: which default is best where users are?

    python benchmarks/training.py embed OUT --tiles DIR [--looks 8]     # tiles.csv there: path, label, group
    python benchmarks/training.py run OUT FIRST LAST                    # cohorts by number, one JSON each; resumes
    python benchmarks/training.py table OUT                             # the table of docs/training.md

Tiles of two labels are embedded once by the default encoder, without stain normalisation, each in several *looks*
(strength of haematoxylin and eosin, JPEG quality, turns). A cohort is drawn from these features: patients are grids of
tiles with a blob of tissue and, in positive ones, a focus of tumour; no source region serves two patients; a tile of
the slide's own grid overlaps four source tiles and is the mean of their features by area, which for a network that
ends in average pooling is nearly what embedding it would give. Number of patients and tiles, size of the focus, looks,
sites, prevalence, width of the features (random projections) and how alike tumour and benign tiles are (`blend` mixes
the features of a benign tile into every tumour tile) are drawn from the cohort's number. Every candidate of
`aggregator: auto` and the gated attention that was the default before are trained on the same members of the same
folds by the trainer's own code.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from slidemake.aggregators import predict_bag
from slidemake.automatic import CANDIDATES, mixture
from slidemake.bags import make_bags
from slidemake.corruptions import restained
from slidemake.encoder_loading import load_encoder
from slidemake.encoders import load_record, registry
from slidemake.fitting import DEFAULTS
from slidemake.splits import make_splits
from slidemake.targets import strata
from slidemake.training_members import FoldBags, train_members
from slidemake.training_plan import fold_seed, make_fold, member_plan, prepare, resolved

BENIGN, TUMOUR = "colon_n", "colon_aca"
STAINS = {"plain": (1, 1), "purple": (1.35, 0.25), "pink": (0.55, 1.5), "pale": (0.5, 0.5), "dark": (1.6, 1.4)}
TASK = {"label": "label", "type": "binary", "positive": "Y"}
BEFORE = {"aggregator": "abmil_gated", "scaling": "each"}
FOLDS = 3


def embed(out: Path, tiles: Path, looks: int) -> None:
    """features<k>.npy (T, D) of every look, with tiles.json."""
    out.mkdir(parents=True, exist_ok=True)
    with open(tiles / "tiles.csv") as handle:
        rows = [row for row in csv.DictReader(handle) if row["label"] in (BENIGN, TUMOUR)]
    encoder = load_encoder(load_record("efficientnet_lite0", registry([Path("config/encoders.yaml")])))
    rng, styles = np.random.default_rng(0), []
    for k in range(looks):
        name = list(STAINS)[k % len(STAINS)]
        gains = tuple(float(gain * rng.uniform(0.75, 1.25)) for gain in STAINS[name])
        styles.append(name)
        features = []
        for start in range(0, len(rows), 16):
            batch = []
            for row in rows[start : start + 16]:
                pixels = np.asarray(Image.open(tiles / row["path"]).convert("RGB").resize((224, 224)))
                kept = io.BytesIO()
                turned = np.ascontiguousarray(np.rot90(restained(pixels, *gains), rng.integers(4)))
                Image.fromarray(turned).save(kept, "JPEG", quality=int(rng.integers(75, 91)))
                batch.append(np.asarray(Image.open(kept)))
            features.append(encoder(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).numpy())
        np.save(out / f"features{k}.npy", np.concatenate(features).astype(np.float16))
        print(f"look {k} of {looks}: {name}", flush=True)
    (out / "tiles.json").write_text(json.dumps({"rows": rows, "styles": styles}))


def settings_of(number: int) -> dict[str, Any]:
    """What cohort `number` is like."""
    rng = np.random.default_rng([11, number])
    patients = [16, 30, 24, 40, 20, 30, 60, 24, 16, 30, 40, 24, 60, 20, 30, 100][number % 16]
    small = float(rng.choice([0.07, 0.09, 0.12]))
    return {
        "patients": patients,
        "across": int(rng.choice([7, 9, 11, 14, 20])) if patients <= 60 else 9,
        "focus": (small, 1.8 * small),
        "style": str(rng.choice(["mixed", "mixed", "mixed", *STAINS])),
        "sites": int(rng.choice([1, 2, 3])),
        "width": int(rng.choice([1280, 1280, 1280, 384, 768, 2560])),
        "blend": float(rng.choice([0, 0, 0.3])),
        "positive": float(rng.choice([0.5, 0.5, 0.35])),
    }


def blob(centre: tuple[float, float], radius: float, rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> Any:
    """Which points lie inside an uneven disc."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    rough = 1 + 0.15 * rng.standard_normal(48)
    rough = radius * np.convolve(np.r_[rough[-3:], rough, rough[:3]], np.ones(7) / 7, "valid")
    at = np.mod(np.arctan2(y - centre[0], x - centre[1]), 2 * np.pi)
    return np.hypot(y - centre[0], x - centre[1]) < np.interp(at, np.r_[angles, 2 * np.pi], np.r_[rough, rough[0]])


def patient(features: np.ndarray, benign: Any, tumour: Any, about: dict[str, Any], rng: np.random.Generator) -> Any:
    """(N, D) tiles of a patient; tumour: indices of its source tiles, None for a negative patient."""
    side = about["across"] + int(rng.integers(4)) + 4
    y, x = np.mgrid[0 : side + 1, 0 : side + 1] + 0.5
    offset = rng.uniform(0, 1, 2)
    tissue = blob((side / 2, side / 2), 0.42 * (side - 4), rng, y[:side, :side], x[:side, :side])
    sick = np.zeros(y.shape, bool)
    if tumour is not None:
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2) * (side - 4)
        centre = side / 2 + away * np.cos(angle), side / 2 + away * np.sin(angle)
        sick = blob(centre, rng.uniform(*about["focus"]) * (side - 4), rng, y - offset[0], x - offset[1])
    source = np.zeros(y.shape, int)
    for pool, inside in ((benign, ~sick), (tumour, sick)):
        if inside.any():
            source[inside] = np.resize(rng.permutation(pool), int(inside.sum()))
    rows, columns = np.nonzero(tissue)
    oy, ox = offset
    corners = ((0, 0, (1 - oy) * (1 - ox)), (0, 1, (1 - oy) * ox), (1, 0, oy * (1 - ox)), (1, 1, oy * ox))
    return sum(share * features[source[rows + dy, columns + dx]] for dy, dx, share in corners)


def compose(folder: Path, number: int) -> tuple[Any, Any, dict[str, Any]]:
    """(bags, splits, settings) of a cohort."""
    about, rng = settings_of(number), np.random.default_rng([12, number])
    known = json.loads((folder / "tiles.json").read_text())
    label = np.array([row["label"] for row in known["rows"]])
    group = np.array([row["group"] for row in known["rows"]])
    looks = [np.load(folder / f"features{k}.npy").astype(np.float32) for k in range(len(known["styles"]))]
    pool = [k for k, style in enumerate(known["styles"]) if about["style"] in ("mixed", style)]
    pools = {}
    for name in (BENIGN, TUMOUR):
        names = rng.permutation(np.unique(group[label == name]))
        parts = np.array_split(names, about["patients"])
        pools[name] = [np.flatnonzero(np.isin(group, part) & (label == name)) for part in parts]
    turn = rng.normal(size=(looks[0].shape[1], about["width"])).astype(np.float32) / np.sqrt(looks[0].shape[1])
    of_site = rng.choice(pool, about["sites"])
    positive = np.arange(about["patients"]) < round(about["positive"] * about["patients"])
    rows, bags = [], []
    for i in range(about["patients"]):
        site = i % about["sites"]
        first = of_site[site] if about["sites"] > 1 else rng.choice(pool)
        share = rng.uniform(0.7, 1)
        features = share * looks[first] + (1 - share) * looks[rng.choice(pool)]
        sick = label == TUMOUR
        mixed_in = rng.choice(pools[BENIGN][i], int(sick.sum()))
        features[sick] += about["blend"] * (features[mixed_in] - features[sick])
        x = patient(features, pools[BENIGN][i], pools[TUMOUR][i] if positive[i] else None, about, rng)
        x = x + 0.02 * rng.standard_normal(x.shape)
        bags.append((x @ turn if about["width"] != x.shape[1] else x).astype(np.float32))
        name = f"P{i:03d}"
        rows.append({"slide_id": name, "patient_id": name, "site": f"s{site}", "label": "NY"[int(positive[i])]})
    names = [row["slide_id"] for row in rows]
    packed = make_bags(np.concatenate(bags), names, names, [len(x) for x in bags], {"key": "x"}, {"method": "none"})
    splits = make_splits(rows, "label", {"folds": FOLDS, "repeats": 1, "seed": number})
    return packed, splits, about | {"tiles": int(np.median([len(x) for x in bags]))}


def run_cohort(folder: Path, number: int) -> dict[str, Any]:
    """AUROC and seconds of processor of every model on cohort `number`; pairs are compared within folds."""
    bags, splits, about = compose(folder, number)
    models = {**CANDIDATES, "before": BEFORE, "lse, refit": {**CANDIDATES["lse"], "refit": True}}
    pairs: dict[str, list[np.ndarray]] = {name: [] for name in (*models, "auto")}
    seconds, weights = dict.fromkeys(models, 0.0), []
    for fold_name in splits.tested(0):
        held_out, tested, truth, shared = {}, {}, np.empty(0, int), None
        for name, changes in models.items():
            began = time.process_time()
            work = prepare(TASK, {**DEFAULTS, **changes}, bags, splits, folder, None, name)
            fold, settings = make_fold(work, 0, fold_name), resolved(work.settings, work.outcome)
            seed, scale = fold_seed(0, 0, fold_name), work.scale(fold)
            plan = member_plan(fold.train, fold.val, strata(splits.labels, work.outcome.kind), 0.25, seed)
            if shared is None:  # as in training: components are estimated once for all candidates, the first pays
                shared = FoldBags(work, fold, max(c.get("components") or 0 for c in CANDIDATES.values()))
            found = train_members(work, fold, plan, scale, settings, *shared.of(settings))
            seconds[name] += time.process_time() - began
            held_out[name] = np.array([found.outputs[p] for p in sorted(found.outputs)])
            tested[name] = np.array(
                [np.mean([predict_bag(m, bags.bag(p))[0] for m in found.models], 0) for p in fold.test]
            )
            truth = np.array([work.labels[p] for p in fold.test])
            labels = [work.labels[p] for p in sorted(found.outputs)]
        mixed = mixture({c: held_out[c] for c in CANDIDATES}, work.outcome, labels, scale)
        tested["auto"] = sum(weight * factor * tested[c] for c, (weight, factor, _) in mixed.items())
        weights.append({c: weight for c, (weight, _, _) in mixed.items()})
        for name, outputs in tested.items():
            score = outputs[:, 1] - outputs[:, 0]
            apart = score[truth == 1][:, None] - score[truth == 0]
            pairs[name].append(((apart > 0) + 0.5 * (apart == 0)).ravel())
    seconds["auto"] = sum(seconds[c] for c in CANDIDATES)
    auroc = {name: float(np.mean(np.concatenate(values))) for name, values in pairs.items()}
    return {"number": number, "about": about, "auroc": auroc, "seconds": seconds, "weights": weights}


def interval(values: np.ndarray) -> str:
    """Mean with a 95 % bootstrap interval over cohorts."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return f"{values.mean():.3f} ({np.quantile(draws, 0.025):.3f} to {np.quantile(draws, 0.975):.3f})"


def table(folder: Path) -> None:
    """Markdown of all cohorts that were run."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("cohort*.json"))]
    names = list(found[0]["auroc"])
    auroc = {name: np.array([row["auroc"][name] for row in found]) for name in names}
    print(f"| model | AUROC, mean of {len(found)} cohorts | minus before | least of these | processor time |")
    print("|---|---|---|---|---|")
    for name in names:
        apart, cost = auroc[name] - auroc["before"], [row["seconds"][name] / row["seconds"]["before"] for row in found]
        print(f"| {name} | {interval(auroc[name])} | {interval(apart)} | {apart.min():.3f} | {np.median(cost):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("embed", "run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("numbers", type=int, nargs="*", help="first cohort, and one past the last")
    parser.add_argument("--tiles", type=Path)
    parser.add_argument("--looks", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "embed":
        embed(asked.out, asked.tiles, asked.looks)
    elif asked.what == "table":
        table(asked.out)
    else:
        for number in range(*asked.numbers):
            path = asked.out / f"cohort{number:03d}.json"
            if not path.exists():
                result = run_cohort(asked.out, number)
                path.write_text(json.dumps(result))
                print(json.dumps(result), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
