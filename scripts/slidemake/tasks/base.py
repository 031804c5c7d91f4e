"""What a type of task is: one class, an `Outcome`, in one file, registered by name; and the predictions of a model.

An outcome knows how many outputs a model has, what is learned from the training labels before training (`scale`), the
loss of held-out outputs, what is fitted on validation patients (`link`: temperature, baseline hazard), how outputs
become predictions (`predict`: a vector of values that an ensemble may average), the threshold, the columns of the
tables; and, of predictions, the metrics, the model without knowledge, the groups that are resampled, the words.
Training, bundles, the prediction of new slides, evaluation and report know no task but through it. No torch: losses for
training are in `mil/losses.py`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np

from slidemake.core.failures import RunError
from slidemake.statistics.sizes import too_few
from slidemake.tasks.labels import why_untrainable

Threshold = float | list[float] | None
Figures = dict[str, np.ndarray]
Options = Mapping[str, Any]  # of `evaluation`
SCORES = {"auroc": "AUROC", "pearson": "correlation", "c_index": "C-index"}  # what `Outcome.score` is called
NO_SKILL = {"auroc": 0.5, "pearson": 0.0, "c_index": 0.5}
LOG_TEMPERATURES = np.linspace(np.log(0.1), np.log(10.0), 200)
SMALL = 20  # patients who carry the information below which intervals say more than figures


def number(value: float | None) -> str:
    """Nine significant digits, so that equal predictions are equal bytes; empty for None."""
    return "" if value is None else format(float(value), ".9g")


def as_written(value: Any) -> float:
    """The number that a reader of the file will find: what is decided is decided on it."""
    return float(number(value))


def number_in(row: Mapping[str, str], column: str, where: str) -> float:
    """The number in a cell; RunError (which begins with `where`) for what is none or not finite."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        raise RunError(f"{where}: {column} is {row[column]!r}, not a number") from None
    if not math.isfinite(value):
        raise RunError(f"{where}: {column} is {row[column]}; a prediction must be a finite number")
    return value


def best_temperature(loss_at: Any, penalty: float) -> float:
    """The temperature 0.1 to 10 with the lowest `loss_at(T)` + penalty (log T)^2 / 2: a penalty worth one patient keeps
    a handful of validation patients, separated by chance, from sending T to its limits."""
    losses = [loss_at(float(np.exp(t))) + 0.5 * penalty * t * t for t in LOG_TEMPERATURES]
    return float(np.exp(LOG_TEMPERATURES[int(np.argmin(losses))]))


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model; n patients in order of their id, R repeats.

    What truth, values and decisions are depends on the type of the task:

                truth (n, T)                    values (R, n, P)            decisions (R, n, Q)
    classes     class                           probability of each class   class
    ordinal     grade                           probability of each grade   grade
    multilabel  1, 0 or -1 (not known)          probability of each label   1 or 0 of each label
    regression  the number                      the number                  none (Q = 0)
    survival    time; 1 event, 0 censored       risk, S at each horizon     1 high risk, 0 low
    """

    name: str
    outcome: Outcome
    patients: tuple[str, ...]
    sites: tuple[str, ...]  # (n,) "" where the sheet names none
    truth: np.ndarray
    repeats: tuple[int, ...]
    values: np.ndarray  # NaN where a repeat has no prediction for a patient
    decisions: np.ndarray  # NaN likewise
    fold: np.ndarray  # (R, n) int, -1 where missing
    # (repeat, fold) -> values (m, P) and truth (m, T) of validation patients, predicted by members not fitted to them
    validation: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    raw: np.ndarray | None = None  # (R, n, C) logits before temperature, where there are any
    of_folds: bool = False  # each fold's model knows how common classes or labels are in the other folds
    ranked_by: np.ndarray | None = None  # (R, n, P) `ranks`, where they are not those of the values

    @property
    def names(self) -> tuple[str, ...]:
        """Classes, grades, labels, or horizons as text."""
        return self.outcome.names

    @cached_property
    def ranks(self) -> np.ndarray:
        """(R, n, P) the values by which patients are ranked: of classes, grades and labels without the prevalence of
        each fold's training patients (`without_prevalence`)."""
        if self.ranked_by is not None:
            return self.ranked_by
        return self.outcome.ranks(self) if self.of_folds else self.values

    def known(self, repeat: int) -> np.ndarray:
        """(n,) whether the repeat (its index) predicts a patient."""
        return self.fold[repeat] >= 0

    def cohort(self) -> tuple[Any, ...]:
        """What two models must share to be compared patient by patient."""
        return self.patients, self.truth.tolist()

    def mean(self) -> Predictions:
        """The same with values, and what patients are ranked by, averaged over repeats, as a single repeat, and what is
        decided from them."""
        values = np.nanmean(self.values, axis=0, keepdims=True)
        fold = self.fold.max(0, keepdims=True)
        if len(self.repeats) > 1:  # patients of one fold in one repeat are of several in the others
            fold = np.where(fold >= 0, 0, -1)
        decisions = self.outcome.decide_mean(values, self.decisions)
        ranks = np.nanmean(self.outcome.comparable(self), axis=0, keepdims=True)
        about = {"repeats": (0,), "values": values, "decisions": decisions, "fold": fold, "raw": None}
        return replace(self, **about, ranked_by=ranks)


