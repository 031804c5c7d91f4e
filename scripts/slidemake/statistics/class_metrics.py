"""Classification metrics of patients, vectorised over weighted copies of the same patients.

Every metric takes `weights` (B, n): how often each of n patients occurs in each of B resamples. B = 1 with ones gives
the plain figure, B = 2,000 with bootstrap counts gives the interval (`bootstrap.py`): one implementation serves both,
and a resample costs a few array operations instead of a call to scikit-learn.

Conventions. Labels are class indices 0..C-1; with two classes, class 1 is the positive one. With more classes AUROC,
AUPRC, F1, sensitivity, specificity and sensitivity at specificity are macro averages of one-versus-rest. A figure that
is not defined (one class only) is NaN here and None with a reason in files; it is never replaced by 0 or 0.5.

MCC is R_k (Gorodkin 2004), 0 when all decisions are the same class, as in scikit-learn; Cohen's kappa is
1 - sum w o / sum w e over the confusion matrix o and its expectation e, w = 1 off the diagonal or (i - j)^2 for grades.

Formulas: AUROC is the Mann-Whitney statistic with ties counted half; AUPRC is average precision (no interpolation);
Brier is mean (p - y)^2 for two classes and mean sum_c (p_c - y_c)^2 for more (as in scikit-learn); log loss clips at
machine epsilon; ECE = sum_m |B_m|/n |observed - predicted| over bins of P(positive), with more classes over bins of the
top class's confidence (Naeini 2015, Guo 2017).
"""

from __future__ import annotations

import numpy as np

METRICS = (
    "auroc",
    "auprc",
    "balanced_accuracy",
    "f1",
    "sensitivity",
    "specificity",
    "accuracy",
    "mcc",
    "kappa",  # with quadratic weights when the classes are grades
    "sensitivity_at_specificity",  # read off the ROC curve: what the model could do, not what its threshold does
    "brier",
    "log_loss",
    "ece",  # equal-mass bins
    "ece_width",  # equal-width bins
)
LOWER_IS_BETTER = ("brier", "log_loss", "ece", "ece_width")
CHUNK = 4_000_000  # numbers per array while working through draws: bounds memory to some 32 MB an array


TINY = 1e-7  # probability below which the log-loss grows no more


