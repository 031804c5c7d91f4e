"""Split-conformal prediction sets, and abstaining: how often the truth is in the set, per site.

The score of a patient is 1 - P(true class). From n validation patients of a fold, which its model was not fitted to,
the limit is the ceil((n + 1)(1 - alpha))-th smallest score, and the set of a tested patient holds every class with a
score up to it. The set then contains the truth with a probability of about 1 - alpha, on average over patients like
those of validation. It would be 1 - alpha at least, whatever the model (Vovk 2005; Sadinle 2019), if one model gave
both scores; here those of validation are of members that had not seen the patient, and sets are of all members
together. Simulated, sets for 0.9 held 0.885 to 0.94. At another site the promise is void, and by how much is what the
figures per site show. A set of one class is a decision; with more, or none, the model abstains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slidemake.statistics.bootstrap import percentile_interval
from slidemake.tasks.class_predictions import ClassPredictions

Calibration = Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # (repeat, fold) -> P (m, C), labels (m,)
POINTS = 101  # of the risk-coverage curve
ROUNDING = 1e-9  # probabilities come from files with nine digits


def conformal_limit(scores: np.ndarray, alpha: float) -> float:
    """The limit on scores (m,); infinity when there are too few for this alpha, and every class is in every set."""
    rank = int(np.ceil((len(scores) + 1) * (1 - alpha) - ROUNDING))
    return float(np.sort(scores)[rank - 1]) if 0 < rank <= len(scores) else float("inf")


def prediction_sets(prob: np.ndarray, limit: float | np.ndarray) -> np.ndarray:
    """(n, C) bool, the classes in each patient's set; `limit` is one number, or one for each class."""
    return 1 - prob <= np.asarray(limit) + ROUNDING


def class_limits(prob: np.ndarray, labels: np.ndarray, alpha: float) -> np.ndarray:
    """(C,) limits, each from the patients of that class: the promise then holds within every class (Mondrian)."""
    scores = 1 - prob[np.arange(len(labels)), labels]
    return np.array([conformal_limit(scores[labels == c], alpha) for c in range(prob.shape[1])])


def sets_of(p: ClassPredictions, calibration: Calibration, alpha: float, by_class: bool) -> np.ndarray | None:
    """(R, n, C) sets of all tested patients, each by the limit of its fold; None when a fold has no validation."""
    sets = np.zeros(p.prob.shape, bool)
    for r, repeat in enumerate(p.repeats):
        for fold in sorted(set(p.fold[r].tolist()) - {-1}):
            if (repeat, fold) not in calibration:
                return None
            prob, labels = calibration[repeat, fold]
            if by_class:
                limit: float | np.ndarray = class_limits(prob, labels, alpha)
            else:
                limit = conformal_limit(1 - prob[np.arange(len(labels)), labels], alpha)
            inside = p.fold[r] == fold
            sets[r, inside] = prediction_sets(p.prob[r, inside], limit)
    return sets


