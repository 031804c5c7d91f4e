"""Predictions of simulated cohorts with subgroups."""

from __future__ import annotations

import numpy as np
from slidemake.evaluation.evaluate import evaluate_tables
from slidemake.statistics.temperature import probabilities
from slidemake.tasks.base import Predictions
from slidemake.tasks.class_predictions import ClassPredictions
from slidemake.tasks.classes import ClassOutcome


def as_table(p: ClassPredictions) -> Predictions:
    """The same as predictions of a task of classes, out of fold."""
    decided = np.where(p.predicted < 0, np.nan, p.predicted)[..., None].astype(float)
    truth = np.asarray(p.labels, float)[:, None]
    validation = p.validation and {
        at: (prob, labels[:, None].astype(float)) for at, (prob, labels) in p.validation.items()
    }
    about = (p.name, ClassOutcome(p.classes), p.patients, p.sites, truth, p.repeats)
    return Predictions(*about, p.prob, decided, p.fold, validation, p.logits)


def evaluate_classes(models, *args, **more):
    """metrics.json and curves.json of predictions of classes."""
    return evaluate_tables([as_table(model) for model in models], *args, **more)


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
    return ClassPredictions(
        "m", ("n", "t"), patients, sites, labels, tuple(range(repeats)), prob, prob.argmax(2), fold, logits
    )


def by_group(p):
    return dict(zip(p.patients, p.sites, strict=True))
