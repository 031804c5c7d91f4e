"""Mean pooling and a perceptron with one hidden layer: logits = C ReLU(W mean(h)).

After SiMLP (arXiv 2502.20823), in which this simple head on a foundation model's mean tile was ahead of attention
models on a pan-cancer task. Permutation invariant; attention is uniform. Defaults: hidden 128, dropout 0.25.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.base import SeededDropout
from slidemake.mil.aggregators.mean_pool import MeanPool
from slidemake.mil.aggregators.registration import aggregator


@aggregator("mean_mlp", takes=("hidden", "dropout"))
class MeanMLP(MeanPool):
    def __init__(self, features: int, outputs: int, hidden: int = 128, dropout: float = 0.25):
        super().__init__(features, outputs)
        self.project = nn.Linear(features, hidden)
        self.classifier = nn.Linear(hidden, outputs)
        self.drop = SeededDropout(dropout)

    def readout(self, pooled: Tensor) -> Tensor:
        return self.drop(torch.relu(self.project(pooled)))
