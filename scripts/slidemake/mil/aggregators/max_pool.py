"""Max pooling: a linear classifier on the largest value of every standardised feature over the tiles.

z_d = max_i h_id. Attention is the share of features for which a tile is the largest (ties share). Permutation
invariant. A maximum grows with the number of tiles: models that draw a share of a bag's tiles in training
(`tile_fraction`) and take all of them to predict see larger values then; `tile_fraction: 1` avoids it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.base import Aggregator
from slidemake.mil.aggregators.registration import aggregator


@aggregator("max_pool", takes=())
class MaxPool(Aggregator):
    def __init__(self, features: int, outputs: int):
        super().__init__(features, outputs)
        self.classifier = nn.Linear(features, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.standardise(x),)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x,) = encoded
        if mask is not None:
            x = x.masked_fill(~mask[..., None], float("-inf"))
        pooled = x.amax(1)  # shares the gradient among equal tiles
        with torch.no_grad():
            largest = x == pooled[:, None]
            attention = (largest / largest.sum(1, keepdim=True)).mean(-1)
        return pooled, attention

    def removed(self, encoded: tuple[Tensor, ...], rows: slice) -> Tensor | None:
        """A feature's second largest value where the tile that goes held the largest."""
        (x,) = encoded
        top = x.topk(2, dim=0)
        index = torch.arange(len(x), device=x.device)[rows, None]
        return torch.where(index == top.indices[0], top.values[1], top.values[0])
