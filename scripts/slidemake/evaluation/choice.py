"""What choosing among models is worth: in every fold, the model that did best on validation patients.

The figure of the best of several models, chosen by what they score on the test folds, is too good: some are best by
luck. Chosen fold by fold on patients of the training side, as a user would choose, the choice is part of what is
tested: nested cross-validation (Varma and Simon 2006, BMC Bioinformatics 7:91).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slidemake.evaluation.comparisons import pairs
from slidemake.tasks.base import Predictions
from slidemake.tasks.controls import CHOSEN

PARTS = ("values", "decisions", "raw")  # (R, n, ...) what predictions hold; raw of models that have it


def choose(models: Sequence[Predictions]) -> tuple[Predictions, dict[str, str]] | None:
    """The predictions of the model chosen in each fold, and {"repeat/fold": its name}.

    Chosen is the least loss of the validation patients of a fold. None for fewer than two models, for models that did
    not test the same patients in the same folds, and where a fold has no validation patients or none of the models a
    loss that is defined.
    """
    first = models[0] if models else None
    if first is None or len(models) < 2:
        return None
    if any(m.cohort() != first.cohort() or not np.array_equal(m.fold, first.fold) for m in models):
        return None
    known = [part for part in PARTS if all(getattr(m, part) is not None for m in models)]
    made: dict[str, Any] = {part: getattr(first, part).copy() if part in known else None for part in PARTS}
    validation, names = {}, {}
    for r, repeat in enumerate(first.repeats):
        for fold in sorted(set(first.fold[r].tolist()) - {-1}):
            if any((repeat, fold) not in (m.validation or {}) for m in models):
                return None
            losses = np.array([m.outcome.validation_loss(m, repeat, fold) for m in models])
            if not np.isfinite(losses).any():
                return None
            best = models[int(np.nanargmin(losses))]
            inside = first.fold[r] == fold
            for part in known:
                made[part][r, inside] = getattr(best, part)[r, inside]
            validation[repeat, fold] = (best.validation or {})[repeat, fold]
            names[f"{repeat}/{fold}"] = best.name
    return replace(first, name=CHOSEN, validation=validation, **made), names


def with_choice(
    models: Sequence[Predictions], controls: Container[str]
) -> tuple[list[Predictions], list[tuple[Predictions, Predictions]], dict[str, str]]:
    """The models and, where there is one, the choice among those that are no controls: (models, controls last; which
    are compared; the names chosen, empty without a choice).

    The choice is compared with the controls, and not with the models that it is made of.
    """
    asked = pairs(models, controls)
    found = choose([m for m in models if m.name not in controls])
    if found is None:
        return list(models), asked, {}
    made, names = found
    asked += [(made, m) for m in models if m.name in controls]
    return sorted([*models, made], key=lambda m: m.name in controls), asked, names  # stable
