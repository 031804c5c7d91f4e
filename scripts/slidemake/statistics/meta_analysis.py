"""One figure from several sites: a mean over sites, how much they differ, and what a new site may expect.

Random effects: figures y_i with variances v_i are of sites whose true values have mean mu and variance tau^2. tau^2 is
that of Paule and Mandel 1982, mu has the interval of Hartung, Knapp, Sidik and Jonkman (IntHout 2014, BMC Medical
Research Methodology 14:25), never narrower than the one without it, and a new site's value lies in mu +- t_(k-2)
sqrt(tau^2 + se^2) (Higgins, Thompson and Spiegelhalter 2009, JRSS A 172:137). AUROCs are pooled on the scale of
log-odds (Snell 2018, Statistical Methods in Medical Research 27:3505).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm
from scipy.stats import t as student

FEW_SITES = 3  # sites from which a spread between them can be told at all


def _fit(y: np.ndarray, v: np.ndarray, tau2: float) -> tuple[float, float, float]:
    """Mean, its variance and the weighted sum of squares about it."""
    w = 1 / (v + tau2)
    mu = float((w * y).sum() / w.sum())
    return mu, float(1 / w.sum()), float((w * (y - mu) ** 2).sum())


def between_variance(y: np.ndarray, v: np.ndarray) -> float:
    """tau^2 of Paule and Mandel: the one at which the weighted sum of squares is what chance makes it, k - 1."""
    k = len(y)
    if k < 2 or _fit(y, v, 0.0)[2] <= k - 1:
        return 0.0
    high = 1.0
    while _fit(y, v, high)[2] > k - 1:
        high *= 2
    return float(brentq(lambda tau2: _fit(y, v, tau2)[2] - (k - 1), 0.0, high, xtol=1e-12))


def random_effects(values: Sequence[float], variances: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """{value, low, high, new_low, new_high, tau2, i2, p_heterogeneity, sites}: the mean over sites with its interval,
    and the interval for a new one (None below three sites)."""
    y, v = np.asarray(values, float), np.asarray(variances, float)
    k, tau2 = len(y), between_variance(y, v)
    mu, variance, _ = _fit(y, v, tau2)
    spread = _fit(y, v, tau2)[2] / (k - 1) if k > 1 else 1.0
    error = np.sqrt(variance * max(1.0, spread))
    q = student.ppf((1 + level) / 2, k - 1) if k > 1 else norm.ppf((1 + level) / 2)
    total = _fit(y, v, 0.0)[2]
    found: dict[str, Any] = {"value": mu, "low": mu - q * error, "high": mu + q * error, "sites": k, "tau2": tau2}
    found |= {"i2": max(0.0, 1 - (k - 1) / total) if total > 0 and k > 1 else 0.0}
    found |= {"p_heterogeneity": float(chi2.sf(total, k - 1)) if k > 1 else None, "new_low": None, "new_high": None}
    if k >= FEW_SITES:
        reach = student.ppf((1 + level) / 2, k - 2) * np.sqrt(tau2 + variance)
        found |= {"new_low": mu - reach, "new_high": mu + reach}
    return {key: float(item) if isinstance(item, np.floating) else item for key, item in found.items()}


def auroc_over_sites(
    log_odds: Sequence[float], variances: Sequence[float], level: float = 0.95
) -> dict[str, Any] | None:
    """`random_effects` of the log-odds of sites' AUROCs, brought back to AUROCs; tau2 stays on the scale of log-odds.
    None without two sites."""
    if len(log_odds) < 2:
        return None
    found = random_effects(log_odds, variances, level)
    back = ("value", "low", "high", "new_low", "new_high")
    return {k: float(1 / (1 + np.exp(-x))) if k in back and x is not None else x for k, x in found.items()}
