"""Can a model take a shortcut? What the embeddings know of site and scanner, and whether it would help with the label.

Cheap probes on the mean embedding of every slide, none of which touches the task's own models:

probe          site and scanner from the embedding, patients held out, beside the same with sites dealt to patients at
               random; and within each class, where the label cannot help. Modern encoders tell the site nearly always:
               so this describes, and alarms only together with the next.
association    of label and site or scanner (Cramer's V with a permutation p): a shortcut pays only where the label
               follows the site.
optimism       AUROC of a linear model on the mean embeddings under folds that keep sites whole, beside the same when
               sites are dealt anew among the patients of each class: folds of the same sizes and classes, so that the
               difference is what is gained by having seen the site, and not by training on more patients.
null           the same linear model with permuted labels: where it should be, and how often chance does as well.
robustness     `neighbours`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier

from slidemake.mil.bags import Bags
from slidemake.robustness.linear_probe import (
    FOLDS,
    held_out_scores,
    logistic_probe,
    macro_auroc,
    random_folds,
    reduce_vectors,
)
from slidemake.robustness.near_duplicates import slide_means
from slidemake.robustness.neighbours import embedding_robustness
from slidemake.robustness.shortcut_words import findings
from slidemake.splits.site_preserved import assign_sites
from slidemake.statistics.association import association_test
from slidemake.statistics.bootstrap import bootstrap_weights, percentile_interval

MOST = 2000  # slides that probes look at
RARE = 4  # slides below which a site or scanner takes no part in a probe
NULLS = 50  # permutations of a probe and of the labels
DRAWS = 1000  # bootstrap draws of the linear model's AUROC


@dataclass(frozen=True)
class Slides:
    """Mean embeddings (S, D) of a task's slides and what is known of each."""

    vectors: np.ndarray
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    sites: tuple[str, ...]
    scanners: tuple[str, ...]

    def take(self, chosen: np.ndarray) -> Slides:
        index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        parts = (tuple(of[i] for i in index) for of in (self.patients, self.labels, self.sites, self.scanners))
        return Slides(self.vectors[index], *parts)


