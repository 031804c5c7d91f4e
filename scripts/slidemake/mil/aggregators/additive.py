"""Additive MIL: the logits are a sum of what each tile contributes, so that a heatmap of contributions is exact.

Javed et al., "Additive MIL: intrinsically interpretable multiple instance learning for pathology", NeurIPS 2022:
logits = b + sum_i g(a_i e_i) with g = C ReLU(U .). U has no bias here: g(a e) = a g(e) then, and a bag's logits do not
grow with its number of tiles. Permutation invariant. Defaults as ABMIL's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.attention import AttentionMIL
from slidemake.mil.aggregators.registration import aggregator


@aggregator("additive")
class AdditiveMIL(AttentionMIL):
    def __init__(self, features: int, outputs: int, hidden: int = 128, attention: int = 64, dropout: float = 0.25):
        super().__init__(features, outputs, hidden, attention, dropout)
        self.evidence = nn.Linear(hidden, hidden, bias=False)
        self.classifier = nn.Linear(hidden, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        embedding = self.embed(x)
        return torch.relu(self.evidence(embedding)), self.attend(embedding)

    def contributions(self, features: Tensor) -> Tensor:
        """(N, D) features of a bag -> (N, O) what each tile adds to the logits; they sum to logits - bias."""
        evidence, scores = self.encode(features)
        return scores.softmax(0) * (evidence @ self.classifier.weight.T)
