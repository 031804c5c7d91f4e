"""Aggregators of a dozen features."""

from __future__ import annotations

import numpy as np
import torch
from slidemake.mil.aggregators import build_aggregator

SMALL = {"hidden": 16, "attention": 8}


def model_of(name, classes=2, dim=12, seed=0):
    model = build_aggregator(name, dim, classes, SMALL, seed).eval()
    model.feature_mean.copy_(torch.linspace(-1, 1, dim))
    model.feature_std.copy_(torch.linspace(0.5, 2, dim))
    return model


def tiles(n, dim=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
