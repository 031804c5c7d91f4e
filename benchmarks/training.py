"""Models of the trainer on cohorts composed of real tiles in feature space: which default is best where users are?

    python benchmarks/training.py embed OUT --tiles DIR [--looks 8]     # tiles.csv there: path, label, group
    python benchmarks/training.py run OUT FIRST LAST [--type T]         # cohorts by number, one JSON each; resumes
    python benchmarks/training.py table OUT [--type T]                  # the tables of docs/training.md

Tiles of two labels are embedded once by the default encoder, without stain normalisation, each in several *looks*
(strength of haematoxylin and eosin, JPEG quality, turns). A cohort is drawn from these features: patients are grids of
tiles with a blob of tissue and, in positive ones, a focus of tumour; no source region serves two patients; a tile of
the slide's own grid overlaps four source tiles and is the mean of their features by area, which for a network that
ends in average pooling is nearly what embedding it would give. Number of patients and tiles, size of the focus, looks,
sites, prevalence, width of the features (random projections) and how alike tumour and benign tiles are (`blend` mixes
the features of a benign tile into every tumour tile) are drawn from the cohort's number. Every candidate of
`aggregator: auto` and the gated attention that was the default before are trained on the same members of the same
folds by the trainer's own code.

Types other than binary: `classes`, no tumour or one of two kinds of it, told apart by the first principal component of
their source regions' mean features; `labels`, the same patients, whether there is tumour and whether it is of the first
kind; `grades`, no focus, one of the size drawn, one of twice its radius; `numbers`, the radius; `survival`, a
focus of any size up to that, the hazard growing with its radius by a factor of 20 in all, half of the patients
censored.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from slidemake.encoders.loading import load_encoder
from slidemake.encoders.registry import load_record, registry
from slidemake.mil.aggregators import predict_bag
from slidemake.mil.automatic import CANDIDATES, mixture
from slidemake.mil.bags import make_bags
from slidemake.mil.fitting import DEFAULTS
from slidemake.robustness.corruptions import restained
from slidemake.splits.make import make_splits
from slidemake.statistics.temperature import auroc
from slidemake.tasks.labels import strata
from slidemake.training.members import FoldBags, train_members
from slidemake.training.plan import fold_seed, make_fold, member_plan, prepare, resolved

BENIGN, TUMOUR = "colon_n", "colon_aca"
STAINS = {"plain": (1, 1), "purple": (1.35, 0.25), "pink": (0.55, 1.5), "pale": (0.5, 0.5), "dark": (1.6, 1.4)}
TASKS: dict[str, dict[str, Any]] = {
    "binary": {"label": "label", "type": "binary", "positive": "Y"},
    "classes": {"label": "label", "type": "multiclass"},
    "grades": {"label": "label", "type": "ordinal", "order": ["0", "1", "2"]},
    "labels": {"labels": ["any", "first"], "type": "multilabel"},
    "numbers": {"label": "size", "type": "regression"},
    "survival": {"label": "os", "type": "survival"},
}
BEFORE = {"aggregator": "abmil_gated", "scaling": "each"}
FOLDS = 3
FEW = 60  # patients, up to which a cohort counts as small
PREFIX = {kind: "cohort" if kind == "binary" else kind for kind in TASKS}  # of the names of results


def embed(out: Path, tiles: Path, looks: int) -> None:
    """features<k>.npy (T, D) of every look, with tiles.json."""
    out.mkdir(parents=True, exist_ok=True)
    with open(tiles / "tiles.csv") as handle:
        rows = [row for row in csv.DictReader(handle) if row["label"] in (BENIGN, TUMOUR)]
    encoder = load_encoder(load_record("efficientnet_lite0", registry()))
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


def patient(
    features: np.ndarray, benign: Any, tumour: Any, about: dict[str, Any], rng: np.random.Generator, times: float = 1.0
) -> Any:
    """(N, D) tiles of a patient; tumour: indices of its source tiles, None for a negative patient; times: the radius
    of the focus drawn."""
    side = about["across"] + int(rng.integers(4)) + 4
    y, x = np.mgrid[0 : side + 1, 0 : side + 1] + 0.5
    offset = rng.uniform(0, 1, 2)
    tissue = blob((side / 2, side / 2), 0.42 * (side - 4), rng, y[:side, :side], x[:side, :side])
    sick = np.zeros(y.shape, bool)
    if tumour is not None:
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2) * (side - 4)
        centre = side / 2 + away * np.cos(angle), side / 2 + away * np.sin(angle)
        sick = blob(centre, times * rng.uniform(*about["focus"]) * (side - 4), rng, y - offset[0], x - offset[1])
    source = np.zeros(y.shape, int)
    for pool, inside in ((benign, ~sick), (tumour, sick)):
        if inside.any():
            source[inside] = np.resize(rng.permutation(pool), int(inside.sum()))
    rows, columns = np.nonzero(tissue)
    oy, ox = offset
    corners = ((0, 0, (1 - oy) * (1 - ox)), (0, 1, (1 - oy) * ox), (1, 0, oy * (1 - ox)), (1, 1, oy * ox))
    return sum(share * features[source[rows + dy, columns + dx]] for dy, dx, share in corners)


def truths(kind: str, about: dict[str, Any], number: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, str]]]:
    """(kind of tumour or -1, radius of the focus over the one drawn, cells of the sheet) of every patient."""
    n, rng = about["patients"], np.random.default_rng([13, number])
    if kind == "binary":
        sick = np.arange(n) < round(about["positive"] * n)
        return np.where(sick, 0, -1), np.ones(n), [{"label": "NY"[int(s)]} for s in sick]
    level = np.arange(n) % 3
    if kind == "classes":
        return level - 1, np.ones(n), [{"label": "ABC"[k]} for k in level]
    if kind == "labels":
        return level - 1, np.ones(n), [{"any": str(int(k > 0)), "first": str(int(k == 1))} for k in level]
    if kind == "grades":
        return np.minimum(level, 1) - 1, np.where(level == 2, 2.0, 1.0), [{"label": str(k)} for k in level]
    radius = rng.uniform(0, 2, n)
    if kind == "numbers":
        return np.where(radius < 0.3, -1, 0), radius, [{"size": f"{r:.4f}"} for r in radius]
    until = rng.exponential(20 ** (-radius / 2))
    leaves = rng.exponential(1.5 * np.median(until), n)
    seen = until <= leaves
    cells = [
        {"os_time": f"{1000 * min(t, c) + 1:.3f}", "os_event": str(int(e))}
        for t, c, e in zip(until, leaves, seen, strict=True)
    ]
    return np.where(radius < 0.3, -1, 0), radius, cells


def source_pools(
    label: np.ndarray, group: np.ndarray, features: np.ndarray, about: dict[str, Any], kinds: int, rng: Any
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Tiles of each patient's own source regions: benign [patient], tumour [kind][patient]."""

    def dealt(name: str, groups: np.ndarray) -> list[np.ndarray]:
        parts = np.array_split(rng.permutation(groups), about["patients"])
        return [np.flatnonzero(np.isin(group, part) & (label == name)) for part in parts]

    benign, regions = dealt(BENIGN, np.unique(group[label == BENIGN])), np.unique(group[label == TUMOUR])
    if kinds == 1:
        return benign, [dealt(TUMOUR, regions)]
    means = np.array([features[(group == region) & (label == TUMOUR)].mean(0) for region in regions])
    axis = np.linalg.svd(means - means.mean(0), full_matrices=False)[2][0]
    high = means @ axis > np.median(means @ axis)
    return benign, [dealt(TUMOUR, regions[~high]), dealt(TUMOUR, regions[high])]


