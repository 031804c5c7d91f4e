"""What the evaluation of a type of task consists of: its metrics, its baseline without a model, its groups.

One description for each type that is no plain classes; `evaluation.evaluate_outcomes` works through scopes and
resamples and knows no type but through it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np

from slidemake.statistics import class_metrics as metrics
from slidemake.statistics import ordinal_metrics as metrics_ordinal
from slidemake.statistics import regression_metrics as metrics_regression
from slidemake.statistics import survival_metrics as metrics_survival
from slidemake.statistics.class_metrics import log_loss
from slidemake.statistics.sizes import too_few
from slidemake.statistics.survival import kaplan_meier, log_rank, step
from slidemake.tasks.outcome_table import OutcomeTable
from slidemake.tasks.outcomes import median_grade

Figures = dict[str, np.ndarray]
LABEL_METRICS = ("auroc", "auprc", "balanced_accuracy", "f1", "sensitivity", "specificity", "brier")


class Kind(ABC):
    """Defaults. `primary` compares models; `null` is the name of the baseline that knows no features."""

    kind = ""
    primary, chance = "", 0.5
    check = ""  # metric by which shuffled labels must come out at chance; default: the primary one
    metrics: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    null = "prevalence"
    few = "patients"
    criterion = "log-loss"  # what `validation_loss` is called

    @abstractmethod
    def over(self, table: OutcomeTable, repeat: int, chosen: np.ndarray, weights: np.ndarray | None) -> Figures:
        """{metric: (B,)} of the patients `chosen` (indices) in one repeat, for weights (B, m)."""

    @abstractmethod
    def loss(self, values: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> float:
        """A proper loss of predicted values (m, P), NaN where it is not defined."""

    def validation_loss(self, table: OutcomeTable, repeat: int, fold: int) -> float:
        """Loss of the validation patients of a fold, predicted by members that were not fitted to them."""
        values, truth = (table.validation or {})[repeat, fold]
        return self.loss(values, truth, table.names)

    @abstractmethod
    def why(self, metric: str, table: OutcomeTable, repeat: int, chosen: np.ndarray) -> str | None:
        """Why a metric has no value."""

    def strata(self, truth: np.ndarray) -> np.ndarray:
        """(n,) int: groups that are resampled each by itself."""
        return np.zeros(len(truth), int)

    def positives(self, truth: np.ndarray) -> int | None:
        return None

    def less_is_better(self, metric: str) -> bool:
        """Of a metric as figures name it: `brier`, `brier:<label>`, `brier@<horizon>`."""
        return re.split("[:@]", metric)[0] in (*self.lower_is_better, "brier")

    def too_small(self, table: OutcomeTable, chosen: np.ndarray, options: dict[str, Any]) -> str | None:
        """Why the group of patients `chosen` gets no figures, or None."""
        if reason := too_few(len(chosen), options):
            return reason
        few = self.few_in(table, chosen, options["subgroup_class"])
        return f"{few}; {options['subgroup_class']} are needed" if few else None

    def few_in(self, table: OutcomeTable, chosen: np.ndarray, needed: int) -> str | None:
        """Of what a group has fewer than `needed`, so that its figures would say nothing."""
        return None

    def counts(self, table: OutcomeTable) -> dict[str, int]:
        return {}

    def rare(self, table: OutcomeTable) -> int:
        """How many patients carry the information; few of them are warned about (`few` says what they are)."""
        return len(table.truth)

    @abstractmethod
    def baseline(self, table: OutcomeTable) -> tuple[np.ndarray, np.ndarray]:
        """(values (P,), decisions (Q,)) of the baseline, the same for every patient."""

    def extras(self, table: OutcomeTable) -> dict[str, Any]:
        """What is reported of a model besides metrics."""
        return {}

    def null_model(self, like: OutcomeTable) -> OutcomeTable:
        """The baseline as a model. It knows the whole cohort: a training fold's own figure would be off wherever the
        tested fold is off the other way."""
        values, decisions = self.baseline(like)
        known = np.isfinite(like.values[..., :1])
        return replace(
            like,
            name=self.null,
            values=np.where(known, values, np.nan),
            decisions=np.where(known, decisions, np.nan),
            raw=None,
            validation=None,
            of_folds=False,
        )


class OrdinalKind(Kind):
    kind, primary, chance = "ordinal", "kappa", 0.0
    metrics, lower_is_better = metrics_ordinal.METRICS, metrics_ordinal.LOWER_IS_BETTER
    few = "of the rarest grade"

    def over(self, table: OutcomeTable, repeat: int, chosen: np.ndarray, weights: np.ndarray | None) -> Figures:
        truth = table.truth[chosen, 0].astype(int)
        expected = table.ranks[repeat, chosen] @ np.arange(len(table.names))
        decided = table.decisions[repeat, chosen, 0].astype(int)
        return metrics_ordinal.metrics_over(truth, expected, decided, len(table.names), weights)

    def loss(self, values: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> float:
        return log_loss(values[np.arange(len(values)), truth[:, 0].astype(int)])

    def why(self, metric: str, table: OutcomeTable, repeat: int, chosen: np.ndarray) -> str | None:
        decided = table.decisions[repeat, chosen, 0].astype(int)
        return metrics_ordinal.why_undefined(metric, table.truth[chosen, 0].astype(int), decided, table.names)

    def strata(self, truth: np.ndarray) -> np.ndarray:
        return truth[:, 0].astype(int)

    def counts(self, table: OutcomeTable) -> dict[str, int]:
        found = np.bincount(table.truth[:, 0].astype(int), minlength=len(table.names))
        return dict(zip(table.names, found.tolist(), strict=True))

    def rare(self, table: OutcomeTable) -> int:
        return min(self.counts(table).values())

    def baseline(self, table: OutcomeTable) -> tuple[np.ndarray, np.ndarray]:
        share = np.array(list(self.counts(table).values())) / len(table.truth)
        return share, median_grade(share)[None].astype(float)

    def extras(self, table: OutcomeTable) -> dict[str, Any]:
        grades, total = len(table.names), np.zeros((len(table.names),) * 2)
        for r in range(len(table.repeats)):
            known = table.known(r)
            truth, decided = table.truth[known, 0].astype(int), table.decisions[r, known, 0].astype(int)
            total += metrics.confusion(truth, decided, grades, np.ones((1, len(truth))))[0]
        return {"confusion": (total / len(table.repeats)).tolist()}


class MultilabelKind(Kind):
    """Every label by itself on the patients of whom it is known, and the mean over labels (macro)."""

    kind, primary = "multilabel", "auroc"
    metrics, lower_is_better = LABEL_METRICS, ("brier",)
    few = "of the rarest label's rarer value"

    def over(self, table: OutcomeTable, repeat: int, chosen: np.ndarray, weights: np.ndarray | None) -> Figures:
        weights = np.ones((1, len(chosen))) if weights is None else weights
        by_label: dict[str, Figures] = {}
        for k, name in enumerate(table.names):
            known = table.truth[chosen, k] >= 0
            inside = chosen[known]
            truth, prob = table.truth[inside, k].astype(int), table.values[repeat, inside, k]
            decided = table.decisions[repeat, inside, k].astype(int)
            two, ranks = (np.stack([1 - p, p], axis=1) for p in (prob, table.ranks[repeat, inside, k]))
            by_label[name] = metrics.metrics_over(truth, two, decided, weights=weights[:, known], ranks=ranks)
        found: Figures = {}
        for metric in LABEL_METRICS:
            each = [by_label[name][metric] for name in self._both(table, chosen)]
            found[metric] = np.mean(each, axis=0) if each else np.full(len(weights), np.nan)
        for name, figures in by_label.items():
            found |= {f"{metric}:{name}": figures[metric] for metric in LABEL_METRICS}
        return found

    def _both(self, table: OutcomeTable, chosen: np.ndarray) -> list[str]:
        """Labels with patients of both values."""
        columns = zip(table.names, table.truth[chosen].T, strict=True)
        return [name for name, column in columns if {0.0, 1.0} <= set(column.tolist())]

    def loss(self, values: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> float:
        known = truth >= 0
        return log_loss(np.where(truth == 1, values, 1 - values)[known]) if known.any() else np.nan

    def why(self, metric: str, table: OutcomeTable, repeat: int, chosen: np.ndarray) -> str | None:
        metric, _, name = metric.partition(":")
        if not name:
            return "no label has patients of both values"
        column = table.truth[chosen, table.names.index(name)]
        known = column[column >= 0].astype(int)
        if not len(known):
            return f"{name} is known of no patient"
        return metrics.why_undefined(metric, known, [f"{name} 0", f"{name} 1"])

    def counts(self, table: OutcomeTable) -> dict[str, int]:
        columns = zip(table.names, table.truth.T, strict=True)
        return {f"{name} of {int((c >= 0).sum())} known": int((c == 1).sum()) for name, c in columns}

    def rare(self, table: OutcomeTable) -> int:
        return min(int(min((c == 1).sum(), (c == 0).sum())) for c in table.truth.T)

    def baseline(self, table: OutcomeTable) -> tuple[np.ndarray, np.ndarray]:
        share = np.array([(c == 1).sum() / max(1, (c >= 0).sum()) for c in table.truth.T])
        return share, (share >= 0.5).astype(float)


class RegressionKind(Kind):
    kind, primary, check, chance, null = "regression", "r2", "pearson", 0.0, "mean"
    metrics, lower_is_better = metrics_regression.METRICS, metrics_regression.LOWER_IS_BETTER
    criterion = "squared error"

    def over(self, table: OutcomeTable, repeat: int, chosen: np.ndarray, weights: np.ndarray | None) -> Figures:
        return metrics_regression.metrics_over(table.truth[chosen, 0], table.values[repeat, chosen, 0], weights)

    def loss(self, values: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> float:
        return float(((values[:, 0] - truth[:, 0]) ** 2).mean())

    def why(self, metric: str, table: OutcomeTable, repeat: int, chosen: np.ndarray) -> str | None:
        return metrics_regression.why_undefined(metric, table.truth[chosen, 0], table.values[repeat, chosen, 0])

    def baseline(self, table: OutcomeTable) -> tuple[np.ndarray, np.ndarray]:
        return np.array([table.truth[:, 0].mean()]), np.empty(0)

    def extras(self, table: OutcomeTable) -> dict[str, Any]:
        mean = table.mean()
        points = {"truth": mean.truth[:, 0], "predicted": mean.values[0, :, 0]}
        return {"points": {key: column.tolist() for key, column in points.items()} | {"sites": list(table.sites)}}


class SurvivalKind(Kind):
    kind, primary, null = "survival", "c_index", "kaplan_meier"
    metrics, lower_is_better = metrics_survival.METRICS, metrics_survival.LOWER_IS_BETTER
    few, criterion = "with the event", "integrated Brier score"

    def _horizons(self, table: OutcomeTable) -> tuple[float, ...]:
        return tuple(float(name) for name in table.names)

    def over(self, table: OutcomeTable, repeat: int, chosen: np.ndarray, weights: np.ndarray | None) -> Figures:
        time, event = table.truth[chosen, 0], table.truth[chosen, 1] == 1
        values, fold = table.values[repeat, chosen], table.fold[repeat, chosen]
        at = self._horizons(table)
        return metrics_survival.metrics_over(time, event, values[:, 0], values[:, 1:], at, weights, fold)

    def loss(self, values: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> float:
        at, event = tuple(float(name) for name in names), truth[:, 1] == 1
        return float(metrics_survival.metrics_over(truth[:, 0], event, values[:, 0], values[:, 1:], at)["ibs"][0])

    def why(self, metric: str, table: OutcomeTable, repeat: int, chosen: np.ndarray) -> str | None:
        time, event = table.truth[chosen, 0], table.truth[chosen, 1] == 1
        fold = table.fold[repeat, chosen]
        return metrics_survival.why_undefined(metric, time, event, self._horizons(table), fold)

    def strata(self, truth: np.ndarray) -> np.ndarray:
        return truth[:, 1].astype(int)

    def positives(self, truth: np.ndarray) -> int | None:
        return int(truth[:, 1].sum())

    def few_in(self, table: OutcomeTable, chosen: np.ndarray, needed: int) -> str | None:
        events = int(table.truth[chosen, 1].sum())
        return f"{events} with the event" if events < needed else None

    def counts(self, table: OutcomeTable) -> dict[str, int]:
        events = int(table.truth[:, 1].sum())
        return {"with the event": events, "censored": len(table.truth) - events}

    def rare(self, table: OutcomeTable) -> int:
        return int(table.truth[:, 1].sum())

    def baseline(self, table: OutcomeTable) -> tuple[np.ndarray, np.ndarray]:
        curve = kaplan_meier(table.truth[:, 0], table.truth[:, 1] == 1)
        at = np.array(self._horizons(table))
        grid = np.linspace(0, at[-1], 400)
        times, survival = np.array(curve["time"]), np.array(curve["survival"])
        risk = 1 - np.trapezoid(step(times, survival, grid), grid) / at[-1]
        return np.concatenate([[risk], step(times, survival, at)]), np.zeros(1)

    def extras(self, table: OutcomeTable) -> dict[str, Any]:
        """Kaplan-Meier curves of the patients above and below the threshold from validation, and the log-rank test."""
        time, event = table.truth[:, 0], table.truth[:, 1] == 1
        high = table.mean().decisions[0, :, 0] == 1
        groups = {"high": high, "low": ~high}
        tests = []
        for r, repeat in enumerate(table.repeats):
            known = table.known(r)
            tested = log_rank(time[known], event[known], table.decisions[r, known, 0] == 1)
            tests.append({"repeat": repeat, **tested})
        return {
            "groups": {
                name: {"n": int(g.sum()), "events": int(event[g].sum()), "curve": kaplan_meier(time[g], event[g])}
                for name, g in groups.items()
                if g.any()
            },
            "log_rank": log_rank(time, event, high),
            "log_rank_by_repeat": tests,
        }


KINDS: dict[str, Kind] = {k.kind: k for k in (OrdinalKind(), MultilabelKind(), RegressionKind(), SurvivalKind())}
