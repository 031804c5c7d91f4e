"""What an evaluation says of the predictions themselves, beside ranks: calibration, conformal sets, abstention.

Grades are looked at as classes, every label of a multi-label task as two classes, survival at every horizon; numbers
have intervals instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slidemake.evaluation.probabilities.calibration import calibration_report
from slidemake.evaluation.probabilities.conformal import conformal, risk_coverage
from slidemake.evaluation.probabilities.conformal_intervals import conformal_intervals
from slidemake.evaluation.probabilities.survival_calibration import survival_calibration
from slidemake.tasks.base import Predictions
from slidemake.tasks.class_predictions import ClassPredictions

WeightsOf = Callable[[str, np.ndarray], np.ndarray]  # scope, indices of patients -> bootstrap weights (B, m)


def of_classes(
    p: ClassPredictions, chosen: np.ndarray, options: Mapping[str, Any], weights_of: WeightsOf
) -> dict[str, Any]:
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


def _classes(table: Predictions, options: Mapping[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    chosen, view = table.outcome.as_classes(table)[""]
    return of_classes(view, chosen, options, weights_of)


def _labels(table: Predictions, options: Mapping[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    views = table.outcome.as_classes(table).items()
    return {"labels": {name: of_classes(view, chosen, options, weights_of) for name, (chosen, view) in views}}


def _number(table: Predictions, options: Mapping[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    if table.validation is None:
        return {}
    return {"intervals": conformal_intervals(table, options["abstention_alpha"], options["level"], weights_of)}


def _curve(table: Predictions, options: Mapping[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    return {"calibration": survival_calibration(table, options)}


OF_FORM = {"classes": _classes, "labels": _labels, "number": _number, "curve": _curve}


def about_predictions(table: Predictions, options: Mapping[str, Any], weights_of: WeightsOf) -> dict[str, Any]:
    """The keys that a model's entry of metrics.json has for the form of its predictions."""
    return OF_FORM[table.outcome.form](table, options, weights_of)
