"""Strength of association between two labels of the same patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats.contingency import association, crosstab


def cramers_v(first: Sequence[str], second: Sequence[str]) -> float:
    """Cramér's V of two nominal variables, 0 (independent) to 1; 0 when either is constant."""
    if min(len(set(first)), len(set(second))) < 2:
        return 0.0
    return float(association(crosstab(list(first), list(second)).count, method="cramer"))


def association_test(
    labels: np.ndarray, groups: list[str] | tuple[str, ...], seed: int, draws: int = 2000
) -> dict[str, float] | None:
    """Association of label and group: Cramér's V (0 none, 1 complete) and a permutation p-value (exact for any n).

    None with fewer than two groups or labels.
    """
    _, g = np.unique(np.array(groups), return_inverse=True)
    _, y = np.unique(labels, return_inverse=True)
    rows, columns = g.max(initial=0) + 1, y.max(initial=0) + 1
    if rows < 2 or columns < 2:
        return None
    n = len(y)
    expected = np.outer(np.bincount(g), np.bincount(y)) / n
    rng = np.random.default_rng(seed)

    def chi_square(of: np.ndarray) -> float:
        table = np.bincount(g * columns + of, minlength=rows * columns).reshape(rows, columns)
        return float(((table - expected) ** 2 / expected).sum())

    seen = chi_square(y)
    as_extreme = sum(chi_square(rng.permutation(y)) >= seen - 1e-9 for _ in range(draws))
    return {"cramers_v": float(np.sqrt(seen / (n * (min(rows, columns) - 1)))), "p": (as_extreme + 1) / (draws + 1)}
