"""Split-conformal intervals of predicted numbers: how wide they are, and how often they hold the truth, per site.

As `conformal` for classes. The score of a patient is |truth - prediction|; the limit of a fold is the
ceil((n + 1)(1 - alpha))-th smallest score of its n validation patients, which its members were not fitted to, and an
interval is the prediction plus and minus the limit (Lei et al. 2018, JASA 113:1094). It holds the truth with
probability 1 - alpha at least for patients like those of validation, on average over patients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slidemake.evaluation.probabilities.conformal import ROUNDING, conformal_limit, coverage, mean_where_known
from slidemake.tasks.base import Predictions


def conformal_intervals(
    table: Predictions,
    alpha: float,
    level: float,
    weights_of: Callable[[str, np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Coverage and width of intervals that promise 1 - alpha, over all patients and per site.

    The table carries its validation patients. weights_of(scope, chosen (m,) indices) gives bootstrap weights (B, m) of
    the chosen patients. Where a fold has too few validation patients for this alpha there are no intervals, and
    `reason` says so.
    """
    nothing: dict[str, Any] = {"alpha": alpha, "pooled": None, "sites": {}, "validation": None}
    residuals = {
        where: np.abs(truth[:, 0] - values[:, 0]) for where, (values, truth) in (table.validation or {}).items()
    }
    limit = np.full(table.fold.shape, np.nan)
    for r, repeat in enumerate(table.repeats):
        for fold in sorted(set(table.fold[r].tolist()) - {-1}):
            if (repeat, fold) not in residuals:
                return {**nothing, "reason": "a fold has no validation patients"}
            limit[r, table.fold[r] == fold] = conformal_limit(residuals[repeat, fold], alpha)
    sizes = [len(of_fold) for of_fold in residuals.values()]
    known = table.fold >= 0
    if not np.isfinite(limit[known]).all():
        needed = int(np.ceil(1 / alpha - ROUNDING)) - 1
        return {**nothing, "reason": f"a fold has {min(sizes)} validation patients, and {needed} are needed"}
    off = np.abs(table.truth[None, :, 0] - table.values[..., 0])
    held, width = mean_where_known(off <= limit + ROUNDING, known), 2 * mean_where_known(limit, known)

    def figures(scope: str, chosen: np.ndarray) -> dict[str, Any]:
        covered = coverage(held[chosen], weights_of(scope, chosen), level)
        return {"n": len(chosen), "coverage": covered, "width": float(width[chosen].mean())}

    sites = np.array(table.sites)
    return {
        "alpha": alpha,
        "validation": {"least": min(sizes), "most": max(sizes)},
        "pooled": figures("pooled", np.arange(len(table.patients))),
        "sites": {
            site: figures(f"site:{site}", np.flatnonzero(sites == site)) for site in sorted(set(table.sites) - {""})
        },
        "reason": None,
    }
