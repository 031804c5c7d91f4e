"""Do intervals of an AUROC hold the truth as often as they say? How often is "better than the control" said in vain?

    python benchmarks/intervals.py                              # all sections, half an hour
    python benchmarks/intervals.py --sections given --cohorts 2000

given       coverage for the models as they were trained: scores of given models, three repeats that agree for the most
            part, beside DeLong's on the scale of log-odds
procedure   coverage for the way of training: five folds, three times, of a linear classifier on 64 features; the truth
            is the mean AUROC of such models over cohorts
claims      how often at least one of 1, 5 or 20 models is called better than a control that is trained as well as they
            are, on features of the same worth; with Holm's correction

Figures are shares of cohorts; in brackets their Monte Carlo standard error in units of the last digit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from slidemake.evaluation.comparisons import holm
from slidemake.statistics.auroc_intervals import auroc_difference, auroc_interval, ranked

REPEATS, FOLDS, AGREE, FEATURES, MODELS, RIDGE = 3, 5, 0.8, 64, 20, 0.5
COHORTS = [(24, 0.5), (24, 0.2), (60, 0.5), (60, 0.1), (200, 0.1), (500, 0.1)]
SPREADS = (1.0, 2.0, 0.5, None)  # deviation of positives over that of negatives; None: a part of them is easy
TRAINED = [(24, 0.5), (60, 0.5), (60, 0.2), (200, 0.5)]
AUROCS = (0.5, 0.7, 0.85, 0.95)
RATIO = FOLDS / (FOLDS - 1)  # tested to training patients of a repeat


def labels_of(patients: int, share: float) -> np.ndarray:
    return (np.arange(patients) < round(patients * share)).astype(int)


def given_scores(
    seed: int, patients: int, share: float, auroc: float, spread: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores (R, n): normal, positives `spread` times as wide as negatives; or (None) each positive ranked
    above all negatives with a chance of 2 AUROC - 1, and else as they are."""
    rng, y = np.random.default_rng([seed, patients, round(100 * share), round(100 * auroc)]), labels_of(patients, share)
    wide = np.where(y == 1, spread or 1.0, 1.0)
    noise = np.sqrt(AGREE) * rng.normal(size=patients) + np.sqrt(1 - AGREE) * rng.normal(size=(REPEATS, patients))
    if spread is None:
        return y, noise + 100.0 * y * (rng.random(patients) < 2 * auroc - 1)
    return y, y * norm.ppf(auroc) * np.sqrt(1 + spread**2) + wide * noise


def given(seed: int, patients: int, share: float, auroc: float, spread: float | None) -> tuple[bool, bool]:
    """Whether ours and the log-odds' interval hold the AUROC, of one cohort."""
    y, scores = given_scores(seed, patients, share, auroc, spread)
    a = ranked(y, scores)
    assert a is not None
    inside = min(max(a.value, 1e-9), 1 - 1e-9)
    half = 1.96 * np.sqrt(a.variance) / (inside * (1 - inside))
    odds = np.log(inside / (1 - inside)) + np.array([-half, half])
    ends = (auroc_interval(a), tuple(1 / (1 + np.exp(-odds))))
    return tuple(low <= auroc <= high for low, high in ends)