def _ordered_groups(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and of negatives per group of equal scores, scores descending: two (B, groups)."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    w, y = weights[:, order], positive[order]
    of_positives, of_negatives = w * y, w * ~y
    if len(starts) < len(score):
        of_positives = np.add.reduceat(of_positives, starts, axis=1)
        of_negatives = np.add.reduceat(of_negatives, starts, axis=1)
    return of_positives, of_negatives


def auroc_auprc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of each resample: positive (n,) bool, score (n,), weights (B, n) -> two (B,).

    NaN where a resample holds one class only.
    """
    if not len(score):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    pos, neg = _ordered_groups(positive.astype(bool), np.asarray(score, float), weights)
    tp, fp = np.cumsum(pos, axis=1), np.cumsum(neg, axis=1)
    n_pos, n_neg = tp[:, -1], fp[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        # A positive beats the negatives below it (all minus those at or above) and half of those level with it.
        auroc = (pos * (n_neg[:, None] - fp + 0.5 * neg)).sum(1) / (n_pos * n_neg)
        precision = np.where(tp > 0, tp / (tp + fp), 0.0)
        auprc = (pos * precision).sum(1) / n_pos
    auprc[n_neg == 0] = np.nan
    return auroc, auprc


def sensitivity_at(positive: np.ndarray, score: np.ndarray, weights: np.ndarray, specificity: float) -> np.ndarray:
    """Highest sensitivity (B,) of a threshold whose specificity is at least `specificity`; NaN with one class only."""
    if not len(score):
        return np.full(len(weights), np.nan)
    pos, neg = _ordered_groups(positive.astype(bool), np.asarray(score, float), weights)
    tp, fp = np.cumsum(pos, axis=1), np.cumsum(neg, axis=1)
    n_pos, n_neg = tp[:, -1], fp[:, -1]
    allowed = fp <= (1 - specificity) * n_neg[:, None] + 1e-9
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(allowed, tp, 0.0).max(1) / n_pos
    found[n_neg == 0] = np.nan
    return found


def auroc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """AUROC of one sample, None when only one class is present. NaN scores are left out."""
    positive, score = np.asarray(positive, bool), np.asarray(score, float)
    known = np.isfinite(score)
    value = auroc_auprc(positive[known], score[known], np.ones((1, int(known.sum()))))[0][0]
    return float(value) if np.isfinite(value) else None


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray) -> np.ndarray:
    """Confusion matrices (B, classes, classes): rows are true classes, columns decisions."""
    cell = np.zeros((len(labels), classes * classes))
    cell[np.arange(len(labels)), labels * classes + predicted] = 1.0
    return (weights @ cell).reshape(-1, classes, classes)


def _mcc(matrix: np.ndarray) -> np.ndarray:
    total, right = matrix.sum((1, 2)), np.trace(matrix, axis1=1, axis2=2)
    actual, called = matrix.sum(2), matrix.sum(1)
    spread_actual, spread_called = total**2 - (actual**2).sum(1), total**2 - (called**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (right * total - (actual * called).sum(1)) / np.sqrt(spread_actual * spread_called)
    return np.where(spread_actual <= 0, np.nan, np.where(spread_called <= 0, 0.0, found))


def _kappa(matrix: np.ndarray) -> np.ndarray:
    actual, cost = matrix.sum(2), 1 - np.eye(matrix.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = actual[:, :, None] * matrix.sum(1)[:, None, :] / matrix.sum((1, 2))[:, None, None]
        found = 1 - (cost * matrix).sum((1, 2)) / (cost * expected).sum((1, 2))
    return np.where((actual > 0).sum(1) < 2, np.nan, found)


def _decisions(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Thresholded metrics of confusion matrices (B, C, C)."""
    classes, total = matrix.shape[1], matrix.sum((1, 2))
    tp = np.diagonal(matrix, axis1=1, axis2=2)
    actual, called = matrix.sum(2), matrix.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = tp / actual
        specificity = (total[:, None] - actual - called + tp) / (total[:, None] - actual)
        f1 = np.where(actual > 0, 2 * tp / (actual + called), np.nan)
        figures = {"balanced_accuracy": recall.mean(1), "accuracy": tp.sum(1) / total}
    which = slice(1, 2) if classes == 2 else slice(None)  # two classes: of the positive one
    figures["f1"] = f1[:, which].mean(1)
    figures["sensitivity"] = recall[:, which].mean(1)
    figures["specificity"] = specificity[:, which].mean(1)
    figures |= {"mcc": _mcc(matrix), "kappa": _kappa(matrix)}
    return figures


def confidence_and_hit(labels: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What calibration compares: (P(positive), is positive) for two classes, else (top probability, top is right)."""
    if prob.shape[1] == 2:
        return prob[:, 1], (labels == 1).astype(float)
    return prob.max(1), (prob.argmax(1) == labels).astype(float)


def mass_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each value (n,) int so that bins hold equal numbers; equal values stay together."""
    below = np.searchsorted(np.sort(confidence), confidence, side="left")
    return below * bins // max(1, len(confidence))


def width_bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each value (n,) int with edges i / bins; the last bin includes 1."""
    return np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)


def ece(confidence: np.ndarray, hit: np.ndarray, member: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error (B,) with the bins given by `member`; bins stay those of the full sample."""
    if not len(confidence):
        return np.full(len(weights), np.nan)
    onehot = np.zeros((len(member), int(member.max()) + 1))
    onehot[np.arange(len(member)), member] = np.asarray(hit, float) - confidence
    return np.abs(weights @ onehot).sum(1) / weights.sum(1)


def _probabilistic(labels: np.ndarray, prob: np.ndarray, bins: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    classes, total = prob.shape[1], weights.sum(1)
    truth = np.eye(classes)[labels]
    squared = ((prob - truth) ** 2).sum(1) * (0.5 if classes == 2 else 1.0)
    tiny = np.finfo(float).eps
    surprise = -np.log(np.clip(prob[np.arange(len(labels)), labels], tiny, 1 - tiny))
    confidence, hit = confidence_and_hit(labels, prob)
    with np.errstate(invalid="ignore"):
        return {
            "brier": weights @ squared / total,
            "log_loss": weights @ surprise / total,
            "ece": ece(confidence, hit, mass_bins(confidence, bins), weights),
            "ece_width": ece(confidence, hit, width_bins(confidence, bins), weights),
        }


def _metrics_of_chunk(
    labels: np.ndarray,
    prob: np.ndarray,
    predicted: np.ndarray | None,
    bins: int,
    weights: np.ndarray,
    specificity: float,
    ranks: np.ndarray,
) -> dict[str, np.ndarray]:
    classes = prob.shape[1]
    which = range(classes) if classes > 2 else [1]
    ranked = [auroc_auprc(labels == c, ranks[:, c], weights) for c in which]
    found = {
        "auroc": np.mean([auroc for auroc, _ in ranked], axis=0),
        "auprc": np.mean([auprc for _, auprc in ranked], axis=0),
        "sensitivity_at_specificity": np.mean(
            [sensitivity_at(labels == c, ranks[:, c], weights, specificity) for c in which], axis=0
        ),
        **_probabilistic(labels, prob, bins, weights),
    }
    if predicted is not None:
        found |= _decisions(confusion(labels, predicted, classes, weights))
    return {name: found[name] for name in METRICS if name in found}


def metrics_over(
    labels: np.ndarray,
    prob: np.ndarray,
    predicted: np.ndarray | None,
    bins: int = 15,
    weights: np.ndarray | None = None,
    specificity: float = 0.9,
    ranks: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """All metrics for every row of `weights`.

    labels (n,) int; prob (n, C) rows summing to 1; predicted (n,) int, the decisions at the thresholds that the models
    brought along, or None to leave the thresholded metrics out; weights (B, n), default one row of ones; specificity
    at which sensitivity is read off the ROC curve; ranks (n, C): what patients are ranked by, if not by prob.
    Returns {metric: (B,) float64}, NaN where undefined.
    """
    labels, prob = np.asarray(labels, int), np.asarray(prob, float)
    ranks = prob if ranks is None else np.asarray(ranks, float)
    weights = np.ones((1, len(labels))) if weights is None else weights
    step = max(1, CHUNK // max(1, len(labels)))
    parts = [
        _metrics_of_chunk(
            labels, prob, predicted, bins, weights[start : start + step].astype(float), specificity, ranks
        )
        for start in range(0, len(weights), step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def why_undefined(metric: str, labels: np.ndarray, class_names: list[str]) -> str | None:
    """Why `metric` has no value for these true labels (class indices), or None when it has one."""
    counts = np.bincount(np.asarray(labels, int), minlength=len(class_names))
    if not counts.sum():
        return "no patients"
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if not absent or metric in ("accuracy", *LOWER_IS_BETTER):
        return None
    if len(class_names) == 2:
        needs = {"sensitivity": (1,), "f1": (1,), "specificity": (0,)}.get(metric, (0, 1))
        if all(counts[c] for c in needs):
            return None
    return f"no patient of class {', '.join(absent)} among {int(counts.sum())}"


def log_loss(of_label: np.ndarray) -> float:
    """Mean log-loss from the probabilities that were given to what came true."""
    return float(-np.log(np.clip(of_label, TINY, 1)).mean())
