"""Each aggregator against its formula, written out; their own losses; signal found and noise not; several slides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mil_cohort import ENCODER, INFO, QUICK, planted
from scipy.special import softmax
from slidemake.mil.aggregators import AGGREGATORS, Batch, build_aggregator, leave_one_out, log_odds, predict_bag
from slidemake.mil.aggregators.clam import BAG_WEIGHT, smooth_svm
from slidemake.mil.aggregators.ilra import GatedAttention
from slidemake.mil.aggregators.transmil import AttentionLayer, landmarks, pseudo_inverse
from slidemake.mil.bags import make_bags
from slidemake.mil.bundle import Group, bundle_leave_one_out, load_bundle, predict, save_bundle
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.losses import class_objective
from slidemake.mil.prediction import predict_bags
from slidemake.statistics.temperature import auroc
from small_models import SMALL, model_of, tiles

DIM = 12


def weights_of(model):
    return {k: v.double().numpy() for k, v in model.state_dict().items()}


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gated(p, x):
    """Standardised features, embeddings and attention scores of a gated model, in float64."""
    h = (x - p["feature_mean"]) / p["feature_std"]
    e = np.maximum(linear(p, "project", h), 0)
    gate = 1 / (1 + np.exp(-linear(p, "gate", e)))
    return h, e, linear(p, "score", np.tanh(linear(p, "tanh", e)) * gate)


# -- formulas -----------------------------------------------------------------------------------------------------


def test_clam_with_one_branch_is_gated_attention_and_with_many_has_one_per_class():
    x = tiles(7)
    for name in ("clam_sb", "clam_mb"):
        model = model_of(name, classes=3)
        p = weights_of(model)
        _, e, s = gated(p, x)
        a = softmax(s, axis=0)  # (N, K)
        z = np.broadcast_to(a.T @ e, (3, e.shape[1]))
        expected = (p["classifier.weight"] * z).sum(1) + p["classifier.bias"]
        logits, attention = predict_bag(model, x)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        np.testing.assert_allclose(attention, a.mean(1), atol=1e-6)


def test_max_pool_takes_the_largest_and_shares_ties():
    model = model_of("max_pool")
    x = np.concatenate([tiles(5), tiles(5)[:2]])  # two tiles twice
    p = weights_of(model)
    h = (x - p["feature_mean"]) / p["feature_std"]
    logits, attention = predict_bag(model, x)
    np.testing.assert_allclose(logits, linear(p, "classifier", h.max(0)), atol=1e-5)
    won = np.bincount(h[:5].argmax(0), minlength=5) / DIM
    np.testing.assert_allclose(attention[:5], np.where(np.arange(5) < 2, won / 2, won), atol=1e-6)
    np.testing.assert_allclose(attention[5:], attention[:2])


def test_mean_mlp():
    model, x = model_of("mean_mlp"), tiles(7)
    p = weights_of(model)
    mean = ((x - p["feature_mean"]) / p["feature_std"]).mean(0)
    expected = linear(p, "classifier", np.maximum(linear(p, "project", mean), 0))
    np.testing.assert_allclose(predict_bag(model, x)[0], expected, atol=1e-5)


def test_dsmil_as_written_in_the_paper():
    model, x = model_of("dsmil", classes=3), tiles(7)
    p = weights_of(model)
    h = (x - p["feature_mean"]) / p["feature_std"]
    c = linear(p, "instance", h)
    q = np.tanh(linear(p, "query.2", np.maximum(linear(p, "query.0", h), 0)))
    a = softmax(q @ q[c.argmax(0)].T / np.sqrt(q.shape[1]), axis=0)
    bag = linear(p, "classifier", (a.T @ h).ravel())
    logits, attention = predict_bag(model, x)
    np.testing.assert_allclose(logits, (c.max(0) + bag) / 2, atol=1e-5)
    np.testing.assert_allclose(attention, a.mean(1), atol=1e-6)


def test_contributions_of_additive_mil_sum_to_the_logits():
    model, x = model_of("additive"), tiles(7)
    p = weights_of(model)
    _, e, s = gated(p, x)
    a = softmax(s[:, 0])
    each = np.maximum((a[:, None] * e) @ p["evidence.weight"].T, 0) @ p["classifier.weight"].T  # g(a_i e_i)
    with torch.no_grad():
        contributions = model.contributions(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(contributions, each, atol=1e-6)
    np.testing.assert_allclose(predict_bag(model, x)[0], each.sum(0) + p["classifier.bias"], atol=1e-5)


def test_chief_attends_on_projections_and_pools_features():
    model, x = model_of("chief"), tiles(7)
    p = weights_of(model)
    h, _, s = gated(p, x)
    np.testing.assert_allclose(predict_bag(model, x)[0], linear(p, "classifier", softmax(s[:, 0]) @ h), atol=1e-5)


@pytest.mark.parametrize("n", [2, 7])  # 2: fewer than pseudo-bags
def test_dtfd_deals_tiles_by_attention_and_pools_twice(n):
    model, x = model_of("dtfd"), tiles(n)
    p = weights_of(model)
    _, e, s = gated(p, x)
    order = np.argsort(-s[:, 0])
    groups = [order[m::4] for m in range(4) if len(order[m::4])]
    inside = [softmax(s[g, 0]) for g in groups]
    f = np.stack([a @ e[g] for a, g in zip(inside, groups, strict=True)])
    second = np.tanh(linear(p, "second.tanh", f)) / (1 + np.exp(-linear(p, "second.gate", f)))
    b = softmax(linear(p, "second.score", second)[:, 0])
    logits, attention = predict_bag(model, x)
    np.testing.assert_allclose(logits, linear(p, "classifier", b @ f), atol=1e-5)
    for weight, a, g in zip(b, inside, groups, strict=True):
        np.testing.assert_allclose(attention[g], weight * a, atol=1e-6)


def test_ilra_attention_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    ours = GatedAttention(16)
    theirs = torch.nn.MultiheadAttention(16, 8, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        q, k = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
        mask = torch.arange(9) < torch.tensor([[9], [5]])
        mixed, weights = theirs(q, k, k, key_padding_mask=~mask)
        x = F.layer_norm(ours.q(q) + mixed, (16,))
        x = F.layer_norm(x + torch.relu(ours.forward_layer(x)), (16,)) * F.silu(ours.gate(q))
        np.testing.assert_allclose(ours(q, k, mask).numpy(), x.numpy(), atol=1e-5)
        np.testing.assert_allclose(ours.weights(q, k, mask).numpy(), weights.numpy(), atol=1e-6)


def test_pseudo_inverse_and_landmarks():
    rng = np.random.default_rng(0)
    kernel = torch.from_numpy(softmax(rng.normal(size=(3, 40, 40)) + 6 * np.eye(40), axis=-1))
    np.testing.assert_allclose(pseudo_inverse(kernel).numpy(), np.linalg.inv(kernel.numpy()), atol=1e-3)
    x = torch.from_numpy(rng.normal(size=(1, 2, 512, 4)))
    np.testing.assert_allclose(landmarks(x).numpy(), x.numpy().reshape(1, 2, 256, 2, 4).mean(3), atol=1e-12)
    odd = landmarks(torch.arange(300.0).reshape(1, 1, 300, 1))[0, 0, :, 0]
    assert torch.all(odd.diff() > 0)
    assert odd[0] in (0.0, 0.5)


def test_nystroem_is_near_plain_attention_and_its_token_weights_are_the_layers_own():
    """Each token twice in a row: the landmarks are the tokens themselves, and only the pseudo-inverse approximates."""
    torch.manual_seed(0)
    layer = AttentionLayer(16, 0.0).double().eval()
    for tokens in (torch.randn(256, 16).double().repeat_interleave(2, 0), torch.randn(100, 16).double()):
        with torch.no_grad():
            q, k, v = layer._split(tokens)
            weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
            plain = tokens + layer.out((weights @ v + layer.values(v))[0].transpose(0, 1).flatten(1))
            np.testing.assert_allclose(layer(tokens).numpy(), plain.numpy(), atol=0.05)
            np.testing.assert_allclose(layer.token_weights(tokens).numpy(), weights[0, :, 0].mean(0).numpy(), atol=0.01)


def test_transmil_beyond_its_landmarks():
    model = model_of("transmil")
    logits, attention = predict_bag(model, tiles(300))
    assert np.isfinite(logits).all()
    assert attention.min() >= 0
    assert attention.sum() == pytest.approx(1, abs=1e-5)


# -- losses of the methods' own -----------------------------------------------------------------------------------


def test_smooth_svm_by_hand():
    scores, truth = torch.tensor([[2.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 1])
    by_hand = [np.log(np.exp(0) + np.exp(1 - 1.0 - 2.0)), np.log(np.exp(1.0) + 1)]
    assert float(smooth_svm(scores, truth)) == pytest.approx(np.mean(by_hand), abs=1e-6)


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
def test_instances_of_clam(name):
    """Most and least attended tiles of the true class; with three classes the others' top tiles speak against them."""
    x, labels = torch.from_numpy(np.stack([tiles(20), tiles(20, seed=1)])), torch.tensor([1, 0])
    for classes in (2, 3):
        model = model_of(name, classes)
        step = model.step(Batch(x, labels=labels), lambda logits: logits.sum() * 0 + 2.0)
        losses = []
        with torch.no_grad():
            for bag, label in zip(x, labels.tolist(), strict=True):
                embedding, scores = model.encode(bag)
                each = []
                for c in range(classes) if classes > 2 else [label]:
                    order = scores[:, c if name == "clam_mb" else 0].argsort(descending=True)
                    rows = torch.cat([order[:8], order[-8:]]) if c == label else order[:8]
                    truth = torch.tensor([1] * 8 + [0] * 8 if c == label else [0] * 8)
                    each.append(float(smooth_svm(model.instances[c](embedding[rows]), truth)))
                losses.append(np.mean(each))
        assert float(step.loss.detach()) == pytest.approx(BAG_WEIGHT * 2 + (1 - BAG_WEIGHT) * np.mean(losses), abs=1e-5)
    one = model.step(Batch(x[:, :1], labels=labels), lambda logits: logits.sum() * 0 + 2.0)
    assert float(one.loss.detach()) == 2.0  # a bag of one tile has no instances to tell apart
    assert (
        float(model.step(Batch(x), lambda logits: logits.sum() * 0 + 2.0).loss.detach()) == 2.0
    )  # nor a task of no classes


