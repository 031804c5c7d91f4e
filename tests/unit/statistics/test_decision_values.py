"""Predictive values, likelihood ratios, net benefit, meta-analysis, sizes: by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from slidemake.statistics.auroc_intervals import auroc_log_odds, ranked
from slidemake.statistics.calibration_intervals import calibration_figures
from slidemake.statistics.decision_values import likelihood_ratios, net_benefit, predictive_values, thresholds_for
from slidemake.statistics.meta_analysis import auroc_over_sites, between_variance, random_effects
from slidemake.statistics.reliability import calibration_line, wilson_interval
from slidemake.statistics.sample_size import (
    auroc_precision,
    auroc_variance,
    detectable_difference,
    external_validation_size,
    patients_for_difference,
)


def test_values_at_the_prevalence_of_the_patients():
    found = predictive_values((40, 10, 20, 130))
    assert found["sensitivity"]["value"] == 0.8
    assert found["ppv"]["value"] == pytest.approx(40 / 60)
    assert found["npv"]["value"] == pytest.approx(130 / 140)
    assert (found["ppv"]["low"], found["ppv"]["high"]) == wilson_interval(40, 60)
    # at the cohort's own prevalence Bayes gives the same
    assert predictive_values((40, 10, 20, 130), 50 / 200)["ppv"]["value"] == pytest.approx(40 / 60)
    rare = predictive_values((40, 10, 20, 130), 0.01)
    assert rare["ppv"]["value"] == pytest.approx(0.8 * 0.01 / (0.8 * 0.01 + 20 / 150 * 0.99))
    assert rare["npv"]["value"] > 0.995


def test_likelihood_ratios_by_hand():
    """Simel 1991: ln(0.8 / 0.1333) +- 1.96 sqrt(1/40 - 1/50 + 1/20 - 1/150)."""
    found = likelihood_ratios((40, 10, 20, 130))["lr_positive"]
    error = np.sqrt(1 / 40 - 1 / 50 + 1 / 20 - 1 / 150)
    assert found["value"] == pytest.approx(6)
    assert found["low"] == pytest.approx(6 * np.exp(-1.959964 * error))
    assert likelihood_ratios((40, 10, 20, 130))["lr_negative"]["value"] == pytest.approx(0.2 / (130 / 150))
    assert likelihood_ratios((5, 5, 0, 10))["lr_positive"]["value"] is None  # infinite
    assert likelihood_ratios((0, 5, 5, 5))["lr_positive"]["value"] == 0


def test_cohorts_in_which_nobody_is_told():
    nobody = predictive_values((0, 10, 0, 20))
    assert nobody["ppv"]["value"] is None
    assert nobody["sensitivity"]["value"] == 0
    assert predictive_values((0, 0, 3, 7), 0.2)["ppv"]["value"] is None
    perfect = predictive_values((10, 0, 0, 10), 0.2)
    assert perfect["ppv"]["value"] == 1
    assert perfect["ppv"]["low"] < 0.9


@pytest.mark.parametrize("prevalence", [0.02, 0.3])
def test_coverage_of_predictive_values_at_a_stated_prevalence(prevalence):
    rng, se, sp = np.random.default_rng(0), 0.85, 0.8
    truth = se * prevalence / (se * prevalence + (1 - sp) * (1 - prevalence))
    held = []
    for _ in range(1000):
        tp, tn = rng.binomial(60, se), rng.binomial(80, sp)
        ppv = predictive_values((tp, 60 - tp, 80 - tn, tn), prevalence)["ppv"]
        held.append(ppv["low"] <= truth <= ppv["high"])
    assert 0.93 <= np.mean(held) <= 0.975  # Monte Carlo error 0.007


def test_net_benefit_by_hand():
    positive, p = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.3, 0.6, 0.2, 0.1])
    found = net_benefit(positive, p, np.array([0.25, 0.5]))
    assert found["model"] == pytest.approx([2 / 5 - 1 / 5 / 3, 1 / 5 - 1 / 5])
    assert found["everyone"] == pytest.approx([0.4 - 0.6 / 3, 0.4 - 0.6])
    assert net_benefit(positive, p, np.array([0.05]))["model"] == pytest.approx(
        net_benefit(positive, p, np.array([0.05]))["everyone"]
    )


def test_thresholds_that_rule_out_and_in():
    positive = np.r_[np.ones(20, bool), np.zeros(20, bool)]
    score = np.r_[np.arange(10, 30), np.arange(0, 20)].astype(float)
    found = thresholds_for(positive, score, 0.95, 0.95)
    assert (score[positive] >= found["rule_out"]).mean() == 0.95
    assert (score[~positive] < found["rule_in"]).mean() == 0.95
    assert found == {"rule_out": 11.0, "rule_in": 19.0}
    assert thresholds_for(np.ones(3, bool), np.arange(3.0)) == {"rule_out": None, "rule_in": None}
    assert thresholds_for(np.array([True, False]), np.array([0.1, 0.9]))["rule_in"] is None  # no score is so high


def test_calibration_with_intervals():
    rng = np.random.default_rng(0)
    held = {"in_the_large": [], "slope": [], "observed_to_expected": []}
    for _ in range(400):
        logit = rng.normal(-1, 1.2, 150)
        p = 1 / (1 + np.exp(-logit))
        found = calibration_figures(p, rng.random(150) < p)
        for key, right in (("in_the_large", 0), ("slope", 1), ("observed_to_expected", 1)):
            held[key].append(found[key]["low"] <= right <= found[key]["high"])
    for key, hits in held.items():
        assert 0.925 <= np.mean(hits) <= 0.98, key  # Monte Carlo error 0.011
    shifted = 1 / (1 + np.exp(-(logit + 1)))
    y = rng.random(150) < p
    found, line = calibration_figures(shifted, y), calibration_line(shifted, y.astype(float))
    assert found["in_the_large"]["value"] == pytest.approx(line["in_the_large"])
    assert found["slope"]["value"] == pytest.approx(line["slope"])
    assert found["in_the_large"]["high"] < 0
    assert found["brier_updated"] < found["brier"]
    few = calibration_figures(p[:20], np.r_[np.ones(3), np.zeros(17)])
    assert few["slope"] is None
    assert "at least 5" in few["reason"]


def test_random_effects_by_hand():
    """Equal variances make tau^2 the sample variance less theirs."""
    y, v = [0.0, 1.0, 2.0, 3.0, 4.0], [0.5] * 5
    assert between_variance(np.array(y), np.array(v)) == pytest.approx(2.5 - 0.5)
    found = random_effects(y, v)
    assert found["value"] == pytest.approx(2)
    error = np.sqrt(2.5 / 5)
    assert found["high"] == pytest.approx(2 + 2.776445 * error)  # t with 4 degrees of freedom
    assert found["new_high"] == pytest.approx(2 + 3.182446 * np.sqrt(2 + 0.5))  # with 3, and the variance of the mean
    assert found["i2"] == pytest.approx(1 - 4 / 20)
    alike = random_effects([1.0, 1.1, 0.9], [0.5] * 3)
    assert alike["tau2"] == 0
    assert alike["high"] - 1 == pytest.approx(4.302653 * np.sqrt(0.5 / 3))  # not narrower than chance
    assert random_effects([1.0, 2.0], [1.0, 1.0])["new_low"] is None


def test_a_new_site_lies_in_the_interval_for_it():
    """1,000 times six sites and a seventh: 0.95 of them inside, with a Monte Carlo error of 0.007."""
    rng, held, mean_held = np.random.default_rng(0), [], []
    for _ in range(1000):
        v = rng.uniform(0.05, 0.2, 7)
        truth = rng.normal(1.5, 0.6, 7)
        found = random_effects(rng.normal(truth, np.sqrt(v))[:6], v[:6])
        held.append(found["new_low"] <= truth[6] <= found["new_high"])
        mean_held.append(found["low"] <= 1.5 <= found["high"])
    assert 0.93 <= np.mean(held) <= 0.975
    assert 0.93 <= np.mean(mean_held) <= 0.975


def test_aurocs_of_sites():
    """Six sites of one model; one ranks its few patients perfectly, and weighs no more for that."""
    rng = np.random.default_rng(0)
    parts = []
    for n in (40, 40, 40, 40, 40, 8):
        y = np.arange(n) % 2
        parts.append(ranked(y, (rng.normal(size=n) + (9 if n == 8 else 1.5) * y)[None]))
    assert parts[-1].value == 1
    values, variances = zip(*map(auroc_log_odds, parts), strict=True)
    assert max(variances) == variances[-1]
    found = auroc_over_sites(values, variances)
    assert found["value"] == pytest.approx(np.mean([part.value for part in parts]), abs=0.05)
    assert 0 < found["new_low"] < found["low"] < found["high"] < found["new_high"] < 1
    # delta method, away from the edges
    slope = parts[0].value * (1 - parts[0].value)
    assert variances[0] == pytest.approx(parts[0].variance / slope**2, rel=0.35)
    assert auroc_over_sites(values[:1], variances[:1]) is None


def test_what_a_cohort_can_tell():
    """Hanley and McNeil 1982: an AUROC of 0.893 of 51 and 58 patients has a standard error of 0.032 (their table)."""
    assert np.sqrt(auroc_variance(0.893, 51, 58)) == pytest.approx(0.032, abs=0.001)
    assert auroc_precision(0.8, 20, 20) > auroc_precision(0.8, 80, 80) > 0
    at = detectable_difference(0.8, 50, 50)
    assert at == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * np.sqrt(auroc_variance(0.8, 50, 50)))
    n = patients_for_difference(0.05, 0.8, 0.3)
    assert detectable_difference(0.8, round(0.3 * n), n - round(0.3 * n)) <= 0.05
    assert detectable_difference(0.8, round(0.3 * (n - 20)), n - 20 - round(0.3 * (n - 20))) > 0.05

    size = external_validation_size(0.1)
    assert size["observed_to_expected"] == int(np.ceil(0.9 / (0.1 * (0.51 / 3.919928) ** 2)))
    assert auroc_precision(0.8, round(0.1 * size["auroc"]), size["auroc"] - round(0.1 * size["auroc"])) <= 0.05
