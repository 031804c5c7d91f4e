"""ABMIL and gated ABMIL: the bag is the attention-weighted mean of its tiles.

e = ReLU(W h), a = softmax(w . (tanh(V e) * sigmoid(U e))), logits = C sum(a e). Ilse, Tomczak, Welling,
"Attention-based deep multiple instance learning", ICML 2018, equations 7 to 9. Permutation invariant. `preset: paper`
has the published sizes.
"""

from __future__ import annotations

from torch import nn

from slidemake.mil.aggregators.attention import AttentionMIL
from slidemake.mil.aggregators.registration import aggregator


@aggregator("abmil_gated", gated=True)
@aggregator("abmil", gated=False)
class GatedABMIL(AttentionMIL):
    """hidden is L, attention the width of the gate; gated=False leaves out U (plain ABMIL)."""

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: int = 128,
        attention: int = 64,
        dropout: float = 0.25,
        gated: bool = True,
    ):
        super().__init__(features, outputs, hidden, attention, dropout, gated)
        self.classifier = nn.Linear(hidden, outputs)