def compose(folder: Path, number: int, kind: str = "binary") -> tuple[Any, Any, dict[str, Any]]:
    """(bags, splits, settings) of a cohort."""
    about, rng = settings_of(number), np.random.default_rng([12, number])
    known = json.loads((folder / "tiles.json").read_text())
    label = np.array([row["label"] for row in known["rows"]])
    group = np.array([row["group"] for row in known["rows"]])
    looks = [np.load(folder / f"features{k}.npy").astype(np.float32) for k in range(len(known["styles"]))]
    pool = [k for k, style in enumerate(known["styles"]) if about["style"] in ("mixed", style)]
    which, times, cells = truths(kind, about, number)
    benign, tumour = source_pools(label, group, looks[0], about, which.max() + 1, rng)
    turn = rng.normal(size=(looks[0].shape[1], about["width"])).astype(np.float32) / np.sqrt(looks[0].shape[1])
    of_site = rng.choice(pool, about["sites"])
    rows, bags = [], []
    for i in range(about["patients"]):
        site = i % about["sites"]
        first = of_site[site] if about["sites"] > 1 else rng.choice(pool)
        share = rng.uniform(0.7, 1)
        features = share * looks[first] + (1 - share) * looks[rng.choice(pool)]
        sick = label == TUMOUR
        mixed_in = rng.choice(benign[i], int(sick.sum()))
        features[sick] += about["blend"] * (features[mixed_in] - features[sick])
        x = patient(features, benign[i], tumour[which[i]][i] if which[i] >= 0 else None, about, rng, times[i])
        x = x + 0.02 * rng.standard_normal(x.shape)
        bags.append((x @ turn if about["width"] != x.shape[1] else x).astype(np.float32))
        name = f"P{i:03d}"
        rows.append({"slide_id": name, "patient_id": name, "site": f"s{site}", **cells[i]})
    names = [row["slide_id"] for row in rows]
    packed = make_bags(np.concatenate(bags), names, names, [len(x) for x in bags], {"key": "x"}, {"method": "none"})
    splits = make_splits(rows, TASKS[kind], {"folds": FOLDS, "repeats": 1, "seed": number})
    return packed, splits, about | {"tiles": int(np.median([len(x) for x in bags]))}


