"""`aggregator: auto` and `auto_linear`: several models of a fold, mixed by what each is worth on held-out patients.

Every candidate is trained on the members of the fold's plan, so that each training patient is predicted by a member
that did not see it. A candidate's outputs O_c are brought to one scale by the factor s_c that minimises the loss of
these patients (what a temperature does to logits), and the fold's output is

    O = sum_c w_c s_c O_c,    w_c proportional to exp(n A_c),

A_c being the AUROC of these n patients (C-index of grades and, with n events, of survival; half the correlation of
numbers, which spans twice as much). These are the exponential weights of Ridgway, Alquier, Chopin and Liang,
"PAC-Bayesian AUC classification and scoring", NIPS 2014: with few patients several candidates share the weight, with
many the best takes it. Ranks are used and not the loss, because each held-out patient is predicted by a single member:
what makes a loss is then mostly how sure that member is, which averaging takes away. The choice is made inside of each
fold, on training patients alone, so that it is part of what the tested patients test (nested cross-validation).
Candidates with less than `LEAST` of the weight are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidemake.tasks.base import NO_SKILL, Outcome
from slidemake.tasks.survival import SurvivalOutcome

LEAST = 0.02

# A fixed number of epochs: a handful of validation patients chooses one by chance, and a candidate whose epoch they
# chose would look better on them than it is.
INSTANCE_LINEAR: dict[str, Any] = {
    "aggregator": "instance_linear",
    "scaling": "whitened",
    "components": 32,
    "epochs": 60,
    "min_epochs": 60,
    "bags_per_step": 32,
    "learning_rate": 0.03,
    "tile_fraction": 1.0,
}
LSE = {**INSTANCE_LINEAR, "pooling": "lse", "sharpness": 3.0}
# Candidates: name -> what differs from the model's settings; the names are in bundles
LINEAR: dict[str, dict[str, Any]] = {
    # which class is called positive is often the alphabet's choice: validation finds out for which tiles speak
    "lse": {**LSE, "evidence": "higher"},
    "lse_lower": {**LSE, "evidence": "lower"},
    "mean": {**INSTANCE_LINEAR, "pooling": "mean"},
}
CANDIDATES: dict[str, dict[str, Any]] = {
    **LINEAR,
    "abmil": {
        "aggregator": "abmil_gated",
        "scaling": "principal",
        "components": 128,
        "epochs": 20,
        "min_epochs": 20,
    },
}
# Of several classes, grades and survival no mixture was as good as gated attention by itself (docs/training.md)
GATED: dict[str, dict[str, Any]] = {"gated": {"aggregator": "abmil_gated", "scaling": "each"}}
AUTO, AUTO_LINEAR = "auto", "auto_linear"
MIXTURES = (AUTO, AUTO_LINEAR)
BY_ATTENTION = ("multiclass", "ordinal", "survival")  # types of tasks whose `auto` is GATED


@dataclass(frozen=True)
class Part:
    """One candidate's part of a group: its members come one after the other, their outputs are averaged."""

    candidate: str
    members: int
    weight: float  # w_c
    scale: float  # s_c


@dataclass(frozen=True)
class Judged:
    """A candidate by its outputs for held-out patients."""

    weight: float  # w_c
    scale: float  # s_c
    score: float | None  # `Outcome.score`; None where it is not defined
    loss: float | None


def heaviest(parts: Sequence[Part]) -> slice:
    """Which of a group's members are the candidate's that weighs most; all of them where they are of one model."""
    if not parts:
        return slice(None)
    best = max(range(len(parts)), key=lambda i: parts[i].weight)
    first = sum(part.members for part in parts[:best])
    return slice(first, first + parts[best].members)


def candidates(settings: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """{name: settings} of what a model with these settings is made of; of a single model the name is empty. kind: the
    type of the task."""
    if settings["aggregator"] not in MIXTURES:
        return {"": dict(settings)}
    of_auto = GATED if kind in BY_ATTENTION else CANDIDATES
    return {
        name: {**settings, **changes}
        for name, changes in (LINEAR if settings["aggregator"] == AUTO_LINEAR else of_auto).items()
    }


def mixture(
    outputs: Mapping[str, np.ndarray], outcome: Outcome, labels: Sequence[Any], scale: Mapping[str, Any]
) -> dict[str, Judged]:
    """What each candidate is worth, from its outputs (V, C) of held-out patients; weights below `LEAST` are 0.

    labels (V): encoded; scale: `Outcome.scale`. Without held-out patients all candidates weigh the same.
    """
    n = len(labels)
    if not n:
        return {name: Judged(1 / len(outputs), 1.0, None, None) for name in outputs}
    settled = {name: outcome.settled(values, labels, scale) for name, values in outputs.items()}
    found = {name: outcome.score_of(values, labels) for name, values in outputs.items()}
    counted = sum(bool(event) for _, event in labels) if isinstance(outcome, SurvivalOutcome) else n
    span = 1 - NO_SKILL[outcome.score]
    scores = np.array([NO_SKILL[outcome.score] if score is None else score for score in found.values()])
    weights = np.exp(-counted * (scores.max() - scores) * 0.5 / span)
    weights /= weights.sum()
    weights[weights < LEAST] = 0
    weights /= weights.sum()
    return {
        name: Judged(float(w), 1 / settled[name][0], found[name], settled[name][1])
        for name, w in zip(found, weights, strict=True)
    }
