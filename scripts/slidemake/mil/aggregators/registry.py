"""Aggregators by the names that configuration and bundles use, and how they are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slidemake.mil.aggregators.abmil import GatedABMIL
from slidemake.mil.aggregators.additive import AdditiveMIL
from slidemake.mil.aggregators.base import Aggregator, GatedScores, Learned
from slidemake.mil.aggregators.chief import CHIEFHead
from slidemake.mil.aggregators.clam import CLAM
from slidemake.mil.aggregators.dsmil import DSMIL
from slidemake.mil.aggregators.dtfd import DTFD
from slidemake.mil.aggregators.ilra import ILRA
from slidemake.mil.aggregators.instance_linear import InstanceLinear
from slidemake.mil.aggregators.max_pool import MaxPool
from slidemake.mil.aggregators.mean_mlp import MeanMLP
from slidemake.mil.aggregators.mean_pool import MeanPool
from slidemake.mil.aggregators.transmil import TransMIL

# name -> (class, fixed arguments)
AGGREGATORS: dict[str, tuple[type[Aggregator], dict[str, Any]]] = {
    "abmil_gated": (GatedABMIL, {"gated": True}),
    "abmil": (GatedABMIL, {"gated": False}),
    "mean_pool": (MeanPool, {}),
    "max_pool": (MaxPool, {}),
    "mean_mlp": (MeanMLP, {}),
    "clam_sb": (CLAM, {"branches": "single"}),
    "clam_mb": (CLAM, {"branches": "multi"}),
    "dsmil": (DSMIL, {}),
    "transmil": (TransMIL, {}),
    "dtfd": (DTFD, {}),
    "ilra": (ILRA, {}),
    "additive": (AdditiveMIL, {}),
    "chief": (CHIEFHead, {}),
    "instance_linear": (InstanceLinear, {}),
}
# name -> the settings of a model that it takes
PARAMETERS: dict[str, tuple[str, ...]] = {
    "mean_pool": (),
    "max_pool": (),
    "mean_mlp": ("hidden", "dropout"),
    "dsmil": ("attention",),
    "transmil": ("hidden", "dropout"),
    "ilra": ("hidden", "dropout"),
    "instance_linear": ("pooling", "sharpness", "share", "evidence", "falls", "contrast"),
}
PARAMETERS = {name: PARAMETERS.get(name, ("hidden", "attention", "dropout")) for name in AGGREGATORS}
IN_ORDER = ("transmil",)  # the order of a bag's tiles matters to these
SLIDE_ATTENTION = 64  # width of the attention over slides


def build_aggregator(
    name: str, features: int, outputs: int, parameters: Mapping[str, Any], seed: int = 0
) -> Aggregator:
    """A freshly initialised aggregator; the same seed gives the same weights and leaves torch's global state alone.

    parameters: settings of a model; those of PARAMETERS[name] are taken, and `slides: attention` adds attention over
    the slides of a patient; `domains: K` makes room for the harmonisation of K scanners or sites, `components: K` for
    the projection of the features on K axes.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}; one of {', '.join(AGGREGATORS)}")
    cls, fixed = AGGREGATORS[name]
    known = {k: parameters[k] for k in PARAMETERS[name] if k in parameters}
    width = min(parameters.get("components") or features, features)
    model = cls(width, outputs, **known, **fixed)
    _initialise(model, seed)
    if isinstance(model, InstanceLinear):
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
    kept = {k: settings[k] for k in PARAMETERS[name] if k in settings}
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