def mean_where_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n,) mean over the repeats (R, n) that tested a patient."""
    return np.where(known, values, 0).sum(0) / np.maximum(1, known.sum(0))


def coverage(covered: np.ndarray, weights: np.ndarray, level: float) -> dict[str, Any]:
    """How often the truth was held, (n,) by patient, with an interval over bootstrap weights (B, n)."""
    low, high = percentile_interval(weights @ covered / weights.sum(1), level)
    return {"value": float(covered.mean()), "low": low, "high": high}


def _figures(
    p: ClassPredictions, sets: np.ndarray, inside: np.ndarray, weights: np.ndarray, level: float
) -> dict[str, Any]:
    """Coverage with its interval, size of the sets, and what becomes of those who get one class; patients `inside`."""
    sets, labels = sets[:, inside], p.labels[inside]
    known, size = p.fold[:, inside] >= 0, sets.sum(2)
    held = np.take_along_axis(sets, np.broadcast_to(labels[None, :, None], (*sets.shape[:2], 1)), 2)[..., 0]
    covered, decided = mean_where_known(held, known), mean_where_known(size == 1, known)
    right = mean_where_known((size == 1) & held, known)
    return {
        "n": len(labels),
        "coverage": coverage(covered, weights, level),
        "set_size": float(mean_where_known(size, known).mean()),
        "decided": float(decided.mean()),
        "empty": float(mean_where_known(size == 0, known).mean()),
        "accuracy_if_decided": float(right.sum() / decided.sum()) if decided.sum() else None,
    }


def conformal(
    p: ClassPredictions,
    calibration: Calibration,
    alpha: float,
    level: float,
    weights_of: Callable[[str, np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Coverage of sets that promise 1 - alpha, over all patients, per class and per site.

    weights_of(scope, chosen (n,) bool) gives bootstrap weights of the chosen patients. Without validation patients for
    every fold there are no sets, and `reason` says so.
    """
    nothing: dict[str, Any] = {"alpha": alpha, "pooled": None, "by_class": None, "sites": {}, "validation": None}
    sets, own = sets_of(p, calibration, alpha, False), sets_of(p, calibration, alpha, True)
    if sets is None or own is None:
        return {**nothing, "reason": "a fold has no validation patients"}
    sizes = [len(labels) for _, labels in calibration.values()]
    everyone = np.ones(len(p.patients), bool)
    weights, sites = weights_of("pooled", everyone), np.array(p.sites)
    classes: dict[str, dict[str, Any]] = {}
    for c, name in enumerate(p.classes):
        inside = p.labels == c
        if inside.any():
            of_class = weights[:, inside]
            classes[name] = {"n": int(inside.sum())}
            for key, limited in (("same_limit", sets), ("own_limit", own)):
                classes[name][key] = _figures(p, limited, inside, of_class, level)["coverage"]
    per_site = {
        site: _figures(p, sets, sites == site, weights_of(f"site:{site}", sites == site), level)
        for site in sorted(set(p.sites) - {""})
    }
    needed = int(np.ceil(1 / alpha)) - 1
    few = f"fewer than {needed} validation patients in a fold: there every set holds all classes"
    return {
        "alpha": alpha,
        "validation": {"least": min(sizes), "most": max(sizes)},
        "pooled": _figures(p, sets, everyone, weights, level),
        "by_class": classes,
        "sites": per_site,
        "reason": few if min(sizes) < needed else None,
    }


def risk_coverage(p: ClassPredictions) -> dict[str, Any]:
    """Share of wrong decisions among the patients that the model is surest of, and its area (AURC, lower is better).

    Sure is who has a high probability of the decided class. Points and area are means over repeats; `full` is the error
    rate without abstaining, `best` the area of a model that is surest where it is right.
    """
    share = np.linspace(0, 1, POINTS)[1:]
    curves, areas, best, full = [], [], [], []
    for r in range(len(p.repeats)):
        known = np.flatnonzero(p.predicted[r] >= 0)
        if not len(known):
            continue
        decided = p.predicted[r, known]
        wrong = (decided != p.labels[known]).astype(float)
        sure = p.prob[r, known, decided]
        order = np.lexsort((wrong, -sure))
        risk = _tied_risk(wrong[order], sure[order])
        perfect = np.cumsum(np.sort(wrong)) / np.arange(1, len(wrong) + 1)
        at = np.minimum(len(risk) - 1, np.ceil(share * len(risk) - ROUNDING).astype(int) - 1)
        curves.append(risk[at])
        areas.append(risk.mean())
        best.append(perfect.mean())
        full.append(wrong.mean())
    if not curves:
        return {"share": [], "risk": [], "aurc": None, "best": None, "full": None}
    return {
        "share": [round(float(v), 4) for v in share],
        "risk": [round(float(v), 6) for v in np.mean(curves, axis=0)],
        "aurc": float(np.mean(areas)),
        "best": float(np.mean(best)),
        "full": float(np.mean(full)),
    }


def _tied_risk(wrong: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Error rate among the first 1, 2, ... of the ordered patients; equally sure ones share their errors evenly."""
    _, group, count = np.unique(-sure, return_inverse=True, return_counts=True)
    even = (np.bincount(group, wrong) / count)[group]
    return np.cumsum(even) / np.arange(1, len(wrong) + 1)
