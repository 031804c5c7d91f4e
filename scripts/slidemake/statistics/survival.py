"""Survival analysis on arrays: Kaplan-Meier, Breslow's baseline, the partial likelihood, log-rank. No torch.

Everywhere: time (n,) float at which a patient was last known, event (n,) bool whether the event happened then (else
censored). Of events and censorings at one time, the events come first. Every estimator takes weights (B, n), how often
each patient is in each of B resamples, so that the bootstrap is a few array operations. Kaplan-Meier and log-rank of a
single sample stand here too, a dozen lines each: lifelines, which the tests compare all of this with, brings pandas and
matplotlib into every job that it is imported in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy

SLOPE_BOUNDS = (0.02, 5.0)


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> dict[str, list[float]]:
    """Survival after each distinct time, beginning with 1 at time 0, with Greenwood's log-log 95 % interval.

    Kaplan and Meier 1958. Keys: time, survival, low, high (equal to survival where undefined), at_risk (just before).
    """
    times, events = np.asarray(time, float), np.asarray(event, bool)
    points: dict[str, list[float]] = {"time": [0.0], "survival": [1.0], "low": [1.0], "high": [1.0]}
    points["at_risk"] = [float(len(times))]
    survival, variance = 1.0, 0.0
    for t in np.unique(times):
        at_risk, died = int((times >= t).sum()), int((events & (times == t)).sum())
        survival *= 1 - died / at_risk
        if died and at_risk > died:
            variance += died / (at_risk * (at_risk - died))
        low = high = survival
        if 0 < survival < 1:
            width = scipy.stats.norm.ppf(0.975) * np.sqrt(variance) / np.log(survival)
            low, high = sorted((survival ** np.exp(width), survival ** np.exp(-width)))
        row = (float(t), survival, float(low), float(high), float(at_risk))
        for key, value in zip(points, row, strict=True):
            points[key].append(value)
    return points


def step(times: np.ndarray, values: np.ndarray, at: np.ndarray, before: float = 1.0) -> np.ndarray:
    """A right-continuous step function with `values` from each of the sorted `times` on, evaluated at `at`."""
    place = np.searchsorted(times, at, side="right")
    return np.concatenate([[before], values])[place]


def median_follow_up(time: np.ndarray, event: np.ndarray) -> float | None:
    """Median time under observation by the reverse Kaplan-Meier estimator (Schemper and Smith 1996), or None."""
    curve = kaplan_meier(time, ~np.asarray(event, bool))
    below = [t for t, s in zip(curve["time"], curve["survival"], strict=True) if s <= 0.5]
    return below[0] if below else None


def censoring_survival(time: np.ndarray, event: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier of being uncensored: distinct times (m,) and G after each of them (B, m), for weights (B, n)."""
    times, group = np.unique(time, return_inverse=True)
    counts = np.zeros((2, len(weights), len(times)))
    for kind in (0, 1):
        chosen = np.asarray(event, bool) == bool(kind)
        onehot = np.zeros((int(chosen.sum()), len(times)))
        onehot[np.arange(len(onehot)), group[chosen]] = 1.0
        counts[kind] = weights[:, chosen] @ onehot
    censored, died = counts
    total = censored + died
    at_risk = np.cumsum(total[:, ::-1], axis=1)[:, ::-1] - died  # events at a time leave before its censorings
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.where(at_risk > 0, 1 - censored / at_risk, 1.0)
    return times, np.cumprod(factor, axis=1)


