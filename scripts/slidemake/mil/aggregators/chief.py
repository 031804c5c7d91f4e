"""CHIEF's attention head: gated attention computed on projected tiles, and applied to the tiles as they came.

Wang et al., "A pathology foundation model for cancer diagnosis and prognosis prediction", Nature 2024:
a = softmax(gated attention of ReLU(W h)), z = sum a_i h_i in the encoder's own space, logits = C z. The branch for the
organ is left out. CHIEF's own are 768 features of CTransPath; `preset: paper` has its other
sizes. Permutation invariant.
"""

from __future__ import annotations

from torch import Tensor, nn

from slidemake.mil.aggregators.attention import AttentionMIL
from slidemake.mil.aggregators.registration import aggregator


@aggregator("chief")
class CHIEFHead(AttentionMIL):
    def __init__(self, features: int, outputs: int, hidden: int = 128, attention: int = 64, dropout: float = 0.25):
        super().__init__(features, outputs, hidden, attention, dropout)
        self.classifier = nn.Linear(features, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.standardise(x), self.attend(self.embed(x))
