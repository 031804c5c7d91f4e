"""ComBat: each domain's shift and scale of every feature, estimated beside the label and taken out.

Johnson, Li, Rabinovic, Biostatistics 2007: x = a + X b + g_d + s_d e per feature, with X the label and empirical-Bayes
estimates of g_d and s_d. Fitted on tiles of training patients only. Applied without the label, which a patient to be
predicted does not have: (x - a - g_d) / s_d + a. The label is in the model only so that its effect is not taken for the
scanner's where both go together. A domain that training did not have is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slidemake.mil.bags import Bags

TILES = 512  # per slide, evenly spaced
ITERATIONS, TOLERANCE = 100, 1e-4


def fit_combat(
    bags: Bags, patients: Sequence[str], domain_of: np.ndarray, domains: int, classes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, each (domains, D), such that x scale_d + shift_d is harmonised.

    domain_of: domain of every slide of `bags` (-1: unknown, left out); classes: label of each patient (any constant for
    tasks without classes).
    """
    rows, place, label = [], [], []
    for patient, c in zip(patients, classes, strict=True):
        first, last = bags.where[patient]
        for s in range(first, last):
            start, stop = int(bags.offsets[s]), int(bags.offsets[s + 1])
            if domain_of[s] < 0 or start == stop:
                continue
            chosen = np.linspace(start, stop - 1, min(TILES, stop - start)).astype(int)
            rows.append(np.asarray(bags.features[chosen], np.float64))
            place += [domain_of[s]] * len(chosen)
            label += [c] * len(chosen)
        bags.forget()
    scale, shift = np.ones((domains, bags.dim)), np.zeros((domains, bags.dim))
    if rows:
        present = np.unique(place)
        gamma, delta, mean = combat_estimates(np.concatenate(rows), np.array(place), np.array(label))
        scale[present] = 1 / delta
        shift[present] = mean - (mean + gamma) / delta
    return scale, shift


def combat_estimates(
    x: np.ndarray, domains: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of x (n, D): shift gamma (K, D) and scale delta (K, D) of every domain, sorted, and the grand mean (D,).

    Both are in the units of x; gamma averages 0 over the tiles. Features that are constant have gamma 0 and delta 1.
    """
    names, place = np.unique(domains, return_inverse=True)
    counts = np.bincount(place)
    batch = np.eye(len(names))[place]
    classes, which = np.unique(labels, return_inverse=True)
    design = np.concatenate([batch, np.eye(len(classes))[which][:, 1:]], 1)
    # lstsq copes with a label that is the domain's alone: its effect is then shared between both
    beta = np.linalg.lstsq(design, x, rcond=None)[0]
    mean = counts / counts.sum() @ beta[: len(names)]
    covariate = design[:, len(names) :] @ beta[len(names) :]
    spread = np.sqrt(np.mean((x - design @ beta) ** 2, axis=0))
    flat = spread < 1e-9
    spread = np.where(flat, 1.0, spread)
    z = (x - mean - covariate) / spread
    gamma, delta = np.empty((len(names), x.shape[1])), np.empty((len(names), x.shape[1]))
    for k in range(len(names)):
        gamma[k], delta[k] = _shrunk(z[place == k])
    gamma[:, flat], delta[:, flat] = 0.0, 1.0
    # what the covariates were given of the mean belongs to it: the harmonised features keep their grand mean
    return gamma * spread, np.maximum(delta, 1e-3), mean + covariate.mean(0)


def _shrunk(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Empirical-Bayes shift and scale (D,) of one domain's standardised tiles (n, D)."""
    n, found = len(z), z.mean(0)
    variance = z.var(0, ddof=1) if n > 1 else np.ones_like(found)
    if z.shape[1] < 2 or n < 2:
        return found, np.sqrt(variance)
    centre, spread = found.mean(), max(found.var(ddof=1), 1e-12)
    m, v = variance.mean(), max(variance.var(ddof=1), 1e-12)
    shape, rate = (2 * v + m * m) / v, (m * v + m**3) / v  # inverse gamma by moments
    gamma, square = found, variance
    for _ in range(ITERATIONS):
        new = (n * spread * found + square * centre) / (n * spread + square)
        total = ((z - new) ** 2).sum(0)
        fresh = (rate + total / 2) / (n / 2 + shape - 1)
        change = max(np.abs(new - gamma).max(), np.abs(fresh - square).max())
        gamma, square = new, fresh
        if change < TOLERANCE:
            break
    return gamma, np.sqrt(square)