def log_rank(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """Log-rank test of two groups (Mantel 1966), with Peto's hazard ratio of `high` (n,) bool against the rest.

    {p, chi_square, hazard_ratio, low, high, reason}: None with a reason when one group is empty or nothing happened
    while both were at risk.
    """
    none = {"p": None, "chi_square": None, "hazard_ratio": None, "low": None, "high": None}
    high = np.asarray(high, bool)
    if high.all() or not high.any():
        return none | {"reason": f"all patients are in the {'high' if high.all() else 'low'}-risk group"}
    observed_less_expected = variance = 0.0
    for t in np.unique(time[event]):
        at_risk, died = time >= t, event & (time == t)
        n, d, n1 = at_risk.sum(), died.sum(), (at_risk & high).sum()
        observed_less_expected += (died & high).sum() - d * n1 / n
        if n > 1:
            variance += d * (n1 / n) * (1 - n1 / n) * (n - d) / (n - 1)
    if variance <= 0:
        return none | {"reason": "no event happened while both groups were at risk"}
    chi_square = float(observed_less_expected**2 / variance)
    log_hr, half = observed_less_expected / variance, scipy.stats.norm.ppf(0.975) / np.sqrt(variance)
    hr, low, up = (float(np.exp(v)) for v in (log_hr, log_hr - half, log_hr + half))
    p = float(scipy.stats.chi2.sf(chi_square, 1))
    return {"p": p, "chi_square": chi_square, "hazard_ratio": hr, "low": low, "high": up, "reason": None}


# -- proportional hazards ------------------------------------------------------------------------------------------


class RiskSets:
    """Who was at risk when, of a set of patients; ties by Efron's method.

    The negative log partial likelihood of log-hazards eta (n,) and its gradient, both over full risk sets:
    - sum_events (eta_i - log(sum_{j: t_j >= t_i} e^eta_j - l/d sum_{tied events} e^eta_j)). Cox 1972; Efron 1977.
    """

    def __init__(self, time: np.ndarray, event: np.ndarray):
        self.event = np.asarray(event, bool)
        self.times, self.group = np.unique(np.asarray(time, float), return_inverse=True)
        self.deaths = np.bincount(self.group[self.event], minlength=len(self.times))
        at = np.repeat(np.arange(len(self.times)), self.deaths)  # one term for each event
        self.term_group = at
        self.term_share = np.concatenate([np.arange(d) / d for d in self.deaths if d] or [np.empty(0)])

    @property
    def events(self) -> int:
        return int(self.event.sum())

    def _terms(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        shift = float(eta.max(initial=0.0))
        hazard = np.exp(np.maximum(eta - shift, -500.0))
        size = len(self.times)
        at_risk = np.cumsum(np.bincount(self.group, hazard, size)[::-1])[::-1]
        tied = np.bincount(self.group[self.event], hazard[self.event], size)
        denominator = at_risk[self.term_group] - self.term_share * tied[self.term_group]
        return hazard, np.maximum(denominator, 1e-300), tied, shift

    def loss(self, eta: np.ndarray) -> float:
        """Negative log partial likelihood (a sum over events)."""
        _, denominator, _, shift = self._terms(np.asarray(eta, float))
        return float((np.log(denominator) + shift).sum() - np.asarray(eta, float)[self.event].sum())

    def gradient(self, eta: np.ndarray) -> np.ndarray:
        """(n,) derivative of `loss` by every patient's eta."""
        hazard, denominator, _, _ = self._terms(np.asarray(eta, float))
        size = len(self.times)
        whole = np.bincount(self.term_group, 1 / denominator, size)
        share = np.bincount(self.term_group, self.term_share / denominator, size)
        gradient = hazard * np.cumsum(whole)[self.group] - self.event
        gradient[self.event] -= (hazard * share[self.group])[self.event]
        return gradient

    def baseline(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Breslow's cumulative baseline hazard: event times (m,) and its value from each on (m,)."""
        hazard = np.exp(np.asarray(eta, float))
        at_risk = np.cumsum(np.bincount(self.group, hazard, len(self.times))[::-1])[::-1]
        happened = self.deaths > 0
        return self.times[happened], np.cumsum(self.deaths[happened] / np.maximum(at_risk[happened], 1e-300))


def fit_slope(eta: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """The factor on held-out log-hazards that maximises their partial likelihood, kept within 0.02 to 5.

    Below 1 the model was too sure of itself. A penalty worth one event towards 1 (on the log scale) keeps small
    validation sets from extremes; without an event, or with equal values, it is 1.
    """
    sets = RiskSets(time, event)
    if not sets.events or np.ptp(eta) < 1e-12:
        return 1.0
    bounds = tuple(np.log(SLOPE_BOUNDS))
    found = scipy.optimize.minimize_scalar(
        lambda s: sets.loss(np.exp(s) * eta) + 0.5 * s * s, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))


# -- discrete time -------------------------------------------------------------------------------------------------


def time_edges(time: np.ndarray, event: np.ndarray, bins: int) -> list[float]:
    """Edges of `bins` intervals from 0: quantiles of the times of events, the last at the longest time seen.

    Fewer where times are tied. An interval holds its upper edge; the last is open.
    """
    happened = np.asarray(time, float)[np.asarray(event, bool)]
    inner = np.unique(np.quantile(happened, np.arange(1, bins) / bins)) if len(happened) else np.empty(0)
    longest = float(np.max(time))
    inner = inner[(inner > 0) & (inner < longest)]
    return [0.0, *inner.tolist(), max(longest, 1e-9)]


def time_bins(time: np.ndarray, edges: list[float]) -> np.ndarray:
    """Interval (n,) 0..K-1 of each time."""
    return np.searchsorted(np.asarray(edges[1:-1]), time, side="left")


def discrete_survival(hazards: np.ndarray, edges: list[float], at: np.ndarray) -> np.ndarray:
    """S at the times `at` from hazards (K,) of the intervals, at a constant rate within each; level after the last."""
    total = np.concatenate([[0.0], np.cumsum(-np.log1p(-np.minimum(hazards, 1 - 1e-12)))])
    return np.exp(-np.interp(at, edges, total))
