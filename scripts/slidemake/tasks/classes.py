"""Classes without an order (`binary`, `multiclass`); with two of them the second is the positive one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy

from slidemake.core.failures import RunError
from slidemake.statistics import class_metrics
from slidemake.statistics.reliability import roc_and_pr
from slidemake.statistics.sizes import bins_for
from slidemake.statistics.temperature import auroc, fit_temperature, probabilities, youden_threshold
from slidemake.tasks.base import (
    SMALL,
    Figures,
    Options,
    Predictions,
    Threshold,
    as_written,
    number,
    number_in,
    task_type,
)
from slidemake.tasks.class_predictions import OfClasses

if TYPE_CHECKING:
    from torch import Tensor

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "mcc": "MCC",
    "kappa": "kappa",
    "sensitivity_at_specificity": "sensitivity at {specificity:.0%} specificity",
    "brier": "Brier",
    "ece": "ECE",
}
FURTHER = ("f1", "mcc", "kappa", "sensitivity_at_specificity")


def class_order(labels: Mapping[str, str], positive: str | None = None) -> tuple[str, ...]:
    """Class names sorted; with two classes `positive` (default: the last) comes second."""
    classes = sorted(set(labels.values()))
    if positive is not None:
        if str(positive) not in classes:
            raise RunError(f"The positive class {positive!r} is not among the labels: {', '.join(classes)}.")
        classes.sort(key=lambda name: name == str(positive))
    return tuple(classes)


def named(columns: Sequence[str], prefix: str) -> list[str]:
    """What follows the prefix in the names of the columns that have it."""
    return [column.removeprefix(prefix) for column in columns if column.startswith(prefix)]


def log_odds(logits: Tensor, target: int) -> Tensor:
    """Log-odds of class `target` from (..., C) logits: with two classes simply their difference. A single output is
    taken as it is."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    others = [c for c in range(logits.shape[-1]) if c != target]
    return logits[..., target] - logits[..., others].logsumexp(-1)


def decide(prob: np.ndarray, classes: Sequence[str], threshold: float | None) -> str:
    """The class predicted from probabilities (C,): by threshold for two classes, else the most probable."""
    if threshold is not None and len(classes) == 2:
        return classes[int(prob[1] >= threshold)]
    return classes[int(np.argmax(prob))]