def test_streams_of_dsmil_and_tiers_of_dtfd_share_the_loss():
    x, mask = torch.from_numpy(np.stack([tiles(9), tiles(9, seed=1)])), torch.arange(9) < torch.tensor([[9], [2]])
    target = torch.tensor([1, 0])

    def loss(logits):
        return F.cross_entropy(logits, target)

    model = model_of("dsmil")
    pooled, _ = model.pool(*model.encode(x), mask=mask)
    largest, bag = pooled[:, :2], model.classifier(pooled[:, 2:])
    step = model.step(Batch(x, mask), loss)
    assert step.loss.item() == pytest.approx(float(loss(largest) + loss(bag)) / 2, abs=1e-6)
    model = model_of("dtfd").train()
    model.seed_dropout(3)
    step = model.step(Batch(x, mask), loss)
    step.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    other = model.step(Batch(x, mask), loss)
    assert not torch.equal(step.logits, other.logits)  # dealt anew
    # the last call of the loss is the second tier's: alone it trains no part of the first
    calls: list[torch.Tensor] = []
    model.zero_grad()
    step = model.step(Batch(x, mask), lambda logits: calls.append(logits) or logits.sum() * 0)
    calls[-1].sum().backward()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"second", "classifier"}


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_every_weight_learns_and_padding_does_not(name):
    model = build_aggregator(name, DIM, 2, {**SMALL, "dropout": 0.0}, 0)
    x = torch.from_numpy(np.stack([tiles(9), tiles(9, seed=1)])).requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [7]])
    target = torch.tensor([1, 0])
    step = model.train().step(Batch(x, mask, target), lambda logits: F.cross_entropy(logits, target))
    step.loss.backward()
    assert step.logits.shape == (2, 2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert float(x.grad[1, 7:].abs().max()) == 0


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@pytest.mark.parametrize("outputs", [1, 4])
def test_number_of_outputs_is_a_parameter(name, outputs):
    model, x = model_of(name, classes=outputs), tiles(5)
    assert predict_bag(model, x)[0].shape == (outputs,)
    step = model.step(Batch(torch.from_numpy(x)[None]), lambda logits: logits.square().mean())
    assert step.loss.isfinite()
    if outputs == 1:  # a regression: what a tile adds to the value itself
        left = [predict_bag(model, np.delete(x, i, 0))[0][0] for i in range(5)]
        np.testing.assert_allclose(leave_one_out(model, x, 0), predict_bag(model, x)[0][0] - np.array(left), atol=1e-5)


# -- signal and noise ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort():
    """60 patients to train on and 400 to test, of 5 to 14 tiles; in half of them a fifth of the tiles is shifted."""
    bags, splits = planted(n=460, slides=1)
    patients = sorted(splits.labels)
    labels = {p: int(splits.labels[p] == "Y") for p in patients}
    return bags, labels, patients[:60], patients[60:]


def area_after_training(cohort, name, labels):
    bags, _, train, test = cohort
    settings = {**DEFAULTS, **QUICK, "aggregator": name, "tile_fraction": 1.0, "bags_per_step": 6}
    model = fit_member(bags, class_objective(labels, train, 2, settings), train, [], settings, seed=1).model
    logits = np.stack([predict_bag(model, bags.bag(p))[0] for p in test])
    return auroc(logits[:, 1] - logits[:, 0], np.array([labels[p] for p in test]) == 1)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_a_planted_signal_is_found_and_a_shuffled_label_is_not(cohort, name):
    _, labels, train, test = cohort
    assert area_after_training(cohort, name, labels) > 0.85
    rng = np.random.default_rng(5)
    shuffled = {
        p: v for side in (train, test) for p, v in zip(side, rng.permutation([labels[p] for p in side]), strict=True)
    }
    # the area's deviation without a signal is sqrt((200 + 200 + 1) / (12 * 200 * 200)) = 0.029: four of them
    assert abs(area_after_training(cohort, name, shuffled) - 0.5) < 4 * 0.029


# -- several slides, bundles, large bags --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_attention_over_slides(name):
    model = build_aggregator(name, DIM, 2, {**SMALL, "slides": "attention"}, 0).eval()
    x, sizes = tiles(9), [4, 0, 3, 2]
    with torch.no_grad():
        parts = [model.pool(*(e[None] for e in model.encode(torch.from_numpy(s)))) for s in (x[:4], x[4:7], x[7:])]
        z = torch.cat([pooled for pooled, _ in parts])
        b = model.slide_scores(z).softmax(0)
        expected = model.logits(b @ z).numpy()
    logits, attention = predict_bag(model, x, sizes)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    inside = np.concatenate([w * a[0].numpy() for w, (_, a) in zip(b.numpy(), parts, strict=True)])
    np.testing.assert_allclose(attention, inside, atol=1e-6)
    order = [*range(7, 9), *range(4, 7), *range(4)]  # slides in another order
    np.testing.assert_allclose(predict_bag(model, x[order], [2, 3, 4])[0], logits, atol=1e-5)
    np.testing.assert_allclose(predict_bag(model, x, [9])[0], predict_bag(model, x)[0], atol=1e-6)
    padded, mask = torch.full((2, 12, DIM), 1e3), torch.zeros(2, 12, dtype=torch.bool)
    slides = torch.zeros(2, 12, dtype=torch.long)
    padded[0, :9], mask[0, :9], slides[0, :9] = torch.from_numpy(x), True, torch.tensor([0] * 4 + [2] * 3 + [3] * 2)
    padded[1, :4], mask[1, :4] = torch.from_numpy(x[:4]), True
    with torch.no_grad():
        both, _ = model(padded, mask, slides)
    np.testing.assert_allclose(both[0].numpy(), logits, atol=1e-5)
    np.testing.assert_allclose(both[1].numpy(), predict_bag(model, x[:4])[0], atol=1e-5)


def test_attention_over_slides_is_trained_and_kept(tmp_path):
    """The signal is in one slide of three, and the slide's weight shows it; the bundle predicts the same."""
    rng = np.random.default_rng(0)
    names, people, features, labels, sick = [], [], [], {}, {}
    for i in range(40):
        patient = f"P{i:02d}"
        labels[patient], sick[patient] = i % 2, int(rng.integers(3))
        for k in range(3):
            x = rng.normal(size=(8, 8))
            x[:, :2] += 3.0 * (labels[patient] and k == sick[patient])
            names.append(f"{patient}_{k}"), people.append(patient), features.append(x)
    bags = make_bags(
        np.concatenate(features).astype(np.float32), names, people, [8] * 120, ENCODER, INFO["stain_of_features"]
    )
    settings = {**DEFAULTS, **QUICK, "slides": "attention", "epochs": 40, "min_epochs": 40}
    patients = sorted(labels)
    model = fit_member(bags, class_objective(labels, patients, 2, settings), patients[:24], [], settings, seed=0).model
    weight, scores = [], []
    for p in patients[24:]:
        logits, attention = predict_bag(model, bags.bag(p), bags.sizes(p))
        scores.append(logits[1] - logits[0])
        if labels[p]:
            weight.append(attention[8 * sick[p] : 8 * sick[p] + 8].sum())
    assert auroc(np.array(scores), np.array([labels[p] for p in patients[24:]]) == 1) > 0.85
    assert np.mean(weight) > 0.5  # 1/3 would be no attention to slides
    about = {"name": "abmil_gated", "parameters": {"hidden": 16, "attention": 8, "slides": "attention"}, "features": 8}
    save_bundle(tmp_path / "bundle", {**INFO, "aggregator": about}, [Group("g", {"temperature": 1.0}, (model,))])
    bundle = load_bundle(tmp_path / "bundle")
    _, rows, _ = predict_bags(bundle, bags, patients[24:])
    np.testing.assert_allclose([float(r["logit_Y"]) - float(r["logit_N"]) for r in rows], scores, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_bundles_keep_every_method(name, tmp_path):
    model, x = build_aggregator(name, 8, 2, SMALL, 4).eval(), tiles(6, 8)
    about = {"name": name, "parameters": SMALL, "features": 8}
    save_bundle(tmp_path / "bundle", {**INFO, "aggregator": about}, [Group("g", {"temperature": 1.0}, (model,))])
    bundle = load_bundle(tmp_path / "bundle")
    logits, attention = predict_bag(model, x)
    found = predict(bundle, x)
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.attention, attention)
    np.testing.assert_array_equal(bundle_leave_one_out(bundle, x), leave_one_out(model, x))


@pytest.mark.parametrize("name", ["dtfd", "ilra"])
def test_leave_one_out_of_large_bags_without_a_closed_form(name):
    """Tiles with most attention exactly, the others by runs whose effects sum to what taking the run away does."""
    model, x = model_of(name), tiles(80)
    effect = leave_one_out(model, x)

    def odds(bag):
        return float(log_odds(torch.from_numpy(predict_bag(model, bag)[0]), 1))

    order = np.argsort(-predict_bag(model, x)[1])
    for i in order[:5]:
        assert effect[i] == pytest.approx(odds(x) - odds(np.delete(x, i, 0)), abs=1e-5)
    run = np.array_split(np.sort(order[32:]), 32)[0]
    assert effect[run].sum() == pytest.approx(odds(x) - odds(np.delete(x, run, 0)), abs=1e-5)
