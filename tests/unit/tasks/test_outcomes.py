"""Types of tasks from labels to bundles: signal found, predictions from the bundle, nothing from tested patients."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from outcome_cohort import FAST, TASKS, rows_and_bags
from slidemake.core.files import read_json
from slidemake.mil.bundle import bundle_leave_one_out, load_bundle, predict
from slidemake.mil.fitting import DEFAULTS
from slidemake.mil.losses import make_objective
from slidemake.splits.make import Splits, make_splits
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.ordinal import OrdinalOutcome, median_grade, stages
from slidemake.tasks.registry import make_outcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.tasks.survival import CoxOutcome, DiscreteOutcome
from slidemake.training.train import train_model
from torchsurv.loss.cox import neg_partial_log_likelihood

ENOUGH = {"pearson": 0.7, "auroc": 0.75, "c_index": 0.6}


def rows_of(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module", params=list(TASKS))
def trained(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    rows, bags = rows_and_bags()
    splits = make_splits(rows, TASKS[request.param], {"folds": 2})
    record = train_model(TASKS[request.param], FAST, bags, splits, out)
    return out, bags, splits, record, TASKS[request.param]


def test_a_planted_signal_is_found_out_of_fold(trained):
    out, _, splits, record, task = trained
    outcome = make_outcome(task, splits.labels)
    rows = rows_of(out / "predictions_patients.csv")
    labels = [outcome.encode(row["label"]) for row in rows]
    raw = [c for c in rows[0] if c.startswith(("logit_", "log_hazard", "output"))]
    outputs = np.array([[float(row[c]) for c in raw] for row in rows])
    assert outcome.score_of(outputs, labels) > ENOUGH[outcome.score]
    assert all(fold[f"val_{outcome.score}"] > ENOUGH[outcome.score] - 0.25 for fold in record["folds"])
    assert list(rows_of(out / "curves.csv")[0])[-1] == f"val_{outcome.score}"


def test_the_bundle_repeats_the_table(trained):
    out, bags, splits, record, task = trained
    for fold in record["folds"]:
        bundle = load_bundle(out / "bundles" / f"repeat0_fold{fold['fold']}")
        assert bundle.outcome.about() == make_outcome(task, splits.labels).about()
        for row in rows_of(out / "predictions_patients.csv"):
            if row["fold"] == fold["fold"]:
                made = predict(bundle, bags.bag(row["patient_id"]))
                cells = bundle.outcome.cells(made.logits, made.values, bundle.threshold)
                assert cells == {key: row[key] for key in cells}
    whole = load_bundle(out / "bundle")
    assert len(whole.groups) == 2
    bag = bags.bag("P003")
    assert np.isfinite(predict(whole, bag).values).all()
    assert predict(whole, bag[:1]).values.shape == predict(whole, bag).values.shape


def test_shifted_tiles_push_the_score_that_is_explained(trained):
    """Severity shifts tiles: taking one away must lower the score on average more than taking another."""
    out, bags, _, _, task = trained
    bundle = load_bundle(out / "bundle")
    gaps = []
    for patient in bags.where:
        features = bags.bag(patient)
        shifted = features[:, :2].mean(1) > 1.5
        if 0 < shifted.sum() < len(shifted):
            effect = bundle_leave_one_out(bundle, features)
            gaps.append(effect[shifted].mean() - effect[~shifted].mean())
    assert np.mean(gaps) > 0, task


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("control", ["mean_pool_lr", "instance_linear", "site_only", "shuffled_label"])
def test_controls(name, control, tmp_path):
    rows, bags = rows_and_bags(24)
    task = TASKS[name]
    splits = make_splits(rows, task, {"folds": 2})
    train_model(task, {**FAST, "epochs": 2, "min_epochs": 1, "control": control}, bags, splits, tmp_path)
    table = rows_of(tmp_path / "predictions_patients.csv")
    assert len(table) == 24
    assert not any(cell.lower() in ("nan", "inf", "-inf", "none") for row in table for cell in row.values())
    if control == "shuffled_label":
        moved = sum(row["label"] != splits.labels[row["patient_id"]] for row in table)
        assert moved > 6
    if control == "mean_pool_lr" and name == "regression":
        truth, predicted = np.array([[float(row[c]) for c in ("label", "predicted")] for row in table]).T
        assert np.corrcoef(truth, predicted)[0, 1] > 0.8


@pytest.mark.parametrize("name", list(TASKS))
def test_a_mixture_of_every_type(name, tmp_path):
    rows, bags = rows_and_bags(24)
    splits = make_splits(rows, TASKS[name], {"folds": 2})
    record = train_model(TASKS[name], {**FAST, "aggregator": "auto", "members": 2}, bags, splits, tmp_path)
    for fold in record["folds"]:
        assert sum(part["weight"] for part in fold["mixture"].values()) == pytest.approx(1)
    bundle = load_bundle(tmp_path / "bundle")
    assert np.isfinite(predict(bundle, bags.bag("P003")).values).all()
    assert np.isfinite(bundle_leave_one_out(bundle, bags.bag("P003"))).all()


@pytest.mark.parametrize("name", ["cox", "discrete", "regression", "multilabel"])
def test_labels_of_tested_patients_change_nothing_but_their_own_column(name, tmp_path):
    """Baseline hazard, cut points, thresholds and horizons come from training and validation patients."""
    rows, bags = rows_and_bags(24)
    task, options = TASKS[name], {**FAST, "epochs": 2, "min_epochs": 1}
    folds = {0: {row["patient_id"]: "0" if i % 3 == 0 else "train" for i, row in enumerate(rows)}}
    labels = make_splits(rows, task, {"folds": 2}).labels
    other = dict(labels)
    tested = [p for p, f in folds[0].items() if f == "0"]
    other.update(zip(tested, [labels[p] for p in tested[::-1]], strict=True))
    assert other != labels
    sites = {row["patient_id"]: row["site"] for row in rows}
    for run, of in (("a", labels), ("b", other)):
        splits = Splits(folds, of, sites, {"method": "given"}, {"0": "test"})
        train_model(task, options, bags, splits, tmp_path / run)
    one, two = (read_json(tmp_path / run / "bundles/repeat0_fold0/bundle.json") for run in "ab")
    for key in ("groups", "threshold", "target", "files", "fingerprint"):
        assert one[key] == two[key]


# -- losses ----------------------------------------------------------------------------------------------------------


def objective(outcome, labels, **settings):
    labels = {str(i): label for i, label in enumerate(labels)}
    scale = outcome.scale(list(labels.values()))
    return make_objective(outcome, labels, list(labels), scale, {**DEFAULTS, **settings}), list(labels)


def test_cox_gradient_is_that_of_the_full_risk_sets():
    """In batches of two, with all log-hazards known, the gradients add up to torchsurv's over all patients."""
    rng = np.random.default_rng(0)
    time, event, eta = rng.exponential(9, 12), rng.random(12) < 0.6, rng.normal(size=12)
    eta -= eta.mean()
    made, people = objective(CoxOutcome([5.0]), list(zip(time, event, strict=True)))
    made.known[:] = eta
    found = []
    for start in range(0, 12, 2):
        outputs = torch.tensor(eta[start : start + 2, None], requires_grad=True)
        loss = made.loss(outputs, people[start : start + 2])
        loss.backward()
        found += (2 * outputs.grad[:, 0]).tolist()
    x = torch.tensor(eta, requires_grad=True)
    neg_partial_log_likelihood(x, torch.tensor(event), torch.tensor(time), reduction="sum").backward()
    np.testing.assert_allclose(found, x.grad.numpy(), atol=1e-5)
    assert float(loss) == pytest.approx(made.sets.loss(eta) / event.sum())


