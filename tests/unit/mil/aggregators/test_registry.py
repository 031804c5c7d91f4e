"""Aggregators: invariances, masks, small bags, exact leave-one-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slidemake.mil.aggregators import (
    AGGREGATORS,
    SeededDropout,
    build_aggregator,
    encode_bag,
    leave_one_out,
    log_odds,
    predict_bag,
)
from small_models import SMALL, model_of, tiles


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize("n", [1, 7, 50])
def test_order_of_tiles_does_not_matter(name, n):
    model, x = model_of(name), tiles(n)
    order = np.random.default_rng(1).permutation(n)
    logits, attention = predict_bag(model, x)
    moved_logits, moved = predict_bag(model, x[order])
    if AGGREGATORS[name].in_order and n > 1:  # says of itself that it is none: then a new order must show
        assert np.abs(moved_logits - logits).max() > 1e-4
    else:
        np.testing.assert_allclose(moved_logits, logits, atol=2e-6)
        np.testing.assert_allclose(moved, attention[order], atol=1e-6)
    assert attention.shape == (n,)
    assert attention.min() >= 0
    assert attention.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_padded_batch_equals_single_bags(name):
    model = model_of(name, classes=3)
    bags = [tiles(n, seed=n) for n in (1, 7, 4)]
    x, mask = torch.full((3, 9, 12), 1e3), torch.zeros(3, 9, dtype=torch.bool)
    for i, bag in enumerate(bags):
        x[i, : len(bag)], mask[i, : len(bag)] = torch.from_numpy(bag), True
    with torch.no_grad():
        logits, attention = model(x, mask)
    assert logits.shape == (3, 3)
    for i, bag in enumerate(bags):
        alone, weights = predict_bag(model, bag)
        np.testing.assert_allclose(logits[i].numpy(), alone, atol=1e-5)
        np.testing.assert_allclose(attention[i, : len(bag)].numpy(), weights, atol=1e-6)
        assert float(attention[i, len(bag) :].sum()) == 0


def test_gated_attention_as_written_in_the_paper():
    model, x = model_of("abmil_gated"), tiles(7)
    p = {k: v.double().numpy() for k, v in model.state_dict().items()}
    z = (x - p["feature_mean"]) / p["feature_std"]
    e = np.maximum(z @ p["project.weight"].T + p["project.bias"], 0)
    gate = 1 / (1 + np.exp(-(e @ p["gate.weight"].T + p["gate.bias"])))
    s = (np.tanh(e @ p["tanh.weight"].T + p["tanh.bias"]) * gate) @ p["score.weight"][0] + p["score.bias"][0]
    a = np.exp(s) / np.exp(s).sum()
    logits, attention = predict_bag(model, x)
    np.testing.assert_allclose(attention, a, atol=1e-6)
    np.testing.assert_allclose(logits, (a @ e) @ p["classifier.weight"].T + p["classifier.bias"], atol=1e-5)


def test_dropout_drops_the_share_it_was_asked_for_and_keeps_the_mean():
    x = torch.ones(1000, 1001)  # an odd number: the last word of random bits is used in part
    for p in (0.1, 0.25, 0.5):
        drop = SeededDropout(p).train()
        drop.generator = torch.Generator().manual_seed(3)
        y = drop(x)
        assert float((y == 0).float().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
        assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        columns = (y == 0).float().mean(0)  # no stripes: neighbours come from one word
        assert float((columns - p).abs().max()) < 5 * (p * (1 - p) / 1000) ** 0.5
        both = float(((y[:, 1:] == 0) & (y[:, :-1] == 0)).float().mean())
        assert both == pytest.approx(p * p, abs=0.002)


def test_mean_pool_is_the_mean():
    model, x = model_of("mean_pool"), tiles(7)
    p = {k: v.double().numpy() for k, v in model.state_dict().items()}
    mean = ((x - p["feature_mean"]) / p["feature_std"]).mean(0)
    logits, attention = predict_bag(model, x)
    np.testing.assert_allclose(logits, p["classifier.weight"] @ mean + p["classifier.bias"], atol=1e-5)
    np.testing.assert_allclose(attention, 1 / 7, atol=1e-7)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_leave_one_out_equals_brute_force(name, classes, n):
    if AGGREGATORS[name].in_order and n == 40:
        n = 12  # one by one: the same code as with more
    model, x = model_of(name, classes), tiles(n)
    got = leave_one_out(model, x, target=1)

    def odds(bag):
        return float(log_odds(torch.from_numpy(predict_bag(model, bag)[0]), 1))

    brute = [odds(x) - odds(np.delete(x, i, axis=0)) for i in range(n)]
    np.testing.assert_allclose(got, brute, atol=1e-5)


def test_leave_one_out_where_one_tile_has_nearly_all_attention():
    model, x = model_of("abmil_gated"), tiles(6)
    with torch.no_grad():
        model.score.weight.mul_(400)
    _, attention = predict_bag(model, x)
    assert attention.max() > 0.999
    whole = predict_bag(model, x)[0]
    rest = [predict_bag(model, np.delete(x, i, axis=0))[0] for i in range(6)]
    brute = [(whole[1] - whole[0]) - (r[1] - r[0]) for r in rest]
    np.testing.assert_allclose(leave_one_out(model, x), brute, atol=1e-4)


def test_leave_one_out_of_a_single_tile_is_against_the_empty_bag():
    model, x = model_of("abmil_gated"), tiles(1)
    logits, _ = predict_bag(model, x)
    empty = model.classifier.bias.detach().double().numpy()
    expected = (logits[1] - logits[0]) - (empty[1] - empty[0])
    np.testing.assert_allclose(leave_one_out(model, x), [expected], atol=1e-6)


def test_chunks_and_seeds():
    x = tiles(23)
    for name in AGGREGATORS:
        model = model_of(name)
        for whole, parts in zip(encode_bag(model, x), encode_bag(model, x, chunk=5), strict=True):
            np.testing.assert_allclose(parts.numpy(), whole.numpy(), atol=1e-6)
    model = model_of("abmil_gated")
    torch.manual_seed(0)
    first, second = (build_aggregator("abmil_gated", 12, 2, SMALL, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    third = build_aggregator("abmil_gated", 12, 2, SMALL, seed=4)
    assert not torch.equal(first.project.weight, third.project.weight)
    with pytest.raises(ValueError, match="unknown aggregator"):
        build_aggregator("clam", 12, 2, {})
    with pytest.raises(ValueError, match="without tiles"):
        predict_bag(model, tiles(0))


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_randomness_of_training_comes_from_its_own_generator(name):
    x = torch.from_numpy(tiles(20))[None]
    outs = []
    for _ in range(2):
        model = build_aggregator(name, 12, 2, SMALL, seed=1).train()
        torch.rand(7)  # somebody else uses the global generator in between
        outs.append(model(x)[0])
    assert torch.equal(*outs)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
