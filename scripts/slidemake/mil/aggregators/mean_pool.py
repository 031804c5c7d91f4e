"""Mean pooling: a linear classifier on the mean standardised tile.

Attention is uniform. Also the form in which mean_pool_lr, the regression fitted by scikit-learn, is kept in bundles.
"""

from __future__ import annotations

from torch import Tensor, nn

from slidemake.mil.aggregators.base import AttentionPool
from slidemake.mil.aggregators.registration import aggregator


@aggregator("mean_pool", takes=())
class MeanPool(AttentionPool):
    def __init__(self, features: int, outputs: int):
        super().__init__(features, outputs)
        self.classifier = nn.Linear(features, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.standardise(x), x.new_zeros((*x.shape[:-1], 1))
