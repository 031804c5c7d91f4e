"""Calibration of predicted survival against lifelines, by hand, and on simulated patients whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from slidemake.evaluation.evaluate import evaluate_tables
from slidemake.evaluation.probabilities.survival_calibration import (
    at_one_horizon,
    calibration_slope,
    expected_events,
    poisson_ratio,
    survival_calibration,
)
from slidemake.report.calibration import survival_section
from slidemake.tasks.base import Predictions
from slidemake.tasks.survival import CoxOutcome

T = 5.0
AT = np.array([T])  # the one horizon


def simulated(n=400, seed=0, spread=1.0):
    """(time, event, S(T) of shape (n, 1)): exponential times at patients' own rates, censored independently."""
    rng = np.random.default_rng(seed)
    rate = 0.12 * np.exp(spread * rng.normal(size=n))
    died, left = rng.exponential(1 / rate), rng.exponential(12, n)
    return np.minimum(died, left), died <= left, np.exp(-rate * T)[:, None]


def test_observed_is_lifelines_kaplan_meier():
    time, event, survival = simulated()
    found = at_one_horizon(time, event, survival, AT, T, 5)
    fitter = KaplanMeierFitter().fit(time, event)
    assert found["observed"] == pytest.approx(1 - fitter.survival_function_at_times(T).item())
    low, high = fitter.confidence_interval_[fitter.confidence_interval_.index <= T].iloc[-1]
    assert (found["low"], found["high"]) == (pytest.approx(1 - high), pytest.approx(1 - low))
    worst = found["table"][-1]
    inside = 1 - survival[:, 0] >= worst["from"]
    alone = KaplanMeierFitter().fit(time[inside], event[inside])
    assert worst["observed"] == pytest.approx(1 - alone.survival_function_at_times(T).item())
    assert (worst["count"], worst["events"]) == (inside.sum(), (event & (time <= T))[inside].sum())


@pytest.mark.parametrize("tied", [False, True])
def test_slope_is_that_of_lifelines_cox(tied):
    time, event, survival = simulated(seed=1)
    time = np.ceil(time * 4) / 4 if tied else time
    frame = pd.DataFrame(
        {"t": np.minimum(time, T), "e": event & (time <= T), "x": np.log(-np.log(survival[:, 0])) / 1.7}
    )
    slope, why = calibration_slope(time, event, np.exp(-np.exp(frame["x"].to_numpy())), T)
    assert slope == pytest.approx(CoxPHFitter().fit(frame, "t", "e").params_["x"], abs=2e-5)
    assert why == ""


def test_what_is_wrong_with_predictions_is_seen():
    time, event, truth = simulated(6000, seed=2, spread=0.5)
    right = at_one_horizon(time, event, truth, AT, T, 10)
    assert right["ratio_low"] < 1 < right["ratio_high"]
    # sd of the slope about 1 / sqrt(events) / sd of log(-log S) = 1 / sqrt(2700) / 0.5 = 0.04, of which 4
    assert right["slope"] == pytest.approx(1, abs=0.16)
    assert right["ece"] < 0.03
    gloomy = at_one_horizon(
        time, event, truth**2, AT, T, 10
    )  # twice the hazard: too many events, in the right proportion
    assert gloomy["ratio_high"] < 0.9
    assert gloomy["slope"] == pytest.approx(right["slope"], abs=1e-4)
    hazard = np.log(-np.log(truth))
    extreme = np.exp(-np.exp(hazard.mean() + 2 * (hazard - hazard.mean())))
    # not exactly half: survival below 1e-6 is cut off
    assert at_one_horizon(time, event, extreme, AT, T, 10)["slope"] == pytest.approx(right["slope"] / 2, abs=0.005)
    for wrong in (truth**2, extreme):
        assert at_one_horizon(time, event, wrong, AT, T, 10)["ece"] > right["ece"] + 0.03


def test_by_hand():
    """Eight patients, all followed beyond t = 2, four events by then: two groups of four by predicted risk."""
    time = np.array([1, 1, 1, 3, 1, 3, 3, 3.0])
    event = np.array([1, 1, 1, 0, 1, 0, 1, 0], bool)
    survival = np.array([0.3, 0.3, 0.4, 0.4, 0.8, 0.8, 0.9, 0.9])[:, None]
    found = at_one_horizon(time, event, survival, np.array([2.0]), 2.0, 15)
    assert found["expected"] == pytest.approx(0.4)
    assert found["observed"] == pytest.approx(0.5)
    # half of -log S for those who died at 1, all of it for the others: log(0.3 0.3 0.4 0.8) / 2 + log(0.4 0.8 0.9 0.9)
    expected = -(np.log(0.3 * 0.3 * 0.4 * 0.8) / 2 + np.log(0.4 * 0.8 * 0.9 * 0.9))
    assert found["expected_events"] == pytest.approx(expected)
    assert found["ratio"] == pytest.approx(4 / expected)
    # Garwood's limits of a count of 4: 1.0899 and 10.2416 (Ulm 1990, Am J Epidemiol 131:373, table 1)
    assert found["ratio_low"] == pytest.approx(1.0899 / expected, rel=1e-4)
    assert found["ratio_high"] == pytest.approx(10.2416 / expected, rel=1e-4)
    rows = [[row[k] for k in ("predicted", "observed", "count", "events")] for row in found["table"]]
    np.testing.assert_allclose(rows, [[0.15, 0.25, 4, 1], [0.65, 0.75, 4, 3]])
    assert found["ece"] == pytest.approx(0.1)


