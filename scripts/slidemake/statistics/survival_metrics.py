"""Metrics of survival predictions, vectorised over weighted copies of the same patients (see `metrics.py`).

time (n,), event (n,) bool, risk (n,) higher = earlier event, survival (n, H) = predicted S at the horizons (H,),
weights (B, n): how often each patient is in each of B resamples. Censoring is weighed by the inverse of the probability
of being uncensored (IPCW), estimated by Kaplan-Meier anew in every resample and just before each event. Figures that
are not defined are NaN here and None with a reason in files.

c_index   Harrell's C (1982): of the pairs of which one is known to have the event first, the share ranked right
c_uno     Uno's C (2011): the same with IPCW, for events before the last horizon; does not depend on the censoring
td_auc    cumulative/dynamic AUC with IPCW (Uno 2007; Hung and Chiang 2010), mean over the horizons
ibs       integrated Brier score with IPCW (Graf 1999), trapezoids over the horizons; 0.25 is a coin's

c_index, c_uno and td_auc rank patients, and compare those of one `group` only, the fold in which they were tested (all
pairs of all folds weigh the same). The risk of another fold has another baseline hazard, estimated without the fold's
own patients: where they live longer than the rest by chance, the rest predicts them shorter. Ranked across folds, a
model that knows nothing comes out below 0.5 (Parker, Guenter, Bedo 2007, BMC Bioinformatics 8:326).
"""

from __future__ import annotations

import numpy as np

from slidemake.statistics.survival import censoring_survival

METRICS = ("c_index", "c_uno", "td_auc", "ibs")
LOWER_IS_BETTER = ("ibs",)
PAIRS = 25_000_000  # pairs of patients for which matrices are formed at once


