"""Training that resists scanner and site: each penalty by hand, what is fitted on whom, guards, and that it works."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from mil_cohort import ENCODER, QUICK, STAIN
from scipy.special import expit
from scipy.stats import spearmanr
from slidemake.core.failures import RunError
from slidemake.core.files import read_json
from slidemake.mil.aggregators import build_aggregator, leave_one_out, predict_bag
from slidemake.mil.bags import make_bags
from slidemake.mil.bundle import load_bundle, predict
from slidemake.mil.fitting import DEFAULTS, fit_member
from slidemake.mil.invariance import OPTIONS, make_robust
from slidemake.mil.invariance.adversary import Adversary, reverse_gradient, schedule
from slidemake.mil.invariance.augmentation import mean_shift, mix_style
from slidemake.mil.invariance.combat import combat_estimates, fit_combat
from slidemake.mil.invariance.groups import GroupDRO, vrex
from slidemake.mil.invariance.guard import choose
from slidemake.mil.invariance.penalties import coral, effective_rank, info_nce, mmd, score_consistency
from slidemake.mil.invariance.robust import domain_names, domain_numbers, scans_of, warn_where_label_and_domain_coincide
from slidemake.mil.losses import class_objective
from slidemake.mil.prediction import predict_bags
from slidemake.splits.make import make_splits
from slidemake.statistics.temperature import auroc
from slidemake.training.train import train_model

PATIENTS, DOMAINS = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 0, 2, 1, 2])


def shifted(n=60, rescans=0.6, confound=0.85, seed=0, dim=8, scanners=3, strength=2.0, tiles=12):
    """A cohort whose scanners shift and scale all tiles and go with the label; a share of patients is scanned twice.

    Returns bags with domains, labels and the rows of the sheet. The signal is in a third of the tiles of positives, in
    features 0 and 1; scanner k moves feature 2 and a little of 0.
    """
    rng = np.random.default_rng(seed)
    moves = np.zeros((scanners, dim))
    moves[:, 2], moves[:, 0] = np.linspace(-strength, strength, scanners), np.linspace(0.8, -0.8, scanners)
    names, people, features, sizes, rows, domains = [], [], [], [], [], {}
    for i in range(n):
        label = i % 2
        home = 0 if rng.random() < (confound if label else 1 - confound) else int(rng.integers(1, scanners))
        tissue = rng.normal(size=(tiles, dim))
        tissue[: tiles // 3, :2] += 1.6 * label
        scans = [home]
        if rng.random() < rescans:
            scans.append((home + int(rng.integers(1, scanners))) % scanners)
        for k, scanner in enumerate(scans):
            names.append(f"P{i:03d}_{k}"), people.append(f"P{i:03d}"), sizes.append(tiles)
            features.append(tissue + moves[scanner] + 0.1 * rng.normal(size=tissue.shape))
            domains[names[-1]] = f"scanner{scanner}"
            rows.append({"slide_id": names[-1], "patient_id": people[-1], "site": f"s{home}", "label": "NY"[label]})
    bags = make_bags(np.concatenate(features).astype(np.float32), names, people, sizes, ENCODER, STAIN, grid="8px")
    return bags.with_domains(domains), {f"P{i:03d}": i % 2 for i in range(n)}, rows


# -- penalties by hand --------------------------------------------------------------------------------------------


def test_score_consistency_by_hand():
    p = np.array([0.1, 0.3, 0.5, 0.9, 0.2, 0.8])
    scores = torch.from_numpy(np.stack([1 - p, p], 1))
    by_hand = np.mean([(p[0] - p[1]) ** 2, (p[0] - p[5]) ** 2, (p[1] - p[5]) ** 2, (p[2] - p[3]) ** 2])
    assert float(score_consistency(scores, PATIENTS, DOMAINS)) == pytest.approx(by_hand)
    value = torch.from_numpy(p)[:, None]
    assert float(score_consistency(value, PATIENTS, DOMAINS)) == pytest.approx(by_hand)


def test_info_nce_by_hand():
    z = np.random.default_rng(0).normal(size=(6, 5))
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    s = u @ u.T / 0.2
    terms = []
    for b, mates in ((0, (1, 5)), (1, (0, 5)), (2, (3,)), (3, (2,)), (5, (0, 1))):  # the scan of patient 2 has none
        bottom = sum(np.exp(s[b, k]) for k in range(6) if k != b)
        terms.append(-np.mean([np.log(np.exp(s[b, j]) / bottom) for j in mates]))
    assert float(info_nce(torch.from_numpy(z), PATIENTS, DOMAINS)) == pytest.approx(np.mean(terms))


def test_coral_and_mmd_compare_domains_within_a_class():
    rng = np.random.default_rng(1)
    x, domains = torch.from_numpy(rng.normal(size=(12, 4))), torch.tensor([0, 0, 0, 1, 1, 1] * 2)
    classes = torch.tensor([0] * 6 + [1] * 6)
    a, b, c, d = x[:3].numpy(), x[3:6].numpy(), x[6:9].numpy(), x[9:].numpy()

    def distance(p, q):
        gap = ((p.mean(0) - q.mean(0)) ** 2).sum()
        return gap + ((np.cov(p.T) - np.cov(q.T)) ** 2).sum() / (4 * 4**2)

    assert float(coral(x, classes, domains)) == pytest.approx((distance(a, b) + distance(c, d)) / 2)
    # domain and class coincide: nothing within a class to compare, so the signal is left alone
    assert float(coral(x, domains, domains)) == 0
    assert float(mmd(x, domains, domains)) == 0
    same = torch.cat([x[:3], x[:3]])
    assert float(mmd(same, torch.zeros(6), torch.tensor([0, 0, 0, 1, 1, 1]))) == pytest.approx(0, abs=1e-12)
    squares = ((np.concatenate([a, b])[:, None] - np.concatenate([a, b])) ** 2).sum(2)
    width = np.sort(squares[~np.eye(6, dtype=bool)])[14]  # torch's median: the lower of the two in the middle
    k = np.mean([np.exp(-squares / (2 * width * f * f)) for f in (0.5, 1, 2)], axis=0)
    by_hand = k[:3, :3].mean() + k[3:, 3:].mean() - 2 * k[:3, 3:].mean()
    assert float(mmd(x[:6], classes[:6], domains[:6])) == pytest.approx(by_hand)
    far = torch.cat([x[:3], x[3:6] + 5])
    assert float(mmd(far, classes[:6], domains[:6])) > float(mmd(x[:6], classes[:6], domains[:6]))


@pytest.mark.parametrize("penalty", [score_consistency, info_nce, coral, mmd])
def test_nothing_to_compare_is_exactly_nothing(penalty):
    x = torch.randn(4, 3, requires_grad=True)
    loss = penalty(x, torch.arange(4), torch.arange(4)) + 0 * x.sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(x.grad.abs().max()) == 0
    assert float(penalty(x[:0], torch.arange(0), torch.arange(0)).detach()) == 0


def test_effective_rank():
    rng = np.random.default_rng(0)
    line = torch.from_numpy(rng.normal(size=(50, 1)) * np.ones((1, 6)))
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.from_numpy(rng.normal(size=(5000, 6)))) == pytest.approx(6, abs=0.1)


def test_gradient_reversal_and_its_schedule():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    reverse_gradient(x, 0.3).mul(torch.tensor([2.0, 5.0])).sum().backward()
    np.testing.assert_allclose(x.grad, [-0.6, -1.5])
    assert schedule(0) == 0
    assert schedule(1) == pytest.approx(2 / (1 + np.exp(-10)) - 1)


@pytest.mark.parametrize("condition", [0, 2])
def test_an_adversary_learns_and_the_model_unlearns(condition):
    """Vectors that carry the domain: the adversary reads it; trained against it, they do not carry it any more."""
    torch.manual_seed(0)
    domains = torch.arange(60) % 2
    hidden = torch.randn(60, 8) + 2.0 * domains[:, None] * torch.eye(8)[0]
    scores = torch.full((60, 2), 0.5)
    adversary = Adversary(8, 2, condition, seed=1)
    again = Adversary(8, 2, condition, seed=1)
    assert torch.equal(adversary.first.weight, again.first.weight)
    optimiser = torch.optim.Adam(adversary.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        adversary(hidden, scores, domains, 0.0).backward()
        optimiser.step()
    learned = float(adversary(hidden, scores, domains, 0.0).detach())
    assert learned < 0.5  # log 2 is not knowing
    free = hidden.clone().requires_grad_()
    mover = torch.optim.SGD([free], 5.0)
    for _ in range(30):
        mover.zero_grad()
        adversary(free, scores, domains, 1.0).backward()
        mover.step()
    assert float(adversary(free, scores, domains, 0.0).detach()) > learned + 0.1


def test_groups_by_hand():
    losses, groups, weights = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 2]), torch.tensor([1.0, 0.5, 1.0])
    first = (1 * 1 + 0.5 * 3) / 1.5
    assert float(vrex(losses, groups, weights, 2.0)) == pytest.approx(
        np.mean([first, 2]) + 2 * np.var([first, 2]), abs=1e-6
    )
    dro = GroupDRO(4, 0.5)
    raw = np.array([np.exp(0.5 * first), 1, np.exp(0.5 * 2), 1]) / 4
    q = raw / raw.sum()
    expected = (q[0] * first + q[2] * 2) / (q[0] + q[2])
    assert float(dro.loss(losses, groups, weights)) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(dro.q, q, atol=1e-6)
    for _ in range(50):
        dro.loss(torch.tensor([0.1, 2.0]), torch.tensor([0, 3]), torch.ones(2))
    assert dro.q.argmax() == 3  # the group that stays bad takes the weight


# -- ComBat -------------------------------------------------------------------------------------------------------


def test_combat_finds_shift_and_scale_and_leaves_the_label_alone():
    rng = np.random.default_rng(0)
    n, dim = 6000, 20
    domains, labels = rng.integers(0, 3, n), rng.integers(0, 2, n)
    labels[domains == 0] = rng.random((domains == 0).sum()) < 0.9  # label and domain go together
    gamma, delta = rng.normal(size=(3, dim)), rng.uniform(0.5, 2, size=(3, dim))
    effect = np.zeros(dim)
    effect[:5] = 2.0
    x = 3.0 + labels[:, None] * effect + gamma[domains] + delta[domains] * rng.normal(size=(n, dim))
    g, d, mean = combat_estimates(x, domains, labels)
    for k in (1, 2):  # against domain 0, in which 200 tiles are negative: their mean's error is 0.14 at most
        np.testing.assert_allclose(g[k] - g[0], gamma[k] - gamma[0], atol=0.4)
        np.testing.assert_allclose(d[k] / d[0], delta[k] / delta[0], rtol=0.08)  # 2000 tiles: 1.6 % each
    np.testing.assert_allclose(np.bincount(domains) @ g / n, 0, atol=0.05)
    harmonised = (x - mean - g[domains]) / d[domains] + mean
    # the label's effect is kept where the domain would have explained most of it
    kept = harmonised[labels == 1].mean(0) - harmonised[labels == 0].mean(0)
    assert kept[:5].min() > 0.8
    assert np.abs(kept[5:]).max() < 0.3


def test_combat_is_fitted_on_training_patients_only():
    bags, labels, _ = shifted()
    names = domain_names(bags)
    place = domain_numbers(bags, names)
    train = sorted(labels)[:40]
    classes = [labels[p] for p in train]
    scale, shift = fit_combat(bags, train, place, len(names), classes)
    changed = bags.features.copy()
    start, _ = bags.rows(sorted(labels)[40])
    changed[start:] += 100  # patients that are not trained on
    other = make_bags(changed, bags.slides, bags.patients, np.diff(bags.offsets), ENCODER).with_domains(bags.domains)
    for a, b in zip(fit_combat(other, train, place, len(names), classes), (scale, shift), strict=True):
        np.testing.assert_array_equal(a, b)
    # a domain without training patients stays as it is
    scale, shift = fit_combat(bags, train, np.where(place == 2, 3, place), 4, classes)
    assert (scale[2] == 1).all()
    assert (shift[2] == 0).all()


def test_a_model_that_harmonises_predicts_alike_from_all_its_scanners(tmp_path):
    """Through training, bundle and prediction; an unknown scanner is left as it is."""
    bags, _, rows = shifted(n=40, rescans=1.0)
    splits = make_splits(rows, "label", {"folds": 2, "repeats": 1})
    options = {**QUICK, "epochs": 4, "min_epochs": 2, "invariance": {"combat": True}}
    record = train_model({"label": "label"}, options, bags, splits, tmp_path / "m")
    info = read_json(tmp_path / "m/bundle/bundle.json")
    assert info["harmonised"] == {"column": "scanner", "names": ["scanner0", "scanner1", "scanner2"]}
    assert {g["kept"] for f in record["folds"] for g in f["invariance"]} <= {"robust", "plain"}
    bundle = load_bundle(tmp_path / "m/bundle")
    tiles = bags.slide(0)
    known, other = (predict(bundle, tiles, None, [name]).logits for name in ("scanner0", "scanner2"))
    assert np.abs(known - other).max() > 1e-3
    unknown = predict(bundle, tiles, None, ["scanner9"]).logits
    np.testing.assert_array_equal(unknown, predict(bundle, tiles).logits)
    _, people, _ = predict_bags(bundle, bags, [bags.patients[0]])
    first, last = bags.where[bags.patients[0]]
    domains = [bags.domains[s] for s in bags.slides[first:last]]
    whole = predict(bundle, bags.bag(bags.patients[0]), bags.sizes(bags.patients[0]), domains)
    assert float(people[0]["logit_Y"]) == pytest.approx(whole.logits[1], rel=1e-6)
    again = train_model({"label": "label"}, options, bags, splits, tmp_path / "m")
    assert all(f["reused"] for f in again["folds"])
    other = "scanner2" if bags.domains[bags.slides[0]] != "scanner2" else "scanner1"
    moved = bags.with_domains({**bags.domains, bags.slides[0]: other})
    assert not any(
        f["reused"] for f in train_model({"label": "label"}, options, moved, splits, tmp_path / "m")["folds"]
    )


def test_harmonised_features_reach_prediction_and_explanation_alike():
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    model = build_aggregator("abmil_gated", 8, 2, {"hidden": 16, "attention": 8, "domains": 2}, 0).eval()
    scale, shift = torch.rand(2, 8) + 0.5, torch.randn(2, 8)
    model.set_domains(scale, shift)
    plain = build_aggregator("abmil_gated", 8, 2, {"hidden": 16, "attention": 8}, 0).eval()
    by_hand = x * scale[1].numpy() + shift[1].numpy()
    np.testing.assert_allclose(predict_bag(model, x, None, [1])[0], predict_bag(plain, by_hand)[0], atol=1e-6)
    np.testing.assert_allclose(predict_bag(model, x, None, [-1])[0], predict_bag(plain, x)[0], atol=1e-6)
    np.testing.assert_allclose(leave_one_out(model, x, 1, 1), leave_one_out(plain, by_hand), atol=1e-6)
    two = predict_bag(model, x, [2, 4], [0, 1])[0]
    mixed = np.concatenate([x[:2] * scale[0].numpy() + shift[0].numpy(), by_hand[2:]])
    np.testing.assert_allclose(two, predict_bag(plain, mixed)[0], atol=1e-6)


# -- augmentation -------------------------------------------------------------------------------------------------


def test_mean_shift_moves_towards_another_domain():
    means = torch.tensor([[0.0, 0.0], [4.0, 2.0], [float("nan"), float("nan")]])
    x, domains = torch.zeros(400, 1, 2), np.array([0] * 300 + [2] * 50 + [-1] * 50)
    moved = mean_shift(x, domains, means, np.random.default_rng(0))[:, 0].numpy()
    assert (moved[300:] == 0).all()  # domains without a mean, and unknown ones
    share = moved[:300, 0] / 4
    np.testing.assert_allclose(moved[:300, 1], 2 * share, atol=1e-6)
    assert np.mean(share > 0) == pytest.approx(0.5, abs=4 * 0.5 / 300**0.5)
    assert share[share > 0].mean() == pytest.approx(0.5, abs=4 * 0.29 / 150**0.5)


def test_mix_style_takes_statistics_of_real_tiles():
    x = torch.randn(40, 6, 3) * torch.linspace(0.5, 2, 40)[:, None, None] + torch.arange(40.0)[:, None, None]
    mask = torch.ones(40, 6, dtype=torch.bool)
    mask[:, 4:] = False
    padded = x.clone()
    padded[:, 4:] = 1e4
    mixed = mix_style(padded, mask, np.random.default_rng(0))[:, :4]
    np.testing.assert_allclose(mixed, mix_style(x[:, :4], None, np.random.default_rng(0)), atol=1e-3)
    centred = (x[:, :4] - x[:, :4].mean(1, keepdim=True)) / x[:, :4].std(1, unbiased=False, keepdim=True)
    again = (mixed - mixed.mean(1, keepdim=True)) / mixed.std(1, unbiased=False, keepdim=True)
    np.testing.assert_allclose(again, centred, atol=1e-3)  # only mean and deviation change
    unchanged = (mixed - x[:, :4]).abs().amax((1, 2)) < 1e-3
    assert 0.2 < unchanged.float().mean() < 0.95


# -- the step, who takes part, guards -----------------------------------------------------------------------------


def objective_of(labels, train):
    return class_objective(labels, train, 2, DEFAULTS)


def fit(bags, labels, train, val, options, seed):
    return fit_member(bags, class_objective(labels, train, 2, options), train, val, options, seed=seed)


def settings(**invariance):
    return {**DEFAULTS, **QUICK, "bags_per_step": 12, "tile_fraction": 1.0, "invariance": {**OPTIONS, **invariance}}


def test_scans_are_a_patients_slides_of_one_domain():
    bags, labels, _ = shifted(n=6, rescans=1.0)
    names = domain_names(bags)
    place = domain_numbers(bags.with_domains({**bags.domains, bags.slides[0]: ""}), names)
    scans = scans_of(bags, "P000", place)
    assert [s.domain for s in scans] == sorted([-1, int(place[1])])
    assert sorted(i for s in scans for i in s.slides) == [0, 1]
    assert make_robust(bags, objective_of(labels, sorted(labels)), sorted(labels), {**DEFAULTS}, 0) is None
    robust = make_robust(bags, objective_of(labels, sorted(labels)), sorted(labels), settings(consistency=5.0), 0)
    assert robust.rescanned == 6
    with pytest.raises(RunError, match="two scanners at least"):
        make_robust(
            bags.with_domains({}), objective_of(labels, sorted(labels)), sorted(labels), settings(consistency=5.0), 0
        )


def test_a_rescanned_patient_weighs_no_more_than_another():
    bags, labels, _ = shifted(n=4, rescans=0.6)
    robust = make_robust(bags, objective_of(labels, sorted(labels)), sorted(labels), settings(v_rex=1e-9), 0)
    counts = [len(s) for s in robust.scans.values()]
    assert 1 in counts
    assert 2 in counts
    seen = []

    def losses(logits, patients):
        seen.append(patients[0])
        return logits.sum() * 0 + float(patients[0] == "P000")

    robust = make_robust(bags, objective_of(labels, sorted(labels)), sorted(labels), settings(info_nce=1e-9), 0)
    model = build_aggregator("abmil_gated", 8, 2, {"hidden": 16, "attention": 8}, 0)
    loss = robust.step(model, sorted(labels), 0.0, np.random.default_rng(0), losses)
    assert float(loss.detach()) == pytest.approx(1 / 4, abs=1e-6)
    assert sorted(set(seen)) == sorted(labels)


ALL = [
    {"consistency": 5.0},
    {"info_nce": 0.05},
    {"coral": 1.0},
    {"mmd": 1.0},
    {"dann": 0.3},
    {"conditional_dann": 0.3},
    {"group_dro": 0.05},
    {"v_rex": 1.0},
    {"combat": True},
    {"augmentation": "mean_shift"},
    {"augmentation": "mix_style"},
]


@pytest.mark.parametrize("option", ALL, ids=lambda o: next(iter(o)) if "augmentation" not in o else o["augmentation"])
def test_every_option_trains_repeatably_and_changes_the_model(option):
    bags, labels, _ = shifted(n=24)
    patients = sorted(labels)
    quick = {**settings(**option), "epochs": 6, "min_epochs": 4}
    fits = []
    for _ in range(2):
        torch.rand(3)
        fits.append(fit(bags, labels, patients[:18], patients[18:], quick, seed=1))
    logits = [predict_bag(f.model, bags.bag(patients[0]), None, [0])[0] for f in fits]
    np.testing.assert_array_equal(*logits)
    assert fits[0].invariance["robust"]["effective_rank"] != fits[0].invariance["plain"]["effective_rank"]
    assert fits[0].invariance["rescanned"] > 0


def test_all_aggregators_can_be_trained_with_penalties_and_over_slides():
    bags, labels, _ = shifted(n=12)
    patients = sorted(labels)
    for name in ("clam_mb", "dsmil", "dtfd", "transmil"):
        quick = {**settings(consistency=1.0, info_nce=0.01, dann=0.1), "aggregator": name, "epochs": 2, "min_epochs": 1}
        for slides in ("pool", "attention"):
            fitted = fit(bags, labels, patients[:8], patients[8:], {**quick, "slides": slides}, seed=1)
            assert np.isfinite(predict_bag(fitted.model, bags.bag(patients[9]), bags.sizes(patients[9]))[0]).all()


def test_a_member_whose_task_suffered_is_not_kept(caplog):
    bags, labels, _ = shifted(n=40)
    patients = sorted(labels)
    with caplog.at_level(logging.WARNING, "slidemake"):
        fitted = fit(bags, labels, patients[:30], patients[30:], settings(consistency=1000.0), seed=0)
    report = fitted.invariance
    assert report["kept"] == "plain"
    assert report["robust"]["inconsistency"] < 0.1 * report["plain"]["inconsistency"]  # bought by constant scores
    assert report["robust"]["score_spread"] < 0.1
    assert report["robust"]["val_loss"] > report["plain"]["val_loss"]
    assert "cost the task" in caplog.text
    plain = fit(bags, labels, patients[:30], patients[30:], settings(), seed=0)
    bag = bags.bag(patients[30])
    np.testing.assert_array_equal(predict_bag(fitted.model, bag)[0], predict_bag(plain.model, bag)[0])


def test_collapse_is_reported(caplog):
    bags, labels, _ = shifted(n=24)
    patients = sorted(labels)
    robust = make_robust(bags, objective_of(labels, patients), patients, settings(consistency=1.0), 0)
    fitted = fit(bags, labels, patients, [], settings(), seed=0)
    other = fit(bags, labels, patients, [], settings(), seed=0)
    with torch.no_grad():
        other.model.project.weight[1:] = other.model.project.weight[:1]
    with caplog.at_level(logging.WARNING, "slidemake"):
        kept, report = choose(other, fitted, robust, patients)
    assert report["collapsed"]
    assert "directions" in caplog.text
    assert kept is other


def test_warning_where_label_and_scanner_coincide(caplog, tmp_path):
    bags, labels, rows = shifted(n=40, rescans=0.0, confound=1.0, scanners=2)
    with caplog.at_level(logging.WARNING, "slidemake"):
        splits = make_splits(rows, "label", {"folds": 2, "repeats": 1})
        quick = {**QUICK, "epochs": 2, "min_epochs": 1, "invariance": {"dann": 0.1}}
        train_model({"label": "label"}, quick, bags, splits, tmp_path)
    assert "label and scanner nearly coincide" in caplog.text
    caplog.clear()
    mixed, labels, _ = shifted(n=60, confound=0.5)
    assert warn_where_label_and_domain_coincide(mixed, labels, "scanner") < 0.8
    assert "coincide" not in caplog.text


# -- that it works ------------------------------------------------------------------------------------------------


def outcome(invariance, seed):
    """(inconsistency between scans, AUROC over scans, rank agreement of scans, share of pairs in the same class).

    Tested on patients of a cohort of its own, by the same scanners, in which label and scanner are independent.
    """
    bags, labels, _ = shifted(n=80, seed=seed)
    patients = sorted(labels)
    chosen = {**settings(**invariance), "epochs": 30, "min_epochs": 20}
    model = fit(bags, labels, patients[:60], patients[60:], chosen, seed=seed).model
    test, truth, _ = shifted(n=160, rescans=1.0, confound=0.5, seed=seed + 100)
    place = domain_numbers(test, domain_names(bags))
    scores = np.array([np.diff(predict_bag(model, test.slide(i), None, [place[i]])[0])[0] for i in range(len(place))])
    p = expit(scores)
    area = auroc(scores, np.array([truth[name] for name in test.patients]) == 1)
    pairs = p.reshape(-1, 2)
    return (
        np.abs(np.diff(pairs)).mean(),
        area,
        spearmanr(pairs[:, 0], pairs[:, 1])[0],
        np.mean((pairs[:, 0] > 0.5) == (pairs[:, 1] > 0.5)),
    )


def test_consistency_between_scans_improves_and_the_task_does_not_suffer():
    """Inconsistency falls by a quarter or more; AUROC, and agreement that shrinking scores cannot buy, do not fall.

    Means over two cohorts of 160 tested patients with two scans each, for which an AUROC of 0.9 has a standard error of
    about 0.02. Measured: inconsistency 0.37 to 0.07, AUROC 0.88 to 0.97.
    """
    before = np.mean([outcome({}, seed) for seed in range(2)], axis=0)
    after = np.mean([outcome({"consistency": 5.0}, seed) for seed in range(2)], axis=0)
    assert after[0] <= 0.75 * before[0]
    assert after[1] >= before[1] - 0.01
    assert after[2] >= before[2]
    assert after[3] >= before[3]
