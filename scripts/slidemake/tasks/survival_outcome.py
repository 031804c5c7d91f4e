"""Outcomes of survival: proportional hazards (Cox) and discrete-time hazards.

Both predict the survival at the task's horizons, and a risk between 0 and 1 by which patients are ranked and divided:
the share of the time up to the last horizon that a patient is expected to lose, 1 - integral of S / horizon. Unlike a
log-hazard, whose zero is another one in every fold, it compares patients of different folds, and of both models. The
threshold is the median risk of validation patients, never of those tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_expit

from slidemake.statistics.survival import RiskSets, discrete_survival, fit_slope, step, time_bins, time_edges
from slidemake.statistics.survival_metrics import concordance
from slidemake.tasks.labels import parse_survival
from slidemake.tasks.outcomes import Outcome, Threshold, best_temperature, number

Label = tuple[float, bool]  # time, whether the event was seen
HORIZONS = 9  # deciles of the times of events, where the task names no horizons
GRID = 400  # points over which survival is integrated


def default_horizons(times: np.ndarray) -> list[float]:
    """Deciles of the times (n,) of events, rounded to three digits."""
    found = np.quantile(times, np.arange(1, HORIZONS + 1) / (HORIZONS + 1))
    return sorted({float(f"{t:.3g}") for t in found if t > 0})


class SurvivalOutcome(Outcome):
    """What both models share."""

    kind, score = "survival", "c_index"
    method = ""

    def __init__(self, horizons: Sequence[float], unit: str = ""):
        self.horizons, self.unit = tuple(horizons), unit

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "method": self.method, "horizons": list(self.horizons), "unit": self.unit}

    def encode(self, label: str) -> Label:
        return parse_survival(label)

    def arrays(self, labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([t for t, _ in labels], float), np.array([e for _, e in labels], bool)

    def survival(self, outputs: np.ndarray, link: Mapping[str, Any], at: np.ndarray) -> np.ndarray:
        """S (T,) at the times `at` from the outputs (C,) of one patient."""
        raise NotImplementedError

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        rows = np.asarray(outputs, float).reshape(-1, self.outputs)
        values = np.array([self.curve_values(lambda at, row=row: self.survival(row, link, at)) for row in rows])
        return values.reshape(*np.shape(outputs)[:-1], 1 + len(self.horizons))

    def curve_values(self, survival: Any) -> np.ndarray:
        """(risk, S at every horizon) of one survival curve."""
        grid = np.linspace(0, self.horizons[-1], GRID)
        risk = 1 - np.trapezoid(survival(grid), grid) / grid[-1]
        return np.concatenate([[risk], survival(np.array(self.horizons))])

    def score_of(self, outputs: np.ndarray, labels: Sequence[Label]) -> float | None:
        time, event = self.arrays(labels)
        return concordance(time, event, np.asarray(self.direction(outputs), float))

    def threshold(self, values: np.ndarray, labels: Sequence[Label]) -> Threshold:
        return float(np.median(values[:, 0])) if len(values) else 0.5

    def raw_columns(self) -> list[str]:
        raise NotImplementedError

    def columns(self) -> list[str]:
        at = [f"survival_{number(h)}" for h in self.horizons]
        return ["risk", *at, *self.raw_columns(), "threshold", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        texts = [number(v) for v in values]
        limit = float(number(threshold))  # type: ignore[arg-type]
        row = dict(zip(self.columns(), texts, strict=False))
        row |= {name: number(v) for name, v in zip(self.raw_columns(), outputs, strict=True)}
        return row | {"threshold": number(limit), "predicted": "high" if float(texts[0]) >= limit else "low"}

    def headline(self, values: np.ndarray) -> float:
        return float(values[0])


class CoxOutcome(SurvivalOutcome):
    """Proportional hazards (Cox 1972): one output, the log-hazard; the baseline from validation patients."""

    method = "cox"

    def loss(self, outputs: np.ndarray, labels: Sequence[Label], scale: Mapping[str, Any]) -> float:
        sets = RiskSets(*self.arrays(labels))
        return sets.loss(outputs[:, 0]) / max(1, sets.events)

    def link(self, outputs: np.ndarray, labels: Sequence[Label], scale: Mapping[str, Any]) -> dict[str, Any]:
        """Slope and Breslow's baseline hazard of patients that were held out of the fits."""
        time, event = self.arrays(labels)
        slope = fit_slope(outputs[:, 0], time, event) if len(labels) else 1.0
        times, hazard = RiskSets(time, event).baseline(slope * outputs[:, 0]) if len(labels) else (np.empty(0),) * 2
        return {"slope": slope, "times": times.tolist(), "hazard": hazard.tolist()}

    def survival(self, outputs: np.ndarray, link: Mapping[str, Any], at: np.ndarray) -> np.ndarray:
        hazard = step(np.asarray(link["times"]), np.asarray(link["hazard"]), at, before=0.0)
        return np.exp(-hazard * np.exp(min(50.0, link["slope"] * outputs[0])))

    def raw_columns(self) -> list[str]:
        return ["log_hazard"]


