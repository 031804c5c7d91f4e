"""Temperature and threshold of a fold, both from validation patients only. No torch here."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

TEMPERATURE_BOUNDS = (0.1, 10.0)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / T): (n, C) float64 rows that sum to 1."""
    return softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the validation NLL of softmax(logits / T) (Guo et al. 2017).

    logits (n, C), labels (n,) class indices. A handful of validation patients is often perfectly separated, and then
    the plain NLL sends T to 0 and every probability to 0 or 1. So the targets are smoothed as Platt (1999) does, by one
    pseudo-count per class: (n_c + 1) / (n_c + C) for the true class. With hundreds of patients this changes nothing.
    Dividing by T never changes the predicted order of classes. Returns 1.0 when there is nothing to fit on.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, int)
    if len(labels) == 0 or len(np.unique(labels)) < 2:
        return 1.0
    n_classes = logits.shape[1]
    of_class = np.bincount(labels, minlength=n_classes)[labels].astype(float)
    targets = np.repeat(1 / (of_class + n_classes)[:, None], n_classes, axis=1)
    targets[np.arange(len(labels)), labels] = (of_class + 1) / (of_class + n_classes)

    def nll(log_t: float) -> float:
        return float(-(targets * log_softmax(logits / np.exp(log_t), axis=1)).sum(1).mean())

    bounds = tuple(np.log(TEMPERATURE_BOUNDS))
    return float(np.exp(minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


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
    return float((rankdata(scores)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
