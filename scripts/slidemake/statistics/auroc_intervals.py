"""Intervals of an AUROC and of the difference of two, of models as they were trained and of the way they were trained.

Two questions, two intervals. How would these models do on other patients? The variance is that of DeLong, DeLong and
Clarke-Pearson 1988: every patient's share in the AUROC. How would models do that are trained in this way on other
patients, and tested on others? Those models would be others too, and the folds of a cross-validation share training
patients, which no variance between them shows. Nadeau and Bengio 2003 (Machine Learning 52:239) add the ratio of tested
to training patients to the variance; here, to that of DeLong: V (1 + r 4 A (1 - A)), r = tested / training patients of
a repeat (1.25 for five folds). The factor 4 A (1 - A) is not theirs: simulated (`benchmarks/intervals.py`), the part of
training in the variance is as large as r says where models know nothing, and fades as they rank every patient rightly.

Interval. A symmetric one is too short where there are few patients or the AUROC is high, because the variance is then
estimated too small together with an AUROC that is too large. So an AUROC t belongs to the interval when
(A - t)^2 <= q^2 V(t), V(t) = c h(t), h(t) = t (1 - t) (1 + (n/2 - 1) ((1 - t)/(2 - t) + t/(1 + t))) / (n1 n0), which is
Hanley and McNeil's variance as Newcombe 2006 (Statistics in Medicine 25:559, method 5) writes it for n = n1 + n0
patients. c brings it to the variance that was measured: c = (k V/h(A) + 10 d) / (k + 10), and at least V/h(A); k is the
number of patients of the rarer class, d what averaging over repeats (and classes) takes away. The 10 are as good as ten
patients who are spread as h says; q is that of a t with k + 9 degrees of freedom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

PRIOR = 10.0  # patients of the rarer class that h counts as
SHRUNK = 3.0  # ... and that d is brought towards 1 by
STEPS = 60  # of bisection


@dataclass(frozen=True)
class Ranked:
    """An AUROC, mean over repeats (and over classes, each against the rest), with every patient's share in it."""

    value: float
    shares: np.ndarray  # (n,) of each patient, sum 0; their squares add up to the variance
    variance: float  # of the models as they were trained
    single: float  # mean variance of one repeat and class
    counts: tuple[tuple[int, int], ...]  # positives and negatives, of each class against the rest
    parts: int  # repeats times classes

    @property
    def rarest(self) -> int:
        return min(min(pair) for pair in self.counts)

    @property
    def quantile_df(self) -> float:
        return self.rarest - 1 + PRIOR


