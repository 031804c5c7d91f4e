"""What an evaluation says of the predictions themselves, beside ranks: calibration, conformal sets, abstention.

Grades are looked at as classes, every label of a multi-label task as two classes, survival at every horizon; numbers
have intervals instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slidemake.evaluation.probabilities.calibration import calibration_report
from slidemake.evaluation.probabilities.conformal import conformal, risk_coverage
from slidemake.evaluation.probabilities.conformal_intervals import conformal_intervals
from slidemake.evaluation.probabilities.survival_calibration import survival_calibration
from slidemake.tasks.outcome_table import OutcomeTable, grades_as_classes, label_as_classes
from slidemake.tasks.prediction_table import Predictions

WeightsOf = Callable[[str, np.ndarray], np.ndarray]  # scope, indices of patients -> bootstrap weights (B, m)


def of_classes(p: Predictions, chosen: np.ndarray, options: dict[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    """Calibration, conformal sets (None without validation patients) and abstention of p, which holds the patients
    `chosen` (indices of the table's)."""

    def weights(scope: str, inside: np.ndarray) -> np.ndarray:
        return weights_of(scope, chosen[inside])

    alpha, level = options["abstention_alpha"], options["level"]
    return {
        "calibration": calibration_report(p, options),
        "conformal": conformal(p, p.validation, alpha, level, weights) if p.validation else None,
        "abstention": risk_coverage(p),
    }


def about_predictions(table: OutcomeTable, options: dict[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    """The keys that a model's entry of metrics.json has for its type of task."""
    everyone = np.arange(len(table.patients))
    if table.kind == "ordinal":
        return of_classes(grades_as_classes(table), everyone, options, weights_of)
    if table.kind == "multilabel":
        labels: dict[str, Any] = {}
        for k, name in enumerate(table.names):
            known = np.flatnonzero(table.truth[:, k] >= 0)
            if len(known):
                labels[name] = of_classes(label_as_classes(table, k), known, options, weights_of)
        return {"labels": labels}
    if table.kind == "survival":
        return {"calibration": survival_calibration(table, options)}
    if table.validation is None:
        return {}
    return {"intervals": conformal_intervals(table, options["abstention_alpha"], options["level"], weights_of)}
