"""Are predicted survival probabilities right? At every horizon, over all patients and at every site.

At a horizon t, `expected` is the mean predicted probability of the event by t, 1 - S(t), and `observed` what the
Kaplan-Meier estimate says of the same patients, with Greenwood's log-log interval. Their ratio is 1 where the model is
right on average (calibration in the large); above 1 it underestimates. Groups of equal size by predicted probability,
each with a Kaplan-Meier estimate of its own, show where it is off; `ece` is the mean distance over patients. `slope` is
the coefficient of log(-log S(t)) in a Cox model of the follow-up until t: 1 is right, below 1 the predictions are too
extreme. Royston and Altman 2013, BMC Med Res Methodol 13:33; Austin, Harrell, van Klaveren 2020, Stat Med 39:2714;
McLernon et al. 2023, Ann Intern Med 176:105.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from slidemake.calibration_report import MIN_PATIENTS, mean_over_repeats
from slidemake.metrics import mass_bins
from slidemake.outcome_table import OutcomeTable
from slidemake.reliability import CLIP
from slidemake.survival import RiskSets, kaplan_meier

MOST_GROUPS = 10
PER_GROUP = 5  # events by the horizon that a group should hold on average: fewer groups where there are few
STEEPEST = 20.0  # a slope beyond is an infinite one


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
    """1 - Kaplan-Meier at t with its interval; None where nobody was followed so far and not all have the event."""
    curve = kaplan_meier(time, event)
    at = int(np.searchsorted(curve["time"], t, side="right")) - 1
    if curve["time"][-1] < t and curve["survival"][-1] > 0:
        return {"observed": None, "low": None, "high": None}
    survival, low, high = (curve[key][at] for key in ("survival", "low", "high"))
    return {"observed": 1 - survival, "low": 1 - high, "high": 1 - low}


def _ratio(observed: float | None, expected: float) -> float | None:
    return None if observed is None or expected <= 0 else observed / expected


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


def at_one_horizon(time: np.ndarray, event: np.ndarray, survival: np.ndarray, t: float, most: int) -> dict[str, Any]:
    """Calibration of predicted S(t) (n,) of patients with time (n,) and event (n,) bool, in at most `most` groups.

    `reason` says why observed, ratio and ece are None; `slope_reason` why the slope is.
    """
    expected = float((1 - survival).mean())
    whole, table = _observed(time, event, t), _groups(time, event, 1 - survival, t, most)
    slope, why = calibration_slope(time, event, survival, t)
    known = [row for row in table if row["observed"] is not None]
    patients = sum(row["count"] for row in known)
    distance = sum(row["count"] * abs(row["observed"] - row["predicted"]) for row in known)
    return {
        "n": len(time),
        "events": int((event & (time <= t)).sum()),
        "expected": expected,
        **whole,
        "ratio": _ratio(whole["observed"], expected),
        "ratio_low": _ratio(whole["low"], expected),
        "ratio_high": _ratio(whole["high"], expected),
        "ece": distance / patients if patients and whole["observed"] is not None else None,
        "reason": None if whole["observed"] is not None else f"nobody is followed up to {t:g}",
        "slope": slope,
        "slope_reason": why or None,
        "table": table,
    }


def survival_calibration(table: OutcomeTable, options: dict[str, Any]) -> dict[str, Any]:
    """Calibration of S averaged over repeats at every horizon: `horizons`, and the same per site under `sites`.

    `middle` names the horizon that is spoken of where one has to do. Sites with fewer than 10 patients get a reason
    instead of figures.
    """
    time, event, survival = table.truth[:, 0], table.truth[:, 1] == 1, mean_over_repeats(table.values)[:, 1:]

    def measured(inside: np.ndarray) -> dict[str, Any]:
        return {
            name: at_one_horizon(time[inside], event[inside], survival[inside, h], float(name), options["ece_bins"])
            for h, name in enumerate(table.names)
        }

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
