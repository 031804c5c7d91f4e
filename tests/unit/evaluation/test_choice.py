"""The choice among models, fold by fold, on validation patients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import as_table
from simulated_outcomes import outcome_of
from sklearn.metrics import log_loss, mean_squared_error
from slidemake.evaluation.choice import choose
from slidemake.evaluation.evaluate import evaluate_tables
from slidemake.statistics.survival_metrics import metrics_over
from slidemake.tasks.base import Predictions
from slidemake.tasks.class_predictions import ClassPredictions
from slidemake.tasks.controls import CHOSEN


def model(name, seed, n=60, skill=0.0, folds=3, repeats=2):
    """Out-of-fold predictions, and 30 validation patients of every fold predicted with the same skill."""
    rng = np.random.default_rng([seed, len(name)])

    def predicted(labels):
        z = rng.normal(size=len(labels)) + skill * (2 * labels - 1)
        p = 1 / (1 + np.exp(-z))
        return np.stack([1 - p, p], axis=-1)

    labels = np.arange(n) % 2
    prob = np.stack([predicted(labels) for _ in range(repeats)])
    fold = np.stack([np.random.default_rng(r).permutation(np.arange(n) % folds) for r in range(repeats)])
    inner = np.arange(30) % 2
    validation = {(r, f): (predicted(inner), inner) for r in range(repeats) for f in range(folds)}
    people = tuple(f"P{i:02d}" for i in range(n))
    decided = (prob[..., 1] >= 0.5).astype(int)
    repeated = tuple(range(repeats))
    about = (name, ("n", "t"), people, ("A",) * n, labels, repeated)
    return as_table(ClassPredictions(*about, prob, decided, fold, np.log(prob), validation))


def test_the_loss_is_the_libraries():
    p = model("a", 0)
    prob, labels = p.validation[1, 2]
    assert p.outcome.validation_loss(p, 1, 2) == pytest.approx(log_loss(labels[:, 0], prob))


def test_every_fold_takes_the_model_with_the_least_loss():
    models = [model("a", 1), model("b", 2), model("c", 3)]
    made, names = choose(models)
    by_name = {m.name: m for m in models}
    assert len(names) == 6
    assert len(set(names.values())) > 1
    for key, name in names.items():
        r, f = map(int, key.split("/"))
        losses = {m.name: log_loss(m.validation[r, f][1][:, 0], m.validation[r, f][0]) for m in models}
        assert name == min(losses, key=losses.get)
        inside = made.fold[r] == f
        np.testing.assert_array_equal(made.values[r, inside], by_name[name].values[r, inside])
        np.testing.assert_array_equal(made.raw[r, inside], by_name[name].raw[r, inside])
        np.testing.assert_array_equal(made.decisions[r, inside], by_name[name].decisions[r, inside])
        assert made.validation[r, f] is by_name[name].validation[r, f]


def test_among_useless_models_the_best_looks_good_and_the_choice_does_not():
    """10 models without skill, 20 cohorts: the best has 0.5 + 1.5 sd (about 0.58) on average, the choice 0.5 with a
    standard error of the mean below 0.02."""
    best, chosen = [], []
    for seed in range(20):
        result, _ = evaluate_tables([model(f"m{'x' * k}", 100 + seed) for k in range(10)], {"bootstrap": 20})
        figures = {name: e["scopes"]["pooled"]["metrics"]["auroc"]["value"] for name, e in result["models"].items()}
        best.append(max(value for name, value in figures.items() if name.startswith("m")))
        chosen.append(figures[CHOSEN])
    assert np.mean(best) > 0.55
    assert abs(np.mean(chosen) - 0.5) < 0.05


def test_it_stands_beside_the_models_and_is_compared_with_controls_only():
    result, curves = evaluate_tables(
        [model("a", 1, skill=1.0), model("b", 2), model("mean_pool_lr", 3)], {"bootstrap": 50}
    )
    assert list(result["models"]) == ["a", "b", CHOSEN, "mean_pool_lr", "prevalence"]
    assert set(result["models"][CHOSEN]["chosen"].values()) == {"a"}
    assert {c["reference"] for c in result["comparisons"] if c["model"] == CHOSEN} == {"mean_pool_lr", "prevalence"}
    assert not any(c["reference"] == CHOSEN for c in result["comparisons"])
    assert CHOSEN in curves["models"]


def test_models_are_measured_against_controls_not_against_each_other():
    result, _ = evaluate_tables(
        [model("good", 1, skill=1.0), model("fair", 2, skill=0.6), model("mean_pool_lr", 3)], {"bootstrap": 50}
    )
    about = {line["text"].split(":")[0]: line["text"] for line in result["verdict"] if "difference" in line["text"]}
    assert all("The best control, fair," not in about[name] for name in ("good", CHOSEN))
    assert "The best control, prevalence," in about["good"]  # mean_pool_lr has no skill here, and is below it


@pytest.mark.parametrize("case", ["one model", "other patients", "other folds", "no validation"])
def test_where_nothing_can_be_chosen(case):
    a, b = model("a", 1), model("b", 2)
    if case == "other patients":
        b = replace(b, patients=("Q",) * 60)
    if case == "other folds":
        b = replace(b, fold=b.fold[::-1])
    if case == "no validation":
        b = replace(b, validation={key: value for key, value in b.validation.items() if key != (1, 1)})
    assert choose([a] if case == "one model" else [a, b]) is None


NAMES = {"ordinal": ("1", "2", "3"), "multilabel": ("a", "b"), "regression": (), "survival": ("2", "4")}


def outcomes(kind, rng, n, skill):
    """(truth, values, decisions) of n patients, predicted with some skill."""
    signal = rng.normal(size=n)
    seen = skill * signal + (1 - skill) * rng.normal(size=n)
    if kind == "regression":
        return signal[:, None], seen[:, None], np.empty((n, 0))
    if kind == "survival":
        time = 3 * np.exp(-signal)
        truth = np.stack([time, (rng.random(n) < 0.8).astype(float)], 1)
        risk = 1 / (1 + np.exp(-seen))
        return truth, np.stack([risk, 1 - risk / 2, 1 - risk], 1), (risk > 0.5)[:, None].astype(float)
    if kind == "ordinal":
        grade = np.digitize(signal, [-0.5, 0.5])
        prob = np.exp(-((seen[:, None] - np.array([-1, 0, 1])) ** 2))
        prob /= prob.sum(1, keepdims=True)
        return grade[:, None].astype(float), prob, prob.argmax(1)[:, None].astype(float)
    truth = np.stack([signal > 0, signal > 0.5], 1).astype(float)
    truth[::7, 1] = -1
    prob = 1 / (1 + np.exp(-np.stack([3 * seen, 3 * seen - 1.5], 1)))
    return truth, prob, (prob > 0.5).astype(float)


def outcome_model(kind, name, skill, n=40, folds=2):
    truth, values, decisions = outcomes(kind, np.random.default_rng(1), n, skill)
    fold = (np.arange(n) % folds)[None]
    made = {(0, f): outcomes(kind, np.random.default_rng([2, f]), 24, skill) for f in range(folds)}
    validation = {where: (of[1], of[0]) for where, of in made.items()}
    people, sites = tuple(f"P{i:02d}" for i in range(n)), ("A",) * n
    about = (name, outcome_of(kind, NAMES[kind]), people, sites, truth, (0,))
    return Predictions(*about, values[None], decisions[None], fold, validation)


@pytest.mark.parametrize("kind", NAMES)
def test_the_losses_of_other_outcomes_are_the_libraries(kind):
    table = outcome_model(kind, "m", 0.5)
    values, truth = table.validation[0, 1]
    if kind == "ordinal":
        expected = log_loss(truth[:, 0], values)
    elif kind == "multilabel":
        known = truth >= 0
        expected = log_loss(truth[known], values[known])
    elif kind == "regression":
        expected = mean_squared_error(truth[:, 0], values[:, 0])
    else:  # itself against torchsurv in test_survival
        at = tuple(float(name) for name in NAMES[kind])
        expected = metrics_over(truth[:, 0], truth[:, 1] == 1, values[:, 0], values[:, 1:], at)["ibs"][0]
    assert table.outcome.validation_loss(table, 0, 1) == pytest.approx(expected)


@pytest.mark.parametrize("kind", NAMES)
def test_of_other_outcomes_the_better_model_is_chosen(kind):
    models = [outcome_model(kind, "poor", 0.0), outcome_model(kind, "good", 0.9), outcome_model(kind, "site_only", 0.0)]
    result, curves = evaluate_tables(models, {"bootstrap": 50})
    assert list(result["models"]) == ["poor", "good", CHOSEN, "site_only", models[0].outcome.null]
    entry = result["models"][CHOSEN]
    assert entry["chosen"] == {"0/0": "good", "0/1": "good"}
    assert entry["chosen_by"] == models[0].outcome.criterion
    assert entry["scopes"]["pooled"]["metrics"] == result["models"]["good"]["scopes"]["pooled"]["metrics"]
    assert not any(c["reference"] == CHOSEN for c in result["comparisons"])
    assert CHOSEN in curves["models"]


def test_a_loss_that_is_not_defined_chooses_nothing():
    models = [outcome_model("survival", name, 0.5) for name in "ab"]
    for m in models:
        for _, truth in m.validation.values():
            truth[:, 0] = 0.5  # nobody is seen at any horizon
    assert choose(models) is None
