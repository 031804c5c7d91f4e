"""`preset: paper`: the published sizes, optimiser and length of training of an aggregator.

They take the place of slidemake's defaults, which are small and quick; what a model of the configuration sets itself
stands. Sources are the papers that the aggregators' files name and, where a paper is silent, its authors' code. Common
to all: one bag a step, all of its tiles, features as the encoder gave them, a loss without class weights. What no
preset changes: members validated on inner folds, early stopping by their loss, calibration (docs/training.md), and what
the head of an aggregator's file says it does otherwise. Additive MIL is built on Ilse's attention, CHIEF's head on
CLAM's; neither paper gives an optimiser for it, so theirs are those of what they are built on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER = "paper"
_COMMON: dict[str, Any] = {
    "scaling": "none",
    "bags_per_step": 1,
    "tile_fraction": 1.0,
    "max_tiles": None,
    "class_weights": False,
    "optimiser": "adam",
}
_ILSE: dict[str, Any] = {
    "hidden": 500,
    "attention": 128,
    "dropout": 0.0,
    "learning_rate": 1e-4,
    "weight_decay": 5e-4,
    "epochs": 100,
}
_CLAM: dict[str, Any] = {
    **{"hidden": 512, "attention": 256, "dropout": 0.25, "learning_rate": 2e-4, "weight_decay": 1e-5},
    **{"epochs": 200, "min_epochs": 50, "patience": 20},
}
_TRANSMIL: dict[str, Any] = {
    **{"hidden": 512, "dropout": 0.1, "learning_rate": 2e-4, "weight_decay": 1e-5},
    **{"epochs": 200, "patience": 10, "optimiser": "lookahead_radam"},
}
_DTFD: dict[str, Any] = {
    **{"hidden": 512, "attention": 128, "dropout": 0.0, "learning_rate": 1e-4, "weight_decay": 1e-4},
    **{"epochs": 200, "min_epochs": 160, "patience": 40, "clip": 5.0},  # the best of the last fifth is kept
}
_DSMIL: dict[str, Any] = {"attention": 128, "learning_rate": 1e-4, "weight_decay": 5e-3, "epochs": 100}
_ILRA: dict[str, Any] = {"hidden": 256, "dropout": 0.0, "learning_rate": 1e-4, "weight_decay": 0.0, "epochs": 100}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {**_COMMON, **settings}
    for name, settings in {
        "abmil": _ILSE,
        "abmil_gated": _ILSE,
        "additive": _ILSE,
        "clam_sb": _CLAM,
        "clam_mb": _CLAM,
        "chief": _CLAM,
        "transmil": _TRANSMIL,
        "dtfd": _DTFD,
        "dsmil": _DSMIL,
        "ilra": _ILRA,
    }.items()
}


def with_presets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` (a configuration with its sweeps expanded) in which models with a preset have its values for all that they
    leave out; a preset of a model that has none is left for `cross_check` to report."""
    models = raw.get("models")
    if not isinstance(models, Mapping):
        return dict(raw)
    return {**raw, "models": {name: _with_preset(model) for name, model in models.items()}}


def _with_preset(model: Any) -> Any:
    if not isinstance(model, Mapping) or str(model.get("preset")).strip().lower() != PAPER:
        return model
    published = PUBLISHED.get(str(model.get("aggregator")).strip().lower(), {})
    return {**published, **model}