def test_losses_by_hand():
    logit = lambda p: float(np.log(p / (1 - p)))  # noqa: E731
    outputs = torch.tensor([[logit(0.5), logit(0.25)]] * 3)
    ordinal, people = objective(OrdinalOutcome(["a", "b", "c"]), [0, 1, 2], class_weights=False)
    expected = -np.mean(np.log([0.5, 0.5 * 0.25, 0.5 * 0.75]))
    assert float(ordinal.loss(outputs, people)) == pytest.approx(expected)
    assert ordinal.validation(outputs, people)[0] == pytest.approx(expected)
    several, people = objective(
        MultilabelOutcome(["x", "y"]), [np.array([1, -1]), np.array([0, 1])], class_weights=False
    )
    two = torch.tensor([[logit(0.8), 5.0], [logit(0.4), logit(0.3)]])
    known = -np.log([0.8, 0.6, 0.3])
    assert float(several.loss(two, people)) == pytest.approx(known.sum() / 4, rel=1e-5)
    assert several.validation(two, people)[0] == pytest.approx(known.mean(), rel=1e-5)
    # bins (0, 2.5], (2.5, ...): event in the first, censored in the first, event in the second, censored in the second
    labels = [(1.0, True), (2.0, False), (4.0, True), (5.0, False)]
    discrete, people = objective(DiscreteOutcome([3.0], bins=2), labels)
    assert discrete.scale["edges"] == [0, 2.5, 5]
    hazards = torch.tensor([[logit(0.2), logit(0.6)]] * 4)
    expected = -np.mean(np.log([0.2, 0.8, 0.8 * 0.6, 0.8 * 0.4]))
    assert float(discrete.loss(hazards, people)) == pytest.approx(expected, rel=1e-5)
    assert discrete.validation(hazards, people)[0] == pytest.approx(expected, rel=1e-5)
    number, people = objective(RegressionOutcome(), [10.0, 20.0])
    assert float(number.loss(torch.tensor([[0.0], [0.0]]), people)) == pytest.approx(1)


def test_weights_make_rare_grades_and_labels_count_alike():
    ordinal, _ = objective(OrdinalOutcome(["a", "b"]), [0, 0, 0, 1])
    np.testing.assert_allclose(ordinal.weights, [4 / 6, 2])
    several, _ = objective(MultilabelOutcome(["x"]), [np.array([v]) for v in (1, 0, 0, 0, -1)])
    np.testing.assert_allclose(several.weights[:, 0], [4 / 6, 2])


def test_grades():
    outputs = np.array([[0.3, -1.0, 2.0], [-4, -4, -4.0]])
    prob = np.exp(stages(outputs))
    np.testing.assert_allclose(prob.sum(1), 1)
    assert median_grade(np.array([[0.5, 0.2, 0.3], [0.4, 0.2, 0.4], [0.1, 0.1, 0.8]])).tolist() == [0, 1, 2]
    assert median_grade(prob)[1] == 3


def test_survival_of_cox_falls_and_the_risk_orders_patients():
    outcome = CoxOutcome([2.0, 4.0, 8.0])
    rng = np.random.default_rng(0)
    time, event = rng.exponential(5, 40), rng.random(40) < 0.7
    eta = rng.normal(size=(40, 1))
    link = outcome.link(eta, list(zip(time, event, strict=True)), {})
    values = outcome.predict(eta, link)
    assert (np.diff(values[:, 1:], axis=1) <= 0).all()
    order = np.argsort(eta[:, 0])
    assert (np.diff(values[order, 0]) >= 0).all()
    assert outcome.threshold(values, [None] * 40) == pytest.approx(np.median(values[:, 0]))
    assert outcome.link(np.empty((0, 1)), [], {})["slope"] == 1.0
