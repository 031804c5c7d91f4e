"""What training says about itself: each finding from figures made for it, and silence where nothing is to be said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from slidemake.evaluation.verdict import against_controls
from slidemake.training.words import agreement, training_findings

SETTINGS = {"aggregator": "abmil_gated", "epochs": 5, "min_epochs": 2}
FALLING = [{"val_loss": v} for v in (0.7, 0.6, 0.5, 0.4, 0.45)]


def codes(folds, curves=None, **settings):
    curves = curves if curves is not None else [[] for _ in folds]
    return [found["code"] for found in training_findings(folds, curves, {**SETTINGS, **settings})]


def fold(**figures):
    return {"temperature": 1.0, "agreement": 0.9, **figures}


def test_nothing_to_say():
    assert codes([fold(epochs=[4]), fold(epochs=[3])], [[FALLING], [FALLING]]) == []
    assert codes([{"temperature": 1.0}]) == []  # site_only


@pytest.mark.parametrize(
    ("value", "code"), [(10.0, "temperature_high"), (9.9, "temperature_high"), (0.1, "temperature_low")]
)
def test_temperature_at_its_limit(value, code):
    assert codes([fold(temperature=value), fold(temperature=value), fold()]) == [code]
    assert codes([fold(temperature=value), fold(), fold()]) == []  # one of three folds is no rule
    assert codes([fold(temperature=[1.0, value])]) == [code]  # one of several labels


def test_the_scale_of_a_mixture_counts_into_its_temperature():
    """Outputs are multiplied by the scale of the heaviest candidate before the temperature divides them."""
    parts = {"lse": {"weight": 0.7, "scale": 0.1}, "abmil": {"weight": 0.3, "scale": 1.0}}
    assert codes([fold(temperature=1.0, mixture=parts)], aggregator="auto") == ["temperature_high"]
    parts["abmil"]["weight"] = 0.8
    assert codes([fold(temperature=1.0, mixture=parts)], aggregator="auto") == []


@pytest.mark.parametrize("aggregator", ["auto", "auto_linear", "instance_linear", "mean_pool_lr", "abmil_gated"])
def test_what_to_try_is_read_by_the_model(aggregator):
    rising = [{"val_loss": v} for v in (0.5, 0.6, 0.7)]
    settings = {**SETTINGS, "aggregator": aggregator}
    worst = [fold(temperature=10.0, agreement=0.1, epochs=[2])]
    said = training_findings(worst, [[rising]], settings)
    said += training_findings([fold(temperature=0.1)], [[]], settings)
    assert [line["code"] for line in said] == [
        "temperature_high",
        "never_falls",
        "members_disagree",
        "temperature_low",
    ]
    text = " ".join(line["text"] for line in said)
    assert ("aggregator: auto" in text) == ("hidden" in text) == (aggregator == "abmil_gated")
    assert ("components" in text) == (aggregator == "instance_linear")
    assert ("learning_rate" in text) == (aggregator in ("abmil_gated", "instance_linear"))


def test_penalty_at_the_edge_of_its_grid():
    assert codes([fold(c=1e-5), fold(c=1e-5)]) == ["penalty_edge"]
    assert codes([fold(c=1000.0), fold(c=0.1)]) == ["penalty_edge"]
    assert codes([fold(c=0.1)]) == []


def test_epochs():
    rising = [{"val_loss": v} for v in (0.5, 0.6, 0.7)]
    assert codes([fold(epochs=[2])], [[rising]]) == ["never_falls"]
    early = [{"val_loss": v} for v in (0.6, 0.5, 0.7)]
    assert codes([fold(epochs=[2])], [[early]]) == ["epoch_first"]
    assert codes([fold(epochs=[5])], [[FALLING]]) == ["epoch_last"]
    assert codes([fold(epochs=[5])], [[FALLING]], min_epochs=5) == []  # so many were asked for
    assert codes([fold(epochs=[5])], [[FALLING]], aggregator="auto") == []  # its candidates have epochs of their own
    unseen = [{"val_loss": None}] * 5
    assert codes([fold(epochs=[5])], [[unseen]]) == []  # without validation patients no epoch is chosen


def test_losses_that_were_not_looked_at_are_left_out():
    some = [{"val_loss": v} for v in (0.5, None, None, 0.4, None)]
    assert codes([fold(epochs=[5])], [[some]], min_epochs=5) == []
    rising = [{"val_loss": v} for v in (0.5, None, 0.6, None, 0.7)]
    assert codes([fold(epochs=[5])], [[rising]], min_epochs=5) == ["never_falls"]


def test_members_that_disagree():
    assert codes([fold(agreement=0.2), fold(agreement=0.6), fold(agreement=None)]) == ["members_disagree"]
    scores = np.random.default_rng(0).normal(size=(9, 3))
    expected = np.mean([spearmanr(scores[:, i], scores[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))])
    assert agreement(scores) == pytest.approx(expected)
    assert agreement(scores[:3]) is None
    assert agreement(scores[:, :1]) is None
    assert agreement(np.ones((5, 2))) is None


def test_as_good_as_a_linear_score_per_tile():
    """Attention that beats mean pooling and not the linear score is told both."""
    difference = {
        "mean_pool_lr": {"difference": 0.2, "low": 0.1, "high": 0.3, "p_holm": 0.01},
        "instance_linear": {"difference": 0.01, "low": -0.05, "high": 0.06, "p_holm": 0.8},
    }
    figure = {"value": 0.9, "low": 0.8, "high": 0.95}
    said = against_controls("m", "AUROC", figure, difference, lambda control: figure)
    assert [line["code"] for line in said] == ["better_than_controls", "as_good_as_linear"]
    assert "mean_pool_lr" in said[0]["text"]
    assert "better than the other controls in this cohort" in said[0]["text"]
    chance = {"prevalence": difference["mean_pool_lr"], "instance_linear": difference["instance_linear"]}
    said = against_controls("m", "AUROC", figure, chance, lambda control: figure)
    assert [line["code"] for line in said] == ["above_chance", "as_good_as_linear"]
    assert "only comparison" not in said[0]["text"]
    assert "not tested" not in said[0]["text"]
    worse = {**difference, "instance_linear": {"difference": -0.1, "low": -0.2, "high": -0.02, "p_holm": 0.01}}
    assert [line["code"] for line in against_controls("m", "AUROC", figure, worse, lambda control: figure)] == [
        "worse_than_control"
    ]