class DiscreteOutcome(SurvivalOutcome):
    """Discrete-time hazards (Zadeh and Schmid 2020): one logit for each interval between quantiles of event times."""

    method = "discrete"

    def __init__(self, horizons: Sequence[float], unit: str = "", bins: int = 4):
        super().__init__(horizons, unit)
        self.outputs = bins

    def about(self) -> dict[str, Any]:
        return {**super().about(), "bins": self.outputs}

    def scale(self, labels: Sequence[Label]) -> dict[str, Any]:
        """Edges of the intervals. Where ties leave fewer intervals than outputs, the last outputs stay unused."""
        return {"edges": time_edges(*self.arrays(labels), self.outputs)}

    def loss(self, outputs: np.ndarray, labels: Sequence[Label], scale: Mapping[str, Any]) -> float:
        time, event = self.arrays(labels)
        place = time_bins(time, scale["edges"])
        outlived = np.arange(self.outputs) < place[:, None]
        last = np.take_along_axis(outputs, place[:, None], axis=1)[:, 0]
        terms = (log_expit(-outputs) * outlived).sum(1) + np.where(event, log_expit(last), log_expit(-last))
        return float(-terms.mean()) if len(terms) else 0.0

    def link(self, outputs: np.ndarray, labels: Sequence[Label], scale: Mapping[str, Any]) -> dict[str, Any]:
        if not len(labels):
            return {"temperature": 1.0, **scale}
        t = best_temperature(lambda t: self.loss(outputs / t, labels, scale), 1 / len(labels))
        return {"temperature": t, **scale}

    def survival(self, outputs: np.ndarray, link: Mapping[str, Any], at: np.ndarray) -> np.ndarray:
        edges = link["edges"]
        return discrete_survival(expit(outputs[: len(edges) - 1] / link["temperature"]), edges, at)

    def raw_columns(self) -> list[str]:
        return [f"logit_{k + 1}" for k in range(self.outputs)]

    def direction(self, outputs: Any) -> Any:
        return outputs.sum(-1)


def make_survival(task: Mapping[str, Any], labels: Mapping[str, str]) -> SurvivalOutcome:
    """The outcome of a survival task. Horizons that it does not name are deciles of the event times of `labels`."""
    horizons = [float(h) for h in task.get("horizons") or ()]
    if not horizons:
        parsed = [parse_survival(text) for text in labels.values()]
        happened = np.array([t for t, event in parsed if event])
        horizons = default_horizons(happened) if len(happened) else []
    horizons = horizons or [max(parse_survival(text)[0] for text in labels.values()) or 1.0]
    about = {"method": task.get("method") or "cox", "horizons": horizons, "unit": str(task.get("unit") or "")}
    return load_survival({**about, "bins": int(task.get("bins") or 4)})


def load_survival(about: Mapping[str, Any]) -> SurvivalOutcome:
    if about["method"] == "discrete":
        return DiscreteOutcome(about["horizons"], about["unit"], about["bins"])
    return CoxOutcome(about["horizons"], about["unit"])