def table(time, event, survival, sites=(), names=("2", "5")):
    """A table of one repeat that predicts `survival`, of as many columns as `names`."""
    n = len(time)
    values = np.concatenate([1 - survival[:, -1:], survival], axis=1)[None]
    high = (values[..., :1] > np.median(values[..., 0])).astype(float)
    people, truth = tuple(f"P{i:03d}" for i in range(n)), np.stack([time, event], 1).astype(float)
    about = ("m", CoxOutcome([float(name) for name in names]), people, tuple(sites) or ("s",) * n, truth, (0,))
    return Predictions(*about, values, high, np.arange(n)[None] % 3)


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
        survival = np.full((60, 1), 0.6)
    if case == "perfect":
        time, event = np.arange(1, 61) / 8, np.ones(60, bool)
        survival = np.linspace(0.05, 0.95, 60)[:, None]
    if case == "certain":
        survival = (survival > 0.5).astype(float)
    if case == "one":
        time, event, survival = np.array([7.0]), np.array([False]), np.array([[0.5]])
    found = at_one_horizon(time, event, survival, AT, T, 15)
    json.dumps(found, allow_nan=False)  # raises for NaN
    assert (found["reason"], found["slope_reason"]) == (why, why_no_slope)
    assert (found["observed"] is None) == (why is not None)
    assert 0 <= found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert (found["slope"] is None) == (why_no_slope is not None)


def test_expected_events_follow_the_horizons():
    """Hazard 0.1 a year up to 2 and 0.3 from there to 5, followed for 1, 4 and 9 years: 0.1 + 0.8 + 1.1 events."""
    survival = np.exp(-np.array([[0.2, 1.1]] * 3))
    time = np.array([1.0, 4.0, 9.0])
    assert expected_events(time, survival, np.array([2.0, 5.0]), 5.0) == pytest.approx(2.0)
    assert expected_events(time, survival, np.array([2.0, 5.0]), 2.0) == pytest.approx(0.1 + 0.2 + 0.2)


def test_no_event_is_no_certainty():
    """Twelve patients followed beyond the horizon without an event, 1.2 events expected: nobody is accused."""
    time, event = np.full(12, 9.0), np.zeros(12, bool)
    found = at_one_horizon(time, event, np.full((12, 1), np.exp(-0.1)), AT, T, 15)
    assert (found["ratio"], found["ratio_low"]) == (0, 0)
    assert found["ratio_high"] == pytest.approx(-np.log(0.025) / 1.2)  # exactly: P(no event) = exp(-x) = 0.025
    assert (found["observed"], found["low"]) == (0, 0)
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / 12))


@pytest.mark.parametrize(("patients", "risk"), [(10, 0.05), (10, 0.5), (25, 0.2)])
def test_right_models_are_rarely_accused(patients, risk):
    """Interval of the ratio without 1 under the truth: 5 % at most, in 600 cohorts (standard error 0.9 %); the exact
    interval of a count is cautious, never bold."""
    rng, rate, accused = np.random.default_rng(patients), -np.log(1 - risk) / T, 0
    for _ in range(600):
        died, left = rng.exponential(1 / rate, patients), rng.exponential(3 / rate, patients)
        time, event = np.minimum(died, left), died <= left
        seen = int((event & (time <= T)).sum())
        expected = expected_events(time, np.full((patients, 1), 1 - risk), AT, T)
        _, low, high = poisson_ratio(seen, expected)
        accused += not low <= 1 <= high
    assert accused / 600 <= 0.05 + 3 * 0.009


def test_sites_and_verdict_and_page():
    time, event, survival = simulated(120, seed=4)
    sites = tuple("a" if i < 70 else "b" if i < 115 else "few" for i in range(120))
    wrong = table(time, event, np.hstack([survival**0.4, survival**3]), sites)
    found = survival_calibration(wrong, {"ece_bins": 15})
    assert list(found["horizons"]) == ["2", "5"]
    assert found["middle"] == "5"
    assert found["sites"]["few"] == {"n": 5, "horizons": None, "reason": "5 patients; 10 are needed"}
    both = np.hstack([survival**0.4, survival**3])[:70]
    of_a = at_one_horizon(time[:70], event[:70], both, np.array([2.0, 5.0]), T, 15)
    assert found["sites"]["a"]["horizons"]["5"] == of_a
    result, _ = evaluate_tables([wrong], {"bootstrap": 50})
    assert result["models"]["m"]["calibration"] == found
    said = {line["code"]: line for line in result["verdict"] if "by time" in line["text"]}
    assert said["expected_events"]["level"] == "warning"
    assert "it predicts too many events" in said["expected_events"]["text"]
    right = table(time, event, np.hstack([survival**0.4, survival]), sites)
    result, _ = evaluate_tables([right], {"bootstrap": 50})
    said = {line["code"]: line for line in result["verdict"]}
    assert said["expected_events"]["level"] == "note"
    assert "site_calibration" not in said
    at_b = np.array(sites) == "b"
    off = table(time, event, np.hstack([survival**0.4, np.where(at_b[:, None], survival**3, survival)]), sites)
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
