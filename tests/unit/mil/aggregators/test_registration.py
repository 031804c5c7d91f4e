"""Aggregators make themselves known; schema and guide say what is registered."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from mil_cohort import planted
from slidemake.configuration.schema import leaves, resolved
from slidemake.mil.aggregators import AGGREGATORS, aggregator, predict_bag
from slidemake.mil.aggregators.base import Aggregator
from slidemake.mil.bundle import load_bundle
from slidemake.training.train import train_model

ROOT = Path(__file__).resolve().parents[4]
OTHERS = {"auto", "auto_linear", "mean_pool_lr"}  # mixtures, and a model that is fitted without steps
STAND_IN = '''
import torch
from torch import nn
from slidemake.mil.aggregators import aggregator
from slidemake.mil.aggregators.base import Aggregator


@aggregator("stand_in", takes=("hidden",), power=2)
class StandIn(Aggregator):
    """The mean of powers of projected tiles."""

    def __init__(self, features, outputs, hidden=4, power=1):
        super().__init__(features, outputs)
        self.project, self.classifier, self.power = nn.Linear(features, hidden), nn.Linear(hidden, outputs), power

    def encode(self, x):
        return (self.standardised_linear(x, self.project) ** self.power,)

    def pool(self, x, mask=None):
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        weight = weight / weight.sum(1, keepdim=True)
        return (weight[..., None] * x).sum(1), weight
'''


def test_schema_and_guide_name_what_is_registered():
    (part,) = (resolved(part) for key, part in leaves() if key == "models.<name>.aggregator")
    assert set(part["enum"]) - OTHERS == set(AGGREGATORS)
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert [name for name in AGGREGATORS if f"`{name}`" not in guide] == []


def test_settings_that_are_taken_are_settings_of_a_model():
    settings = {key.removeprefix("models.<name>.") for key, _ in leaves() if key.startswith("models.<name>.")}
    taken = {key for registered in AGGREGATORS.values() for key in registered.takes}
    assert taken - settings == {"falls", "contrast"}  # what the task tells a model, not the user


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'abmil' is registered already, as GatedABMIL"):
        aggregator("abmil")(Aggregator)


def test_a_new_aggregator_is_one_file(tmp_path):
    """Trained with its settings, put into bundles and read from them, without a change anywhere else."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    spec = importlib.util.spec_from_file_location("stand_in", tmp_path / "stand_in.py")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        bags, splits = planted(n=24)
        options = {"aggregator": "stand_in", "hidden": 5, "epochs": 4, "min_epochs": 4, "members": 1}
        record = train_model({"label": "label", "type": "binary"}, options, bags, splits, tmp_path / "model")
        assert len(record["folds"]) == sum(len(set(folds.values())) for folds in splits.folds.values())
        bundle = load_bundle(tmp_path / "model" / "bundles" / "repeat0_fold0")
        (model, *_) = bundle.groups[0].members
        assert model.project.out_features == 5
        assert model.power == 2
        patient = sorted(splits.labels)[0]
        assert np.isfinite(predict_bag(model, bags.bag(patient))[0]).all()
    finally:
        AGGREGATORS.pop("stand_in", None)
