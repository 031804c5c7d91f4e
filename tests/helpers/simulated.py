"""Predictions of simulated cohorts with subgroups."""

from __future__ import annotations

import numpy as np
from slidemake.statistics.temperature import probabilities
from slidemake.tasks.prediction_table import Predictions


def simulate(n=160, groups=2, weaker=0.0, repeats=2, seed=0, temperature=1.0):
    """Scores with a signal of 2 that is `weaker` in the last group; true logits divided by `temperature`."""
    rng = np.random.default_rng(seed)
    labels, group = np.arange(n) % 2, (np.arange(n) // 2) % groups
    score = rng.normal(size=n) + np.where(group == groups - 1, 2 - weaker, 2.0) * (labels - 0.5)
    logit = 2 * score[None] + 0.2 * rng.normal(size=(repeats, n))
    logits = np.stack([-logit / 2, logit / 2], -1) * temperature
    prob = probabilities(logits, temperature)
    patients = tuple(f"P{i:03d}" for i in range(n))
    sites = tuple("ABCDEFGH"[g] for g in group)
    fold = np.repeat(np.arange(n)[None] % 4, repeats, 0)
    return Predictions(
        "m", ("n", "t"), patients, sites, labels, tuple(range(repeats)), prob, prob.argmax(2), fold, logits
    )


def by_group(p):
    return dict(zip(p.patients, p.sites, strict=True))
