"""Calibration of predicted survival against lifelines, by hand, and on simulated patients whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from slidemake.calibration_survival import at_one_horizon, calibration_slope, survival_calibration
from slidemake.evaluation_outcomes import evaluate_tables
from slidemake.outcome_table import OutcomeTable
from slidemake.report_calibration import survival_section

T = 5.0


def simulated(n=400, seed=0, spread=1.0):
    """(time, event, S(T)): exponential times at patients' own rates, censored independently; S is the truth."""
    rng = np.random.default_rng(seed)
    rate = 0.12 * np.exp(spread * rng.normal(size=n))
    died, left = rng.exponential(1 / rate), rng.exponential(12, n)
    return np.minimum(died, left), died <= left, np.exp(-rate * T)


def test_observed_is_lifelines_kaplan_meier():
    time, event, survival = simulated()
    found = at_one_horizon(time, event, survival, T, 5)
    fitter = KaplanMeierFitter().fit(time, event)
    assert found["observed"] == pytest.approx(1 - fitter.survival_function_at_times(T).item())
    low, high = fitter.confidence_interval_[fitter.confidence_interval_.index <= T].iloc[-1]
    assert (found["low"], found["high"]) == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert found["ratio"] == pytest.approx(found["observed"] / (1 - survival).mean())
    worst = found["table"][-1]
    inside = 1 - survival >= worst["from"]
    alone = KaplanMeierFitter().fit(time[inside], event[inside])
    assert worst["observed"] == pytest.approx(1 - alone.survival_function_at_times(T).item())
    assert (worst["count"], worst["events"]) == (inside.sum(), (event & (time <= T))[inside].sum())


@pytest.mark.parametrize("tied", [False, True])
def test_slope_is_that_of_lifelines_cox(tied):
    time, event, survival = simulated(seed=1)
    time = np.ceil(time * 4) / 4 if tied else time
    frame = pd.DataFrame({"t": np.minimum(time, T), "e": event & (time <= T), "x": np.log(-np.log(survival)) / 1.7})
    slope, why = calibration_slope(time, event, np.exp(-np.exp(frame["x"].to_numpy())), T)
    assert slope == pytest.approx(CoxPHFitter().fit(frame, "t", "e").params_["x"], abs=2e-5)
    assert why == ""


def test_what_is_wrong_with_predictions_is_seen():
    time, event, truth = simulated(6000, seed=2, spread=0.5)
    right = at_one_horizon(time, event, truth, T, 10)
    assert right["ratio_low"] < 1 < right["ratio_high"]
    # sd of the slope about 1 / sqrt(events) / sd of log(-log S) = 1 / sqrt(2700) / 0.5 = 0.04, of which 4
    assert right["slope"] == pytest.approx(1, abs=0.16)
    assert right["ece"] < 0.03
    gloomy = at_one_horizon(time, event, truth**2, T, 10)  # twice the hazard: too many events, in the right proportion
    assert gloomy["ratio_high"] < 0.9
    assert gloomy["slope"] == pytest.approx(right["slope"], abs=1e-4)
    hazard = np.log(-np.log(truth))
    extreme = np.exp(-np.exp(hazard.mean() + 2 * (hazard - hazard.mean())))
    # not exactly half: survival below 1e-6 is cut off
    assert at_one_horizon(time, event, extreme, T, 10)["slope"] == pytest.approx(right["slope"] / 2, abs=0.005)
    for wrong in (truth**2, extreme):
        assert at_one_horizon(time, event, wrong, T, 10)["ece"] > right["ece"] + 0.03


def test_by_hand():
    """Eight patients, all followed beyond t = 2, four events by then: two groups of four by predicted risk."""
    time = np.array([1, 1, 1, 3, 1, 3, 3, 3.0])
    event = np.array([1, 1, 1, 0, 1, 0, 1, 0], bool)
    survival = np.array([0.3, 0.3, 0.4, 0.4, 0.8, 0.8, 0.9, 0.9])
    found = at_one_horizon(time, event, survival, 2.0, 15)
    assert found["expected"] == pytest.approx(0.4)
    assert found["observed"] == pytest.approx(0.5)
    assert found["ratio"] == pytest.approx(1.25)
    rows = [[row[k] for k in ("predicted", "observed", "count", "events")] for row in found["table"]]
    np.testing.assert_allclose(rows, [[0.15, 0.25, 4, 1], [0.65, 0.75, 4, 3]])
    assert found["ece"] == pytest.approx(0.1)


