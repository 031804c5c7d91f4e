"""Intervals of AUROCs: against DeLong's formula by hand, at the edges, and slices of the simulations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from slidemake.statistics.auroc_intervals import auroc_difference, auroc_interval, ranked, training_part

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import intervals


def by_hand(y, scores):
    """Mean AUROC and DeLong's variance of scores (R, n), pair by pair."""
    x, z = scores[:, y == 1], scores[:, y == 0]
    psi = (x[:, :, None] > z[:, None]) + 0.5 * (x[:, :, None] == z[:, None])
    above, below = psi.mean((0, 2)), psi.mean((0, 1))
    return psi.mean(), above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below), above, below


def test_value_and_variance_are_delongs():
    rng = np.random.default_rng(0)
    y = np.r_[np.ones(7, int), np.zeros(12, int)]
    scores = np.round(rng.normal(size=(3, 19)) + y, 1)  # with ties
    value, variance, above, _ = by_hand(y, scores)
    a = ranked(y, scores)
    assert a.value == pytest.approx(value)
    assert a.variance == pytest.approx(variance)
    assert a.shares.sum() == pytest.approx(0, abs=1e-12)
    assert a.counts == ((7, 12),)
    assert a.shares[y == 1] == pytest.approx((above - value) / 7 * np.sqrt(7 / 6))
    single = [by_hand(y, row[None])[1] for row in scores]
    assert a.single == pytest.approx(np.mean(single))
    other = np.round(rng.normal(size=(2, 19)) + y, 1)
    found = auroc_difference(a, ranked(y, other), tested_to_trained=1.25)
    _, _, above2, below2 = by_hand(y, other)
    _, _, _, below = by_hand(y, scores)
    plain = (above - above2).var(ddof=1) / 7 + (below - below2).var(ddof=1) / 12
    mean = (value + by_hand(y, other)[0]) / 2
    assert found["se"] ** 2 == pytest.approx(plain * (1 + 1.25 * 4 * mean * (1 - mean)))
    assert found["p"] == pytest.approx(2 * student.sf(abs(found["z"]), 6 + 10))
    assert found["low"] < found["difference"] < found["high"]


def test_patients_whom_not_every_repeat_tested():
    """Two repeats that tested different patients: their mean has the mean of two independent variances, halved."""
    rng = np.random.default_rng(1)
    y = np.tile([0, 1], 20)
    scores = np.full((2, 40), np.nan)
    scores[0, :20], scores[1, 20:] = rng.normal(size=20) + y[:20], rng.normal(size=20) + y[20:]
    first, second = by_hand(y[:20], scores[:1, :20]), by_hand(y[20:], scores[1:, 20:])
    a = ranked(y, scores)
    assert a.value == pytest.approx((first[0] + second[0]) / 2)
    assert a.variance == pytest.approx((first[1] + second[1]) / 4)
    assert ranked(y, np.where(y == 1, scores, np.nan)) is None  # one class only
    assert ranked(np.zeros(4, int), np.zeros((1, 4))) is None


def test_classes_against_the_rest():
    rng = np.random.default_rng(2)
    y = np.repeat([0, 1, 2], [6, 8, 10])
    scores = rng.normal(size=(2, 24, 3)) + np.eye(3)[y]
    a = ranked(y, scores, 3)
    assert a.value == pytest.approx(np.mean([by_hand((y == c) * 1, scores[..., c])[0] for c in range(3)]))
    shares = np.mean([ranked((y == c) * 1, scores[..., c]).shares for c in range(3)], axis=0)
    assert a.variance == pytest.approx((shares**2).sum())
    low, high = auroc_interval(a)
    assert low < a.value < high


def test_edges():
    y = np.r_[np.ones(12, int), np.zeros(12, int)]
    low, high = auroc_interval(ranked(y, y[None].astype(float)))
    assert high == 1  # a perfect ranking is no proof of one
    assert 0.8 < low < 0.95
    wider = auroc_interval(ranked(y, y[None].astype(float)), tested_to_trained=1.25)
    assert wider[0] < low
    low, high = auroc_interval(ranked(y, np.zeros((1, 24))))
    assert low < 0.5 < high
    one = np.r_[1, np.zeros(9, int)]
    low, high = auroc_interval(ranked(one, np.arange(10.0)[None]))
    assert low == pytest.approx(0, abs=0.01)
    assert high > 0.5
    assert auroc_difference(ranked(one, np.arange(10.0)[None]), ranked(one, -np.arange(10.0)[None]))["p"] is None
    same = auroc_difference(ranked(y, y[None].astype(float)), ranked(y, y[None].astype(float)))
    assert (same["difference"], same["p"]) == (0, 1)
    apart = auroc_difference(ranked(y, y[None].astype(float)), ranked(y, np.zeros((1, 24))))
    assert (apart["difference"], apart["p"]) == (0.5, None)
    assert training_part(0.5, 1.25) == 2.25
    assert training_part(1.0, 1.25) == 1


def test_mirrored_scores_have_the_mirrored_interval():
    y, scores = intervals.given_scores(3, 60, 0.5, 0.85, 1.0)
    low, high = auroc_interval(ranked(y, scores))
    assert auroc_interval(ranked(y, -scores)) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("patients", "share", "auroc"), [(24, 0.5, 0.95), (60, 0.2, 0.85), (60, 0.5, 0.5)])
def test_coverage_of_models_as_trained(patients, share, auroc):
    """A slice of `benchmarks/intervals.py given`: 400 cohorts, so that a share of 0.95 has a Monte Carlo error of
    0.011; seeds are fixed."""
    held = np.mean([intervals.given(s, patients, share, auroc, 1.0)[0] for s in range(400)])
    assert 0.92 <= held <= 0.99


def test_a_way_of_training_is_not_called_better_than_its_equal():
    """A slice of `benchmarks/intervals.py claims`: 40 cohorts of 24 patients, five models that are as good as the
    control; DeLong's test with Holm's correction says it more often than one that counts training."""
    said = np.array([intervals.claims(s, 24, 0.5, 0.0, 0.5, models=5) for s in range(40)])
    assert said[:, 4].mean() <= 0.05
    assert said[:, 1].mean() >= said[:, 4].mean()
