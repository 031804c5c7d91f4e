"""CLAM: gated attention with one branch (SB) or one per class (MB), and a clustering loss on its extreme tiles.

Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images", Nat Biomed Eng 2021.
For the true class, the B tiles with most attention are to be told from the B with least by a small classifier of that
class; with more than two classes the B top tiles of every other class are labelled as evidence against it. The loss of
that classifier is the smooth top-1 SVM (Berrada, Zisserman, Kumar, ICLR 2018; temperature and margin 1), and L = 0.7
L_bag + 0.3 L_instance. B = 8, and at most half of the tiles of a bag; bags of one tile have none. Permutation
invariant. Dropout falls on both branches of the gate, each by itself, as in the authors' code. Two classes are taken
for tissue with and without a finding; where both are findings the authors' option `subtyping` also labels the top tiles
of the other class as evidence against it, which is done here from three classes on. `preset: paper` has the published
sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidemake.mil.aggregators.attention import AttentionMIL
from slidemake.mil.aggregators.base import BagLoss, Batch, Step, masked_softmax
from slidemake.mil.aggregators.registration import aggregator

TILES = 8  # B
BAG_WEIGHT = 0.7  # c1


@aggregator("clam_sb", branches="single")
@aggregator("clam_mb", branches="multi")
class CLAM(AttentionMIL):
    """branches "single": attention and pooled vector are shared; "multi": each class has its own."""

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: int = 128,
        attention: int = 64,
        dropout: float = 0.25,
        branches: str = "single",
    ):
        super().__init__(features, outputs, hidden, attention, dropout, heads=outputs if branches == "multi" else 1)
        self.multi = branches == "multi"
        self.classifier = nn.Linear(hidden, outputs)
        self.instances = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(outputs))

    def attend(self, embedding: Tensor) -> Tensor:
        assert self.gate is not None
        return self.score(self.drop(torch.tanh(self.tanh(embedding))) * self.drop(torch.sigmoid(self.gate(embedding))))

    def classify(self, hidden: Tensor) -> Tensor:
        if not self.multi:
            return self.classifier(hidden)
        each = hidden.unflatten(-1, (self.outputs, -1))  # class c reads its own vector
        return (each * self.classifier.weight).sum(-1) + self.classifier.bias

    def step(self, batch: Batch, bag_loss: BagLoss) -> Step:
        encoded = self.encode(batch.features)
        pooled, _ = self.represent(encoded, batch.mask, batch.slides)
        logits = self.classify(pooled)
        loss = bag_loss(logits)
        if batch.labels is not None and self.outputs > 1:
            instance = self.instance_loss(encoded[0], encoded[1], batch.mask, batch.labels)
            loss = loss if instance is None else BAG_WEIGHT * loss + (1 - BAG_WEIGHT) * instance
        return Step(loss, logits, pooled)

    def instance_loss(self, embedding: Tensor, scores: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor | None:
        """Mean over the bags that have two tiles; None when there is none."""
        attention = masked_softmax(scores, mask)
        counts = [embedding.shape[1]] * len(embedding) if mask is None else mask.sum(1).tolist()
        losses = []
        for bag, (count, label) in enumerate(zip(counts, labels.tolist(), strict=True)):
            b = min(TILES, count // 2)
            if b == 0:
                continue
            found = [
                self._of_class(embedding[bag], attention[bag], count, b, c, c == label) for c in self._asked(label)
            ]
            losses.append(torch.stack(found).mean())
        return torch.stack(losses).mean() if losses else None

    def _asked(self, label: int) -> list[int]:
        return list(range(self.outputs)) if self.outputs > 2 else [label]

    def _of_class(self, embedding: Tensor, attention: Tensor, count: int, b: int, c: int, inside: bool) -> Tensor:
        order = attention[c if self.multi else 0].argsort(descending=True)  # padding has weight 0 and comes last,
        top, bottom = (
            order[:b],
            order[count - b : count],
        )  # ... unless a real tile's weight is 0 as well: `count` cuts it
        rows = torch.cat([top, bottom]) if inside else top
        truth = torch.zeros(len(rows), dtype=torch.long, device=embedding.device)
        truth[:b] = 1 if inside else 0
        return smooth_svm(self.instances[c](embedding[rows]), truth)


def smooth_svm(scores: Tensor, truth: Tensor) -> Tensor:
    """Smooth top-1 SVM, mean of log sum_j exp(1[j != y] + s_j - s_y); scores (n, C), truth (n,)."""
    margin = torch.ones_like(scores).scatter_(1, truth[:, None], 0.0)
    return (torch.logsumexp(scores + margin, 1) - scores.gather(1, truth[:, None])[:, 0]).mean()
