"""Scalings against NumPy and scikit-learn, models that carry them, and the instance-linear model by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mil_cohort import ENCODER, STAIN, planted
from sklearn.decomposition import PCA
from slidemake.mil import scaling
from slidemake.mil.aggregators import build_aggregator, leave_one_out, predict_bag
from slidemake.mil.bags import make_bags
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.mil.scaling import Components, Scaling, fit_scaling, scaled_bags

LINEAR = {"aggregator": "instance_linear", "contrast": True}


def linear_model(seed=0, features=5, outputs=2, **parameters):
    """An instance-linear model with random weights."""
    model = build_aggregator("instance_linear", features, outputs, {"contrast": outputs == 2, **parameters})
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.scores.weight)
    torch.nn.init.normal_(model.scores.bias)
    return model.eval()


@pytest.fixture(scope="module")
def cohort():
    bags, splits = planted(12, dim=20, slides=2)
    rng = np.random.default_rng(0)
    spread = np.linspace(0.1, 5, 20)
    features = (bags.features * spread + rng.normal(size=20)).astype(np.float32)
    return replace(bags, features=features), sorted(splits.labels)


@pytest.mark.parametrize("how", ["none", "each", "centred"])
def test_scalings_by_feature(cohort, how):
    bags, people = cohort
    found = fit_scaling(bags, people, {"scaling": how})
    x = bags.features.astype(float)
    expected = {
        "none": x,
        "each": (x - x.mean(0)) / x.std(0),
        "centred": (x - x.mean(0)) / x.std(0).mean(),
    }[how]
    np.testing.assert_allclose(found.apply(bags.features), expected, rtol=1e-3, atol=1e-4)


def test_components_of_features_in_other_units_are_those_of_their_correlation(cohort):
    """A length in nm beside shares: the components are scikit-learn's of standardised tiles, and not the length."""
    bags, people = cohort
    units = np.full(20, 1e-4)
    units[3] = 1e5
    found = Components.fit(replace(bags, features=(bags.features * units).astype(np.float32)), people, 4)
    x = bags.features.astype(float)
    pca = PCA(4, svd_solver="full").fit((x - x.mean(0)) / x.std(0))
    np.testing.assert_allclose(found.variance, pca.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-3)
    apart = np.abs(found.axes.T @ pca.components_.T)
    np.testing.assert_allclose(apart, np.eye(4), atol=2e-2)
    scaled = found.scaling("whitened", 4).apply(bags.features * units)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-2)


@pytest.mark.parametrize("tiles", [None, 9])
def test_components_equal_scikit_learns(cohort, tiles):
    """With many tiles (the covariance of features) and with fewer than features (that of tiles)."""
    bags, people = cohort
    if tiles:
        bags = scaled_bags(bags, people[:1], Scaling(np.zeros(20), np.ones(20)))
        bags = replace(bags, features=bags.features[:tiles], offsets=np.array([0, tiles]), where={people[0]: (0, 1)})
        people = people[:1]
    x = np.concatenate([bags.bag(p) for p in people]).astype(float)
    reference = PCA(4, svd_solver="full").fit(x)
    found = Components.fit(bags, people, 4)
    np.testing.assert_allclose(found.variance, reference.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-3)
    np.testing.assert_allclose(np.abs((found.axes * reference.components_.T).sum(0)), 1, atol=1e-3)
    white = found.scaling("whitened", 4).apply(x)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(4), atol=1e-3)
    principal = found.scaling("principal", 4).apply(x)
    assert np.mean(principal**2) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(np.corrcoef(principal[:, 0], white[:, 0])[0, 1], 1, atol=1e-6)


