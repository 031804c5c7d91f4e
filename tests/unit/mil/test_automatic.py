"""The mixture of candidates: weights against the formula, whole models against their parts, every type of task."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from mil_cohort import ENCODER, STAIN, planted
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score
from slidemake.mil.aggregators import leave_one_out, predict_bag
from slidemake.mil.automatic import CANDIDATES, LEAST, LINEAR, candidates, mixture
from slidemake.mil.bags import make_bags
from slidemake.mil.bundle import bundle_leave_one_out, load_bundle, predict
from slidemake.mil.fitting import DEFAULTS
from slidemake.splits.make import VAL, make_splits
from slidemake.tasks.classes import ClassOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import CoxOutcome
from slidemake.training.train import train_model

TWO = ClassOutcome(["N", "Y"])
FEW = {"aggregator": "auto", "members": 2, "epochs": 2, "min_epochs": 1, "hidden": 8, "attention": 8, "validation": 0.5}


def logits(labels, gap, rng):
    score = gap * (np.array(labels) - 0.5) + rng.normal(size=len(labels))
    return np.stack([-score / 2, score / 2], 1)


def test_weights_fall_with_the_auroc_of_held_out_patients():
    rng = np.random.default_rng(0)
    labels = [0, 1] * 8
    outputs = {"good": logits(labels, 3, rng), "fair": logits(labels, 2.5, rng), "noise": logits(labels, 0, rng)}
    found = mixture(outputs, TWO, labels, {})
    weights = {name: judged.weight for name, judged in found.items()}
    assert sum(weights.values()) == pytest.approx(1)
    for name, judged in found.items():
        assert judged.score == pytest.approx(roc_auc_score(labels, outputs[name][:, 1]))
        own = -log_softmax(judged.scale * outputs[name], 1)[np.arange(16), labels].mean()
        assert judged.loss <= own + 1e-9  # the intercept is the best
        assert judged.loss <= -log_softmax(outputs[name], 1)[np.arange(16), labels].mean() + 1e-3  # so is the scale
    better = found["good"].score - found["fair"].score
    assert weights["good"] / weights["fair"] == pytest.approx(np.exp(16 * better))
    assert weights["noise"] == 0 < LEAST  # sixteen patients tell it from the others


def test_a_scale_of_its_own_does_not_change_a_candidates_weight():
    """Outputs three times as large are as good as they were; their scale is smaller, but for its pull towards 1."""
    rng = np.random.default_rng(1)
    labels = [0, 1] * 10
    one, other = logits(labels, 2, rng), logits(labels, 2, rng)
    before = mixture({"a": one, "b": other}, TWO, labels, {})
    after = mixture({"a": 3 * one, "b": other}, TWO, labels, {})
    assert after["a"].weight == before["a"].weight
    assert 3 * after["a"].scale == pytest.approx(before["a"].scale, rel=0.4)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "multilabel", "regression", "survival"])
def test_what_auto_is_made_of(kind):
    """Gated attention alone where no mixture was shown to be better; the control is linear for every type."""
    own = {**DEFAULTS, "aggregator": "auto", "scaling": "none", "epochs": 7}
    found = candidates(own, kind)
    if kind in ("multiclass", "ordinal", "survival"):
        assert found == {"gated": {**own, "aggregator": "abmil_gated", "scaling": "each"}}
    else:
        assert set(found) == set(CANDIDATES)
    assert set(candidates({**own, "aggregator": "auto_linear"}, kind)) == set(LINEAR)
    assert candidates({**own, "aggregator": "clam_sb"}, kind) == {"": {**own, "aggregator": "clam_sb"}}


def test_nothing_held_out_leaves_equal_weights():
    found = mixture({"a": np.empty((0, 2)), "b": np.empty((0, 2))}, TWO, [], {})
    assert [judged.weight for judged in found.values()] == [0.5, 0.5]


def test_survival_counts_events():
    """Of ten patients with one event, that one is all that the weights go by."""
    rng = np.random.default_rng(2)
    labels = [(float(t), t == 3) for t in range(1, 11)]
    outputs = {"a": rng.normal(size=(10, 1)), "b": rng.normal(size=(10, 1))}
    found = mixture(outputs, CoxOutcome([5.0]), labels, {})
    assert found["a"].weight / found["b"].weight == pytest.approx(np.exp(found["a"].score - found["b"].score))


def test_numbers_count_half_of_their_correlation_and_classes_the_mean_of_each():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=20)
    outputs = {name: (truth + s * rng.normal(size=20))[:, None] for name, s in (("a", 0.5), ("b", 1.0))}
    found = mixture(outputs, RegressionOutcome(), list(truth), {"mean": 0.0, "sd": 1.0})
    r = {name: np.corrcoef(values[:, 0], truth)[0, 1] for name, values in outputs.items()}
    assert found["a"].weight / found["b"].weight == pytest.approx(np.exp(10 * (r["a"] - r["b"])))
    labels = list(np.arange(18) % 3)
    outputs = {name: rng.normal(size=(18, 3)) + s * np.eye(3)[labels] for name, s in (("a", 2.0), ("b", 1.0))}
    found = mixture(outputs, ClassOutcome(["x", "y", "z"]), labels, {})
    area = {name: roc_auc_score(labels, softmax(v, 1), multi_class="ovr") for name, v in outputs.items()}
    assert found["a"].weight / found["b"].weight == pytest.approx(np.exp(18 * (area["a"] - area["b"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("auto")
    bags, splits = planted(16, slides=2, signal=6)
    return out, bags, train_model({"label": "label"}, FEW, bags, splits, out)


def test_group_outputs_are_the_weighted_sum_of_its_candidates(trained):
    out, bags, record = trained
    bundle = load_bundle(out / "bundles" / "repeat0_fold0")
    (group,) = bundle.groups
    assert sum(part.weight for part in group.parts) == pytest.approx(1)
    x, parts, changes, i = bags.bag("P03"), [], [], 0
    for part in group.parts:
        own = group.members[i : i + part.members]
        i += part.members
        parts.append(part.weight * part.scale * np.mean([predict_bag(m, x)[0] for m in own], 0))
        changes.append(part.weight * part.scale * np.mean([leave_one_out(m, x) for m in own], 0))
    got = predict(bundle, x)
    np.testing.assert_allclose(got.logits, np.sum(parts, 0), atol=1e-5)
    np.testing.assert_allclose(bundle_leave_one_out(bundle, x), np.sum(changes, 0), atol=1e-5)
    assert got.attention.sum() == pytest.approx(1, abs=1e-5)
    mixed = record["folds"][0]["mixture"]
    assert set(mixed) == set(CANDIDATES)
    assert {p.candidate: p.weight for p in group.parts} == {n: m["weight"] for n, m in mixed.items() if m["weight"]}
    about = json.loads((out / "bundle" / "bundle.json").read_text())["aggregator"]
    assert about["name"] == "auto"
    assert set(about["candidates"]) == set(CANDIDATES)


def test_inner_validation_alone_decides(trained):
    """The weights are those of the outputs that held-out training patients got: tested patients take no part."""
    out, _, record = trained
    for fold in record["folds"]:
        info = json.loads((out / "bundles" / f"repeat{fold['repeat']}_fold{fold['fold']}" / "bundle.json").read_text())
        seen = {p for m in info["training"]["members"] for p in [*m["train"], *m["val"]]}
        assert seen == set(info["training"]["train"])


def test_refit_is_one_model_of_all_training_patients(tmp_path):
    bags, splits = planted(12, slides=1)
    record = train_model(
        {"label": "label"},
        {**FEW, "aggregator": "abmil_gated", "epochs": 3, "refit": True},
        bags,
        splits,
        tmp_path,
    )
    first = record["folds"][0]
    assert first["refitted_epochs"] == int(np.median(first["epochs"]))
    assert len(load_bundle(tmp_path / "bundles" / "repeat0_fold0").groups[0].members) == 1


def test_the_linear_control_is_the_mixture_without_attention(tmp_path):
    """Whatever the task's model is: tiles that speak for either class are scored."""
    bags, splits = planted(12, slides=1)
    options = {**FEW, "aggregator": "abmil_gated", "learning_rate": 1.0, "control": "instance_linear"}
    train_model({"label": "label"}, options, bags, splits, tmp_path)
    about = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert about["aggregator"]["name"] == "auto_linear"
    assert set(about["aggregator"]["candidates"]) == set(LINEAR)
    assert {kind["name"] for kind in about["aggregator"]["candidates"].values()} == {"instance_linear"}
    assert about["settings"]["learning_rate"] == DEFAULTS["learning_rate"]


