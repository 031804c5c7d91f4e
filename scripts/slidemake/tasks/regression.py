"""A number (`regression`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from slidemake.statistics import regression_metrics
from slidemake.tasks.base import Figures, Options, Outcome, Predictions, Threshold, number, task_type
from slidemake.tasks.labels import quantile_strata


@task_type("regression")
class RegressionOutcome(Outcome):
    """A number: one output, in standard deviations of the training labels."""

    kind, form, score = "regression", "number", "pearson"
    primary, check, chance, null = "r2", "pearson", 0.0, "mean"
    lower_is_better, criterion, quantity = regression_metrics.LOWER_IS_BETTER, "squared error", "predicted"
    titles: ClassVar[dict[str, str]] = {
        "r2": "R²",
        "mae": "mean absolute error",
        "rmse": "RMSE",
        "pearson": "correlation",
        "slope": "slope of truth on prediction",
    }

    def __init__(self, unit: str = ""):
        self.unit = unit

    @classmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> RegressionOutcome:
        return RegressionOutcome(str(task.get("unit") or ""))

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> RegressionOutcome:
        return RegressionOutcome(about.get("unit", ""))

    @classmethod
    def of_columns(cls, columns: Sequence[str]) -> RegressionOutcome:
        return RegressionOutcome()

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "unit": self.unit}

    def encode(self, label: str) -> float:
        return float(label)

    def scale(self, labels: Sequence[float]) -> dict[str, Any]:
        sd = float(np.std(labels))
        return {"mean": float(np.mean(labels)), "sd": sd if sd > 0 else 1.0}

    def loss(self, outputs: np.ndarray, labels: Sequence[float], scale: Mapping[str, Any]) -> float:
        target = (np.asarray(labels, float) - scale["mean"]) / scale["sd"]
        return float(((outputs[:, 0] - target) ** 2).mean())

    def score_of(self, outputs: np.ndarray, labels: Sequence[float]) -> float | None:
        if len(labels) < 3 or np.ptp(outputs[:, 0]) < 1e-12 or np.ptp(labels) < 1e-12:
            return None
        return float(np.corrcoef(outputs[:, 0], np.asarray(labels, float))[0, 1])

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(outputs, float) * link["sd"] + link["mean"]

    def columns(self) -> list[str]:
        return ["output", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        return {"output": number(outputs[0]), "predicted": number(values[0])}

    # -- tables of predictions and evaluation -----------------------------------------------------------------------

    def value_columns(self) -> list[str]:
        return ["predicted"]

    def decision_columns(self) -> list[str]:
        return []

    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        return regression_metrics.metrics_over(table.truth[chosen, 0], table.values[repeat, chosen, 0], weights)

    def proper_loss(self, values: np.ndarray, truth: np.ndarray) -> float:
        return float(((values[:, 0] - truth[:, 0]) ** 2).mean())

    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        return regression_metrics.why_undefined(metric, table.truth[chosen, 0], table.values[repeat, chosen, 0])

    def labels_by_site(self, truth: np.ndarray) -> dict[str, np.ndarray]:
        return {"": quantile_strata(truth[:, 0])}

    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([truth[:, 0].mean()]), np.empty(0)

    def curves(self, table: Predictions, entry: Mapping[str, Any]) -> dict[str, Any]:
        mean = table.mean()
        points = {"truth": mean.truth[:, 0], "predicted": mean.values[0, :, 0]}
        return {"points": {key: column.tolist() for key, column in points.items()} | {"sites": list(table.sites)}}
