"""DeLong by its definition and by hand, paired bootstrap, Holm."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student
from slidemake.evaluation.comparisons import adjust, bootstrap_p, holm
from slidemake.statistics.auroc_intervals import auroc_difference, ranked, structural_components


def delong(positive, first, second):
    """Of models as they were trained."""
    return auroc_difference(*(ranked(positive.astype(int), np.atleast_2d(scores)) for scores in (first, second)))


def by_definition(positive, first, second):
    """DeLong as the paper writes it: psi over all pairs, sample covariances of the components."""

    def components(score):
        x, y = score[positive], score[~positive]
        psi = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
        return psi.mean(), psi.mean(1), psi.mean(0)

    (one, v10_1, v01_1), (two, v10_2, v01_2) = components(first), components(second)
    s10, s01 = np.cov(v10_1, v10_2), np.cov(v01_1, v01_2)
    contrast = np.array([1, -1])
    variance = contrast @ (s10 / positive.sum() + s01 / (~positive).sum()) @ contrast
    return one - two, np.sqrt(variance)


@pytest.mark.parametrize("decimals", [6, 1])  # one decimal: many ties
def test_delong_equals_its_definition(decimals):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        positive = np.arange(37) % 3 == 0
        first = (rng.random(37) + 0.4 * positive).round(decimals)
        second = (0.5 * first + rng.random(37)).round(decimals)
        found = delong(positive, first, second)
        assert (found["difference"], found["se"]) == pytest.approx(by_definition(positive, first, second), abs=1e-12)
        df = min(positive.sum(), (~positive).sum()) + 9
        assert found["p"] == pytest.approx(2 * student.sf(abs(found["difference"] / found["se"]), df))


def test_delong_by_hand():
    """Positives 3, 1 and negatives 2, 0 against positives 3, 2.5: V10 = (1, 1/2) and (1, 1), V01 = (1/2, 1), (1, 1)."""
    positive = np.array([True, True, False, False])
    first, second = np.array([3.0, 1.0, 2.0, 0.0]), np.array([3.0, 2.5, 2.0, 0.0])
    auroc, v10, v01 = structural_components(positive, first)
    assert (auroc, v10.tolist(), v01.tolist()) == (0.75, [1.0, 0.5], [0.5, 1.0])
    # differences of the components (0, -1/2) and (-1/2, 0): variance 1/8 each, over 2 patients each: 1/16 + 1/16
    found = delong(positive, first, second)
    assert found["difference"] == -0.25
    assert found["se"] == pytest.approx(np.sqrt(1 / 8))


def test_delong_of_equal_scores_and_of_no_variance():
    positive = np.arange(20) % 2 == 0
    score = np.random.default_rng(0).random(20)
    assert delong(positive, score, score)["p"] == 1.0
    assert delong(positive, score, score * 3)["p"] == 1.0  # ranks alone count
    perfect = positive.astype(float)
    found = delong(positive, perfect, np.full(20, 0.5))
    assert (found["difference"], found["p"]) == (0.5, None)
    assert delong(np.array([True, False, False]), np.arange(3.0), np.ones(3))["p"] is None


def test_delong_of_repeats_is_that_of_the_mean():
    """Monte Carlo: the standard error of the mean AUROC over repeats is the spread that fresh patients show.

    400 cohorts; the sd of 400 draws is within 3.5 % of the truth (1 / sqrt(2 * 400)); the tolerance is four of that.
    """
    rng = np.random.default_rng(1)
    positive = np.arange(120) % 2 == 0
    differences, errors = [], []
    for _ in range(400):
        shared = rng.normal(size=120) + positive
        first = np.stack([shared + 0.5 * rng.normal(size=120) for _ in range(3)])
        second = np.stack([0.6 * shared + rng.normal(size=120) for _ in range(3)])
        found = delong(positive, first, second)
        differences.append(found["difference"])
        errors.append(found["se"])
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.14)


def test_delong_holds_its_level():
    """Two equally good models, 600 cohorts: 5 % of p-values below 0.05, sd 0.9 %; between 2 % and 8.6 % is four sd."""
    rng = np.random.default_rng(2)
    positive = np.arange(80) % 2 == 0
    p = [delong(positive, positive + rng.normal(size=80), positive + rng.normal(size=80))["p"] for _ in range(600)]
    assert 0.014 <= np.mean(np.array(p) < 0.05) <= 0.086


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_bootstrap_p_is_never_zero():
    assert bootstrap_p(np.arange(1.0, 100.0)) == pytest.approx(2 / 100)
    assert bootstrap_p(np.r_[-np.ones(50), np.ones(50)]) == 1.0
    assert bootstrap_p(np.r_[np.full(49, np.nan), np.ones(19)]) == pytest.approx(0.1)
    assert bootstrap_p(np.full(5, np.nan)) is None


def test_null_controls_are_not_counted_among_the_comparisons():
    def one(model, reference, p, delong_p=None):
        auroc = {"auroc": {"p": p}}
        return {"model": model, "reference": reference, "metrics": auroc, "delong": {"p": delong_p}}

    rows = [one("a", "b", 0.04, 0.02), one("a", "mean_pool_lr", 0.03), one("a", "shuffled_label", 0.001)]
    adjust(rows, "auroc")
    assert [row["p_holm"] for row in rows] == [pytest.approx(0.04), pytest.approx(0.04), None]