def slides_of(bags: Bags, labels: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> Slides:
    """The slides of the patients in `labels` that have tiles; site and scanner from the rows of slides.csv."""
    kept, vectors = slide_means(bags.of_patients(labels))
    about = {row["slide_id"]: row for row in rows}
    names = [bags.slides[i] for i in kept]
    patients = tuple(bags.patients[i] for i in kept)
    columns = (tuple(about.get(name, {}).get(key) or "" for name in names) for key in ("site", "scanner"))
    return Slides(vectors, patients, tuple(labels[p] for p in patients), *columns)


def probe_shortcuts(slides: Slides, seed: int = 0, nulls: int = NULLS) -> dict[str, Any]:
    """All probes of a task's slides; figures that do not exist are None with a reason. `findings` says it in words."""
    rng = np.random.default_rng(seed)
    if len(slides.patients) > MOST:
        slides = slides.take(np.sort(rng.choice(len(slides.patients), MOST, replace=False)))
    result: dict[str, Any] = {"slides": len(slides.patients), "patients": len(set(slides.patients)), "columns": {}}
    result["background"] = None  # is looked at where background was embedded: `background_control`
    reduced = reduce_vectors(slides.vectors)
    for column in ("site", "scanner"):
        values = slides.sites if column == "site" else slides.scanners
        result["columns"][column] = _about_column(slides, reduced, values, seed, nulls)
    result["null"] = label_null(reduced, slides, seed, nulls)
    result["optimism"] = optimism(reduced, slides, seed, nulls)
    result["findings"] = findings(result)
    return result


def _about_column(slides: Slides, reduced: np.ndarray, values: Sequence[str], seed: int, nulls: int) -> dict[str, Any]:
    stated = Counter(value for value in values if value)
    common = sorted(value for value, count in stated.items() if count >= RARE)
    if len(common) < 2:
        reason = f"fewer than two of {RARE} slides or more"
        return {
            "values": dict(stated),
            "association": None,
            "probe": None,
            "within_class": None,
            "robustness": None,
            "reason": reason,
        }
    chosen = np.array([value in common for value in values])
    kept, named = slides.take(chosen), [value for value in values if value in common]
    of_patient = {p: (label, value) for p, label, value in zip(kept.patients, kept.labels, named, strict=True)}
    labels = np.unique([label for label, _ in of_patient.values()], return_inverse=True)[1]
    return {
        "values": dict(stated),
        "association": association_test(labels, [value for _, value in of_patient.values()], seed),
        "probe": probe(reduced[chosen], named, kept.patients, seed, nulls),
        "within_class": _within_class(reduced[chosen], named, kept, seed, nulls),
        "robustness": embedding_robustness(kept.vectors, kept.labels, named, kept.patients),
        "reason": None,
    }


def _nearest() -> Any:
    return KNeighborsClassifier(5, metric="cosine")


def _balanced(y: np.ndarray, scores: np.ndarray) -> float:
    known = np.isfinite(scores[:, 0])
    called = scores[known].argmax(1)
    if not known.any():
        return float("nan")
    return float(np.mean([(called[y[known] == c] == c).mean() for c in np.unique(y[known])]))


def _grouped_folds(y: np.ndarray, patients: Sequence[str], seed: int) -> np.ndarray:
    # scikit-learn refuses more folds than the most frequent value has members
    count = max(2, min(FOLDS, len(set(patients)), int(np.bincount(y).max())))
    fold = np.zeros(len(y), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a site with fewer slides than folds
        dealer = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        for f, (_, test) in enumerate(dealer.split(np.zeros(len(y)), y, np.asarray(patients))):
            fold[test] = f
    return fold


def probe(
    x: np.ndarray, values: Sequence[str], patients: Sequence[str], seed: int, nulls: int = NULLS
) -> dict[str, Any] | None:
    """Balanced accuracy of telling `values` from x (S, K), patients held out; None for fewer than two patients a value.

    `null` is the mean, and `null_high` the 95th percentile, when values are dealt to patients at random; `p` is how
    often chance does as well.
    """
    names, y = np.unique(np.asarray(values), return_inverse=True)
    if len(names) < 2 or min(len({p for p, v in zip(patients, values, strict=True) if v == n}) for n in names) < 2:
        return None
    fold = _grouped_folds(y, patients, seed)
    found = _balanced(y, held_out_scores(logistic_probe, x, y, fold, len(names)))
    if not np.isfinite(found):
        return None
    neighbours = _balanced(y, held_out_scores(_nearest, x, y, fold, len(names)))
    rng = np.random.default_rng(seed)
    # a patient's slides keep their values together, as re-scans on two scanners do; patients of as many slides swap
    blocks: dict[int, list[np.ndarray]] = {}
    of = np.asarray(patients)
    for patient in dict.fromkeys(patients):
        rows = np.flatnonzero(of == patient)
        blocks.setdefault(len(rows), []).append(rows)
    chance = []
    for _ in range(nulls):
        dealt = y.copy()
        for alike in blocks.values():
            for target, source in zip(alike, rng.permutation(len(alike)), strict=True):
                dealt[target] = y[alike[source]]
        fold = _grouped_folds(dealt, patients, seed)
        chance.append(_balanced(dealt, held_out_scores(logistic_probe, x, dealt, fold, len(names))))
    chance = [null for null in chance if np.isfinite(null)]
    if not chance:
        return None
    as_good = sum(null >= found - 1e-12 for null in chance)
    return {
        "balanced_accuracy": found,
        "neighbours": neighbours,
        "values": len(names),
        "null": float(np.mean(chance)),
        "null_high": float(np.quantile(chance, 0.95)),
        "p": (as_good + 1) / (len(chance) + 1),
    }


def _within_class(x: np.ndarray, values: Sequence[str], slides: Slides, seed: int, nulls: int) -> dict[str, Any] | None:
    """The probe inside each class, where the label cannot help; weighted by slides."""
    found = []
    for label in sorted(set(slides.labels)):
        inside = np.array([one == label for one in slides.labels])
        of_class = [value for value, chosen in zip(values, inside, strict=True) if chosen]
        counts = Counter(of_class)
        keep = np.array([inside[i] and counts[value] >= RARE for i, value in enumerate(values)])
        index = np.flatnonzero(keep).tolist()
        if index:
            people = [slides.patients[i] for i in index]
            one = probe(x[index], [values[i] for i in index], people, seed, nulls)
            if one:
                found.append((len(index), one))
    if not found:
        return None
    weight = np.array([n for n, _ in found], float)
    keys = ("balanced_accuracy", "null", "null_high")
    mean = {key: float(np.average([one[key] for _, one in found], weights=weight)) for key in keys}
    return {**mean, "classes": len(found)}


def _patient_level(reduced: np.ndarray, slides: Slides) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Mean vectors, class codes, class names and sites of the patients, sorted."""
    people = sorted(set(slides.patients))
    of = np.asarray(slides.patients)
    x = np.stack([reduced[of == p].mean(0) for p in people])
    first = {p: i for i, p in reversed(list(enumerate(slides.patients)))}
    labels = [slides.labels[first[p]] for p in people]
    names, y = np.unique(labels, return_inverse=True)
    sites = [
        "+".join(sorted({s for s, q in zip(slides.sites, slides.patients, strict=True) if q == p and s}))
        for p in people
    ]
    return x, y, names.tolist(), sites


def label_null(reduced: np.ndarray, slides: Slides, seed: int, nulls: int = NULLS) -> dict[str, Any]:
    """AUROC of the linear model on mean embeddings with an interval, and with labels permuted `nulls` times."""
    x, y, names, _ = _patient_level(reduced, slides)
    if min(np.bincount(y)) < 2 or len(names) < 2:
        return {"auroc": None, "reason": "fewer than two patients in a class"}
    one = np.ones((1, len(y)))
    rng = np.random.default_rng([seed, 1])

    def measured(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        scores = held_out_scores(logistic_probe, x, labels, random_folds(labels, seed, FOLDS), len(names))
        known = np.isfinite(scores[:, 0])
        return macro_auroc(labels[known], scores[known], weights[:, known])

    found = float(measured(y, one)[0])
    low, high = percentile_interval(measured(y, bootstrap_weights(y, DRAWS, [seed, 3])[0]))
    chance = np.array([measured(rng.permutation(y), one)[0] for _ in range(nulls)])
    chance = chance[np.isfinite(chance)]
    if not np.isfinite(found) or not len(chance):
        return {"auroc": None, "reason": "too few patients to hold some out"}
    return {
        "auroc": found,
        "low": low,
        "high": high,
        "null": float(chance.mean()),
        "null_low": float(np.quantile(chance, 0.025)),
        "null_high": float(np.quantile(chance, 0.975)),
        "p": float((np.sum(chance >= found - 1e-12) + 1) / (len(chance) + 1)),
        "reason": None,
    }


def optimism(reduced: np.ndarray, slides: Slides, seed: int, nulls: int = NULLS) -> dict[str, Any]:
    """AUROC under folds that keep sites whole, and under `nulls` deals of the same folds to pseudo-sites.

    A pseudo-site has as many patients of each class as its site has, so its folds train on as many. If embeddings know
    nothing of the site beyond the class, sites and pseudo-sites are exchangeable and `p` is exact. `random` is the mean
    over the deals, `difference` that minus `preserved`, `chance_high` its 95th percentile by chance. None, with a
    reason, where sites cannot be held out.
    """
    x, y, names, sites = _patient_level(reduced, slides)
    nothing: dict[str, Any] = {"random": None, "preserved": None, "difference": None, "chance_high": None, "p": None}
    chosen = np.array([bool(site) and "+" not in site for site in sites])
    x, y, sites = x[chosen], y[chosen], [site for site in sites if site and "+" not in site]
    held, site = np.unique(np.array(sites, dtype=object).astype(str), return_inverse=True)
    if len(held) < 2 or len(names) < 2:
        return {**nothing, "reason": "fewer than two sites or two classes"}
    count = min(FOLDS, len(held))
    table = np.array([np.bincount(y[site == s], minlength=len(names)) for s in range(len(held))])
    fold = assign_sites(table, count)[0][site]
    one = np.ones((1, len(y)))

    def measured(folds: np.ndarray) -> float:
        scores = held_out_scores(logistic_probe, x, y, folds, len(names))
        return float(macro_auroc(y, scores, one)[0]) if np.isfinite(scores).all() else float("nan")

    preserved = measured(fold)
    if not np.isfinite(preserved):
        return {**nothing, "reason": "without some sites the training side has one class only"}
    rng = np.random.default_rng([seed, 2])
    dealt = np.array([measured(_dealt_within(y, fold, rng)) for _ in range(nulls)])
    return {
        "random": float(dealt.mean()),
        "preserved": preserved,
        "difference": float(dealt.mean() - preserved),
        "chance_high": float(dealt.mean() - np.quantile(dealt, 0.05)),
        "p": float((np.sum(dealt <= preserved + 1e-12) + 1) / (nulls + 1)),
        "folds": count,
        "reason": None,
    }


def _dealt_within(y: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The folds (n,) dealt anew among the patients of each class (n,)."""
    dealt = fold.copy()
    for c in np.unique(y):
        members = np.flatnonzero(y == c)
        dealt[members] = fold[rng.permutation(members)]
    return dealt
