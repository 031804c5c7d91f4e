"""Linear models on mean-pooled features for the types that are no plain classes: what `mean_pool_lr` is for them.

regression   ridge regression
ordinal      continuation ratios: for each grade but the last a logistic regression of "this grade" against "higher",
             on the patients of this grade or higher, which is the maximum of the likelihood that `OrdinalOutcome`
             states
multilabel   a logistic regression for each label, on the patients of which it is known
survival     ridge Cox regression on full risk sets (Efron's ties), in the space that the patients span
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize

from slidemake.mil.bags import Bags
from slidemake.statistics.survival import RiskSets
from slidemake.tasks.base import Outcome
from slidemake.tasks.multilabel import MultilabelOutcome
from slidemake.tasks.ordinal import OrdinalOutcome
from slidemake.tasks.regression import RegressionOutcome
from slidemake.training.class_baselines import C_GRID, mean_vectors, worth

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler

CERTAIN = 10.0  # logit of a stage or label that training had only one value of
Fit = Callable[[np.ndarray, list[Any], float, Mapping[str, Any]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LinearModel:
    """Outputs weight (C, D) @ scaled mean tile + bias (C,); C, the inverse penalty; outputs of validation patients."""

    scaler: StandardScaler
    weight: np.ndarray
    bias: np.ndarray
    c: float
    val_outputs: dict[str, np.ndarray]


def fit_linear(
    bags: Bags,
    outcome: Outcome,
    labels: Mapping[str, Any],
    train: Sequence[str],
    plan: Sequence[tuple[Sequence[str], Sequence[str]]],
    scale: Mapping[str, Any],
) -> LinearModel:
    """Choose C by inner validation (`plan`), then fit on all of `train`; without validation C is 0.01.

    Grades and labels, whose outputs are still calibrated, are chosen by what they are `worth`; numbers and survival by
    the loss. labels: patient -> encoded label. scale: `Outcome.scale`.
    """
    everyone = sorted({*train, *(p for _, v in plan for p in v)})
    vectors = dict(zip(everyone, mean_vectors(bags, everyone), strict=True))

    from sklearn.preprocessing import StandardScaler

    def fit(patients: Sequence[str], c: float) -> tuple[StandardScaler, np.ndarray, np.ndarray]:
        scaler = StandardScaler().fit(x := np.stack([vectors[p] for p in patients]))
        return scaler, *_solver(outcome)(scaler.transform(x), [labels[p] for p in patients], c, scale)

    best, chosen, kept = (-np.inf, -np.inf), 0.01, {}
    by_rank = isinstance(outcome, OrdinalOutcome | MultilabelOutcome)
    for c in C_GRID:
        outputs: dict[str, list[np.ndarray]] = {}
        total, held_out = 0.0, 0
        for inner, val in plan:
            if not val:
                continue
            scaler, weight, bias = fit(inner, c)
            out = scaler.transform(np.stack([vectors[p] for p in val])) @ weight.T + bias
            total += len(val) * outcome.loss(out, [labels[p] for p in val], scale)
            held_out += len(val)
            for patient, row in zip(val, out, strict=True):
                outputs.setdefault(patient, []).append(row)
        if not held_out:
            break
        pooled = {p: np.mean(rows, axis=0) for p, rows in outputs.items()}
        found = (0.0, -total / held_out)
        if by_rank:
            found = worth(outcome, np.array(list(pooled.values())), [labels[p] for p in pooled], scale)
        if found > best:
            best, chosen, kept = found, c, pooled
    return LinearModel(*fit(train, chosen), chosen, kept)


def _solver(outcome: Outcome) -> Fit:
    if isinstance(outcome, RegressionOutcome):
        return _ridge
    if isinstance(outcome, OrdinalOutcome):
        return _ordinal
    if isinstance(outcome, MultilabelOutcome):
        return _multilabel
    return _cox


def _ridge(x: np.ndarray, y: list[float], c: float, scale: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import Ridge

    fitted = Ridge(alpha=1 / c).fit(x, (np.array(y) - scale["mean"]) / scale["sd"])
    return fitted.coef_[None], np.array([fitted.intercept_])


def _logistic(x: np.ndarray, y: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of y (n,) in {0, 1}; constant where y is."""
    if len(np.unique(y)) < 2:
        return np.zeros(x.shape[1]), (CERTAIN if len(y) and y[0] else -CERTAIN) if len(y) else 0.0
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(x, y)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _ordinal(x: np.ndarray, y: list[int], c: float, scale: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    grades = np.array(y)
    stages = int(scale["outputs"])
    parts = [_logistic(x[grades >= k], (grades[grades >= k] == k).astype(int), c) for k in range(stages)]
    return np.stack([w for w, _ in parts]), np.array([b for _, b in parts])


def _multilabel(
    x: np.ndarray, y: list[np.ndarray], c: float, scale: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    truth = np.asarray(y)
    parts = [_logistic(x[t >= 0], t[t >= 0], c) for t in truth.T]
    return np.stack([w for w, _ in parts]), np.array([b for _, b in parts])


def _cox(x: np.ndarray, y: list[Any], c: float, scale: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Minimises partial likelihood + |w|^2 / (2 c); the optimum lies in the span of the patients (rows of x)."""
    sets = RiskSets(np.array([t for t, _ in y]), np.array([e for _, e in y], bool))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    z = u * s  # patients in the coordinates of their span

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        eta = z @ w
        return sets.loss(eta) + w @ w / (2 * c), z.T @ sets.gradient(eta) + w / c

    found = minimize(objective, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return (vt.T @ found.x)[None], np.zeros(1)
