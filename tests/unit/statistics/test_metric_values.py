"""Metrics of numbers and grades against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from slidemake.statistics import ordinal_metrics as metrics_ordinal
from slidemake.statistics import regression_metrics as metrics_regression


def test_regression_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.normal(50, 9, 60)
    predicted = 0.6 * truth + rng.normal(20, 4, 60)
    ours = {name: float(v[0]) for name, v in metrics_regression.metrics_over(truth, predicted).items()}
    assert ours["r2"] == pytest.approx(sk.r2_score(truth, predicted), abs=1e-12)
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted), abs=1e-12)
    assert ours["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted), abs=1e-12)
    assert ours["pearson"] == pytest.approx(stats.pearsonr(truth, predicted).statistic, abs=1e-12)
    assert ours["slope"] == pytest.approx(stats.linregress(predicted, truth).slope, abs=1e-12)


def test_regression_by_hand_and_weights():
    truth, predicted = np.array([1, 2, 3.0]), np.array([1, 2, 6.0])
    ours = metrics_regression.metrics_over(truth, predicted, np.array([[1, 1, 1], [2, 2, 0]]))
    np.testing.assert_allclose(ours["r2"], [1 - 9 / 2, 1])
    np.testing.assert_allclose(ours["mae"], [1, 0])
    np.testing.assert_allclose(ours["slope"], [stats.linregress(predicted, truth).slope, 1])


@pytest.mark.parametrize(
    ("truth", "predicted", "undefined"),
    [
        ([1, 2, 3], [7, 7, 7], {"pearson": "all predictions are the same", "slope": "all predictions are the same"}),
        ([5, 5, 5], [1, 2, 3], dict.fromkeys(("r2", "pearson"), "all 3 patients have the same value")),
        ([5], [4], {"r2": "one patient only", "pearson": "one patient only", "slope": "all predictions are the same"}),
    ],
)
def test_regression_says_why_a_figure_is_not_defined(truth, predicted, undefined):
    truth, predicted = np.array(truth, float), np.array(predicted, float)
    found = metrics_regression.metrics_over(truth, predicted)
    assert {name for name, value in found.items() if np.isnan(value[0])} == set(undefined)
    for name in found:
        assert metrics_regression.why_undefined(name, truth, predicted) == undefined.get(name)


def test_grades_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 90)
    predicted = np.clip(truth + rng.integers(-1, 2, 90), 0, 3)
    expected = predicted + rng.normal(0, 0.3, 90)
    ours = {n: float(v[0]) for n, v in metrics_ordinal.metrics_over(truth, expected, predicted, 4).items()}
    assert ours["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, predicted, weights="quadratic"), abs=1e-12)
    assert ours["mae"] == pytest.approx(np.abs(truth - predicted).mean(), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-12)
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, predicted), abs=1e-12)
    pairs = [(i, j) for i in range(90) for j in range(90) if truth[i] < truth[j]]
    right = np.mean([(expected[i] < expected[j]) + 0.5 * (expected[i] == expected[j]) for i, j in pairs])
    assert ours["c_index"] == pytest.approx(right, abs=1e-6)


def test_grades_that_say_nothing():
    names = ("low", "middle", "high")
    same = np.ones(5, int)
    found = metrics_ordinal.metrics_over(same, same.astype(float), same, 3)
    assert np.isnan(found["kappa"][0])
    assert np.isnan(found["c_index"][0])
    assert "all 5 patients have grade middle" in metrics_ordinal.why_undefined("kappa", same, same, names)
    assert metrics_ordinal.why_undefined("balanced_accuracy", same, same, names) == (
        "no patient of grade low, high among 5"
    )
    constant = metrics_ordinal.metrics_over(np.array([0, 1, 2]), np.ones(3), same[:3], 3)
    assert (constant["kappa"][0], constant["c_index"][0]) == (0, 0.5)