def _pairs(
    time: np.ndarray, event: np.ndarray, risk: np.ndarray, rows: slice, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For patients i in `rows` and all j of the same group: whether i is known to come first (r, n), and that times
    what ranks it so."""
    t, e, r = time[rows, None], event[rows, None], risk[rows, None]
    comparable = e & ((t < time) | ((t == time) & ~event))
    if groups is not None:
        comparable &= groups[rows, None] == groups
    agree = comparable * ((r > risk) + 0.5 * (r == risk))
    return comparable.astype(np.float32), agree.astype(np.float32)


def weighted_concordance(
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """(B,) sum over pairs of first_i second_j agree_ij / the same of comparable pairs; first, second (B, n).

    groups (n,): pairs are of one group each; None: of any two patients.
    """
    numerator, denominator = np.zeros(len(first)), np.zeros(len(first))
    step = max(1, PAIRS // max(1, len(time)))
    for start in range(0, len(time), step):
        rows = slice(start, start + step)
        comparable, agree = _pairs(time, event, risk, rows, groups)
        weighed = first[:, rows].astype(np.float32)
        numerator += ((weighed @ agree).astype(float) * second).sum(1)
        denominator += ((weighed @ comparable).astype(float) * second).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def concordance(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float | None:
    """Harrell's C of one sample; None when no two patients can be compared."""
    ones = np.ones((1, len(time)))
    value = weighted_concordance(time, event, np.asarray(risk, float), ones, ones)[0] if len(time) else np.nan
    return float(value) if np.isfinite(value) else None


class Censoring:
    """The probability of being uncensored in every resample: just before each patient's time, and at any time."""

    def __init__(self, time: np.ndarray, event: np.ndarray, weights: np.ndarray):
        self.times, after = censoring_survival(time, event, weights)
        self.after = np.concatenate([np.ones((len(weights), 1)), after], axis=1)
        self.before_each = self.after[:, np.searchsorted(self.times, time, side="left")]

    def at(self, t: float) -> np.ndarray:
        return self.after[:, np.searchsorted(self.times, t, side="right")]


def _inverse(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(probability > 0, 1 / probability, 0.0)


def auc_at(
    t: float,
    time: np.ndarray,
    event: np.ndarray,
    marker: np.ndarray,
    weights: np.ndarray,
    censoring: Censoring,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """(B,) probability that a patient with the event by t has a higher marker than one without it at t, both of one
    group (n,)."""
    cases = weights * (event & (time <= t)) * _inverse(censoring.before_each)
    controls = weights * (time > t)
    agree, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for members in _members(groups, len(time)):
        order = members[np.argsort(-marker[members], kind="stable")]
        starts = np.flatnonzero(np.r_[True, marker[order][1:] != marker[order][:-1]])
        case = np.add.reduceat(cases[:, order], starts, axis=1)
        control = np.add.reduceat(controls[:, order], starts, axis=1)
        below = control.sum(1)[:, None] - np.cumsum(control, axis=1) + 0.5 * control
        agree += (case * below).sum(1)
        pairs += case.sum(1) * control.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, agree / pairs, np.nan)


def _members(groups: np.ndarray | None, n: int) -> list[np.ndarray]:
    """Indices of the patients of each group."""
    return [np.arange(n)] if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]


def brier_at(
    t: float, time: np.ndarray, event: np.ndarray, survival: np.ndarray, weights: np.ndarray, censoring: Censoring
) -> np.ndarray:
    """(B,) squared error of the predicted S(t) (n,), censored patients weighed by IPCW."""
    died = (event & (time <= t)) * survival**2 * _inverse(censoring.before_each)
    alive = (time > t) * (1 - survival) ** 2 * _inverse(censoring.at(t))[:, None]
    known = (weights * (time > t)).sum(1) > 0  # nobody left: nothing says how many would be alive
    value = (weights * (died + alive)).sum(1) / weights.sum(1)
    return np.where(known, value, np.nan)


def at_horizon(metric: str, horizon: float) -> str:
    """Name of a metric at one horizon, such as `td_auc@24`."""
    return f"{metric}@{horizon:g}"


def metrics_over(
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    survival: np.ndarray,
    horizons: tuple[float, ...],
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """METRICS, and td_auc and brier at each horizon, for every row of `weights` (default: one row of ones).

    groups (n,): the fold of each patient; None where all were predicted by the same model. A mean over horizons is over
    those at which the plain sample has a value.
    """
    n = len(time)
    weights = np.ones((1, n)) if weights is None else np.asarray(weights, float)
    ones = np.ones((1, n))
    plain, censoring = Censoring(time, event, ones), Censoring(time, event, weights)
    early = event & (time < horizons[-1])
    found = {
        "c_index": weighted_concordance(time, event, risk, weights, weights, groups),
        "c_uno": weighted_concordance(
            time, event, risk, weights * early * _inverse(censoring.before_each) ** 2, weights, groups
        ),
    }
    aucs, briers, used_auc, used = [], [], [], []
    for h, t in enumerate(horizons):
        aucs.append(auc_at(t, time, event, 1 - survival[:, h], weights, censoring, groups))
        briers.append(brier_at(t, time, event, survival[:, h], weights, censoring))
        used_auc.append(bool(np.isfinite(auc_at(t, time, event, 1 - survival[:, h], ones, plain, groups)[0])))
        used.append(bool(np.isfinite(brier_at(t, time, event, survival[:, h], ones, plain)[0])))
    nothing = np.full(len(weights), np.nan)
    found["td_auc"] = _mean([a for a, u in zip(aucs, used_auc, strict=True) if u], nothing)
    found["ibs"] = _integral(np.array(horizons)[used], [b for b, u in zip(briers, used, strict=True) if u], nothing)
    found |= {at_horizon("td_auc", t): a for t, a in zip(horizons, aucs, strict=True)}
    return found | {at_horizon("brier", t): b for t, b in zip(horizons, briers, strict=True)}


def _mean(values: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    """(B,) mean over horizons; in a resample over those that it has cases and controls for."""
    if not values:
        return nothing
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def _integral(at: np.ndarray, values: list[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    if not len(at):
        return nothing
    if len(at) == 1:
        return values[0]
    return np.trapezoid(np.array(values), at, axis=0) / (at[-1] - at[0])


def why_undefined(
    metric: str, time: np.ndarray, event: np.ndarray, horizons: tuple[float, ...], groups: np.ndarray | None = None
) -> str | None:
    """Why `metric` has no value for these patients, or None when it has one."""
    if not len(time):
        return "no patients"
    if not event.any() and not metric.startswith(("ibs", "brier")):
        return f"all {len(time)} patients are censored"
    name, _, at = metric.partition("@")
    within = "" if groups is None or len(np.unique(groups)) < 2 else " within a fold"
    if name in ("c_index", "c_uno"):
        early = event & (time < horizons[-1]) if name == "c_uno" else event
        if not early.any():
            return f"no event before {horizons[-1]:g}"
        comparable = _pairs(time, event, np.zeros(len(time)), slice(None), groups)[0]
        return None if comparable[early].any() else f"no two patients{within} whose order is known"
    for t in [float(at)] if at else horizons:
        if name != "td_auc":
            missing = "" if (time > t).any() else "patient known to be without the event"
        else:
            missing = _no_pairs(t, time, event, groups)
        if not missing:
            return None
    where = f"at {at}" if at else "at any horizon"
    return f"no {missing}{within if name == 'td_auc' else ''} {where}"


def _no_pairs(t: float, time: np.ndarray, event: np.ndarray, groups: np.ndarray | None) -> str:
    """What is missing for an AUC at t in every group; empty where one has it all."""
    died, alive = event & (time <= t), time > t
    if not died.any():
        return "event"
    if not alive.any():
        return "patient known to be without the event"
    both = any(died[members].any() and alive[members].any() for members in _members(groups, len(time)))
    return "" if both else "event beside a patient known to be without it"
