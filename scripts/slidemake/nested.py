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


def validation_loss(p: Predictions, repeat: int, fold: int) -> float:
    """Mean log-loss of the validation patients of a fold, predicted by members that were not fitted to them."""
    prob, labels = (p.validation or {})[repeat, fold]
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
    known = [m.logits for m in models if m.logits is not None]
    all_logits = np.stack(known) if len(known) == len(models) else None
    prob, predicted = first.prob.copy(), first.predicted.copy()
    logits = None if all_logits is None else all_logits[0].copy()
    validation, names = {}, {}
    for r, repeat in enumerate(first.repeats):
        for fold in sorted(set(first.fold[r].tolist()) - {-1}):
            if any((repeat, fold) not in (m.validation or {}) for m in models):
                return None
            best = int(np.argmin([validation_loss(m, repeat, fold) for m in models]))
            inside, model = first.fold[r] == fold, models[best]
            prob[r, inside], predicted[r, inside] = model.prob[r, inside], model.predicted[r, inside]
            if logits is not None and all_logits is not None:
                logits[r, inside] = all_logits[best, r, inside]
            validation[repeat, fold] = (model.validation or {})[repeat, fold]
            names[f"{repeat}/{fold}"] = model.name
    made = replace(first, name=CHOSEN, prob=prob, predicted=predicted, logits=logits, validation=validation)
    return made, names
