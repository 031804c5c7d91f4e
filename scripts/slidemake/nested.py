"""What choosing among models is worth: in every fold, the model that did best on validation patients.

The figure of the best of several models, chosen by what they score on the test folds, is too good: some are best by
luck. Chosen fold by fold on patients of the training side, as a user would choose, the choice is part of what is
tested: nested cross-validation (Varma and Simon 2006, BMC Bioinformatics 7:91).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slidemake.prediction_table import Predictions

CHOSEN = "best_by_validation"
TINY = 1e-7  # probability below which the log-loss grows no more


def validation_loss(p: Predictions, repeat: int, fold: int) -> float | None:
    """Mean log-loss of the validation patients of a fold, predicted by members that were not fitted to them."""
    found = (p.validation or {}).get((repeat, fold))
    if found is None:
        return None
    prob, labels = found
    return float(-np.log(np.clip(prob[np.arange(len(labels)), labels], TINY, 1)).mean())


def choose(models: Sequence[Predictions]) -> tuple[Predictions, dict[str, str]] | None:
    """The predictions of the model chosen in each fold, and {"repeat/fold": its name}.

    None for fewer than two models, for models that did not test the same patients in the same folds, and where a fold
    has no validation patients.
    """
    first = models[0] if models else None
    if first is None or len(models) < 2:
        return None
    if any(m.cohort() != first.cohort() or not np.array_equal(m.fold, first.fold) for m in models):
        return None
    with_logits = all(m.logits is not None for m in models)
    made = replace(
        first,
        name=CHOSEN,
        prob=first.prob.copy(),
        predicted=first.predicted.copy(),
        logits=first.logits.copy() if with_logits and first.logits is not None else None,
        validation={},
    )
    names = {}
    for r, repeat in enumerate(first.repeats):
        for fold in sorted(set(first.fold[r].tolist()) - {-1}):
            losses = [validation_loss(m, repeat, fold) for m in models]
            if any(loss is None for loss in losses):
                return None
            best = models[int(np.argmin(np.array(losses, float)))]
            inside = first.fold[r] == fold
            made.prob[r, inside], made.predicted[r, inside] = best.prob[r, inside], best.predicted[r, inside]
            if made.logits is not None and best.logits is not None:
                made.logits[r, inside] = best.logits[r, inside]
            assert best.validation is not None
            assert made.validation is not None
            made.validation[repeat, fold] = best.validation[repeat, fold]
            names[f"{repeat}/{fold}"] = best.name
    return made, names
