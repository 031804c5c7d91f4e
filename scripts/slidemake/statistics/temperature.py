"""Temperature, intercepts and threshold of a fold, all from validation patients only. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy

TEMPERATURE_BOUNDS = (0.1, 10.0)


def probabilities(logits: np.ndarray, temperature: float = 1.0, intercept: Sequence[float] | float = 0.0) -> np.ndarray:
    """softmax(logits / T + b): (n, C) float64 rows that sum to 1."""
    return scipy.special.softmax(np.asarray(logits, np.float64) / temperature + np.asarray(intercept, float), axis=-1)


def fit_intercepts(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) intercepts b, of sum 0, with which the mean of softmax(logits + b) is the share of every class.

    It is the maximum of the likelihood. Where the loss of training weighted classes, or a model is of another cohort's
    prevalence, this is what makes its probabilities right on average (calibration in the large). A class without any
    of these patients counts as half of one, so that b stays finite.
    """
    logits = np.asarray(logits, np.float64)
    counts = np.maximum(np.bincount(labels, minlength=logits.shape[1]), 0.5)
    shares = counts / counts.sum()
    b = np.log(shares) - np.log(scipy.special.softmax(logits, axis=1).mean(0))
    for _ in range(50):
        p = scipy.special.softmax(logits + b, axis=1)
        slope = p.mean(0) - shares
        if np.abs(slope).max() < 1e-10:
            break
        if len(b) == 2:  # the pseudo-inverse by hand, which is most of a temperature's time else
            bend = 2 * float((p[:, 0] * p[:, 1]).mean())
            step = slope / bend if bend > 1e-300 else np.zeros(2)
        else:
            curve = np.diag(p.mean(0)) - p.T @ p / len(p)
            step = np.linalg.pinv(curve, hermitian=True) @ slope
        b = b - np.clip(step, -2, 2)  # of a nearly separated sample the curvature vanishes
    return np.asarray(b - b.mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float, list[float]]:
    """(T, b) that minimise the validation NLL of softmax(logits / T + b) (Guo et al. 2017, with intercepts).

    logits (n, C), labels (n,) class indices. A handful of validation patients is often perfectly separated, and then
    the plain NLL sends T to 0 and every probability to 0 or 1. So the targets are smoothed as Platt (1999) does, by one
    pseudo-count per class: (n_c + 1) / (n_c + C) for the true class. With hundreds of patients this changes nothing.
    The intercepts are those of `fit_intercepts` at each T. (1, 0) when there is nothing to fit on.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, int)
    n_classes = logits.shape[1]
    if len(labels) == 0 or len(np.unique(labels)) < 2:
        return 1.0, [0.0] * n_classes
    of_class = np.bincount(labels, minlength=n_classes)[labels].astype(float)
    targets = np.repeat(1 / (of_class + n_classes)[:, None], n_classes, axis=1)
    targets[np.arange(len(labels)), labels] = (of_class + 1) / (of_class + n_classes)

    def nll(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        return float(
            -(targets * scipy.special.log_softmax(scaled + fit_intercepts(scaled, labels), axis=1)).sum(1).mean()
        )

    bounds = tuple(np.log(TEMPERATURE_BOUNDS))
    t = float(np.exp(scipy.optimize.minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))
    return t, fit_intercepts(logits / t, labels).tolist()


def youden_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """The threshold on scores (n,) in 0..1 that maximises sensitivity + specificity - 1 for `scores >= threshold`.

    Candidates lie midway between neighbouring scores; of equally good ones the closest to 0.5 is taken. 0.5 when a
    class is missing or no threshold beats chance.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    if not positive.any() or positive.all():
        return 0.5
    values = np.unique(scores)
    middle = (values[1:] + values[:-1]) / 2
    if not len(middle):
        return 0.5
    called = scores[None, :] >= middle[:, None]
    gain = called[:, positive].mean(1) - called[:, ~positive].mean(1)
    if gain.max() <= 0:
        return 0.5
    best = middle[np.isclose(gain, gain.max(), atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve by mid-ranks (ties count half); None when a class is missing."""
    positive = np.asarray(positive, bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0:
        return None
    return float((scipy.stats.rankdata(scores)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