def test_components_beyond_the_rank_are_nothing(cohort):
    """Three tiles span two directions: the others stay 0 instead of blowing rounding errors up."""
    bags, people = cohort
    few = replace(bags, features=bags.features[:3], offsets=np.array([0, 3]), where={people[0]: (0, 1)})
    found = fit_scaling(few, people[:1], {"scaling": "whitened", "components": 6})
    assert found.axes.shape == (20, 6)
    assert (np.abs(found.axes).max(0) > 0).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("dim", [20, 400])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_errors_are_not_whitened(dim, dtype):
    """200 tiles that vary in five directions alone: what rounding adds to them is no sixth, and is not made large."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 5)) @ rng.normal(size=(5, dim)) + 3).astype(dtype)
    x[:, 0] = 7  # a constant feature
    bags = make_bags(x, ["a"], ["a"], [200], ENCODER, STAIN)
    found = Components.fit(bags, ["a"], 12)
    assert (found.variance > 0).tolist() == [True] * 5 + [False] * 7
    for how in ("whitened", "principal"):
        assert not found.scaling(how, 12).apply(bags.bag("a"))[:, 5:].any()


@pytest.mark.parametrize("aggregator", ["abmil_gated", "instance_linear", "max_pool", "dsmil"])
def test_a_model_of_scaled_features_takes_features_as_they_are(cohort, aggregator):
    bags, people = cohort
    found = fit_scaling(bags, people, {"scaling": "whitened", "components": 5})
    model = build_aggregator(aggregator, 20, 2, {"components": 5, "hidden": 8, "attention": 8}, seed=1).eval()
    inner = build_aggregator(aggregator, 5, 2, {"hidden": 8, "attention": 8}, seed=1).eval()
    found.install(model)
    x = bags.bag(people[0])
    np.testing.assert_allclose(predict_bag(model, x)[0], predict_bag(inner, found.apply(x))[0], atol=1e-4)
    again = build_aggregator(aggregator, 20, 2, {"components": 5, "hidden": 8, "attention": 8})
    again.load_state_dict(model.state_dict(), strict=True)
    np.testing.assert_array_equal(predict_bag(again.eval(), x)[0], predict_bag(model, x)[0])


def test_training_on_scaled_bags_is_training_on_the_bags(cohort):
    """Scaling once, or at every step inside the model, is the same fit."""
    bags, people = cohort
    labels = {p: i % 2 for i, p in enumerate(people)}
    settings = {**DEFAULTS, **LINEAR, "scaling": "whitened", "components": 6, "epochs": 4, "min_epochs": 1}
    inside = fit_member(bags, class_objective(labels, people, 2, settings), people, [], settings, 0)
    found = fit_scaling(bags, people, settings)
    scaled = scaled_bags(bags, people, found)
    before = fit_member(scaled, class_objective(labels, people, 2, settings), people, [], settings, 0, found)
    x = bags.bag(people[0])
    np.testing.assert_allclose(predict_bag(before.model, x)[0], predict_bag(inside.model, x)[0], atol=2e-3)


def test_scaled_bags_are_bounded(cohort, monkeypatch):
    bags, people = cohort
    monkeypatch.setattr(scaling, "SCALED_BYTES", 4 * 20 * 30)
    scaled = scaled_bags(bags, people[:4], Scaling(np.zeros(20), np.ones(20)))
    assert len(scaled.features) <= 30
    assert set(scaled.where) == set(people[:4])
    assert all(scaled.tiles(p) for p in people[:4])


def pooled_by_hand(t, pooling):
    if pooling == "lse":
        return np.log(np.mean(np.exp(3 * t))) / 3
    if pooling == "top":
        return np.sort(t)[::-1][: max(1, round(0.1 * len(t)))].mean()
    if pooling == "noisy_or":
        none = np.prod((1 - 1 / (1 + np.exp(-t))) ** (100 / len(t)))
        return np.log((1 - none) / none)
    return t.mean()


@pytest.mark.parametrize("pooling", ["lse", "top", "mean", "noisy_or"])
@pytest.mark.parametrize("n", [1, 7, 34])
def test_pooled_scores_by_hand(pooling, n):
    model = linear_model(pooling=pooling)
    x = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
    w, c = model.scores.weight[0].detach().numpy(), model.scores.bias.item()
    logits, attention = predict_bag(model, x)
    assert logits[1] - logits[0] == pytest.approx(pooled_by_hand(x @ w + c, pooling), abs=1e-4)
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    padded = torch.from_numpy(np.concatenate([x, np.full((3, 5), 9, np.float32)]))[None]
    mask = torch.arange(n + 3)[None] < n
    np.testing.assert_allclose(model(padded, mask)[0][0].detach(), logits, atol=1e-5)
    assert not model(padded, mask)[1][0, n:].any()


@pytest.mark.parametrize("pooling", ["lse", "top", "mean", "noisy_or"])
@pytest.mark.parametrize("evidence", ["higher", "both"])
def test_leave_one_out_equals_brute_force(pooling, evidence):
    model = linear_model(pooling=pooling, evidence=evidence)
    x = np.random.default_rng(3).normal(size=(23, 5)).astype(np.float32)
    whole = predict_bag(model, x)[0]
    brute = [
        (whole[1] - whole[0]) - np.subtract(*predict_bag(model, np.delete(x, i, 0))[0][::-1]) for i in range(len(x))
    ]
    np.testing.assert_allclose(leave_one_out(model, x), brute, atol=1e-4)


@pytest.mark.parametrize("pooling", ["lse", "top", "mean"])
def test_a_tiles_score_is_the_output_of_a_bag_of_it_and_linear(pooling):
    model = linear_model(pooling=pooling, outputs=3, evidence="both")
    x = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    scores = model.tile_scores(torch.from_numpy(x)).detach().numpy()
    for i in range(6):
        np.testing.assert_allclose(predict_bag(model, x[i : i + 1])[0], scores[i], atol=1e-5)
    middle = model.tile_scores(torch.from_numpy((x[:1] + x[1:2]) / 2)).detach().numpy()
    np.testing.assert_allclose(middle[0], (scores[0] + scores[1]) / 2, atol=1e-5)


def test_sides_of_evidence():
    """One tile that stands out raises what tiles may speak for: with `falls` an output that falls with the label."""
    x = np.zeros((10, 5), np.float32)
    x[0, 0] = 4
    for evidence, falls, sign in (("higher", False, 1), ("lower", False, -1), ("higher", True, -1)):
        model = build_aggregator("instance_linear", 5, 1, {"evidence": evidence, "falls": falls}).eval()
        with torch.no_grad():
            model.scores.weight[0, 0] = 1.0
        assert np.sign(predict_bag(model, x)[0][0]) == sign
        assert leave_one_out(model, x, lambda o: o[..., 0])[0] * sign > 0.5
