"""ILRA-MIL: tiles talk to each other through a few learned latent vectors, then a learned query pools them.

Xiang, Zhang, "Exploring low-rank property in multiple instance learning for whole slide image classification", ICLR
2023. A gated attention block is H = A(L, X), X' = A(X, H) with r latent vectors L and A(Q, K) the multi-head attention
with residual, layer norms and feed-forward, times a gate SiLU(G Q); two blocks, r = 64, 8 heads. The query's attention
over the tiles, mean of its heads, is what is reported. Permutation invariant; cost grows with the number of tiles
times r. `preset: paper` has the published sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from slidemake.mil.aggregators.base import Aggregator, Learned, SeededDropout
from slidemake.mil.aggregators.registration import aggregator

LATENTS, BLOCKS, HEADS = 64, 2, 8


@aggregator("ilra", takes=("hidden", "dropout"))
class ILRA(Aggregator):
    def __init__(self, features: int, outputs: int, hidden: int = 128, dropout: float = 0.25):
        super().__init__(features, outputs)
        self.project = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(LowRankBlock(hidden) for _ in range(BLOCKS))
        self.query = Learned(1, hidden)
        self.pooling = GatedAttention(hidden, gated=False)
        self.classifier = nn.Linear(hidden, outputs)
        self.drop = SeededDropout(dropout)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.drop(torch.relu(self.standardised_linear(x, self.project))),)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x,) = encoded
        for block in self.blocks:
            x = block(x, mask)
        query = self.query.value.expand(len(x), -1, -1)
        return self.pooling(query, x, mask)[:, 0], self.pooling.weights(query, x, mask)[:, 0]


class LowRankBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.latents = Learned(LATENTS, hidden)
        self.gather, self.spread = GatedAttention(hidden), GatedAttention(hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        latents = self.gather(self.latents.value.expand(len(x), -1, -1), x, mask)
        return self.spread(x, latents, None)


class GatedAttention(nn.Module):
    """Multi-head attention of q (B, M, L) on k (B, N, L) with residual, norms, feed-forward and gate."""

    def __init__(self, hidden: int, gated: bool = True):
        super().__init__()
        self.heads = math.gcd(hidden, HEADS)
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out, self.forward_layer = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.first_norm, self.second_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.gate = nn.Linear(hidden, hidden) if gated else None

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        asked = self.q(q)
        heads = scaled_dot_product_attention(
            self._split(asked),
            self._split(self.k(k)),
            self._split(self.v(k)),
            attn_mask=None if mask is None else mask[:, None, None],
        )
        x = self.first_norm(asked + self.out(heads.transpose(1, 2).flatten(2)))
        x = self.second_norm(x + torch.relu(self.forward_layer(x)))
        return x if self.gate is None else x * nn.functional.silu(self.gate(q))

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """(B, M, N) weights of the same attention, mean over heads."""
        asked, keys = self._split(self.q(q)), self._split(self.k(k))
        scores = asked @ keys.transpose(2, 3) / keys.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(-1).mean(1)
