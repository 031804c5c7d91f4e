"""DSMIL: one stream finds the critical tile of every class, the other attends to the tiles that resemble it.

Li, Li, Eliceiri, "Dual-stream multiple instance learning network", CVPR 2021. c_i = W h_i, m = argmax_i c_i per class,
q_i = tanh(Q2 ReLU(Q1 h_i)), a_i = softmax_i(q_i . q_m / sqrt(d)), B = sum a_i h_i, logits = (max_i c_i + F(B)) / 2 with
F over the vectors of all classes. Training gives each stream half of the loss. Permutation invariant; values are the
features themselves. One thing differs from the paper, which has one output with a sigmoid where there are two classes,
and a sigmoid for each where there are more: here each class has an output, two classes have two, with a softmax over
them, so that the negative class has a critical tile, too. `preset: paper` has the published sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.base import Aggregator, BagLoss, Batch, Step, masked_softmax
from slidemake.mil.aggregators.registration import aggregator


@aggregator("dsmil", takes=("attention",))
class DSMIL(Aggregator):
    def __init__(self, features: int, outputs: int, attention: int = 64):
        super().__init__(features, outputs)
        self.instance = nn.Linear(features, outputs)
        self.query = nn.Sequential(
            nn.Linear(features, attention), nn.ReLU(), nn.Linear(attention, attention), nn.Tanh()
        )
        self.classifier = nn.Linear(outputs * features, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.standardise(x)
        return self.instance(x), self.query(x), x

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """pooled: [largest instance scores (O), B of every class (O D)]."""
        scores, query, x = encoded
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], float("-inf"))
        largest, critical = scores.max(1)  # (B, O)
        asked = query.gather(1, critical[..., None].expand(-1, -1, query.shape[-1]))
        attention = masked_softmax(query @ asked.transpose(1, 2) / query.shape[-1] ** 0.5, mask)  # (B, O, N)
        pooled = torch.einsum("bcn,bnd->bcd", attention, x).flatten(1)
        return torch.cat([largest, pooled], 1), attention.mean(1)

    def streams(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return pooled[..., : self.outputs], self.classifier(pooled[..., self.outputs :])

    def classify(self, hidden: Tensor) -> Tensor:
        return torch.add(*self.streams(hidden)) / 2

    def step(self, batch: Batch, bag_loss: BagLoss) -> Step:
        pooled, _ = self.represent(self.encode(batch.features), batch.mask, batch.slides)
        largest, bag = self.streams(pooled)
        return Step((bag_loss(largest) + bag_loss(bag)) / 2, (largest + bag) / 2, pooled)

    def _attention(self, encoded: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        largest, critical = encoded[0].max(0)
        query = encoded[1]
        return largest, critical, (query @ query[critical].T / query.shape[-1] ** 0.5).softmax(0)

    def removed(self, encoded: tuple[Tensor, ...], rows: slice) -> Tensor | None:
        """Without a tile that is critical for no class only the weights renormalise."""
        largest, _, attention = self._attention(encoded)
        x = encoded[2]
        a = attention[rows, :, None]
        rest = (attention.T @ x - a * x[rows, None]) / (1 - a).clamp_min(1e-12)
        return torch.cat([largest.expand(len(a), -1), rest.flatten(1)], 1)

    def removed_by_hand(self, encoded: tuple[Tensor, ...]) -> Tensor:
        _, critical, attention = self._attention(encoded)
        return torch.cat([critical, (attention > 0.5).any(1).nonzero().flatten()]).unique()
