"""What a decision at a threshold is worth: predictive values, likelihood ratios, net benefit, and thresholds that rule
in or out. Binary outcomes; all intervals are of the models as they were trained.

Sensitivity and specificity are those of the patients at hand (Wilson's intervals). Predictive values depend on how
common the disease is where the model is used: at a stated prevalence p, PPV = se p / (se p + (1 - sp)(1 - p)), with
intervals on the scale of log-odds (Mercaldo, Lau and Zhou 2007, Statistics in Medicine 26:2170). Likelihood ratios have
the intervals of Simel, Samsa and Matchar 1991 (J Clin Epidemiol 44:763). Net benefit is that of Vickers and Elkin 2006
(Medical Decision Making 26:565): at a threshold t, true positives minus false ones times t / (1 - t), both per patient.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from slidemake.statistics.reliability import wilson_interval

Figure = dict[str, float | None]


def _figure(value: float | None, low: float | None, high: float | None) -> Figure:
    return {"value": value, "low": low, "high": high}


def _share(hits: float, count: float, level: float) -> Figure:
    if count <= 0:
        return _figure(None, None, None)
    low, high = wilson_interval(min(round(hits), round(count)), round(count), level)
    return _figure(hits / count, low, high)


def predictive_values(
    counts: tuple[float, float, float, float], prevalence: float | None = None, level: float = 0.95
) -> dict[str, Figure]:
    """Figures of decisions from their counts (true positives, false negatives, false positives, true negatives).

    prevalence: at which PPV and NPV hold; None: of the patients at hand. Counts may be means over repeats. A figure
    that nobody tells (no positive decision, no patient of a class) is None. Intervals of shares are at whole counts.
    """
    tp, fn, fp, tn = counts
    found = {"sensitivity": _share(tp, tp + fn, level), "specificity": _share(tn, tn + fp, level)}
    if prevalence is None:
        found |= {"ppv": _share(tp, tp + fp, level), "npv": _share(tn, tn + fn, level)}
    else:
        found |= _at_prevalence(counts, prevalence, level)
    return found | likelihood_ratios(counts, level)


def _at_prevalence(counts: tuple[float, float, float, float], p: float, level: float) -> dict[str, Figure]:
    """PPV and NPV at prevalence p; half a patient is added to each count where one is 0, for the interval alone."""
    tp, fn, fp, tn = counts
    nothing = _figure(None, None, None)
    if tp + fn <= 0 or fp + tn <= 0 or not 0 < p < 1:
        return {"ppv": nothing, "npv": nothing}
    z = float(norm.ppf((1 + level) / 2))
    se, sp = tp / (tp + fn), tn / (tn + fp)
    ppv = se * p / (se * p + (1 - sp) * (1 - p)) if se * p + (1 - sp) * (1 - p) > 0 else None
    npv = sp * (1 - p) / (sp * (1 - p) + (1 - se) * p) if sp * (1 - p) + (1 - se) * p > 0 else None
    if min(tp, fn, fp, tn) == 0:
        tp, fn, fp, tn = (count + 0.5 for count in counts)
    se, sp, m, n = tp / (tp + fn), tn / (tn + fp), tp + fn, fp + tn
    of_ppv = np.log(se * p / ((1 - sp) * (1 - p))), np.sqrt((1 - se) / (se * m) + sp / ((1 - sp) * n))
    of_npv = np.log(sp * (1 - p) / ((1 - se) * p)), np.sqrt(se / ((1 - se) * m) + (1 - sp) / (sp * n))
    found = {}
    for name, value, (centre, error) in (("ppv", ppv, of_ppv), ("npv", npv, of_npv)):
        low, high = (float(1 / (1 + np.exp(-(centre + side * z * error)))) for side in (-1, 1))
        found[name] = nothing if value is None else _figure(value, min(low, value), max(high, value))
    return found


def likelihood_ratios(counts: tuple[float, float, float, float], level: float = 0.95) -> dict[str, Figure]:
    """How much a positive (negative) decision multiplies the odds of disease; None where it would be infinite."""
    tp, fn, fp, tn = counts
    m, n, z = tp + fn, fp + tn, float(norm.ppf((1 + level) / 2))
    found = {}
    for name, of_positives, of_negatives in (("lr_positive", tp, fp), ("lr_negative", fn, tn)):
        if m <= 0 or n <= 0 or of_negatives <= 0:
            found[name] = _figure(None, None, None)
            continue
        value = (of_positives / m) / (of_negatives / n)
        a, b = (of_positives, of_negatives) if of_positives > 0 else (0.5, of_negatives + 0.5)
        error = np.sqrt(max(0.0, 1 / a - 1 / m) + max(0.0, 1 / b - 1 / n))
        centre = np.log((a / m) / (b / n))
        low, high = float(np.exp(centre - z * error)), float(np.exp(centre + z * error))
        found[name] = _figure(value, min(low, value), max(high, value))
    return found


def net_benefit(positive: np.ndarray, probability: np.ndarray, thresholds: np.ndarray) -> dict[str, list[float]]:
    """Net benefit at thresholds (T,): of treating by the model, of treating everyone (treating nobody has 0)."""
    positive, probability = np.asarray(positive, bool), np.asarray(probability, float)
    n, odds = len(positive), thresholds / (1 - thresholds)
    called = probability[None] >= thresholds[:, None]
    true, false = (called & positive).sum(1) / n, (called & ~positive).sum(1) / n
    share = positive.mean()
    return {
        "threshold": thresholds.tolist(),
        "model": (true - false * odds).tolist(),
        "everyone": (share - (1 - share) * odds).tolist(),
    }


def thresholds_for(
    positive: np.ndarray, score: np.ndarray, sensitivity: float = 0.95, specificity: float = 0.95
) -> dict[str, float | None]:
    """Thresholds (score >= t is called positive): to rule out, the highest that keeps the sensitivity; to rule in, the
    lowest that keeps the specificity. Chosen on validation patients; None where these have one class only."""
    positive, score = np.asarray(positive, bool), np.asarray(score, float)
    x, y = np.sort(score[positive]), np.sort(score[~positive])
    if not len(x) or not len(y):
        return {"rule_out": None, "rule_in": None}
    may_miss = int(np.floor((1 - sensitivity) * len(x) + 1e-9))
    may_call = int(np.floor((1 - specificity) * len(y) + 1e-9))
    above = np.sort(
        score[score > y[len(y) - 1 - may_call]]
    )  # lowest score that is called, if more negatives may not be
    return {"rule_out": float(x[may_miss]), "rule_in": float(above[0]) if len(above) else None}
