"""The baselines that every task's table carries: mean pooling with a linear model, and the site alone.

mean_pool_lr is logistic regression here, and for other types than classes the linear model of `linear_baseline.py`;
site_only of other types is in `site_baseline.py`. The third control, shuffled_label, is the first configured
aggregator on `splits.permuted_control`. Only `as_mean_pool` makes a torch model, which keeps a fit in the form
that bundles know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slidemake.mil.bags import Bags
from slidemake.tasks.base import Outcome
from slidemake.tasks.classes import ClassOutcome

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from slidemake.mil.aggregators import Aggregator

C_GRID = tuple(10.0**k for k in range(-5, 4))


@dataclass(frozen=True)
class MeanPoolLR:
    """A fitted regression on mean-pooled features, the C it took, and logits of inner-validation patients."""

    scaler: StandardScaler
    regression: LogisticRegression
    c: float
    val_logits: dict[str, np.ndarray]


def mean_vectors(bags: Bags, patients: Sequence[str]) -> np.ndarray:
    """(P, D) mean tile of every patient, float64."""
    means = np.empty((len(patients), bags.dim))
    for row, patient in zip(means, patients, strict=True):
        bags.bag(patient).mean(0, dtype=np.float64, out=row)
        bags.forget()
    return means


def fit_lr(x: np.ndarray, y: np.ndarray, c: float) -> tuple[StandardScaler, LogisticRegression]:
    """Logistic regression of y (n,) on the standardised x (n, D), classes weighed alike, with inverse penalty c."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    return scaler, LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(scaler.transform(x), y)


def _logits(scaler: StandardScaler, regression: LogisticRegression, x: np.ndarray, classes: int) -> np.ndarray:
    """(P, C) logits; classes unseen in training get a very low one."""
    decision = regression.decision_function(scaler.transform(x))
    if decision.ndim == 1:
        decision = np.stack([-decision / 2, decision / 2], 1)
    full = np.full((len(x), classes), decision.min() - 10.0)
    full[:, regression.classes_] = decision
    return full


def fit_mean_pool_lr(
    bags: Bags,
    labels: Mapping[str, int],
    train: Sequence[str],
    plan: Sequence[tuple[Sequence[str], Sequence[str]]],
    classes: int,
) -> MeanPoolLR:
    """Choose C by what inner validation (`plan`) is worth, see `worth`, then fit on all of `train`.

    plan: (train, validation) patients of each inner fold (`plan.member_plan`). The scaler is fitted on the
    training side of each fit only. Without validation patients C is 0.01.
    """
    outcome, best, chosen, kept = ClassOutcome([str(c) for c in range(classes)]), (-1.0, 0.0), 0.01, {}
    vectors = dict(
        zip(everyone := sorted({*train, *(p for _, v in plan for p in v)}), mean_vectors(bags, everyone), strict=True)
    )
    for c in C_GRID:
        logits: dict[str, list[np.ndarray]] = {}
        for inner, val in plan:
            if not val:
                continue
            fitted = fit_lr(np.stack([vectors[p] for p in inner]), np.array([labels[p] for p in inner]), c)
            out = _logits(*fitted, np.stack([vectors[p] for p in val]), classes)
            for patient, row in zip(val, out, strict=True):
                logits.setdefault(patient, []).append(row)
        if not logits:
            break
        pooled = {p: np.mean(rows, axis=0) for p, rows in logits.items()}
        found = worth(outcome, np.array(list(pooled.values())), [labels[p] for p in pooled], {})
        if found > best:
            best, chosen, kept = found, c, pooled
    scaler, regression = fit_lr(np.stack([vectors[p] for p in train]), np.array([labels[p] for p in train]), chosen)
    return MeanPoolLR(scaler, regression, chosen, kept)


def worth(
    outcome: Outcome, outputs: np.ndarray, labels: Sequence[Any], scale: Mapping[str, Any]
) -> tuple[float, float]:
    """What held-out outputs (V, C) are worth: their score and, between equal ones, the loss that is left, negated.

    The loss of bare logits would choose a C so small that nothing is learned: with few patients a weak penalty is too
    sure of itself, which the temperature sets right afterwards.
    """
    score = outcome.score_of(outputs, labels)
    return 0.0 if score is None else score, -outcome.settled(outputs, labels, scale)[1]


def as_aggregator(fitted: MeanPoolLR, classes: int) -> Aggregator:
    """The same regression as a MeanPool aggregator: equal logits, and bundles, predict and explain work on it."""
    coefficients, intercept = fitted.regression.coef_, fitted.regression.intercept_
    if len(coefficients) == 1:
        coefficients, intercept = np.concatenate([-coefficients, coefficients]) / 2, np.r_[-intercept, intercept] / 2
    weight = np.zeros((classes, coefficients.shape[1]))
    bias = np.full(classes, -30.0)  # a class that training did not have is never predicted
    weight[fitted.regression.classes_], bias[fitted.regression.classes_] = coefficients, intercept
    return as_mean_pool(fitted.scaler, weight, bias)


def as_mean_pool(scaler: StandardScaler, weight: np.ndarray, bias: np.ndarray) -> Aggregator:
    """A MeanPool aggregator with the outputs weight (C, D) @ scaled mean tile (D,) + bias (C,)."""
    import torch

    from slidemake.mil.aggregators import build_aggregator

    model: Any = build_aggregator("mean_pool", weight.shape[1], len(weight), {})
    with torch.no_grad():
        model.feature_mean.copy_(torch.from_numpy(scaler.mean_))
        model.feature_std.copy_(torch.from_numpy(scaler.scale_))
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(bias))
    return model.eval()


def site_prevalence(
    labels: Mapping[str, int], sites: Mapping[str, str], train: Sequence[str], classes: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Class prevalence (C,) in each site's training patients, and over all of them (for sites without any).

    With one pseudo-patient of the overall prevalence per site, so that a site with one patient is not certain. In
    cross-validation within sites this predictor falls below 0.5 by construction (a positive patient held out lowers the
    prevalence that predicts it); above 0.5 it says that the site alone tells the label.
    """
    overall = np.bincount([labels[p] for p in train], minlength=classes) / len(train)
    table = {}
    for site in sorted({sites[p] for p in train}):
        inside = np.bincount([labels[p] for p in train if sites[p] == site], minlength=classes)
        table[site] = (inside + overall) / (inside.sum() + 1)
    return table, overall


def site_threshold(overall: np.ndarray) -> float | None:
    """Two classes: positive where the site's prevalence exceeds the training cohort's. None for more classes."""
    return float(overall[1]) if len(overall) == 2 else None


def predict_site(table: Mapping[str, Any], overall: np.ndarray, site: str) -> np.ndarray:
    """(C,) probabilities for a patient of `site`."""
    return np.asarray(table.get(site, overall), float)