def structural_components(positive: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUROC, V10 of the positives (in their order) and V01 of the negatives; both classes must be there.

    AUROC is the mean of psi(x_i, y_j) over pairs of a positive x and a negative y, psi = 1, 1/2 or 0 as x is above,
    level with or below y; V10 and V01 are its means over y and over x. Computed by mid-ranks (Sun and Xu 2014).
    """
    x, y = score[positive], score[~positive]
    everyone = rankdata(np.r_[x, y])
    above = (everyone[: len(x)] - rankdata(x)) / len(y)
    below = 1 - (everyone[len(x) :] - rankdata(y)) / len(x)
    return float(above.mean()), above, below


def _shares_of_one(positive: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
    """AUROC and shares (n,) of one repeat, whose squares add up to DeLong's variance."""
    value, above, below = structural_components(positive, score)
    shares = np.empty(len(score))
    for inside, part in ((positive, above), (~positive, below)):
        count = len(part)
        shares[inside] = (part - value) / count * np.sqrt(count / max(1, count - 1))
    return value, shares


def ranked(labels: np.ndarray, scores: np.ndarray, classes: int = 2) -> Ranked | None:
    """The mean AUROC of repeats: labels (n,) class indices, scores (R, n) for the positive class or (R, n, C) for each.

    NaN: not tested in that repeat. None where a repeat, or a class, has no value.
    """
    labels, scores = np.asarray(labels, int), np.asarray(scores, float)
    which = [1] if classes == 2 else list(range(classes))
    if scores.ndim == 2:
        scores = scores[..., None]
    columns = [scores[..., -1]] if classes == 2 else [scores[..., c] for c in which]
    values, total, singles, counts = [], np.zeros(len(labels)), [], []
    for c, column in zip(which, columns, strict=True):
        seen = np.isfinite(column)
        inside = (labels == c) & seen.any(0)
        counts.append((int(inside.sum()), int((seen.any(0) & ~inside).sum())))
        for row, known in zip(column, seen, strict=True):
            positive = labels[known] == c
            if not positive.any() or positive.all():
                return None
            value, shares = _shares_of_one(positive, row[known])
            values.append(value)
            singles.append(float((shares**2).sum()))
            total[known] += shares
    shares = total / len(values)
    variance = float((shares**2).sum())
    return Ranked(float(np.mean(values)), shares, variance, float(np.mean(singles)), tuple(counts), len(values))


def _shape(t: np.ndarray | float, counts: tuple[tuple[int, int], ...]) -> Any:
    """h(t), mean over classes."""
    parts = [t * (1 - t) * (1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n) for m, n in counts]
    return sum(parts) / len(parts)


def _scale(a: Ranked) -> float:
    """c, what h is multiplied by."""
    k = a.rarest if a.rarest > 1 else 0  # one patient has no variance
    gain = min(1.0, max(1 / a.parts, a.variance / a.single)) if a.single > 0 else 1.0
    gain = (k * gain + SHRUNK) / (k + SHRUNK)
    measured = a.variance / _shape(min(max(a.value, 1e-6), 1 - 1e-6), a.counts) if k else 0.0
    return max((k * measured + PRIOR * gain) / (k + PRIOR), measured)


def training_part(value: float | np.ndarray, tested_to_trained: float) -> Any:
    """What the variance is multiplied by where the question is about other training patients, too."""
    return 1 + tested_to_trained * 4 * value * (1 - value)


def auroc_interval(a: Ranked, level: float = 0.95, tested_to_trained: float = 0.0) -> tuple[float, float]:
    """Interval of the AUROC of models as they were trained (0) or of the way they were trained (tested to training
    patients of a repeat)."""
    scale, q = _scale(a), float(student.ppf((1 + level) / 2, a.quantile_df))

    def outside(t: float) -> bool:
        allowed = q * q * scale * _shape(t, a.counts) * training_part(t, tested_to_trained)
        return bool((a.value - t) ** 2 > allowed)

    ends = []
    for far in (0.0, 1.0):
        near = a.value
        for _ in range(STEPS):
            middle = (far + near) / 2
            if outside(middle):
                far = middle
            else:
                near = middle
        ends.append(near)
    return ends[0], ends[1]


def auroc_log_odds(a: Ranked) -> tuple[float, float]:
    """The log-odds of an AUROC and their variance, for pooling over sites. Where all patients are ranked rightly, or
    wrongly, half a patient of the rarer class is taken for not."""
    edge = 0.5 / (a.rarest + 1)
    t = min(max(a.value, edge), 1 - edge)
    return float(np.log(t / (1 - t))), float(_scale(a) * _shape(t, a.counts) / (t * (1 - t)) ** 2)


def auroc_difference(
    first: Ranked, second: Ranked, level: float = 0.95, tested_to_trained: float = 0.0
) -> dict[str, float | None]:
    """Difference of two AUROCs on the same patients: {difference, low, high, se, z, p}, p two-sided.

    Paired by DeLong; with `tested_to_trained` it is about procedures. Equal scores give a difference of 0 and p = 1. A
    standard error of 0 with a difference (both perfect, or constant) gives no p; a class of one patient no error.
    """
    difference = first.value - second.value
    nothing = {"low": None, "high": None, "se": None, "z": None, "p": None}
    if min(first.rarest, second.rarest) < 2:
        return {"difference": difference, **nothing}
    variance = float(((first.shares - second.shares) ** 2).sum())
    variance *= training_part((first.value + second.value) / 2, tested_to_trained)
    error = float(np.sqrt(variance))
    if error < 1e-12:
        same = abs(difference) < 1e-12
        return {"difference": difference, **nothing, "se": 0.0, "p": 1.0 if same else None}
    df = first.quantile_df
    z, q = difference / error, float(student.ppf((1 + level) / 2, df))
    ends = {"low": max(-1.0, difference - q * error), "high": min(1.0, difference + q * error)}
    return {"difference": difference, **ends, "se": error, "z": z, "p": float(2 * student.sf(abs(z), df))}
