"""DTFD-MIL: a bag is split into pseudo-bags, each is pooled, and a second attention pools what they gave.

Zhang et al., "DTFD-MIL: double-tier feature distillation multiple instance learning", CVPR 2022, with the attention
feature of each pseudo-bag handed on (AFS) and 4 pseudo-bags. Both tiers learn from the bag's label, each from its own
loss: what the second tier loses does not train the first, as with the two optimisers of the authors. In training the
tiles are dealt at random. To predict they are dealt in the order of their attention scores, so that the outcome does
not depend on chance or on the order of tiles. A bag with fewer tiles than pseudo-bags leaves some empty, which weigh
nothing. Permutation invariant when predicting. `preset: paper` has the published sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.attention import AttentionMIL
from slidemake.mil.aggregators.base import Aggregator, BagLoss, Batch, GatedScores, Step
from slidemake.mil.aggregators.registration import aggregator

PSEUDO_BAGS = 4


@aggregator("dtfd")
class DTFD(AttentionMIL):
    def __init__(self, features: int, outputs: int, hidden: int = 128, attention: int = 64, dropout: float = 0.25):
        super().__init__(features, outputs, hidden, attention, dropout)
        self.first = nn.Linear(hidden, outputs)  # the first tier's classifier
        self.second = GatedScores(hidden, attention)
        self.classifier = nn.Linear(hidden, outputs)
        self.generator: torch.Generator | None = None  # deals tiles to pseudo-bags

    # pooling by pseudo-bags is no weighted mean with fixed weights
    removed = Aggregator.removed
    removed_by_hand = Aggregator.removed_by_hand

    def distil(self, embedding: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Pseudo-bags' vectors (B, M, L), the attention inside them (B, M, N), and whether they have tiles (B, M)."""
        scores = scores[..., 0]
        if self.training:
            place = torch.rand(scores.shape, generator=self.generator, device=scores.device)
        else:
            place = -scores.detach()
        if mask is not None:
            place = place.masked_fill(~mask, float("inf"))
        rank = place.argsort(dim=1, stable=True).argsort(dim=1)
        member = rank[:, None] % PSEUDO_BAGS == torch.arange(PSEUDO_BAGS, device=scores.device)[:, None]
        if mask is not None:
            member = member & mask[:, None]
        filled = member.any(-1)
        within = scores[:, None].masked_fill(~member, float("-inf")).masked_fill(~filled[..., None], 0.0)
        attention = within.softmax(-1) * filled[..., None]
        return attention @ embedding, attention, filled

    def combine(self, vectors: Tensor, attention: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.second(vectors).masked_fill(~filled, float("-inf")).softmax(-1)
        return (weights[:, None] @ vectors)[:, 0], (weights[:, None] @ attention)[:, 0]

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.combine(*self.distil(encoded[0], encoded[1], mask))

    def step(self, batch: Batch, bag_loss: BagLoss) -> Step:
        if batch.slides is not None and self.slide_scores is not None:  # slides are the bags then
            return super().step(batch, bag_loss)
        embedding, scores = self.encode(batch.features)
        vectors, attention, filled = self.distil(embedding, scores, batch.mask)
        pooled, _ = self.combine(vectors.detach(), attention, filled)
        logits = self.classify(pooled)
        known = torch.where(filled[..., None], vectors, vectors[:, :1])  # the first has a tile in every bag
        first = self.first(known)
        loss = torch.stack([bag_loss(first[:, m]) for m in range(PSEUDO_BAGS)]).mean()
        return Step(loss + bag_loss(logits), logits, pooled)