@dataclass(frozen=True)
class FoldOutputs:
    """Of one tested fold: outputs (T, C) of the tested patients by model, their encoded labels, what it took."""

    outcome: Any
    outputs: dict[str, np.ndarray]
    truth: list[Any]
    seconds: dict[str, float]  # of processor, by model
    weights: dict[str, float]  # of the candidates of `auto`


def train_fold(
    task: dict[str, Any], bags: Any, splits: Any, repeat: int, name: str, models: dict[str, Any]
) -> FoldOutputs:
    """Every model on the same members of fold `name`; all of CANDIDATES must be among `models`."""
    held_out, tested, seconds, shared = {}, {}, {}, None
    for model, changes in models.items():
        began = time.process_time()
        work = prepare(task, {**DEFAULTS, **changes}, bags, splits, Path("unused"), None, model)
        fold, settings = make_fold(work, repeat, name), resolved(work.settings, work.outcome)
        seed, scale = fold_seed(0, repeat, name), work.scale(fold)
        kind = work.outcome.kind
        by = strata(splits.labels, kind)
        plan = member_plan(fold.train, fold.val, by, 0.25, seed, work.outcome.by_class)
        if shared is None:  # as in training: components are estimated once for all candidates, the first pays
            shared = FoldBags(work, fold, max(c.get("components") or 0 for c in CANDIDATES.values()))
        trained = train_members(plan, scale, settings, shared)
        seconds[model] = time.process_time() - began
        held_out[model] = np.array([trained.outputs[p] for p in sorted(trained.outputs)])
        tested[model] = np.array(
            [np.mean([predict_bag(m, bags.bag(p))[0] for m in trained.models], 0) for p in fold.test]
        )
        labels = [work.labels[p] for p in sorted(trained.outputs)]
    mixed = mixture({c: held_out[c] for c in CANDIDATES}, work.outcome, labels, scale)
    tested["auto"] = sum(found.weight * found.scale * tested[c] for c, found in mixed.items())
    seconds["auto"] = sum(seconds[c] for c in CANDIDATES)
    weights = {c: found.weight for c, found in mixed.items()}
    return FoldOutputs(work.outcome, tested, [work.labels[p] for p in fold.test], seconds, weights)