def test_a_mixture_of_models_that_harmonise_and_attend_to_slides(tmp_path):
    """ComBat and attention over slides go into every candidate; the group is still their weighted sum."""
    bags, splits = planted(16, slides=3, signal=6)
    scanner = {name: "AB"[int(patient[1:]) // 2 % 2] for name, patient in zip(bags.slides, bags.patients, strict=True)}
    options = {**FEW, "slides": "attention", "invariance": {"combat": True}}
    train_model({"label": "label"}, options, bags.with_domains(scanner), splits, tmp_path)
    bundle = load_bundle(tmp_path / "bundles" / "repeat0_fold0")
    assert bundle.info["harmonised"]["names"] == ["A", "B"]
    (group,) = bundle.groups
    assert all(m.slide_scores is not None and m.domain_scale.shape == (3, bags.dim) for m in group.members)
    patient = next(p for p, (first, last) in bags.where.items() if last - first == 3)
    x, sizes = bags.bag(patient), bags.sizes(patient)
    outputs = {}
    for name, number in (("A", 0), ("B", 1), ("unknown", -1)):
        each = [predict_bag(m, x, sizes, [number] * 3)[0] for m in group.members]
        outputs[name] = predict(bundle, x, sizes, [name] * 3).logits
        np.testing.assert_allclose(outputs[name], group.factors @ np.array(each), atol=1e-5)
    assert np.abs(outputs["A"] - outputs["B"]).max() > 1e-6
    assert np.isfinite(bundle_leave_one_out(bundle, x, "A")).all()


def small(labels, tiles, features=6, constant=False, folds=2):
    """Bags and splits of patients with these labels, `tiles` each; constant: of features that do not vary."""
    rng = np.random.default_rng(0)
    names = [f"P{i:02d}" for i in range(len(labels))]
    x = np.ones((len(labels) * tiles, features)) if constant else rng.normal(size=(len(labels) * tiles, features))
    bags = make_bags(x.astype(np.float32), names, names, [tiles] * len(labels), ENCODER, STAIN)
    rows = [
        {"slide_id": name, "patient_id": name, "site": "s", "label": label}
        for name, label in zip(names, labels, strict=True)
    ]
    return bags, make_splits(rows, "label", {"folds": folds, "repeats": 1})


@pytest.mark.parametrize(
    ("given", "held_out"),
    [
        ({"labels": "NYNY", "tiles": 4}, False),  # one patient of each class to train on: nothing can be held out
        ({"labels": "NNNNNNYYYYYY", "tiles": 1}, True),
        ({"labels": "NNNNNNYYYYYY", "tiles": 3, "constant": True}, True),
        ({"labels": "NNNNNNYYYYYY", "tiles": 2, "features": 200}, True),
    ],
)
def test_what_little_there_is(tmp_path, given, held_out):
    """Two training patients, one tile each, features that are constant or more than there are tiles: a model, and
    probabilities that are numbers; without held-out patients all candidates weigh the same."""
    bags, splits = small(**given)
    record = train_model({"label": "label"}, FEW, bags, splits, tmp_path)
    for fold in record["folds"]:
        weights = {name: part["weight"] for name, part in fold["mixture"].items()}
        assert sum(weights.values()) == pytest.approx(1)
        assert (set(weights.values()) == {1 / len(CANDIDATES)}) is not held_out or given.get("constant")
    bundle = load_bundle(tmp_path / "bundle")
    values = np.array([predict(bundle, bags.bag(p)).values for p in bags.where])
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-6)
    if given.get("constant"):
        assert np.ptp(values, 0).max() < 1e-6  # nobody can be told from anybody


def test_given_validation_patients_of_one_class(tmp_path):
    """They can tell little; that they are of one class must not make a weight or temperature that is no number."""
    bags, splits = planted(12, slides=1)
    one_class = [p for p, label in splits.labels.items() if label == "Y"][:2]
    splits = replace(splits, folds={0: {**splits.folds[0], **dict.fromkeys(one_class, VAL)}})
    record = train_model({"label": "label"}, FEW, bags, splits, tmp_path)
    for fold in record["folds"]:  # without two classes there is no AUROC, and nothing to choose by
        assert {part["weight"] for part in fold["mixture"].values()} == {1 / len(CANDIDATES)}
        assert np.isfinite([part["loss"] for part in fold["mixture"].values()]).all()
    assert all(0.1 <= fold["temperature"] <= 10 for fold in record["folds"])
    values = predict(load_bundle(tmp_path / "bundle"), bags.bag("P00")).values
    assert np.isfinite(values).all()