@task_type("binary", "multiclass", "classes")  # the last: of bundles that do not say which
class ClassOutcome(OfClasses):
    """Classes without an order; with two of them the second is the positive one. Softmax over one logit each."""

    primary, tests_auroc, by_class = "auroc", True, True
    few, undefined, lower_is_better = "of the rarest class", "", class_metrics.LOWER_IS_BETTER
    titles: ClassVar[dict[str, str]] = TITLES
    headlines = ("auroc", "auprc", "balanced_accuracy", "brier")
    further = FURTHER

    def __init__(self, classes: Sequence[str], kind: str | None = None):
        super().__init__(classes)
        self.kind = kind or ("binary" if len(self.classes) == 2 else "multiclass")
        self.outputs = len(self.classes)

    @classmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> ClassOutcome:
        return ClassOutcome(class_order(labels, task.get("positive")))

    @classmethod
    def load(cls, about: Mapping[str, Any]) -> ClassOutcome:
        return ClassOutcome(about["classes"])

    @classmethod
    def of_columns(cls, columns: Sequence[str]) -> ClassOutcome:
        return ClassOutcome(named(columns, "prob_"))

    def loss(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> float:
        return float(
            -scipy.special.log_softmax(outputs, axis=1)[np.arange(len(labels)), np.asarray(labels, int)].mean()
        )

    def score_of(self, outputs: np.ndarray, labels: Sequence[int]) -> float | None:
        if len(self.classes) == 2:
            return auroc(outputs[:, 1] - outputs[:, 0], np.asarray(labels) == 1)
        p = probabilities(outputs)
        areas = [auroc(p[:, c], np.asarray(labels) == c) for c in range(p.shape[1])]
        found = [area for area in areas if area is not None]
        return float(np.mean(found)) if found else None

    def link(self, outputs: np.ndarray, labels: Sequence[int], scale: Mapping[str, Any]) -> dict[str, Any]:
        temperature, intercept = fit_temperature(outputs, np.asarray(labels, int))
        return {"temperature": temperature, "intercept": intercept}

    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        return probabilities(outputs, link["temperature"], link.get("intercept", 0.0))

    def threshold(self, values: np.ndarray, labels: Sequence[int]) -> Threshold:
        if len(self.classes) != 2:
            return None
        return youden_threshold(values[:, 1], np.asarray(labels, int) == 1)

    def columns(self) -> list[str]:
        return [*(f"{kind}_{name}" for kind in ("prob", "logit") for name in self.classes), "threshold", "predicted"]

    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        # decided on the number that is written, so that a reader of the file decides the same
        written = np.array([as_written(p) for p in values])
        limit = None if threshold is None else as_written(threshold)
        row = {"threshold": number(limit), "predicted": decide(written, self.classes, limit)}
        row |= {f"prob_{name}": number(p) for name, p in zip(self.classes, values, strict=True)}
        return row | {f"logit_{name}": number(v) for name, v in zip(self.classes, outputs, strict=True)}

    def direction(self, outputs: Any) -> Any:
        return log_odds(outputs, len(self.classes) - 1)

    # -- tables of predictions and evaluation -----------------------------------------------------------------------

    def logit_columns(self) -> list[str]:
        return [f"logit_{name}" for name in self.classes]

    def values_in(self, row: Mapping[str, str], where: str) -> list[float]:
        prob = super().values_in(row, where)
        if min(prob) < -1e-6 or abs(sum(prob) - 1) > 1e-3:
            raise RunError(f"{where}: the class probabilities {prob} do not sum to 1")
        total = sum(max(0.0, p) for p in prob)
        return [max(0.0, p) / total for p in prob]

    def decisions_in(self, row: Mapping[str, str], values: list[float], where: str) -> list[float]:
        """By the row's own threshold (two classes), else as written, else the most probable class."""
        if len(self.classes) == 2 and row.get("threshold"):
            return [float(values[1] >= number_in(row, "threshold", where))]
        if row.get("predicted"):
            if row["predicted"] not in self.classes:
                raise RunError(f"{where}: predicted is {row['predicted']!r}, not one of {', '.join(self.classes)}")
            return [float(self.classes.index(row["predicted"]))]
        return [float(np.argmax(values))]

    def decision_columns(self) -> list[str]:
        return []  # what is decided follows from the probabilities where a table does not say it

    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        bins = bins_for(len(chosen) if size is None else size, options["ece_bins"])
        return class_metrics.metrics_over(
            table.truth[chosen, 0].astype(int),
            table.values[repeat, chosen],
            table.decisions[repeat, chosen, 0].astype(int),
            bins,
            weights,
            options["specificity"],
            table.ranks[repeat, chosen],
        )

    def of_ensemble(self, table: Predictions, weights: np.ndarray | None, options: Options) -> Figures:
        """A mean of probabilities has no threshold of its own: no metric of decisions."""
        labels, bins = table.truth[:, 0].astype(int), bins_for(len(table.truth), options["ece_bins"])
        prob, ranks = np.nanmean(table.values, axis=0), np.nanmean(table.ranks, axis=0)
        return class_metrics.metrics_over(labels, prob, None, bins, weights, options["specificity"], ranks)

    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        return class_metrics.why_undefined(metric, table.truth[chosen, 0].astype(int), list(self.classes))

    def decide_mean(self, values: np.ndarray, decisions: np.ndarray) -> np.ndarray:
        return values.argmax(-1)[..., None].astype(float)

    def positives(self, truth: np.ndarray) -> int | None:
        return int((truth[:, 0] == 1).sum()) if len(self.classes) == 2 else None

    def facts(self, truth: np.ndarray) -> dict[str, Any]:
        """The prevalence: what AUPRC is without skill."""
        share = self._class_counts(truth) / max(1, len(truth))
        return {"prevalence": float(share[1] if len(self.classes) == 2 else share.mean())}

    def about_subset(self, patients: int, options: Options) -> dict[str, Any]:
        return {"ece_bins": bins_for(patients, options["ece_bins"])}

    def site_counts(self, truth: np.ndarray) -> Any:
        return self._class_counts(truth).tolist()

    def less_is_better(self, metric: str) -> bool:
        return metric in self.lower_is_better

    def why_no_figures(self, truth: np.ndarray) -> str | None:
        absent = [name for name, count in self.counts(truth).items() if not count]
        return f"no patient of class {', '.join(absent)} among {len(truth)}" if absent else None

    def few_in(self, truth: np.ndarray, needed: int) -> str | None:
        few = [f"{count} of class {name}" for name, count in self.counts(truth).items() if count < needed]
        return f"{', '.join(few)}; {needed} of each are needed" if few else None

    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        share = self._class_counts(truth) / len(truth)
        return share, np.array([float(share.argmax())])

    def curves(self, table: Predictions, entry: Mapping[str, Any]) -> dict[str, Any]:
        """ROC and PR of what ranks patients (mean over repeats), of more than two classes each; calibration points."""
        keys = ("predicted", "observed", "low", "high", "count")
        points = [{key: row[key] for key in keys} for row in entry["calibration"]["table"]]
        labels, ranks = table.truth[:, 0], np.nanmean(table.ranks, axis=0)
        if len(self.classes) == 2:
            return {"calibration": points, **(roc_and_pr(labels == 1, ranks[:, 1]) or {"roc": None, "pr": None})}
        by_class = {name: roc_and_pr(labels == c, ranks[:, c]) for c, name in enumerate(self.classes)}
        return {"calibration": points, "roc": None, "pr": None, "classes": by_class}

    def within_sites(self, table: Predictions, scopes: Mapping[str, Any]) -> dict[str, Any] | None:
        """The AUROC of every site that has both classes, however few of its patients; two classes only."""
        if len(self.classes) != 2:
            return None
        sites, measured = np.array(table.sites), []
        for site in sorted(set(table.sites) - {""}):
            value = self._mean_auroc(table, sites == site)
            if value is not None:
                measured.append((int((sites == site).sum()), value))
        if not measured:
            return None
        patients = sum(n for n, _ in measured)
        within = sum(n * value for n, value in measured) / patients
        pooled = self._mean_auroc(table, np.ones(len(sites), bool))
        pooled = within if pooled is None else pooled
        return {"within": within, "pooled": pooled, "sites": len(measured), "patients": patients}

    def _mean_auroc(self, table: Predictions, inside: np.ndarray) -> float | None:
        """AUROC among the patients `inside`, mean over repeats; None when a repeat has one class only."""
        positive = table.truth[inside, 0] == 1
        values = [class_metrics.auroc(positive, table.ranks[r, inside, 1]) for r in range(len(table.repeats))]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    @property
    def positive(self) -> str | None:
        return self.classes[1] if len(self.classes) == 2 else None

    def small_sample(self, patients: int, counts: Mapping[str, int], carriers: int) -> tuple[str, str] | None:
        rarest = min(counts, key=lambda name: counts[name])
        if carriers == 0:
            return "one_class", f"No patient is labelled {rarest}: nothing that compares classes can be computed."
        if carriers >= SMALL:
            return None
        text = (
            f"Small sample: {patients} patients, {carriers} of them labelled {rarest}. One patient of these ranked "
            f"differently moves the AUROC by up to {1 / carriers:.2f}; read the intervals, not the figures, and "
            "confirm on another cohort."
        )
        return "small_sample", text
