"""Probabilities are right on average at any prevalence, though the loss weighs classes alike: a slice of
benchmarks/nominal_rates.py, and labels by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from slidemake.tasks.multilabel import MultilabelOutcome

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from nominal_rates import MODELS, predicted


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.7, 0.25, 0.05)])
def test_calibration_in_the_large_of_the_linear_control(shares):
    """Out of fold, 200 patients: the log-odds are off by less than their standard error; they were off by 2."""
    mean, large, area, brier, constant = predicted(0, shares, 200, MODELS["linear control"])
    positives = shares[-1] * 200
    assert abs(large) < np.sqrt(1 / positives + 1 / (200 - positives))
    assert mean == pytest.approx(shares[-1], abs=0.02)
    assert area > 0.6
    assert brier < constant


def test_labels_of_which_few_are_positive_or_known():
    """Logits that are right for labels as common as not: each label's mean probability is its share among the patients
    of whom it is known, and patients keep their order."""
    rng = np.random.default_rng(0)
    truth = (rng.random((500, 3)) < [0.05, 0.5, 0.2]).astype(int)
    outputs = 2 * (2 * truth - 1) + rng.normal(size=truth.shape) * 2
    truth[rng.random(truth.shape) < 0.2] = -1
    outcome = MultilabelOutcome(["a", "b", "c"])
    values = outcome.predict(outputs, outcome.link(outputs, list(truth), {}))
    for k in range(3):
        known = truth[:, k] >= 0
        assert values[known, k].mean() == pytest.approx(truth[known, k].mean(), abs=1e-6)
        assert (values[:, k].argsort() == outputs[:, k].argsort()).all()
