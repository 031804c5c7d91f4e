"""Metrics against scikit-learn and hand computation; the bootstrap against a loop over resamples."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from slidemake.statistics import ordinal_metrics as metrics_ordinal
from slidemake.statistics.bootstrap import bootstrap_indices, bootstrap_weights, percentile_interval, scope_seed
from slidemake.statistics.class_metrics import METRICS, auroc, ece, mass_bins, metrics_over, why_undefined, width_bins
from slidemake.statistics.reliability import (
    MAX_POINTS,
    calibration_line,
    ece_if_calibrated,
    reliability_table,
    roc_and_pr,
    wilson_interval,
)


def sample(n: int, classes: int, seed: int, decimals: int = 12):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(classes, size=n - classes)]
    prob = np.floor(rng.dirichlet(np.ones(classes), n) * 10**decimals) / 10**decimals
    prob[:, 0] = (1 - prob[:, 1:].sum(1)).round(decimals)
    predicted = rng.integers(classes, size=n)
    return labels, np.clip(prob, 0, 1), predicted


def best_sensitivity(positive, score, specificity):
    fpr, tpr, _ = sk.roc_curve(positive, score, drop_intermediate=False)
    return tpr[1 - fpr >= specificity - 1e-12].max()


def sklearn_figures(labels, prob, predicted):
    classes = prob.shape[1]
    two = classes == 2
    average = "binary" if two else "macro"
    onehot = np.eye(classes)[labels]
    specificity = [
        ((labels != c) & (predicted != c)).sum() / (labels != c).sum() for c in ([1] if two else range(classes))
    ]
    return {
        "auroc": sk.roc_auc_score(labels, prob[:, 1]) if two else sk.roc_auc_score(labels, prob, multi_class="ovr"),
        "auprc": sk.average_precision_score(onehot[:, 1], prob[:, 1])
        if two
        else sk.average_precision_score(onehot, prob, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted, average=average),
        "sensitivity": sk.recall_score(labels, predicted, average=average),
        "specificity": np.mean(specificity),
        "accuracy": sk.accuracy_score(labels, predicted),
        "mcc": sk.matthews_corrcoef(labels, predicted),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "sensitivity_at_specificity": np.mean(
            [best_sensitivity(labels == c, prob[:, c], 0.9) for c in ([1] if two else range(classes))]
        ),
        "brier": sk.brier_score_loss(labels, prob[:, 1]) if two else ((prob - onehot) ** 2).sum(1).mean(),
        "log_loss": sk.log_loss(labels, prob, labels=list(range(classes))),
    }


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("decimals", [12, 1])  # one decimal: many ties
def test_metrics_equal_scikit_learn(classes, decimals):
    for seed in range(5):
        labels, prob, predicted = sample(60, classes, seed, decimals)
        found = metrics_over(labels, prob, predicted)
        for name, expected in sklearn_figures(labels, prob, predicted).items():
            assert found[name][0] == pytest.approx(expected, abs=1e-9), name
        assert set(found) == set(METRICS)


@pytest.mark.parametrize("classes", [2, 3])
def test_weighted_draws_equal_a_loop_over_resamples(classes):
    labels, prob, predicted = sample(30, classes, 7, decimals=2)
    indices, _ = bootstrap_indices(labels, 40, seed=3)
    weights, redrawn = bootstrap_weights(labels, 40, seed=3)
    assert redrawn == 0
    found = metrics_over(labels, prob, predicted, bins=4, weights=weights)
    confidence = prob[:, 1] if classes == 2 else prob.max(1)
    hit = (labels == 1) if classes == 2 else (prob.argmax(1) == labels)
    member = mass_bins(confidence, 4)
    for draw, chosen in enumerate(indices):
        for name, expected in sklearn_figures(labels[chosen], prob[chosen], predicted[chosen]).items():
            assert found[name][draw] == pytest.approx(expected, abs=1e-9), name
        error = sum(
            abs((hit[chosen][member[chosen] == b].astype(float) - confidence[chosen][member[chosen] == b]).sum())
            for b in range(4)
        )
        assert found["ece"][draw] == pytest.approx(error / 30, abs=1e-12)


def test_work_in_chunks_changes_nothing(monkeypatch):
    labels, prob, predicted = sample(20, 2, 1)
    weights, _ = bootstrap_weights(labels, 50, seed=0)
    whole = metrics_over(labels, prob, predicted, weights=weights)
    monkeypatch.setattr("slidemake.statistics.class_metrics.CHUNK", 60)
    for name, values in metrics_over(labels, prob, predicted, weights=weights).items():
        np.testing.assert_allclose(values, whole[name], rtol=0, atol=1e-12)


def test_brier_and_ece_by_hand():
    p = np.array([0.1, 0.2, 0.6, 0.9])
    y = np.array([0, 1, 1, 1])
    found = metrics_over(y, np.column_stack([1 - p, p]), y, bins=2)
    assert found["brier"][0] == pytest.approx((0.01 + 0.64 + 0.16 + 0.01) / 4)
    # Bins {0.1, 0.2} and {0.6, 0.9}: |0.5 - 0.15| and |1 - 0.75|, half of the patients each; the widths give the same.
    assert found["ece"][0] == pytest.approx(0.5 * 0.35 + 0.5 * 0.25)
    assert found["ece_width"][0] == pytest.approx(0.30)


def test_bins_keep_ties_together_and_include_one():
    assert mass_bins(np.array([0.5, 0.5, 0.5, 0.9]), 2).tolist() == [0, 0, 0, 1]
    assert np.bincount(mass_bins(np.random.default_rng(0).random(100), 10)).tolist() == [10] * 10
    assert width_bins(np.array([0.0, 0.1, 0.999, 1.0]), 10).tolist() == [0, 1, 9, 9]


def test_ece_of_a_calibrated_and_of_a_shifted_simulator():
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 0.8, 100_000)
    one = np.ones((1, len(p)))
    for member in (mass_bins(p, 15), width_bins(p, 15)):
        assert ece(p, rng.random(len(p)) < p, member, one)[0] < 0.01
        assert ece(p, rng.random(len(p)) < p + 0.2, member, one)[0] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("present", [0, 1])
def test_one_class_has_no_figure_and_a_reason(present):
    labels = np.full(6, present)
    prob = np.column_stack([np.linspace(0.9, 0.1, 6), np.linspace(0.1, 0.9, 6)])
    found = metrics_over(labels, prob, (prob[:, 1] > 0.5).astype(int), weights=np.ones((3, 6)))
    for name in METRICS:
        reason = why_undefined(name, labels, ["benign", "tumour"])
        assert np.isnan(found[name]).all() == (reason is not None), name
    assert np.isnan(found["auroc"]).all()
    assert np.isnan(found["balanced_accuracy"]).all()
    assert "no patient of class" in why_undefined("auroc", labels, ["benign", "tumour"])


def test_a_missing_class_of_three_and_no_patient_at_all():
    labels, prob, predicted = sample(12, 3, 0)
    labels = np.minimum(labels, 1)
    assert np.isnan(metrics_over(labels, prob, predicted)["auroc"][0])
    nobody = metrics_over(np.empty(0, int), np.empty((0, 2)), np.empty(0, int))
    assert all(np.isnan(value[0]) for value in nobody.values())
    assert why_undefined("accuracy", np.empty(0, int), ["a", "b"]) == "no patients"
    assert auroc(np.array([True]), np.array([0.3])) is None
    assert auroc(np.array([True, False, True]), np.array([0.3, 0.1, np.nan])) == 1.0


def test_stratified_draws_keep_the_classes_and_are_seeded():
    labels = np.array([0] * 9 + [1] * 2)
    indices, redrawn = bootstrap_indices(labels, 300, seed=1)
    assert redrawn == 0
    assert ((labels[indices] == 1).sum(1) == 2).all()
    np.testing.assert_array_equal(indices, bootstrap_indices(labels, 300, seed=1)[0])
    assert (indices != bootstrap_indices(labels, 300, seed=2)[0]).any()
    assert scope_seed(0, "pooled") != scope_seed(0, "site:A")


def test_draws_that_lost_a_class_are_drawn_again_and_counted():
    labels = np.array([0] * 9 + [1])
    indices, redrawn = bootstrap_indices(labels, 500, seed=1, stratify=False)
    assert (labels[indices] == 1).any(1).all()
    # Each attempt loses the only positive with probability 0.9^10 = 0.35: 500 * 0.35 / 0.65 = 268 expected.
    assert 200 < redrawn < 340
    assert bootstrap_indices(np.zeros(5, int), 10, seed=0, stratify=False)[1] == 0
    assert bootstrap_indices(np.empty(0, int), 10, seed=0)[0].shape == (10, 0)


def test_percentile_interval():
    assert percentile_interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert percentile_interval(np.r_[np.arange(101.0), np.nan]) == pytest.approx((2.5, 97.5))
    assert percentile_interval(np.array([1.0, np.nan, np.nan])) == (None, None)


def test_interval_of_null_scores_contains_one_half():
    inside = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        labels, score = np.arange(40) % 2, rng.random(40)
        weights, _ = bootstrap_weights(labels, 400, seed)
        draws = metrics_over(labels, np.column_stack([1 - score, score]), None, weights=weights)["auroc"]
        low, high = percentile_interval(draws)
        inside += low <= 0.5 <= high
    assert inside >= 45


def test_wilson_interval_and_reliability_table():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # tabulated
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    p, y = np.array([0.1, 0.3, 0.6, 0.8]), np.array([0, 1, 1, 1])
    rows = reliability_table(p, y, 2)
    assert [row["count"] for row in rows] == [2, 2]
    assert [row["observed"] for row in rows] == [0.5, 1.0]
    assert rows[0]["predicted"] == pytest.approx(0.2)
    assert sum(row["count"] for row in reliability_table(p, y, 10, "width")) == 4


def test_calibration_line_equals_unpenalised_regression():
    rng = np.random.default_rng(4)
    logit = rng.normal(size=400)
    y = rng.random(400) < 1 / (1 + np.exp(-(0.4 + 0.5 * logit)))
    line = calibration_line(1 / (1 + np.exp(-logit)), y)
    oracle = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(logit[:, None], y)
    assert line["slope"] == pytest.approx(oracle.coef_[0, 0], abs=1e-5)
    assert line["intercept"] == pytest.approx(oracle.intercept_[0], abs=1e-5)
    assert line["in_the_large"] > 0


@pytest.mark.parametrize(
    ("p", "y", "reason"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], "separate"),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1], "equal"),
        ([0.1, 0.9], [1, 1], "one class"),
        ([0.0, 1.0, 0.0, 1.0], [0, 1, 0, 1], "separate"),
    ],
)
def test_calibration_line_that_does_not_exist(p, y, reason):
    line = calibration_line(np.array(p), np.array(y))
    assert line["slope"] is None
    assert reason in line["reason"]


def test_ece_of_small_calibrated_samples_is_not_zero():
    p = np.random.default_rng(0).random(24)
    null = ece_if_calibrated(p, 4, seed=0)
    assert 0.05 < null["mean"] < null["p95"] < 0.4
    assert null == ece_if_calibrated(p, 4, seed=0)


def test_curves_equal_scikit_learn_and_are_thinned():
    labels, prob, _ = sample(80, 2, 3, decimals=1)
    found = roc_and_pr(labels == 1, prob[:, 1])
    fpr, tpr, _ = sk.roc_curve(labels, prob[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(found["roc"]["fpr"], fpr, atol=1e-6)
    np.testing.assert_allclose(found["roc"]["tpr"], tpr, atol=1e-6)
    precision, recall, _ = sk.precision_recall_curve(labels, prob[:, 1])
    np.testing.assert_allclose(found["pr"]["recall"][1:], recall[:-1][::-1], atol=1e-6)
    np.testing.assert_allclose(found["pr"]["precision"][1:], precision[:-1][::-1], atol=1e-6)
    labels, prob, _ = sample(5000, 2, 3)
    large = roc_and_pr(labels == 1, prob[:, 1])["roc"]
    assert len(large["fpr"]) == MAX_POINTS
    assert (large["fpr"][0], large["tpr"][-1]) == (0.0, 1.0)
    assert roc_and_pr(np.ones(3, bool), np.arange(3.0)) is None


@pytest.mark.parametrize("classes", [2, 4])
def test_kappa_of_grades_has_quadratic_weights(classes):
    labels, prob, predicted = sample(60, classes, 3)
    found = metrics_ordinal.metrics_over(labels, prob @ np.arange(classes), predicted, classes)
    expected = sk.cohen_kappa_score(labels, predicted, weights="quadratic")
    assert found["kappa"][0] == pytest.approx(expected, abs=1e-12)


def test_sensitivity_at_other_specificities_and_with_ties():
    positive, score = np.array([1, 1, 1, 0, 0, 0, 0]) == 1, np.array([0.9, 0.5, 0.2, 0.5, 0.3, 0.1, 0.1])
    prob = np.column_stack([1 - score, score])
    labels = positive.astype(int)
    # thresholds from the top: 0.9 (tp 1, fp 0), 0.5 (2, 1), 0.3 (2, 2), 0.2 (3, 2), 0.1 (3, 4)
    for specificity, expected in ((1.0, 1 / 3), (0.75, 2 / 3), (0.74, 2 / 3), (0.5, 1.0), (0.9, 1 / 3)):
        found = metrics_over(labels, prob, None, specificity=specificity)
        assert found["sensitivity_at_specificity"][0] == pytest.approx(expected)
    level = metrics_over(labels, np.full((7, 2), 0.5), None)  # one threshold, which calls everybody
    assert level["sensitivity_at_specificity"][0] == 0


def test_constant_decisions_have_no_skill_and_constant_labels_no_figure():
    labels = np.array([0, 1, 1, 0, 1])
    found = metrics_over(labels, np.full((5, 2), 0.5), np.ones(5, int))
    assert (found["mcc"][0], found["kappa"][0], found["auroc"][0], found["balanced_accuracy"][0]) == (0, 0, 0.5, 0.5)
    same = metrics_over(np.ones(5, int), np.full((5, 2), 0.5), np.array([1, 1, 0, 1, 1]))
    for name in ("mcc", "kappa", "auroc", "sensitivity_at_specificity"):
        assert np.isnan(same[name][0])
        assert why_undefined(name, np.ones(5, int), ["benign", "tumour"]) == "no patient of class benign among 5"