class Outcome(ABC):
    """What all types share. Encoded labels are what `encode` makes of a label's text."""

    kind = ""  # its name in the configuration
    form: ClassVar[str] = ""  # of a prediction: "classes", "labels", "number" or "curve"
    names: tuple[str, ...] = ()  # classes, grades, labels, or horizons as text
    classes: tuple[str, ...] = ()  # of types whose label is the name of a class
    outputs = 1  # of the aggregator
    rises = True  # whether outputs rise with the label
    by_class: ClassVar[bool] = False  # outputs are logits of classes without an order

    score: ClassVar[str] = "auroc"  # of held-out patients, shown beside the validation loss
    primary: ClassVar[str] = ""  # metric that compares models
    check: ClassVar[str] = ""  # by which shuffled labels must come out at chance; default: the primary one
    chance: ClassVar[float] = 0.5
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    null: ClassVar[str] = "prevalence"  # the baseline that knows no features
    criterion: ClassVar[str] = "log-loss"  # what `validation_loss` is called
    few: ClassVar[str] = "patients"  # who carries the information
    tests_auroc: ClassVar[bool] = False  # DeLong's test compares two models
    undefined: ClassVar[str] = "not defined, because "  # begins the reason of a metric without a value

    name_is: ClassVar[str] = "class"  # what one of `names` is called
    titles: ClassVar[dict[str, str]] = {}  # {metric: head of its column in the report, may name options}
    further: ClassVar[tuple[str, ...]] = ()  # of `titles`, those in a table that opens, so that the first fits the page
    headlines: ClassVar[tuple[str, ...]] = ()  # metrics that the report shows large; default: the first of `titles`
    called: ClassVar[dict[str, str]] = {}  # {metric: its name in a sentence}, where it is another one
    quantity: ClassVar[str] = "probability"  # what is predicted, as a head of a column
    positives_are: ClassVar[str] = "positive"  # of the patients that `positives` counts

    # -- from a task, a bundle, a table -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def make(cls, task: Mapping[str, Any], labels: Mapping[str, str]) -> Outcome:
        """The outcome of a task for a cohort's labels (patient -> text)."""

    @classmethod
    @abstractmethod
    def load(cls, about: Mapping[str, Any]) -> Outcome:
        """The outcome that `about` describes."""

    @classmethod
    @abstractmethod
    def of_columns(cls, columns: Sequence[str]) -> Outcome:
        """The outcome of a table of predictions with these columns."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What `load` needs to make this outcome again; a part of bundle.json."""

    # -- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, label: str) -> Any:
        """The label as models are trained on it, from its text."""

    def why_untrainable(self, labels: Sequence[str]) -> str | None:
        return why_untrainable(labels, self.kind)

    def scale(self, labels: Sequence[Any]) -> dict[str, Any]:
        """What training and prediction take from the encoded labels of training and validation patients."""
        return {}

    @abstractmethod
    def loss(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> float:
        """Mean loss of held-out outputs (V, C)."""

    def score_of(self, outputs: np.ndarray, labels: Sequence[Any]) -> float | None:
        """The score (attribute `score`) of held-out outputs (V, C); None where it is not defined."""
        return None

    def settled(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> tuple[float, float]:
        """(temperature, mean loss) of held-out outputs (V, C) once they are divided by it, and shifted where a link of
        this type shifts: what is left when neither confidence nor class weights count."""
        t = best_temperature(lambda t: self.loss(self._shifted(outputs / t, labels), labels, scale), 1 / len(labels))
        return t, self.loss(self._shifted(outputs / t, labels), labels, scale)

    def _shifted(self, outputs: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        return outputs

    def link(self, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]) -> dict[str, Any]:
        """From the outputs (V, C) of validation patients: all that `predict` needs. Goes into the bundle."""
        return dict(scale)

    @abstractmethod
    def predict(self, outputs: np.ndarray, link: Mapping[str, Any]) -> np.ndarray:
        """Values (..., P) from outputs (..., C)."""

    def threshold(self, values: np.ndarray, labels: Sequence[Any]) -> Threshold:
        """From the values (V, P) of validation patients."""
        return None

    def direction(self, outputs: Any) -> Any:
        """The score that is explained (...), from outputs (..., C) as an array or a tensor."""
        return outputs[..., 0]

    def headline(self, values: np.ndarray) -> float:
        """The one figure of a prediction (P,) by which explained slides are sorted."""
        return float(values[-1])

    # -- tables of predictions --------------------------------------------------------------------------------------

    @abstractmethod
    def columns(self) -> list[str]:
        """Columns of the tables of predictions that `cells` fills."""

    @abstractmethod
    def cells(self, outputs: np.ndarray, values: np.ndarray, threshold: Threshold) -> dict[str, str]:
        """One row's cells: values, raw outputs, threshold and what is decided by it."""

    @abstractmethod
    def value_columns(self) -> list[str]:
        """Columns that hold the values, in their order."""

    def logit_columns(self) -> list[str]:
        """Columns that hold logits before temperature."""
        return []

    def decision_columns(self) -> list[str]:
        return ["predicted"]

    def truth_of(self, label: str) -> list[float]:
        """(T,) of the label's text."""
        return np.atleast_1d(np.asarray(self.encode(label), float)).tolist()

    def values_in(self, row: Mapping[str, str], where: str) -> list[float]:
        """(P,) of a row of a table; `where` begins messages."""
        return [number_in(row, column, where) for column in self.value_columns()]

    def decisions_in(self, row: Mapping[str, str], values: list[float], where: str) -> list[float]:
        """(Q,) of a row, whose values are read already."""
        return [float(row[column]) for column in self.decision_columns()]

    # -- evaluation -------------------------------------------------------------------------------------------------

    @abstractmethod
    def over(
        self,
        table: Predictions,
        repeat: int,
        chosen: np.ndarray,
        weights: np.ndarray | None,
        options: Options,
        size: int | None = None,
    ) -> Figures:
        """{metric: (B,)} of the patients `chosen` (indices) in one repeat, for weights (B, m). size: how many patients
        count, where weights leave some out."""

    def of_ensemble(self, table: Predictions, weights: np.ndarray | None, options: Options) -> Figures:
        """The same of the prediction averaged over repeats."""
        return self.over(table.mean(), 0, np.arange(len(table.patients)), weights, options)

    @abstractmethod
    def proper_loss(self, values: np.ndarray, truth: np.ndarray) -> float:
        """A proper loss of predicted values (m, P), NaN where it is not defined."""

    def validation_loss(self, table: Predictions, repeat: int, fold: int) -> float:
        """Loss of the validation patients of a fold, predicted by members that were not fitted to them."""
        return self.proper_loss(*(table.validation or {})[repeat, fold])

    @abstractmethod
    def why(self, metric: str, table: Predictions, repeat: int, chosen: np.ndarray) -> str | None:
        """Why a metric has no value."""

    def ranks(self, table: Predictions) -> np.ndarray:
        return table.values

    def comparable(self, table: Predictions) -> np.ndarray:
        """(R, n, P) ranks that may be averaged over repeats, in which a patient is of other folds."""
        return table.ranks

    def decide_mean(self, values: np.ndarray, decisions: np.ndarray) -> np.ndarray:
        """(1, n, Q) decided from values (1, n, P) averaged over repeats; by majority of decisions (R, n, Q)."""
        return (np.nanmean(decisions, axis=0, keepdims=True) >= 0.5).astype(float)

    def strata(self, truth: np.ndarray) -> np.ndarray:
        """(n,) int: groups that are resampled each by itself."""
        return np.zeros(len(truth), int)

    def labels_by_site(self, truth: np.ndarray) -> dict[str, np.ndarray]:
        """{"" or label: (n,) int, -1 where not known}: what may depend on the site."""
        return {"": self.strata(truth)}

    def positives(self, truth: np.ndarray) -> int | None:
        return None

    def facts(self, truth: np.ndarray) -> dict[str, Any]:
        """What is said of the patients of any part, besides how many they are."""
        return {}

    def about_subset(self, patients: int, options: Options) -> dict[str, Any]:
        """What is said of a scope over all repeats: how its figures were measured."""
        return {}

    def site_counts(self, truth: np.ndarray) -> Any:
        return len(truth)

    def less_is_better(self, metric: str) -> bool:
        """Of a metric as figures name it: `brier`, `brier:<label>`, `brier@<horizon>`."""
        return re.split("[:@]", metric)[0] in (*self.lower_is_better, "brier")

    def why_no_figures(self, truth: np.ndarray) -> str | None:
        """Why a site with enough patients gets none."""
        return None

    def too_small(self, truth: np.ndarray, options: Options) -> str | None:
        """Why a group of patients gets no figures, or None."""
        if reason := too_few(len(truth), options):
            return reason
        return self.few_in(truth, options["subgroup_class"])

    def few_in(self, truth: np.ndarray, needed: int) -> str | None:
        """Of what a group has fewer than `needed`, so that its figures would say nothing."""
        return None

    def counts(self, truth: np.ndarray) -> dict[str, int]:
        return {}

    def rare(self, truth: np.ndarray) -> int:
        """How many patients carry the information; few of them are warned about (`few` says what they are)."""
        return len(truth)

    @abstractmethod
    def baseline(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values (P,), decisions (Q,)) of the baseline, the same for every patient."""

    def null_model(self, like: Predictions) -> Predictions:
        """The baseline as a model. It knows the whole cohort: a training fold's own figure would be off wherever the
        tested fold is off the other way."""
        values, decisions = self.baseline(like.truth)
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

    def as_classes(self, table: Predictions) -> dict[str, tuple[np.ndarray, Any]]:
        """{"" or label: (patients (indices), `ClassPredictions` of them)}, for what is said of their probabilities."""
        return {}

    def extras(self, table: Predictions) -> dict[str, Any]:
        """What metrics.json says of a model besides."""
        return {}

    def curves(self, table: Predictions, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What curves.json says of a model, of which metrics.json says `entry`."""
        return {}

    def within_sites(self, table: Predictions, scopes: Mapping[str, Any]) -> dict[str, Any] | None:
        """The primary metric inside sites, weighted by their patients, beside the pooled one; None when no site has a
        value. Comparing only patients of one site removes what the site gives away."""
        sites = [scope for name, scope in scopes.items() if name.startswith("site:")]
        measured = [(s["n"], s["metrics"][self.primary]["value"]) for s in sites if s["metrics"]]
        measured = [(n, value) for n, value in measured if value is not None]
        pooled = scopes["pooled"]["metrics"][self.primary]["value"]
        if not measured or pooled is None:
            return None
        patients = sum(n for n, _ in measured)
        within = sum(n * value for n, value in measured) / patients
        return {"within": within, "pooled": pooled, "sites": len(measured), "patients": patients}

    # -- words ------------------------------------------------------------------------------------------------------

    @property
    def positive(self) -> str | None:
        """The class that is looked for, of two without an order."""
        return None

    def title(self, metric: str) -> str:
        """A metric's name in a sentence."""
        return self.called.get(metric) or self.titles.get(metric) or metric

    def small_sample(self, patients: int, counts: Mapping[str, int], carriers: int) -> tuple[str, str] | None:
        """(code, sentence) where the cohort is too small for its figures to be read by themselves.

        counts: `counts` of the cohort, carriers: `rare` of it."""
        if carriers >= SMALL:
            return None
        of = f"{patients} patients, {carriers} of them {self.few}"
        if self.few == "patients":
            of = f"{carriers} patients"
        elif self.few.startswith("of the"):
            of = f"{carriers} patients {self.few}"
        text = f"Small sample: {of}. Read the intervals, not the figures, and confirm on another cohort."
        return "small_sample", text


TYPES: dict[str, type[Outcome]] = {}
T = TypeVar("T", bound=type[Outcome])


def task_type(*names: str) -> Callable[[T], T]:
    """Registers a type of task under its names in the configuration."""

    def register(outcome: T) -> T:
        for name in names:
            TYPES[name] = outcome
        return outcome

    return register
