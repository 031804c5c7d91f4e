"""Aggregators by the names that configuration and bundles use (`registration`), and how they are built."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slidemake.mil.aggregators.base import Aggregator, GatedScores, Learned
from slidemake.mil.aggregators.registration import AGGREGATORS

for _file in pkgutil.iter_modules([str(Path(__file__).parent)]):  # each registers what it holds
    if _file.name not in ("registry", "inference"):
        importlib.import_module(f"slidemake.mil.aggregators.{_file.name}")
SLIDE_ATTENTION = 64  # width of the attention over slides


def build_aggregator(
    name: str, features: int, outputs: int, parameters: Mapping[str, Any], seed: int = 0
) -> Aggregator:
    """A freshly initialised aggregator; the same seed gives the same weights and leaves torch's global state alone.

    parameters: settings of a model; those that it is registered for are taken, and `slides: attention` adds attention
    over the slides of a patient; `domains: K` makes room for the harmonisation of K scanners or sites, `components: K`
    for the projection of the features on K axes.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}; one of {', '.join(AGGREGATORS)}")
    registered = AGGREGATORS[name]
    given = {key: parameters[key] for key in registered.takes if key in parameters}
    width = min(parameters.get("components") or features, features)
    model = registered.build(width, outputs, **given, **registered.fixed)
    _initialise(model, seed)
    model.start()
    if parameters.get("slides") == "attention":
        with torch.no_grad():
            pooled, _ = model.pool(*model.encode(torch.zeros(1, 1, width)))
        model.slide_scores = GatedScores(pooled.shape[1], SLIDE_ATTENTION)
        _initialise(model.slide_scores, seed)
    if parameters.get("components"):
        model.set_scaling(torch.zeros(features), torch.ones(features), torch.eye(features, width))
    if parameters.get("domains"):
        shape = (parameters["domains"], features)
        model.set_domains(torch.ones(shape), torch.zeros(shape))
    model.seed_dropout(seed)
    return model


def model_parameters(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's settings from which `build_aggregator` makes the same architecture again."""
    kept = {key: settings[key] for key in AGGREGATORS[name].takes if key in settings}
    if settings.get("slides") == "attention":
        kept["slides"] = "attention"
    if settings.get("components"):
        kept["components"] = settings["components"]
    return kept


def _initialise(model: nn.Module, seed: int) -> None:
    # torch's own initialisation draws from the global generator, which parallel threads share: draw again from ours.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = module.weight[0].numel() ** -0.5  # inputs of one output
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, Learned):
                module.value.normal_(0, module.value.shape[-1] ** -0.5, generator=generator)
