"""What training says about itself: choices at the edge of their range, losses that never fell, members that disagree.

None of it is an error, and each has something to try. Findings are {level, code, text}, as those of `verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from slidemake.mil.automatic import AUTO, MIXTURES
from slidemake.statistics.temperature import TEMPERATURE_BOUNDS
from slidemake.training.class_baselines import C_GRID

OFTEN = 0.5  # share of the folds, or members, from which a finding is worth a sentence
EDGE = 1.02  # how near a temperature is to its limit: within 2 %
AGREE = 0.5  # mean rank correlation of members' scores below which they say different things
FEW = 4  # tested patients below which a rank correlation is chance
Finding = dict[str, str]


def training_findings(
    folds: Sequence[Mapping[str, Any]],
    curves: Sequence[Sequence[Sequence[Mapping[str, Any]]]],
    settings: Mapping[str, Any],
) -> list[Finding]:
    """folds: figures of each fold as in train.json; curves: [fold][member] -> points of `fitting`, none of models
    that have no epochs; settings: those of the model, `aggregator` being mean_pool_lr for the linear control, too."""
    found = [
        _temperatures(folds, settings),
        _penalties(folds),
        *_epochs(folds, curves, settings),
        _agreement(folds, settings),
    ]
    return [finding for finding in found if finding]


def agreement(scores: np.ndarray) -> float | None:
    """Mean rank correlation between the members' scores (P, M) of tested patients, over all pairs of members.

    None for one member, for fewer than `FEW` patients, and where a member says the same of all.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) < FEW or (np.ptp(scores, axis=0) < 1e-12).any():
        return None
    pairs = [spearmanr(scores[:, i], scores[:, j]).statistic for j in range(scores.shape[1]) for i in range(j)]
    return float(np.mean(pairs))


def _note(code: str, text: str, level: str = "note") -> Finding:
    return {"level": level, "code": code, "text": text}


def _of(count: int, total: int, what: str = "folds") -> str:
    return f"in all {total} {what}" if count == total else f"in {count} of {total} {what}"


def _simpler(settings: Mapping[str, Any]) -> str:
    """What to try, among what this model's aggregator reads, where too much is learned of too few patients."""
    aggregator = settings["aggregator"]
    if aggregator == "instance_linear":
        return "Try fewer components, another encoder, or more patients."
    if not _trains_freely(settings):
        return "Try another encoder, or more patients."
    return f"Try aggregator: {AUTO}, fewer weights (hidden, attention), another encoder, or more patients."


def _trains_freely(settings: Mapping[str, Any]) -> bool:
    """Whether the model reads `epochs` and `learning_rate`: mixtures and the linear control have their own."""
    return settings["aggregator"] not in (*MIXTURES, "mean_pool_lr")


def _divisor(fold: Mapping[str, Any]) -> np.ndarray | None:
    """What the outputs of a fold's model are divided by: of a mixture those of its heaviest candidate, whose scale has
    done a part of it already."""
    if fold.get("temperature") is None:
        return None
    mixed = fold.get("mixture", {}).values()
    scale = max(mixed, key=lambda part: part["weight"])["scale"] if mixed else 1.0
    return np.atleast_1d(fold["temperature"]) / scale


def _temperatures(folds: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Finding | None:
    low, high = TEMPERATURE_BOUNDS
    values = [divisor for fold in folds if (divisor := _divisor(fold)) is not None]
    top = sum(bool((v > high / EDGE).any()) for v in values)
    bottom = sum(bool((v < low * EDGE).any()) for v in values)
    if values and top >= OFTEN * len(values):
        text = (
            f"The temperature is at its upper limit ({high:g}) {_of(top, len(values))}: what the model says of "
            "patients it was not fitted to hardly follows their labels, and its probabilities are drawn together. "
            f"{_simpler(settings)}"
        )
        return _note("temperature_high", text, "warning")
    if values and bottom >= OFTEN * len(values):
        text = (
            f"The temperature is at its lower limit ({low:g}) {_of(bottom, len(values))}: outputs are far too small "
            "for how well they separate."
        )
        if _trains_freely(settings):
            text += " Try more epochs or a higher learning_rate."
        return _note("temperature_low", text)
    return None


def _penalties(folds: Sequence[Mapping[str, Any]]) -> Finding | None:
    values = [fold["c"] for fold in folds if fold.get("c") is not None]
    for edge, says in (
        (C_GRID[0], "strongest penalty: next to nothing of the mean tile is used, and it may tell nothing"),
        (
            C_GRID[-1],
            "weakest penalty: a still weaker one might do better, and so small a grid makes this model easy to beat",
        ),
    ):
        count = sum(np.isclose(c, edge) for c in values)
        if values and count >= OFTEN * len(values):
            return _note("penalty_edge", f"C is {edge:g} {_of(int(count), len(values))}, the {says}.")
    return None


def _epochs(
    folds: Sequence[Mapping[str, Any]],
    curves: Sequence[Sequence[Sequence[Mapping[str, Any]]]],
    settings: Mapping[str, Any],
) -> list[Finding | None]:
    """Of members that were early-stopped; a fixed number of epochs (epochs = min_epochs) has no edge."""
    members = [
        (curve, epoch)
        for fold, of_fold in zip(folds, curves, strict=True)
        for curve, epoch in zip(of_fold, fold.get("epochs", ()), strict=False)
        if curve and curve[0]["val_loss"] is not None
    ]
    if not members:
        return []
    n = len(members)
    said: list[Finding | None] = []
    losses = [[p["val_loss"] for p in curve if p["val_loss"] is not None] for curve, _ in members]
    risen = sum(len(loss) > 2 and int(np.argmin(loss)) == 0 for loss in losses)
    if risen >= OFTEN * n:
        text = (
            f"The validation loss was lowest after the first epoch {_of(risen, n, 'members')} and never fell again: "
            f"what is learned of the training patients does not hold for others. {_simpler(settings)}"
        )
        said.append(_note("never_falls", text, "warning"))
    if not _trains_freely(settings) or settings["min_epochs"] >= settings["epochs"]:
        return said
    first = sum(epoch == settings["min_epochs"] for _, epoch in members)
    last = sum(epoch == settings["epochs"] for _, epoch in members)
    if first >= OFTEN * n and risen < OFTEN * n:
        text = (
            f"The epoch kept is the first that may be kept ({settings['min_epochs']}) {_of(first, n, 'members')}: the "
            "best one lies earlier. Try a smaller min_epochs or a lower learning_rate."
        )
        said.append(_note("epoch_first", text))
    if last >= OFTEN * n:
        text = (
            f"The epoch kept is the last ({settings['epochs']}) {_of(last, n, 'members')}: training ended before the "
            "validation loss rose. Try more epochs or a higher learning_rate."
        )
        said.append(_note("epoch_last", text))
    return said


def _agreement(folds: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Finding | None:
    values = [fold["agreement"] for fold in folds if fold.get("agreement") is not None]
    if not values or np.mean(values) >= AGREE:
        return None
    text = (
        f"Members disagree: the rank correlation of their scores for the same tested patients is {np.mean(values):.2f} "
        "on average: what is learned depends on the training patients that each of them saw, and on chance. "
        f"{_simpler(settings)} More members (a smaller validation) average more of it away."
    )
    return _note("members_disagree", text, "warning")
