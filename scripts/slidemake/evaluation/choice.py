"""What choosing among models is worth: in every fold, the model that did best on validation patients.

The figure of the best of several models, chosen by what they score on the test folds, is too good: some are best by
luck. Chosen fold by fold on patients of the training side, as a user would choose, the choice is part of what is
tested: nested cross-validation (Varma and Simon 2006, BMC Bioinformatics 7:91).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from slidemake.evaluation.comparisons import pairs
from slidemake.statistics.class_metrics import log_loss
from slidemake.tasks.controls import CHOSEN
from slidemake.tasks.prediction_table import Predictions


class Chosen(Protocol):
    """What is chosen among: dataclasses of predictions that know their folds and the validation patients of each."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str: ...

    @property
    def repeats(self) -> tuple[int, ...]: ...

    @property
    def fold(self) -> np.ndarray: ...

    @property
    def validation(self) -> Mapping[tuple[int, int], Any] | None: ...

    def cohort(self) -> tuple[Any, ...]: ...


M = TypeVar("M", bound=Chosen)


def validation_loss(p: Predictions, repeat: int, fold: int) -> float:
    """Mean log-loss of the validation patients of a fold, predicted by members that were not fitted to them."""
    prob, labels = (p.validation or {})[repeat, fold]
    return log_loss(prob[np.arange(len(labels)), labels])


def choose(
    models: Sequence[M], loss: Callable[[M, int, int], float], parts: Sequence[str]
) -> tuple[M, dict[str, str]] | None:
    """The predictions of the model chosen in each fold, and {"repeat/fold": its name}.

    loss(model, repeat, fold): of the validation patients of a fold, the least is chosen; parts: the attributes
    (R, n, ...) that hold predictions, of which those that a model lacks are left out. None for fewer than two models,
    for models that did not test the same patients in the same folds, and where a fold has no validation patients or
    none of the models a loss that is defined.
    """
    first = models[0] if models else None
    if first is None or len(models) < 2:
        return None
    if any(m.cohort() != first.cohort() or not np.array_equal(m.fold, first.fold) for m in models):
        return None
    known = [part for part in parts if all(getattr(m, part) is not None for m in models)]
    made: dict[str, Any] = {part: getattr(first, part).copy() if part in known else None for part in parts}
    validation, names = {}, {}
    for r, repeat in enumerate(first.repeats):
        for fold in sorted(set(first.fold[r].tolist()) - {-1}):
            if any((repeat, fold) not in (m.validation or {}) for m in models):
                return None
            losses = np.array([loss(m, repeat, fold) for m in models])
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
    models: Sequence[M], controls: Container[str], loss: Callable[[M, int, int], float], parts: Sequence[str]
) -> tuple[list[M], list[tuple[M, M]], dict[str, str]]:
    """The models and, where there is one, the choice among those that are no controls: (models, controls last; which
    are compared; the names chosen, empty without a choice).

    The choice is compared with the controls, and not with the models that it is made of. loss, parts: of `choose`.
    """
    asked = pairs(models, controls)
    found = choose([m for m in models if m.name not in controls], loss, parts)
    if found is None:
        return list(models), asked, {}
    made, names = found
    asked += [(made, m) for m in models if m.name in controls]
    return sorted([*models, made], key=lambda m: m.name in controls), asked, names  # stable
