"""Are the report's statistics right where nothing is to be found, and do they see what was planted?

    .venv/bin/python benchmarks/nominal_rates.py                    # all sections, some minutes
    .venv/bin/python benchmarks/nominal_rates.py --sections drift --cohorts 400

Every section simulates cohorts whose truth is known and prints a share of them, or a mean over them, with its Monte
Carlo standard error.

survival     how often the ratio of seen to expected events accuses a model whose predictions are the true risks
optimism     how often the alarm goes off where labels are independent of sites of unequal sizes, with and without a
             site effect in the embeddings
drift        how often new patients are said to differ that were drawn as the training patients were, and that were not
prevalence   mean predicted probability, calibration in the large and AUROC of the linear control and of attention at
             prevalences of 0.5 to 0.05, out of fold, where the loss weights classes alike (docs/training.md)
penalty      AUROC of the linear control for 2,000 new patients with the C it takes, with the best of its grid, and with
             the C of the least loss of bare logits (docs/training.md)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from slidemake.drift.judgement import Sample, judge
from slidemake.drift.reference import sketched
from slidemake.evaluation.probabilities.survival_calibration import expected_events, poisson_ratio
from slidemake.evaluation.survival_words import FEW_EVENTS
from slidemake.mil.bags import make_bags
from slidemake.robustness.shortcuts import Slides, optimism
from slidemake.splits.make import make_splits
from slidemake.statistics.temperature import auroc, fit_intercepts
from slidemake.tasks.prediction_table import read_predictions
from slidemake.training.class_baselines import C_GRID, fit_lr, fit_mean_pool_lr
from slidemake.training.plan import member_plan
from slidemake.training.train import train_model

FEATURES = 1280
QUICK = {"epochs": 10, "min_epochs": 5, "hidden": 16, "attention": 8, "learning_rate": 0.005, "members": 2}
MODELS = {
    "linear control": {"control": "mean_pool_lr"},
    "gated attention": {"aggregator": "abmil_gated"},
}
SITES = {  # patients of each site
    "24: 8, 8, 8": (8, 8, 8),
    "24: 16, 4, 4": (16, 4, 4),
    "60: 42, 18": (42, 18),
    "100: 60, 20, 10, 10": (60, 20, 10, 10),
    "100: ten of 30 to 2": (30, 20, 12, 10, 8, 6, 5, 4, 3, 2),
}


def accused(seed: int, patients: int, risk: float) -> tuple[bool, bool]:
    """One site of so many patients at a true risk of the event by t = 1: (interval without 1, and it would be said)."""
    rng, rate, at = np.random.default_rng([seed, patients]), -np.log(1 - risk), np.array([1.0])
    died, left = rng.exponential(1 / rate, patients), rng.exponential(2 / rate, patients)
    time, event = np.minimum(died, left), died <= left
    expected = expected_events(time, np.full((patients, 1), 1 - risk), at, 1.0)
    _, low, high = poisson_ratio(int((event & (time <= 1)).sum()), expected)
    outside = not low <= 1 <= high
    return outside, outside and expected >= FEW_EVENTS


def optimistic(seed: int, sizes: tuple[int, ...], site_shift: float) -> bool | None:
    """Whether the alarm goes off where labels are independent of sites; None where sites cannot be held out."""
    rng, n = np.random.default_rng([seed, *sizes]), sum(sizes)
    y = rng.permutation(np.arange(n) % 2)
    site = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(n, 32)) + 1.2 * np.outer(y - 0.5, rng.normal(size=32) / 4)
    x += site_shift * rng.normal(size=(len(sizes), 32))[site]
    names = tuple(f"P{i:03d}" for i in range(n))
    slides = Slides(x, names, tuple("nt"[k] for k in y), tuple(f"S{k}" for k in site), ("one",) * n)
    found = optimism(x, slides, seed, 19)
    return None if found["p"] is None else found["p"] <= 0.05


def drifts(seed: int, decay: float, reference: int, new: int, shift: float = 0.0) -> str:
    """Level of the whole of new patients; embeddings of FEATURES with eigenvalues k^-decay, new ones shifted by `shift`
    standard deviations along the first direction."""
    rng = np.random.default_rng([seed, reference, new])
    spread = np.arange(1, FEATURES + 1) ** (-decay / 2)
    old, young = (rng.normal(size=(n, FEATURES)) * spread for n in (reference, new))
    young[:, 0] += shift * spread[0]
    centre = old.mean(0)
    scores = rng.uniform(size=reference + new)
    record = {
        "patients": reference,
        "scored": reference,
        "slides": reference,
        "failed": 0,
        "sites": ["a"] * reference,
        "embeddings": sketched(old, centre).tolist(),
        "scores": {"prob_y": scores[:reference].tolist()},
        "conformal": None,
        "abstained": None,
        "quality": {},
    }
    names = tuple(f"p{i}" for i in range(new))
    sample = Sample(
        names,
        ("a",) * new,
        ("",) * new,
        sketched(young, centre),
        {"prob_y": scores[reference:]},
        np.zeros((new, 0)),
        names,
        (("a", ""),) * new,
        np.zeros(new, bool),
        {},
    )
    return str(judge(record, sample, seed)["groups"][0]["level"])


def cohort_of(seed: int, shares: tuple[float, ...], patients: int, signal: float) -> tuple[Any, list[dict[str, str]]]:
    """(bags, rows) of patients of len(shares) classes or grades; ten tiles of eight features, a class's own `signal`
    deviations of the mean tile away."""
    rng = np.random.default_rng([seed, patients, len(shares)])
    counts = np.round(np.array(shares) * patients).astype(int)
    labels = np.repeat(np.arange(len(shares)), counts)
    x = rng.normal(size=(len(labels), 1, 8)) + rng.normal(size=(len(labels), 10, 8))
    x[..., 0] += signal * labels[:, None]
    names = [f"P{i:04d}" for i in range(len(labels))]
    rows = [
        {
            "slide_id": n,
            "patient_id": n,
            "site": "s",
            "label": str(k),
            "a": str(int(k > 0)),
            "b": str(int(k == len(shares) - 1)),
        }
        for n, k in zip(names, labels, strict=True)
    ]
    return make_bags(x.reshape(-1, 8).astype(np.float32), names, names, [10] * len(names), {"key": "x", "dim": 8}), rows


def predicted(seed: int, shares: tuple[float, ...], patients: int, options: dict[str, Any], signal: float = 1.5) -> Any:
    """Out of fold: (mean probability of the last class, its calibration in the large, its AUROC as reported, its Brier
    score, and that of the prevalence)."""
    bags, rows = cohort_of(seed, shares, patients, signal)
    task = {
        "label": "label",
        "type": "binary" if len(shares) == 2 else "ordinal",
        "order": ["0", "1", "2"][: len(shares)],
    }
    splits = make_splits(rows, task, {"folds": 5, "repeats": 1, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        train_model(task, {**QUICK, **options}, bags, splits, Path(folder))
        found = read_predictions(Path(folder) / "predictions_patients.csv", "model", task["type"])
    p, y = found.values[0, :, -1], (found.truth[:, 0] == len(shares) - 1).astype(int)
    b = fit_intercepts(np.log(np.stack([1 - p, p], 1)), y)
    area = auroc(found.ranks[0, :, -1], y == 1)
    return p.mean(), b[1] - b[0], area, ((p - y) ** 2).mean(), y.mean() * (1 - y.mean())


def penalised(seed: int, patients: int, features: int, prevalence: float) -> tuple[float, float, float]:
    """AUROC on new patients: (with the C taken, with the best of the grid, with the C of the least bare loss).
    Principal components shrink as 1 / k, as an encoder's do, and the 6th to 25th tell the classes: a strong penalty
    leaves them out."""
    rng = np.random.default_rng([seed, patients, features])
    turn = np.linalg.qr(rng.normal(size=(features, 60)))[0]
    spread = 1 / np.arange(1, 61)
    effect = 0.8 * ((np.arange(60) >= 5) & (np.arange(60) < 25))

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.r_[np.ones(max(2, round(prevalence * n)), int), np.zeros(n - max(2, round(prevalence * n)), int)]
        z = (rng.normal(size=(n, 60)) + np.outer(y - 0.5, effect)) * spread
        return (z @ turn.T + 2e-4 * rng.normal(size=(n, features))).astype(np.float32), y

    (x, y), (x_new, y_new) = draw(patients), draw(2000)
    names = [f"P{i:03d}" for i in range(patients)]
    bags = make_bags(x, names, names, [1] * patients, {"key": "x", "dim": features})
    labels = dict(zip(names, y.tolist(), strict=True))
    plan = member_plan(names, [], {name: str(k) for name, k in labels.items()}, 0.25, seed)
    fitted = fit_mean_pool_lr(bags, labels, names, plan, 2)

    def area(scaler: Any, regression: Any) -> float:
        found = auroc(regression.decision_function(scaler.transform(x_new)), y_new == 1)
        assert found is not None
        return found

    by_c, loss = {}, {}
    at = {name: i for i, name in enumerate(names)}
    for c in C_GRID:
        by_c[c] = area(*fit_lr(x, y, c))
        held_out = np.zeros(patients)
        for inner, val in plan:
            rows, tested = [at[n] for n in inner], [at[n] for n in val]
            scaler, regression = fit_lr(x[rows], y[rows], c)
            held_out[tested] = regression.decision_function(scaler.transform(x[tested]))
        loss[c] = float(np.logaddexp(0, np.where(y == 1, -held_out, held_out)).mean())
    return by_c[fitted.c], max(by_c.values()), by_c[min(loss, key=lambda c: loss[c])]


def penalty_table(cohorts: int, pool: ProcessPoolExecutor) -> list[list[str]]:
    rows = [["patients, features, prevalence", "C taken", "best of the grid", "taken minus best", "C by bare loss"]]
    for patients, features, prevalence in ((24, 1280, 0.5), (40, 1024, 0.5), (60, 1280, 0.5), (100, 256, 0.1)):
        one = partial(penalised, patients=patients, features=features, prevalence=prevalence)
        taken, best, bare = np.array(list(pool.map(one, range(cohorts)))).T
        cells = [mean(taken), mean(best), mean(taken - best), mean(bare)]
        rows.append([f"{patients}, {features}, {prevalence:g}", *cells])
    return rows


def mean(values: np.ndarray) -> str:
    """Mean over cohorts and its Monte Carlo standard error."""
    return f"{values.mean():.3f} ({values.std(ddof=1) / np.sqrt(len(values)):.3f})"


def prevalence_table(cohorts: int, pool: ProcessPoolExecutor) -> list[list[str]]:
    rows = [
        ["classes", "model", "mean predicted of the last", "in the large", "AUROC", "Brier", "Brier of the prevalence"]
    ]
    for shares in ((0.5, 0.5), (0.8, 0.2), (0.9, 0.1), (0.95, 0.05), (0.7, 0.25, 0.05)):
        for name, options in MODELS.items():
            one = partial(predicted, shares=shares, patients=200, options=options)
            found = np.array(list(pool.map(one, range(cohorts), chunksize=2)))
            rows.append(
                [
                    " / ".join(f"{s:g}" for s in shares),
                    name,
                    *(mean(column) for column in found.T[:4]),
                    f"{found[:, 4].mean():.3f}",
                ]
            )
    return rows


def share(found: list[bool]) -> str:
    """A share of the cohorts and its Monte Carlo standard error."""
    p = float(np.mean(found))
    return f"{p:.3f} ({np.sqrt(max(p * (1 - p), 1 / len(found) ** 2) / len(found)):.3f})"


def survival_table(cohorts: int, pool: ProcessPoolExecutor) -> list[list[str]]:
    rows = [["patients at the site", "risk", "interval without 1", "said in the report"]]
    for patients in (10, 15, 25, 50, 200):
        for risk in (0.05, 0.2, 0.5):
            found = list(pool.map(partial(accused, patients=patients, risk=risk), range(cohorts), chunksize=50))
            rows.append([str(patients), f"{risk:g}", share([a for a, _ in found]), share([b for _, b in found])])
    return rows


def optimism_table(cohorts: int, pool: ProcessPoolExecutor) -> list[list[str]]:
    rows = [["patients and sites", "site in the embeddings", "alarm"]]
    for name, sizes in SITES.items():
        for shift in (0.0, 1.0):
            found = pool.map(partial(optimistic, sizes=sizes, site_shift=shift), range(cohorts), chunksize=5)
            rows.append([name, "yes" if shift else "no", share([bool(f) for f in found if f is not None])])
    return rows


def drift_table(cohorts: int, pool: ProcessPoolExecutor) -> list[list[str]]:
    rows = [["eigenvalues", "training and new patients", "shift (SD)", "watch or alarm", "alarm"]]
    for decay in (1.0, 1.5, 2.0):
        for reference, new in ((24, 24), (60, 30), (200, 50)):
            for shift in (0.0, 2.0):
                one = partial(drifts, decay=decay, reference=reference, new=new, shift=shift)
                levels = list(pool.map(one, range(cohorts if not shift else max(20, cohorts // 5)), chunksize=5))
                cells = [share([level != "ok" for level in levels]), share([level == "alarm" for level in levels])]
                rows.append([f"k^-{decay:g}", f"{reference}, {new}", f"{shift:g}", *cells])
    return rows


SECTIONS = {
    "survival": (survival_table, 2000),
    "optimism": (optimism_table, 300),
    "drift": (drift_table, 200),
    "prevalence": (prevalence_table, 20),
    "penalty": (penalty_table, 20),
}


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--cohorts", type=int, help="simulated cohorts of each kind (default: by section)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers) as pool:
        for name in options.sections:
            table, usual = SECTIONS[name]
            cohorts = options.cohorts or usual
            print(f"\n{name}: {cohorts} cohorts each; in brackets the Monte Carlo standard error\n")
            head, *rows = table(cohorts, pool)
            print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), flush=True)


if __name__ == "__main__":
    main()
