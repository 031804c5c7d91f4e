"""Attention scores of tiles, the part that ABMIL, CLAM, DTFD, additive MIL and CHIEF's head have in common.

Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018, equations 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.base import AttentionPool, SeededDropout


class AttentionMIL(AttentionPool):
    """e = ReLU(W h) and K scores s = w (tanh(V e) * sigmoid(U e)) per tile; gated=False leaves out U.

    hidden is L, attention the width of the gate, heads is K.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: int,
        attention: int,
        dropout: float,
        gated: bool = True,
        heads: int = 1,
    ):
        super().__init__(features, outputs)
        self.project = nn.Linear(features, hidden)
        self.tanh = nn.Linear(hidden, attention)
        self.gate = nn.Linear(hidden, attention) if gated else None
        self.score = nn.Linear(attention, heads)
        self.drop = SeededDropout(dropout)

    def embed(self, x: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, L)."""
        return self.drop(torch.relu(self.standardised_linear(x, self.project)))

    def attend(self, embedding: Tensor) -> Tensor:
        """(..., N, L) -> (..., N, K) scores before the softmax."""
        gated = torch.tanh(self.tanh(embedding))
        if self.gate is not None:
            gated = gated * torch.sigmoid(self.gate(embedding))
        return self.score(self.drop(gated))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        embedding = self.embed(x)
        return embedding, self.attend(embedding)
