"""Split-conformal sets against MAPIE, their promise on simulated data, and abstention."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from mapie.regression import SplitConformalRegressor
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from slidemake.evaluation.probabilities.conformal import (
    class_limits,
    conformal,
    conformal_limit,
    prediction_sets,
    risk_coverage,
    sets_of,
)
from slidemake.evaluation.probabilities.conformal_intervals import conformal_intervals
from slidemake.statistics.bootstrap import bootstrap_weights
from slidemake.tasks.base import Predictions
from slidemake.tasks.class_predictions import ClassPredictions
from slidemake.tasks.prediction_table import read_predictions, read_validation
from slidemake.tasks.regression import RegressionOutcome


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose probabilities are the features."""

    def __init__(self, classes: int = 3):
        self.classes = classes

    def fit(self, x, y):
        self.classes_, self.fitted_ = np.arange(self.classes), True
        return self

    def predict_proba(self, x):
        return x

    def predict(self, x):
        return x.argmax(1)


def draw(n, classes, seed, noise=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = noise * rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.5
    logits[:, 0] += shift
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return prob, labels


def predictions(prob, labels, fold=None, sites=None, repeats=1):
    n = len(labels)
    fold = np.zeros((repeats, n), int) if fold is None else fold
    prob = np.repeat(prob[None], repeats, 0)
    return ClassPredictions(
        "m",
        tuple("abcdef"[: prob.shape[2]]),
        tuple(f"P{i:04d}" for i in range(n)),
        tuple(sites or [""] * n),
        labels,
        tuple(range(repeats)),
        prob,
        prob.argmax(2),
        fold,
    )


def equal_weights(scope, chosen):
    return bootstrap_weights(np.zeros(int(chosen.sum()), int), 100, 0)[0]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_sets_equal_mapie(classes, alpha):
    for seed in range(3):
        (cal, truth), (new, _) = draw(73, classes, seed), draw(50, classes, seed + 100)
        oracle = SplitConformalClassifier(Given(classes).fit(cal, truth), confidence_level=1 - alpha, prefit=True)
        _, expected = oracle.conformalize(cal, truth).predict_set(new)
        limit = conformal_limit(1 - cal[np.arange(73), truth], alpha)
        np.testing.assert_array_equal(prediction_sets(new, limit), expected[:, :, 0])


def test_limit_by_hand():
    scores = np.arange(1, 20) / 20  # 19 scores: ceil(20 * 0.9) = 18th smallest
    assert conformal_limit(scores, 0.1) == 0.9
    assert conformal_limit(scores[:9], 0.1) == scores[8]  # ceil(10 * 0.9) = 9th of 9
    assert conformal_limit(scores[:8], 0.1) == float("inf")  # 9 * 0.9 = 8.1: more than there are
    assert conformal_limit(np.empty(0), 0.1) == float("inf")
    limits = class_limits(np.array([[0.8, 0.2]]), np.array([0]), 0.6)
    np.testing.assert_array_equal(limits, [np.float64(1 - 0.8), np.inf])


def test_coverage_is_as_promised_on_exchangeable_patients_and_not_elsewhere():
    """2,000 folds of 100 validation patients: mean coverage is between 0.9 and 0.9 + 1/101; 0.02 is far over 4 se."""
    covered, elsewhere = [], []
    for seed in range(400):
        cal, truth = draw(100, 2, seed)
        limit = conformal_limit(1 - cal[np.arange(100), truth], 0.1)
        for found, shift in ((covered, 0.0), (elsewhere, 3.0)):
            new, labels = draw(50, 2, seed + 10_000, shift=shift)
            found.append(prediction_sets(new, limit)[np.arange(50), labels].mean())
    assert 0.88 <= np.mean(covered) <= 0.92
    assert np.mean(elsewhere) < 0.8


def test_each_fold_has_its_own_limit_and_sites_show_what_the_mean_hides():
    prob, labels = draw(200, 2, 0)
    far, far_labels = draw(40, 2, 1, shift=3.0)
    everything, truth = np.concatenate([prob, far]), np.r_[labels, far_labels]
    fold = np.arange(240)[None] % 2
    p = predictions(everything, truth, fold, ["here"] * 200 + ["elsewhere"] * 40)
    calibration = {(0, 0): draw(80, 2, 2), (0, 1): draw(120, 2, 3)}
    sets = sets_of(p, calibration, 0.1, False)
    for f in (0, 1):
        cal, of = calibration[0, f]
        limit = conformal_limit(1 - cal[np.arange(len(of)), of], 0.1)
        np.testing.assert_array_equal(sets[0, fold[0] == f], prediction_sets(everything[fold[0] == f], limit))
    found = conformal(p, calibration, 0.1, 0.95, equal_weights)
    held = sets[0, np.arange(240), truth]
    assert found["pooled"]["coverage"]["value"] == pytest.approx(held.mean())
    assert found["sites"]["elsewhere"]["coverage"]["value"] == pytest.approx(held[200:].mean())
    assert found["sites"]["elsewhere"]["coverage"]["high"] < 0.9 < found["sites"]["here"]["coverage"]["high"]
    size = sets[0].sum(1)
    assert found["pooled"]["decided"] == pytest.approx((size == 1).mean())
    assert found["pooled"]["accuracy_if_decided"] == pytest.approx(held[size == 1].mean())
    assert found["by_class"]["a"]["same_limit"]["value"] == pytest.approx(held[truth == 0].mean())
    assert found["validation"] == {"least": 80, "most": 120}
    json.dumps(found, allow_nan=False)


def test_too_few_validation_patients_and_none():
    prob, labels = draw(30, 2, 0)
    p = predictions(prob, labels)
    found = conformal(p, {(0, 0): draw(5, 2, 1)}, 0.1, 0.95, equal_weights)
    assert "fewer than 9 validation patients" in found["reason"]
    assert (found["pooled"]["coverage"]["value"], found["pooled"]["set_size"], found["pooled"]["decided"]) == (1, 2, 0)
    assert found["pooled"]["accuracy_if_decided"] is None
    nothing = conformal(p, {}, 0.1, 0.95, equal_weights)
    assert (nothing["pooled"], nothing["reason"]) == (None, "a fold has no validation patients")


def test_risk_coverage_by_hand():
    # sure of 0.9, 0.8, 0.7, 0.6; the second and the last are wrong: risks 0, 1/2, 1/3, 1/2
    prob = np.array([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    found = risk_coverage(predictions(prob, np.array([1, 0, 0, 0])))
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["full"] == 0.5
    assert found["best"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert [found["risk"][i] for i in (24, 49, 74, 99)] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2], abs=1e-6)
    level = risk_coverage(predictions(np.full((4, 2), 0.5), np.array([1, 0, 0, 0])))
    assert level["aurc"] == pytest.approx(level["full"]) == pytest.approx(0.25)  # equally sure: no order


def test_validation_predictions_come_from_the_folds_bundles(tmp_path):
    lines = ["patient_id,site,label,repeat,fold,prob_n,prob_t,threshold,predicted"]
    lines += [f"P{i},,{'nt'[i % 2]},0,{i % 2},0.4,0.6,0.5,t" for i in range(4)]
    path = tmp_path / "predictions_patients.csv"
    path.write_text("\n".join(lines))
    for fold in (0, 1):
        folder = tmp_path / "bundles" / f"repeat0_fold{fold}"
        folder.mkdir(parents=True)
        kept = {f"P{i}": [0.1 * i, 1 - 0.1 * i] for i in range(4) if i % 2 != fold} | {"unknown": [0.5, 0.5]}
        (folder / "bundle.json").write_text(json.dumps({"training": {"validation_probability": kept}}))
    p = read_validation(path, read_predictions(path, "m", "binary"), {f"P{i}": "nt"[i % 2] for i in range(4)})
    assert sorted(p.validation) == [(0, 0), (0, 1)]
    prob, labels = p.validation[0, 0]
    np.testing.assert_allclose(prob, [[0.1, 0.9], [0.3, 0.7]])
    assert labels.tolist() == [[1], [1]]
    assert read_validation(tmp_path / "elsewhere" / "p.csv", p, {}).validation is None


class GivenNumber(RegressorMixin, BaseEstimator):
    """A fitted regression whose prediction is the feature."""

    def fit(self, x, y):
        self.fitted_ = True
        return self

    def predict(self, x):
        return np.asarray(x)[:, 0]


def numbers(n, seed, sites=("",), shift=0.0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    of = np.array([sites[i % len(sites)] for i in range(n)])
    said = truth + 0.3 * rng.normal(size=n) + shift * (of == "B")
    people = tuple(f"P{i:04d}" for i in range(n))
    fold = (np.arange(n) % 2)[None]
    about = ("m", RegressionOutcome(), people, tuple(of), truth[:, None], (0,))
    return Predictions(*about, said[None, :, None], np.empty((1, n, 0)), fold)


def off_by(table, *residuals):
    """The table with validation patients who are that far off, for each fold."""
    made = {(0, f): (np.zeros((len(off), 1)), off[:, None]) for f, off in enumerate(residuals)}
    return replace(table, validation=made)


def unweighted(scope, chosen):
    return bootstrap_weights(np.zeros(len(chosen), int), 50, 0)[0]


def test_intervals_of_numbers_are_mapies():
    table, residual = numbers(60, 1), np.abs(np.random.default_rng(2).normal(size=80))
    found = conformal_intervals(off_by(table, residual, residual), 0.1, 0.95, unweighted)
    mapie = SplitConformalRegressor(GivenNumber().fit(None, None), confidence_level=0.9, prefit=True)
    zero = np.zeros((80, 1))
    mapie.conformalize(zero, residual)
    _, bounds = mapie.predict_interval(table.values[0])
    assert found["pooled"]["width"] == pytest.approx((bounds[:, 1, 0] - bounds[:, 0, 0]).mean())
    inside = (bounds[:, 0, 0] <= table.truth[:, 0]) & (table.truth[:, 0] <= bounds[:, 1, 0])
    assert found["pooled"]["coverage"]["value"] == pytest.approx(inside.mean())


def test_intervals_keep_their_promise_and_show_the_site_that_breaks_it():
    """90 % promised, 1,000 patients, 500 for validation: the sd of the coverage is 0.017 (both parts), 4 sd 0.066."""
    table = numbers(1000, 3, ("A", "B"), shift=0.0)
    validation = np.abs(numbers(500, 4).values[0, :, 0] - numbers(500, 4).truth[:, 0])
    found = conformal_intervals(off_by(table, validation, validation), 0.1, 0.95, unweighted)
    assert abs(found["pooled"]["coverage"]["value"] - 0.9) < 0.066
    other = off_by(numbers(1000, 3, ("A", "B"), shift=1.0), validation, validation)
    moved = conformal_intervals(other, 0.1, 0.95, unweighted)
    assert moved["sites"]["B"]["coverage"]["high"] < 0.5 < 0.8 < moved["sites"]["A"]["coverage"]["low"]


def test_too_few_for_an_interval():
    table = numbers(20, 1)
    found = conformal_intervals(off_by(table, np.ones(8), np.ones(30)), 0.1, 0.95, unweighted)
    assert (found["pooled"], found["reason"]) == (None, "a fold has 8 validation patients, and 9 are needed")
    one_fold = conformal_intervals(off_by(table, np.ones(9)), 0.1, 0.95, unweighted)
    assert one_fold["reason"].startswith("a fold has no")
    json.dumps(found, allow_nan=False)


def test_validation_comes_from_the_bundles_of_the_folds(tmp_path):
    table = numbers(6, 0)
    for fold, kept in ((0, {"Q1": [2.5], "Q2": [1.0], "unknown": [3.0]}), (1, {"Q1": [0.0]})):
        folder = tmp_path / "bundles" / f"repeat0_fold{fold}"
        folder.mkdir(parents=True)
        (folder / "bundle.json").write_text(json.dumps({"training": {"validation_values": kept}}))
    found = read_validation(tmp_path / "predictions_patients.csv", table, {"Q1": "2", "Q2": "4"}).validation
    assert {where: (values.tolist(), truth.tolist()) for where, (values, truth) in found.items()} == {
        (0, 0): ([[2.5], [1.0]], [[2.0], [4.0]]),
        (0, 1): ([[0.0]], [[2.0]]),
    }