def deal(y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    fold = np.empty(len(y), int)
    for c in (0, 1):
        inside = rng.permutation(np.flatnonzero(y == c))
        fold[inside] = (np.arange(len(inside)) + rng.integers(FOLDS)) % FOLDS
    return fold


def direction(x: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Discriminant of features (n, D) by the means of two classes and their covariance plus `ridge`, and its middle."""
    means = [x[y == c].mean(0) for c in (0, 1)]
    rest = x - np.where(y[:, None] == 1, means[1], means[0])
    w = np.linalg.solve(rest.T @ rest / len(y) + ridge * np.eye(x.shape[1]), means[1] - means[0])
    return w / np.linalg.norm(w), (means[0] + means[1]) / 2


def features_of(rng: np.random.Generator, y: np.ndarray, signal: float, shared: np.ndarray | None) -> tuple:
    """Features (n, D) with falling deviations, ten of which tell the classes, half of them from `shared`; deviations
    and the distance of the classes."""
    dim = FEATURES if shared is None else shared.shape[1]
    x = rng.normal(size=(len(y), dim))
    if shared is not None:
        x[:, ::2] = shared[:, ::2]
    scale, apart = np.arange(1, dim + 1) ** -0.5, np.zeros(dim)
    apart[2:12] = signal / 2
    return x * scale + y[:, None] * apart * scale, scale, apart * scale


def cross_validated(x: np.ndarray, y: np.ndarray, folds: np.ndarray, ridge: float) -> Iterator[tuple]:
    """Of every repeat and fold: repeat, tested patients, their scores, and the direction."""
    for r, fold in enumerate(folds):
        for k in range(FOLDS):
            test = fold == k
            if test.any():
                w, middle = direction(x[~test], y[~test], ridge)
                yield r, test, (x[test] - middle) @ w, w


def procedure(seed: int, patients: int, share: float, signal: float, ridge: float) -> tuple:
    """Of one cohort: mean true AUROC of its models, then ends of the interval for models and of that for training."""
    rng, y = np.random.default_rng([seed, patients, round(10 * signal)]), labels_of(patients, share)
    x, scale, apart = features_of(rng, y, signal, None)
    folds = np.array([deal(y, rng) for _ in range(REPEATS)])
    scores, truths = np.empty((REPEATS, patients)), []
    for r, test, found, w in cross_validated(x, y, folds, ridge):
        scores[r, test] = found
        truths.append(norm.cdf(w @ apart / np.sqrt(2 * ((w * scale) ** 2).sum())))
    a = ranked(y, scores)
    assert a is not None
    return (float(np.mean(truths)), *auroc_interval(a), *auroc_interval(a, tested_to_trained=RATIO))


def claims(
    seed: int, patients: int, share: float, signal: float, ridge: float, models: int = MODELS
) -> tuple[bool, ...]:
    """Of one cohort: is one of 1, 5, 20 models called better, by DeLong's test with Holm and by ours with Holm?"""
    rng, y = np.random.default_rng([seed, patients, round(10 * signal)]), labels_of(patients, share)
    shared = rng.normal(size=(patients, 24))
    folds = np.array([deal(y, rng) for _ in range(REPEATS)])
    trained = []
    for _ in range(models + 1):
        x, _, _ = features_of(rng, y, signal, shared)
        scores = np.empty((REPEATS, patients))
        for r, test, found, _ in cross_validated(x, y, folds, ridge):
            scores[r, test] = found
        trained.append(ranked(y, scores))
    said = []
    for ratio in (0.0, RATIO):
        tests = [auroc_difference(m, trained[0], 0.95, ratio) for m in trained[1:]]
        for count in (1, 5, 20):
            p = holm([t["p"] for t in tests[:count]])
            said.append(any(q is not None and q < 0.05 and t["difference"] > 0 for q, t in zip(p, tests, strict=False)))
    return tuple(said)


def shown(hits: np.ndarray) -> str:
    share = float(np.mean(hits))
    return f"{share:.3f} ({1000 * np.sqrt(max(share * (1 - share), 1e-9) / len(hits)):.0f})"


def print_given(pool: ProcessPoolExecutor, cohorts: int) -> None:
    print("| patients, share positive | positives' spread | interval | " + " | ".join(map(str, AUROCS)) + " |")
    print("|---" * (3 + len(AUROCS)) + "|")
    for patients, share in COHORTS:
        for spread in SPREADS:
            cells = []
            for auroc in AUROCS:
                one = partial(given, patients=patients, share=share, auroc=auroc, spread=spread)
                cells.append(np.array(list(pool.map(one, range(cohorts), chunksize=50))))
            for i, name in enumerate(("slidemake", "DeLong, log-odds")):
                row = " | ".join(shown(c[:, i]) for c in cells)
                print(f"| {patients}, {share} | {spread or 'a part is easy'} | {name} | {row} |", flush=True)


def print_procedure(pool: ProcessPoolExecutor, cohorts: int) -> None:
    print("| patients, share positive | true AUROC | of the models | of the way of training |")
    print("|---|---|---|---|")
    for patients, share in TRAINED:
        for signal in (0.0, 1.0, 2.0):
            one = partial(procedure, patients=patients, share=share, signal=signal, ridge=RIDGE)
            found = np.array(list(pool.map(one, range(cohorts), chunksize=10)))
            truth = found[:, 0].mean()
            cells = [shown((found[:, i] <= truth) & (truth <= found[:, i + 1])) for i in (1, 3)]
            print(f"| {patients}, {share} | {truth:.2f} | " + " | ".join(cells) + " |", flush=True)


def print_claims(pool: ProcessPoolExecutor, cohorts: int) -> None:
    print("| patients, share positive | signal | test | 1 model | 5 | 20 |")
    print("|---|---|---|---|---|---|")
    for patients, share in TRAINED:
        for signal in (0.0, 1.5):
            one = partial(claims, patients=patients, share=share, signal=signal, ridge=RIDGE)
            found = np.array(list(pool.map(one, range(cohorts), chunksize=5)))
            for i, name in enumerate(("DeLong, Holm", "slidemake")):
                row = " | ".join(shown(found[:, 3 * i + j]) for j in range(3))
                print(f"| {patients}, {share} | {signal:g} | {name} | {row} |", flush=True)


SECTIONS = {"given": (print_given, 1000), "procedure": (print_procedure, 400), "claims": (print_claims, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cohorts", type=int, help="of each line")
    parser.add_argument("--workers", type=int, default=2)
    given_arguments = parser.parse_args()
    with ProcessPoolExecutor(given_arguments.workers) as pool:
        for name in given_arguments.sections:
            section, cohorts = SECTIONS[name]
            print(f"\n{name}\n")
            section(pool, given_arguments.cohorts or cohorts)


if __name__ == "__main__":
    main()
