"""Are predicted survival probabilities right? At every horizon, over all patients and at every site.

At a horizon t, `expected` is the mean predicted probability of the event by t, 1 - S(t), and `observed` what the
Kaplan-Meier estimate says of the same patients, with Greenwood's log-log interval (where nobody or everybody had the
event and Greenwood's has no width, with that of a binomial share). Calibration in the large is `ratio`: the events seen
by t over `expected_events`, the sum of the predicted cumulative hazards of all patients up to t or to the end of their
own follow-up. If the predictions are right, the difference of the two is a martingale with that sum as its variance, so
the count is taken for a Poisson one and the ratio has the exact interval, which also lives at no event at all (Garwood
1936, Biometrika 28:437; Berry 1983, Biometrics 39:173). Above 1 the model underestimates. Groups of equal size by
predicted probability, each with a Kaplan-Meier estimate of its own, show where it is off; `ece` is the mean distance
over patients. `slope` is the coefficient of log(-log S(t)) in a Cox model of the follow-up until t: 1 is right, below 1
the predictions are too extreme. Royston and Altman 2013, BMC Med Res Methodol 13:33; Austin, Harrell, van Klaveren
2020, Stat Med 39:2714; McLernon et al. 2023, Ann Intern Med 176:105.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, chi2

from slidemake.evaluation.probabilities.calibration import MIN_PATIENTS, mean_over_repeats
from slidemake.statistics.class_metrics import mass_bins
from slidemake.statistics.reliability import CLIP
from slidemake.statistics.survival import RiskSets, kaplan_meier
from slidemake.tasks.base import Predictions

MOST_GROUPS = 10
PER_GROUP = 5  # events by the horizon that a group should hold on average: fewer groups where there are few
STEEPEST = 20.0  # a slope beyond is an infinite one
LEVEL = 0.95


def calibration_slope(time: np.ndarray, event: np.ndarray, survival: np.ndarray, t: float) -> tuple[float | None, str]:
    """(slope, why it has none) of predicted S(t) (n,) on the follow-up until t."""
    seen, until = event & (time <= t), np.minimum(time, t)
    if not seen.any():
        return None, f"no event by {t:g}"
    hazard = np.log(-np.log(np.clip(survival, CLIP, 1 - CLIP)))
    if np.ptp(hazard) < 1e-9:
        return None, "all predictions are equal"
    hazard -= hazard.mean()
    sets = RiskSets(until, seen)
    found = minimize_scalar(
        lambda b: sets.loss(b * hazard), bounds=(-STEEPEST, STEEPEST), method="bounded", options={"xatol": 1e-7}
    )
    if abs(found.x) > 0.99 * STEEPEST:
        return None, "predictions rank the events perfectly: the slope is infinite"
    return float(found.x), ""


def _observed(time: np.ndarray, event: np.ndarray, t: float) -> dict[str, float | None]:
    """1 - Kaplan-Meier at t with its interval; None where nobody was followed so far and not all have the event.

    Greenwood's interval of a curve at 1 or 0 has no width, as if it were certain. There the exact one of a share of the
    patients who were at risk to the end is taken.
    """
    curve = kaplan_meier(time, event)
    at = int(np.searchsorted(curve["time"], t, side="right")) - 1
    if curve["time"][-1] < t and curve["survival"][-1] > 0:
        return {"observed": None, "low": None, "high": None}
    survival, low, high = (curve[key][at] for key in ("survival", "low", "high"))
    if survival in (0.0, 1.0):
        followed = int((time >= t).sum()) if survival == 1 else int(event.sum())
        exact = binomtest(0 if survival == 1 else followed, max(followed, 1)).proportion_ci(LEVEL)
        return {"observed": 1 - survival, "low": float(exact.low), "high": float(exact.high)}
    return {"observed": 1 - survival, "low": 1 - high, "high": 1 - low}


def expected_events(time: np.ndarray, survival: np.ndarray, horizons: np.ndarray, t: float) -> float:
    """Sum over patients of the predicted cumulative hazard -log S up to t or to the end of their follow-up, time (n,).

    survival (n, H) at the horizons (H,), ascending. Between horizons the hazard is constant.
    """
    grid = np.concatenate([[0.0], horizons])
    hazard = np.concatenate([np.zeros((len(time), 1)), -np.log(np.clip(survival, CLIP, 1.0))], 1)
    hazard = np.maximum.accumulate(hazard, axis=1)
    until = np.minimum(time, t)
    after = np.clip(np.searchsorted(grid, until, side="left"), 1, len(grid) - 1)
    rows = np.arange(len(time))
    before, rate = hazard[rows, after - 1], hazard[rows, after] - hazard[rows, after - 1]
    return float((before + rate * (until - grid[after - 1]) / (grid[after] - grid[after - 1])).sum())


def poisson_ratio(events: int, expected: float) -> tuple[float | None, float | None, float | None]:
    """events / expected with the exact Poisson interval of the count (Garwood 1936); None where nothing is expected."""
    if expected <= 0:
        return None, None, None
    tail = (1 - LEVEL) / 2
    low = float(chi2.ppf(tail, 2 * events)) / 2 if events else 0.0
    return events / expected, low / expected, float(chi2.ppf(1 - tail, 2 * events + 2)) / 2 / expected


def _groups(time: np.ndarray, event: np.ndarray, risk: np.ndarray, t: float, most: int) -> list[dict[str, Any]]:
    """Predicted against observed of groups of equal size by predicted risk (n,)."""
    seen = event & (time <= t)
    member = mass_bins(risk, max(2, min(most, MOST_GROUPS, int(seen.sum()) // PER_GROUP)))
    rows = []
    for index in np.unique(member):
        inside = member == index
        rows.append(
            {
                "from": float(risk[inside].min()),
                "to": float(risk[inside].max()),
                "predicted": float(risk[inside].mean()),
                **_observed(time[inside], event[inside], t),
                "count": int(inside.sum()),
                "events": int(seen[inside].sum()),
            }
        )
    return rows


def at_one_horizon(
    time: np.ndarray, event: np.ndarray, survival: np.ndarray, horizons: np.ndarray, t: float, most: int
) -> dict[str, Any]:
    """Calibration of predicted S (n, H) at t, one of the horizons (H,), in at most `most` groups.

    time (n,) and event (n,) bool are the patients' follow-up. `reason` says why observed and ece are None;
    `slope_reason` why the slope is. `ratio` needs no one to be followed up to t.
    """
    at_t = survival[:, int(np.flatnonzero(horizons == t)[0])]
    whole, table = _observed(time, event, t), _groups(time, event, 1 - at_t, t, most)
    slope, why = calibration_slope(time, event, at_t, t)
    known = [row for row in table if row["observed"] is not None]
    patients = sum(row["count"] for row in known)
    distance = sum(row["count"] * abs(row["observed"] - row["predicted"]) for row in known)
    events, expected = int((event & (time <= t)).sum()), expected_events(time, survival, horizons, t)
    ratio, low, high = poisson_ratio(events, expected)
    return {
        "n": len(time),
        "events": events,
        "expected_events": expected,
        "expected": float((1 - at_t).mean()),
        **whole,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "ece": distance / patients if patients and whole["observed"] is not None else None,
        "reason": None if whole["observed"] is not None else f"nobody is followed up to {t:g}",
        "slope": slope,
        "slope_reason": why or None,
        "table": table,
    }


def survival_calibration(table: Predictions, options: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration of S averaged over repeats at every horizon: `horizons`, and the same per site under `sites`.

    `middle` names the horizon that is spoken of where one has to do. Sites with fewer than 10 patients get a reason
    instead of figures.
    """
    time, event, survival = table.truth[:, 0], table.truth[:, 1] == 1, mean_over_repeats(table.values)[:, 1:]

    horizons = np.array([float(name) for name in table.names])

    def measured(inside: np.ndarray) -> dict[str, Any]:
        of = (time[inside], event[inside], survival[inside], horizons)
        return {name: at_one_horizon(*of, float(name), options["ece_bins"]) for name in table.names}

    sites: dict[str, Any] = {}
    for site in sorted(set(table.sites) - {""}):
        inside = np.array(table.sites) == site
        if (n := int(inside.sum())) < MIN_PATIENTS:
            sites[site] = {"n": n, "horizons": None, "reason": f"{n} patients; {MIN_PATIENTS} are needed"}
        else:
            sites[site] = {"n": n, "horizons": measured(inside), "reason": None}
    return {
        "of": "survival averaged over repeats" if len(table.repeats) > 1 else "survival",
        "middle": table.names[len(table.names) // 2],
        "horizons": measured(np.ones(len(time), bool)),
        "sites": sites,
    }
