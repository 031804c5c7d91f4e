"""Time to an event (`survival`): proportional hazards (Cox) and discrete-time hazards.

Both predict the survival at the task's horizons, and a risk between 0 and 1 by which patients are ranked and divided:
the share of the time up to the last horizon that a patient is expected to lose, 1 - integral of S / horizon. Unlike a
log-hazard, whose zero is another one in every fold, it compares patients of different folds, and of both models. The
threshold is the median risk of validation patients, never of those tested.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import scipy
from scipy.stats import rankdata

from slidemake.statistics import survival_metrics
from slidemake.statistics.survival import (
    RiskSets,
    discrete_survival,
    fit_slope,
    kaplan_meier,
    log_rank,
    step,
    time_bins,
    time_edges,
)
from slidemake.tasks.base import (
    Figures,
    Options,
    Outcome,
    Predictions,
    Threshold,
    as_written,
    best_temperature,
    number,
    task_type,
)
from slidemake.tasks.classes import named
from slidemake.tasks.labels import parse_survival, survival_strata

Label = tuple[float, bool]  # time, whether the event was seen
HORIZONS = 9  # deciles of the times of events, where the task names no horizons
GRID = 400  # points over which survival is integrated


def default_horizons(times: np.ndarray) -> list[float]:
    """Deciles of the times (n,) of events, rounded to three digits."""
    found = np.quantile(times, np.arange(1, HORIZONS + 1) / (HORIZONS + 1))
    return sorted({float(f"{t:.3g}") for t in found if t > 0})


@task_type("survival")
class SurvivalOutcome(Outcome):
    """What both models share."""

    kind, form, score = "survival", "curve", "c_index"
    primary, null, few = "c_index", "kaplan_meier", "with the event"
    lower_is_better, criterion = survival_metrics.LOWER_IS_BETTER, "integrated Brier score"
    quantity, positives_are = "risk", "with the event"
    titles: ClassVar[dict[str, str]] = {
        "c_index": "C-index (Harrell)",
        "c_uno": "C-index (Uno)",
        "td_auc": "time-dependent AUC",
        "ibs": "integrated Brier",
    }
    called: ClassVar[dict[str, str]] = {"c_index": "C-index", "c_uno": "Uno's C", "ibs": "integrated Brier score"}
    method = ""

    def __init__(self, horizons: Sequence[float], unit: str = ""):
        self.horizons, self.unit = tuple(horizons), unit
        self.names = tuple(number(horizon) for horizon in self.horizons)

    @classmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> SurvivalOutcome:
        """Horizons that the task does not name are deciles of the event times of `labels`."""
        horizons = [float(h) for h in task.get("horizons") or ()]
        if not horizons:
            parsed = [parse_survival(text) for text in labels.values()]
            happened = np.array([t for t, event in parsed if event])
            horizons = default_horizons(happened) if len(happened) else []
        horizons = horizons or [max(parse_survival(text)[0] for text in labels.values()) or 1.0]
        about = {"method": task.get("method") or "cox", "horizons": horizons, "unit": str(task.get("unit") or "")}
        return cls.load({**about, "bins": int(task.get("bins") or 4)})

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> SurvivalOutcome:
        unit = about.get("unit", "")
        if about.get("method") == "discrete":
            return DiscreteOutcome(about["horizons"], unit, about["bins"])
        return CoxOutcome(about["horizons"], unit)

    @classmethod
    def of_columns(cls, columns: Sequence[str]) -> SurvivalOutcome:
        """Either model predicts the same: what tables say does not tell which it was."""
        return CoxOutcome([float(horizon) for horizon in named(columns, "survival_")])

    def about(self) -> dict[str, Any]:
        return {"type": self.kind, "method": self.method, "horizons": list(self.horizons), "unit": self.unit}

    def encode(self, label: str) -> Label:
        return parse_survival(label)

    def arrays(self, labels: Sequence[Label]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([t for t, _ in labels], float), np.array([e for _, e in labels], bool)

    @abstractmethod
    def survival(self, outputs: np.ndarray, link: Mapping[str, Any], at: np.ndarray) -> np.ndarray:
        """S (T,) at the times `at` from the outputs (C,) of one patient."""

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
        return survival_metrics.concordance(time, event, np.asarray(self.direction(outputs), float))

    def threshold(self, values: np.ndarray, labels: Sequence[Label]) -> Threshold:
        return float(np.median(values[:, 0])) if len(values) else 0.5

    @abstractmethod
    def raw_columns(self) -> list[str]:
        """Columns of the outputs (C,) as they come from the model."""

    def columns(self) -> list[str]:
        return [*self.value_columns(), *self.raw_columns(), "threshold", "predicted"]

    def value_columns(self) -> list[str]:
        return ["risk", *(f"survival_{name}" for name in self.names)]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        texts = [number(v) for v in values]
        limit = as_written(threshold)
        row = dict(zip(self.columns(), texts, strict=False))
        row |= {name: number(v) for name, v in zip(self.raw_columns(), outputs, strict=True)}
        return row | {"threshold": number(limit), "predicted": "high" if float(texts[0]) >= limit else "low"}

    def headline(self, values: np.ndarray) -> float:
        return float(values[0])

    # -- tables of predictions and evaluation -----------------------------------------------------------------------

    def decisions_in(self, row: Mapping[str, str], values: list[float], where: str) -> list[float]:
        return [{"low": 0.0, "high": 1.0}[row["predicted"]]]

    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        time, event = table.truth[chosen, 0], table.truth[chosen, 1] == 1
        values, fold = table.values[repeat, chosen], table.fold[repeat, chosen]
        at = self.horizons
        return survival_metrics.metrics_over(time, event, values[:, 0], values[:, 1:], at, weights, fold)

    def comparable(self, table: Predictions) -> np.ndarray:
        """Risks as shares of their fold's patients at or below them: models of two folds have no scale in common."""
        ranks = table.values.copy()
        for r, of in enumerate(table.fold):
            for fold in set(of.tolist()) - {-1}:
                inside = of == fold
                ranks[r, inside, 0] = (rankdata(table.values[r, inside, 0]) - 0.5) / inside.sum()
        return ranks

    def of_ensemble(self, table: Predictions, weights: np.ndarray | None, options: Options) -> Figures:
        mean = table.mean()
        if len(table.repeats) > 1:  # patients of different folds are compared then
            risk = mean.values.copy()
            risk[..., 0] = mean.ranks[..., 0]
            mean = replace(mean, values=risk)
        return self.over(mean, 0, np.arange(len(table.patients)), weights, options)

    def proper_loss(self, values: np.ndarray, truth: np.ndarray) -> float:
        event = truth[:, 1] == 1
        found = survival_metrics.metrics_over(truth[:, 0], event, values[:, 0], values[:, 1:], self.horizons)
        return float(found["ibs"][0])

    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        time, event = table.truth[chosen, 0], table.truth[chosen, 1] == 1
        return survival_metrics.why_undefined(metric, time, event, self.horizons, table.fold[repeat, chosen])

    def strata(self, truth: np.ndarray) -> np.ndarray:
        return truth[:, 1].astype(int)

    def labels_by_site(self, truth: np.ndarray) -> dict[str, np.ndarray]:
        return {"": survival_strata(truth[:, 0], truth[:, 1] == 1)}

    def positives(self, truth: np.ndarray) -> int | None:
        return int(truth[:, 1].sum())

    def few_in(self, truth: np.ndarray, needed: int) -> str | None:
        events = int(truth[:, 1].sum())
        return f"{events} with the event; {needed} are needed" if events < needed else None

    def counts(self, truth: np.ndarray) -> dict[str, int]:
        events = int(truth[:, 1].sum())
        return {"with the event": events, "censored": len(truth) - events}

    def rare(self, truth: np.ndarray) -> int:
        return int(truth[:, 1].sum())

    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve = kaplan_meier(truth[:, 0], truth[:, 1] == 1)
        times, survival = np.array(curve["time"]), np.array(curve["survival"])
        return self.curve_values(lambda at: step(times, survival, at)), np.zeros(1)

    def extras(self, table: Predictions) -> dict[str, Any]:
        """The log-rank test of the patients above and below the threshold from validation, and that of each repeat."""
        time, event = table.truth[:, 0], table.truth[:, 1] == 1
        tests = []
        for r, repeat in enumerate(table.repeats):
            known = table.known(r)
            tested = log_rank(time[known], event[known], table.decisions[r, known, 0] == 1)
            tests.append({"repeat": repeat, **tested})
        return {"log_rank": log_rank(time, event, self._high(table)), "log_rank_by_repeat": tests}

    def _high(self, table: Predictions) -> np.ndarray:
        """(n,) bool: patients whom most repeats call high risk."""
        return table.mean().decisions[0, :, 0] == 1

    def curves(self, table: Predictions, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Kaplan-Meier curves of those patients."""
        time, event, high = table.truth[:, 0], table.truth[:, 1] == 1, self._high(table)
        groups = {
            name: {"n": int(g.sum()), "events": int(event[g].sum()), "curve": kaplan_meier(time[g], event[g])}
            for name, g in {"high": high, "low": ~high}.items()
            if g.any()
        }
        return {"groups": groups}


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
        terms = (scipy.special.log_expit(-outputs) * outlived).sum(1) + np.where(
            event, scipy.special.log_expit(last), scipy.special.log_expit(-last)
        )
        return float(-terms.mean()) if len(terms) else 0.0

    def link(self, outputs: np.ndarray, labels: Sequence[Label], scale: Mapping[str, Any]) -> dict[str, Any]:
        if not len(labels):
            return {"temperature": 1.0, **scale}
        t = best_temperature(lambda t: self.loss(outputs / t, labels, scale), 1 / len(labels))
        return {"temperature": t, **scale}

    def survival(self, outputs: np.ndarray, link: Mapping[str, Any], at: np.ndarray) -> np.ndarray:
        edges = link["edges"]
        return discrete_survival(scipy.special.expit(outputs[: len(edges) - 1] / link["temperature"]), edges, at)

    def raw_columns(self) -> list[str]:
        return [f"logit_{k + 1}" for k in range(self.outputs)]

    def direction(self, outputs: Any) -> Any:
        return outputs.sum(-1)
