"""Survival against lifelines and torchsurv, and by hand: estimators, partial likelihood, metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from slidemake.statistics.survival import (
    RiskSets,
    discrete_survival,
    fit_slope,
    kaplan_meier,
    log_rank,
    median_follow_up,
    step,
    time_bins,
    time_edges,
)
from slidemake.statistics.survival_metrics import METRICS, concordance, metrics_over, why_undefined
from torchsurv.loss.cox import neg_partial_log_likelihood
from torchsurv.metrics.auc import Auc
from torchsurv.metrics.brier_score import BrierScore
from torchsurv.metrics.cindex import ConcordanceIndex
from torchsurv.stats.ipcw import get_ipcw

HORIZONS = (4.0, 8.0, 12.0)


def cohort(n=80, seed=0, tied=False):
    """Times, events and log-hazards that tell something of the times."""
    rng = np.random.default_rng(seed)
    eta = rng.normal(size=n)
    died, left = rng.exponential(12 * np.exp(-0.8 * eta)), rng.exponential(15, n)
    time = np.minimum(died, left)
    return np.ceil(time) if tied else time, died <= left, eta + rng.normal(size=n)


def curves(eta):
    return np.exp(-np.outer(np.exp(eta), [0.3, 0.6, 0.9]))


@pytest.mark.parametrize("tied", [False, True])
def test_kaplan_meier_is_lifelines(tied):
    time, event, _ = cohort(tied=tied)
    ours, theirs = kaplan_meier(time, event), KaplanMeierFitter().fit(time, event)
    np.testing.assert_allclose(ours["survival"], theirs.survival_function_at_times(ours["time"]), atol=1e-12)
    interval = theirs.confidence_interval_survival_function_.loc[ours["time"][1:]].to_numpy()
    inside = np.array([0 < s < 1 for s in ours["survival"][1:]])
    both = np.stack([ours["low"][1:], ours["high"][1:]], 1)
    np.testing.assert_allclose(both[inside], interval[inside], atol=1e-6)
    assert ours["at_risk"][:2] == [80, 80]


def test_kaplan_meier_by_hand():
    curve = kaplan_meier(np.array([1, 2, 2, 3, 4.0]), np.array([1, 1, 0, 0, 1], bool))
    np.testing.assert_allclose(curve["survival"], [1, 0.8, 0.6, 0.6, 0])
    assert curve["at_risk"] == [5, 5, 4, 2, 1]
    np.testing.assert_allclose(
        step(np.array([1, 2.0]), np.array([0.8, 0.6]), np.array([0.5, 1, 1.5, 9])), [1, 0.8, 0.8, 0.6]
    )
    assert median_follow_up(np.array([1, 2, 2, 3, 4.0]), np.array([1, 1, 0, 0, 1], bool)) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_log_rank_is_lifelines(tied):
    time, event, eta = cohort(tied=tied)
    high = eta > np.median(eta)
    ours, theirs = log_rank(time, event, high), logrank_test(time[high], time[~high], event[high], event[~high])
    assert ours["p"] == pytest.approx(theirs.p_value, rel=1e-9)
    assert ours["chi_square"] == pytest.approx(theirs.test_statistic, rel=1e-9)
    assert ours["low"] < ours["hazard_ratio"] < ours["high"]
    assert ours["hazard_ratio"] > 1
    assert "low-risk" in log_rank(time, event, np.zeros(len(time), bool))["reason"]
    assert log_rank(time, np.zeros(len(time), bool), high)["p"] is None


@pytest.mark.parametrize("tied", [False, True])
def test_partial_likelihood_is_torchsurvs_with_efrons_ties(tied):
    time, event, eta = cohort(tied=tied)
    x = torch.tensor(eta, requires_grad=True)
    theirs = neg_partial_log_likelihood(
        x, torch.tensor(event), torch.tensor(time), ties_method="efron", reduction="sum"
    )
    theirs.backward()
    sets = RiskSets(time, event)
    assert sets.loss(eta) == pytest.approx(theirs.item(), rel=1e-6)  # theirs in float32
    np.testing.assert_allclose(sets.gradient(eta), x.grad.numpy(), atol=1e-5)
    assert sets.loss(eta + 700) == pytest.approx(theirs.item(), rel=1e-6)  # a shift changes nothing, nor overflows


def test_partial_likelihood_by_hand():
    # times 1 (event), 2 (event), 3 (censored); hazards 1, 2, 4
    eta = np.log([1.0, 2, 4])
    sets = RiskSets(np.array([1.0, 2, 3]), np.array([True, True, False]))
    assert sets.loss(eta) == pytest.approx(-np.log(1 / 7) - np.log(2 / 6))
    times, hazard = sets.baseline(eta)
    assert times.tolist() == [1, 2]
    np.testing.assert_allclose(hazard, [1 / 7, 1 / 7 + 1 / 6])


def test_slope_finds_what_was_multiplied():
    time, event, eta = cohort(2000, seed=3)
    slope = fit_slope(eta, time, event)
    assert fit_slope(2 * eta, time, event) == pytest.approx(slope / 2, rel=0.02)
    assert fit_slope(eta, time, np.zeros(2000, bool)) == fit_slope(np.ones(2000), time, event) == 1.0


def test_discrete_time():
    time, event = np.array([1, 2, 3, 4, 5, 6, 7, 8.0]), np.ones(8, bool)
    edges = time_edges(time, event, 4)
    assert edges == [0, 2.75, 4.5, 6.25, 8]
    assert time_bins(np.array([0, 2.75, 2.8, 100]), edges).tolist() == [0, 0, 1, 3]
    survival = discrete_survival(np.array([0.5, 0.5, 0, 0.5]), edges, np.array([0, 2.75, 4.5, 6.25, 8, 20]))
    np.testing.assert_allclose(survival, [1, 0.5, 0.25, 0.25, 0.125, 0.125])
    assert len(time_edges(np.array([3.0, 3, 3, 9]), np.array([True, True, True, False]), 4)) == 3  # ties: fewer


def test_concordance_is_lifelines_and_its_ends():
    time, event, eta = cohort()
    assert concordance(time, event, eta) == pytest.approx(concordance_index(time, -eta, event), abs=1e-6)
    order = np.arange(10.0)
    everyone = np.ones(10, bool)
    assert concordance(order, everyone, -order) == 1
    assert concordance(order, everyone, order) == 0
    assert concordance(order, everyone, np.zeros(10)) == 0.5
    assert concordance(order, ~everyone, order) is None
    assert concordance(np.empty(0), np.empty(0, bool), np.empty(0)) is None


@pytest.mark.parametrize("seed", range(3))
def test_metrics_with_ipcw_are_torchsurvs(seed):
    time, event, eta = cohort(seed=seed)
    survival = curves(eta)
    ours = {name: float(value[0]) for name, value in metrics_over(time, event, eta, survival, HORIZONS).items()}
    t, e, x = torch.tensor(time).float(), torch.tensor(event), torch.tensor(eta).float()
    at = torch.tensor(HORIZONS)
    weight, weight_at = get_ipcw(e, t), get_ipcw(e, t, at)
    harrell, uno = ConcordanceIndex(), ConcordanceIndex()
    assert ours["c_index"] == pytest.approx(float(harrell(x, e, t)), abs=1e-5)
    assert ours["c_uno"] == pytest.approx(float(uno(x, e, t, weight=weight, tmax=at[-1])), abs=1e-5)
    dead = torch.tensor(1 - survival).float()
    auc = Auc()(dead, e, t, new_time=at, weight=weight, weight_new_time=weight_at)
    assert [ours[f"td_auc@{h:g}"] for h in HORIZONS] == pytest.approx(auc.tolist(), abs=1e-5)
    assert ours["td_auc"] == pytest.approx(float(auc.mean()), abs=1e-5)
    brier = BrierScore()
    theirs = brier(torch.tensor(survival).float(), e, t, new_time=at, weight=weight, weight_new_time=weight_at)
    assert [ours[f"brier@{h:g}"] for h in HORIZONS] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert ours["ibs"] == pytest.approx(float(brier.integral()), abs=1e-5)


def test_weights_are_copies_of_patients():
    time, event, eta = cohort(40, tied=True)
    survival, times = curves(eta), np.random.default_rng(1).integers(0, 3, 40)
    weighted = metrics_over(time, event, eta, survival, HORIZONS, times[None])
    copies = np.repeat(np.arange(40), times)
    repeated = metrics_over(time[copies], event[copies], eta[copies], survival[copies], HORIZONS)
    for name in repeated:
        assert weighted[name][0] == pytest.approx(repeated[name][0], abs=1e-6), name


def test_a_coin_and_the_truth():
    """With a true order of 1 everything is perfect; without information S = 0.5 has a Brier score of 0.25."""
    time, event = np.arange(1.0, 21), np.ones(20, bool)
    right = (time[:, None] > np.array(HORIZONS)).astype(float)
    best = metrics_over(time, event, -time, right, HORIZONS)
    assert [float(best[name][0]) for name in METRICS] == [1, 1, 1, 0]
    coin = metrics_over(time, event, np.zeros(20), np.full((20, 3), 0.5), HORIZONS)
    assert [float(coin[name][0]) for name in METRICS] == [0.5, 0.5, 0.5, 0.25]


def test_what_is_not_defined_says_why():
    none = np.zeros(6, bool)
    time = np.array([1, 2, 3, 4, 5, 6.0])
    for name in ("c_index", "c_uno", "td_auc", "td_auc@4"):
        assert why_undefined(name, time, none, HORIZONS) == "all 6 patients are censored"
        assert np.isnan(metrics_over(time, none, time, curves(time), HORIZONS)[name][0])
    late = np.array([13, 14, 15.0])
    assert why_undefined("td_auc", late, np.ones(3, bool), HORIZONS) == "no event at any horizon"
    assert why_undefined("c_uno", late, np.ones(3, bool), HORIZONS) == "no event before 12"
    assert why_undefined("c_index", np.ones(3), np.ones(3, bool), HORIZONS) == "no two patients whose order is known"
    assert why_undefined("ibs", np.ones(2), np.ones(2, bool), (4.0,)) is not None
    assert why_undefined("c_index", np.empty(0), np.empty(0, bool), HORIZONS) == "no patients"
    assert why_undefined("ibs", late, none[:3], HORIZONS) is None


# -- within folds ---------------------------------------------------------------------------------------------------


def by_hand(time, event, marker, groups, weigh, comparable):
    """Sum over ordered pairs of one group of weigh(i) * agreement, over that of weigh(i)."""
    agree = total = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if groups[i] == groups[j] and comparable(i, j):
                total += weigh(i)
                agree += weigh(i) * ((marker[i] > marker[j]) + 0.5 * (marker[i] == marker[j]))
    return agree / total


def test_ranks_are_compared_within_folds():
    time, event, eta = cohort(60, seed=5)
    groups = np.arange(60) % 4
    eta = eta + 10 * groups  # of no use across folds
    survival = curves(eta / 10)
    found = metrics_over(time, event, eta, survival, HORIZONS, groups=groups)
    weight = get_ipcw(torch.tensor(event), torch.tensor(time).float()).numpy()

    def first(i, j):
        return event[i] and time[i] < time[j]

    def early(i, j):
        return first(i, j) and time[i] < HORIZONS[-1]

    def at_eight(i, j):
        return event[i] and time[i] <= 8 < time[j]

    harrell = by_hand(time, event, eta, groups, lambda i: 1.0, first)
    assert found["c_index"][0] == pytest.approx(harrell, abs=1e-6)
    assert found["c_uno"][0] == pytest.approx(
        by_hand(time, event, eta, groups, lambda i: weight[i] ** 2, early), abs=1e-5
    )
    assert found["td_auc@8"][0] == pytest.approx(
        by_hand(time, event, 1 - survival[:, 1], groups, lambda i: weight[i], at_eight), abs=1e-5
    )
    across = metrics_over(time, event, eta, survival, HORIZONS)
    assert abs(across["c_index"][0] - harrell) > 0.05
    assert across["ibs"][0] == found["ibs"][0]  # no ranks
    one = metrics_over(time, event, eta, survival, HORIZONS, groups=np.zeros(60, int))
    assert all(one[name][0] == across[name][0] for name in METRICS)


def test_a_model_that_knows_nothing_is_at_chance_within_folds_and_below_it_across():
    """Risks of each fold from the other folds' mean survival and a little noise: 30 cohorts of 40. The sd of a C-index
    of 40 patients is about 0.06 across and 0.1 within five folds: of the mean 0.02."""
    across, within = [], []
    for seed in range(30):
        time, event, _ = cohort(40, seed=seed)
        groups = np.random.default_rng(seed).permutation(np.arange(40) % 5)
        risk = np.array([1 / time[groups != g].mean() for g in groups])
        risk += 1e-6 * np.random.default_rng([seed, 1]).random(40)
        survival = np.repeat(1 - risk[:, None] / risk.max(), 3, 1)
        for kept, of in ((across, None), (within, groups)):
            kept.append(metrics_over(time, event, risk, survival, HORIZONS, groups=of)["c_index"][0])
    assert np.mean(across) < 0.44
    assert abs(np.mean(within) - 0.5) < 0.06


def test_why_nothing_can_be_ranked_within_folds():
    time, event, groups = np.array([1.0, 2, 3, 4]), np.array([True, False, True, False]), np.array([0, 1, 0, 1])
    nothing = why_undefined("td_auc@2.5", time, event, (2.5, 5.0), np.array([0, 1, 2, 3]))
    assert nothing == "no event beside a patient known to be without it within a fold at 2.5"
    assert why_undefined("td_auc@2.5", time, event, (2.5, 5.0), groups) is None
    assert why_undefined("c_index", time, event, (2.5, 5.0), groups) is None
    alone = why_undefined("c_index", time, event, (2.5, 5.0), np.arange(4))
    assert alone == "no two patients within a fold whose order is known"
    assert np.isnan(metrics_over(time, event, time, np.ones((4, 2)), (2.5, 5.0), groups=np.arange(4))["c_index"][0])