def table(time, event, survival, sites=(), names=("2", "5")):
    """A table of one repeat that predicts `survival` (n, H)."""
    n = len(time)
    values = np.concatenate([1 - survival[:, -1:], survival], axis=1)[None]
    high = (values[..., :1] > np.median(values[..., 0])).astype(float)
    people, truth = tuple(f"P{i:03d}" for i in range(n)), np.stack([time, event], 1).astype(float)
    about = ("m", "survival", names, people, tuple(sites) or ("s",) * n, truth, (0,))
    return OutcomeTable(*about, values, high, np.arange(n)[None] % 3)


@pytest.mark.parametrize(
    ("case", "why", "why_no_slope"),
    [
        ("censored", None, "no event by 5"),
        ("short", "nobody is followed up to 5", None),
        ("constant", None, "all predictions are equal"),
        ("perfect", None, "predictions rank the events perfectly: the slope is infinite"),
        ("certain", None, None),
        ("one", None, "no event by 5"),
    ],
)
def test_bad_input_gives_numbers_or_reasons(case, why, why_no_slope):
    time, event, survival = simulated(60, seed=3)
    if case == "censored":
        event = np.zeros(60, bool)
    if case == "short":
        time, event = np.minimum(time, 4), event & (time <= 4)
    if case == "constant":
        survival = np.full(60, 0.6)
    if case == "perfect":
        time, event = np.arange(1, 61) / 8, np.ones(60, bool)
        survival = np.linspace(0.05, 0.95, 60)
    if case == "certain":
        survival = (survival > 0.5).astype(float)
    if case == "one":
        time, event, survival = np.array([7.0]), np.array([False]), np.array([0.5])
    found = at_one_horizon(time, event, survival, T, 15)
    json.dumps(found, allow_nan=False)  # raises for NaN
    assert (found["reason"], found["slope_reason"]) == (why, why_no_slope)
    assert (found["observed"] is None) == (found["ratio"] is None) == (why is not None)
    assert (found["slope"] is None) == (why_no_slope is not None)


def test_sites_and_verdict_and_page():
    time, event, survival = simulated(120, seed=4)
    sites = tuple("a" if i < 70 else "b" if i < 115 else "few" for i in range(120))
    wrong = table(time, event, np.stack([survival**0.4, survival**3], 1), sites)
    found = survival_calibration(wrong, {"ece_bins": 15})
    assert list(found["horizons"]) == ["2", "5"]
    assert found["middle"] == "5"
    assert found["sites"]["few"] == {"n": 5, "horizons": None, "reason": "5 patients; 10 are needed"}
    of_a = at_one_horizon(time[:70], event[:70], survival[:70] ** 3, T, 15)
    assert found["sites"]["a"]["horizons"]["5"] == of_a
    result, _ = evaluate_tables([wrong], {"bootstrap": 50})
    assert result["models"]["m"]["calibration"] == found
    said = {line["code"]: line for line in result["verdict"] if "by time" in line["text"]}
    assert said["expected_events"]["level"] == "warning"
    assert "it predicts too many events" in said["expected_events"]["text"]
    right = table(time, event, np.stack([survival**0.4, survival], 1), sites)
    result, _ = evaluate_tables([right], {"bootstrap": 50})
    said = {line["code"]: line for line in result["verdict"]}
    assert said["expected_events"]["level"] == "note"
    assert "site_calibration" not in said
    at_b = np.array(sites) == "b"
    off = table(time, event, np.stack([survival**0.4, np.where(at_b, survival**3, survival)], 1), sites)
    said = {line["code"]: line for line in evaluate_tables([off], {"bootstrap": 50})[0]["verdict"]}
    assert "leaves 1 out at b (0." in said["site_calibration"]["text"]
    assert "of 2 sites" in said["site_calibration"]["text"]
    section = survival_section(found, "months")
    assert [at for at, _ in section["horizons"]] == ["2 months", "5 months"]
    assert len(section["pictures"]) == 2
    assert [(site, reason) for site, reason, _, _ in section["sites"]] == [
        ("a", None),
        ("b", None),
        ("few", "5 patients; 10 are needed"),
    ]