def figures(outcome: Any, outputs: np.ndarray, truth: list[Any]) -> np.ndarray:
    """What is averaged over the folds: for two classes whether each pair of patients is in the right order (their mean
    is the AUROC within folds), else one figure: AUROC of each class against the others, C-index of grade or risk."""
    if outcome.kind == "binary":
        score, of = outputs[:, 1] - outputs[:, 0], np.array(truth)
        apart = score[of == 1][:, None] - score[of == 0]
        return ((apart > 0) + 0.5 * (apart == 0)).ravel()
    if outcome.kind != "multiclass":
        return np.array([value for value in [outcome.score_of(outputs, truth)] if value is not None])
    p = softmax(outputs, axis=1)
    found = [auroc(p[:, k], np.array(truth) == k) for k in range(outcome.outputs)]
    return np.array([np.mean([value for value in found if value is not None])])


def run_cohort(folder: Path, number: int, kind: str) -> dict[str, Any]:
    """Figure (`auroc`: see `figures`) and seconds of every model on cohort `number`."""
    bags, splits, about = compose(folder, number, kind)
    models = {**CANDIDATES, "before": BEFORE}
    if kind == "binary":
        models["lse, refit"] = {**CANDIDATES["lse"], "refit": True}
    folds = [train_fold(TASKS[kind], bags, splits, 0, name, models) for name in splits.tested(0)]
    names = list(folds[0].outputs)
    auroc = {
        m: float(np.mean(np.concatenate([figures(f.outcome, f.outputs[m], f.truth) for f in folds]))) for m in names
    }
    seconds = {m: sum(fold.seconds[m] for fold in folds) for m in names}
    weights = [fold.weights for fold in folds]
    return {"number": number, "about": about, "auroc": auroc, "seconds": seconds, "weights": weights}


def interval(values: np.ndarray) -> str:
    """Mean with a 95 % bootstrap interval over cohorts."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return f"{values.mean():.3f} ({np.quantile(draws, 0.025):.3f} to {np.quantile(draws, 0.975):.3f})"


def table(found: list[dict[str, Any]], title: str) -> None:
    """Markdown of cohorts that were run."""
    if not found:
        return
    names = list(found[0]["auroc"])
    auroc = {name: np.array([row["auroc"][name] for row in found]) for name in names}
    print(f"\n| model | {title}, mean of {len(found)} cohorts | minus before | least of these | processor time |")
    print("|---|---|---|---|---|")
    for name in names:
        apart, cost = auroc[name] - auroc["before"], [row["seconds"][name] / row["seconds"]["before"] for row in found]
        print(f"| {name} | {interval(auroc[name])} | {interval(apart)} | {apart.min():.3f} | {np.median(cost):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("embed", "run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("numbers", type=int, nargs="*", help="first cohort, and one past the last")
    parser.add_argument("--type", choices=list(TASKS), default="binary")
    parser.add_argument("--tiles", type=Path)
    parser.add_argument("--looks", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "embed":
        embed(asked.out, asked.tiles, asked.looks)
    elif asked.what == "table":
        found = [json.loads(path.read_text()) for path in sorted(asked.out.glob(f"{PREFIX[asked.type]}*.json"))]
        for title, few in (("60 patients and fewer", True), ("more than 60 patients", False)):
            table([row for row in found if (row["about"]["patients"] <= FEW) is few], title)
        table(found, "all")
    else:
        for number in range(*asked.numbers):
            path = asked.out / f"{PREFIX[asked.type]}{number:03d}.json"
            if not path.exists():
                result = run_cohort(asked.out, number, asked.type)
                path.write_text(json.dumps(result))
                print(json.dumps(result), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
