"""Instance-linear MIL: every tile gets a score that is linear in its features, and the bag's output pools the scores.

t_i = w . x_i + c is computed tile by tile, so that the heatmap of t_i is the model itself, and a bag of one tile has
its tile's score as output (but for noisy-or). Pooling of the scores of N tiles:

    lse       (1 / r) log mean exp(r t_i), r = `sharpness`: between the mean (r -> 0) and the maximum (r -> infinity).
              Ramon and De Raedt, "Multi instance neural networks", 2000; Pinheiro and Collobert, CVPR 2015
    top       mean of the highest `share` of the tiles, of one at least
    mean      mean of all: the linear model on the mean tile
    noisy_or  log-odds of 1 - prod (1 - sigmoid(t_i)), for a bag brought to 100 tiles: the chance would otherwise grow
              with the number of tiles. Zhang, Platt and Viola, "Multiple instance boosting", NeurIPS 2005

On standardised features of an encoder a linear score has a thousand weights for thirty patients: it is meant for a few
whitened principal components (`scaling: whitened`). `evidence` says what single tiles may speak for: higher values of
what is predicted, lower ones, or both, each with scores of its own whose pooled difference is the output.
Permutation invariant. Attention is each tile's share in the pooled scores, of both sides in those for higher values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidemake.mil.aggregators.base import Aggregator
from slidemake.mil.aggregators.registration import aggregator

POOLINGS = ("lse", "top", "mean", "noisy_or")
SIDES = {"higher": (1.0,), "lower": (-1.0,), "both": (1.0, -1.0)}
OR_TILES = 100  # number of tiles to which noisy-or brings a bag


@aggregator("instance_linear", takes=("pooling", "sharpness", "share", "evidence", "falls", "contrast"))
class InstanceLinear(Aggregator):
    """falls: outputs fall with what is predicted. contrast: two classes share one output s, as logits -s / 2 and s / 2.

    M below is the number of a tile's scores: one for every side of every output (of both classes, with contrast).
    """

    signs: Tensor  # (M,)

    def __init__(
        self,
        features: int,
        outputs: int,
        pooling: str = "lse",
        sharpness: float = 3.0,
        share: float = 0.1,
        evidence: str = "higher",
        falls: bool = False,
        contrast: bool = False,
    ):
        super().__init__(features, outputs)
        if pooling not in POOLINGS or evidence not in SIDES or (contrast and outputs != 2):
            raise ValueError(f"no instance-linear model has pooling {pooling}, evidence {evidence}, {outputs} outputs")
        self.pooling, self.sharpness, self.share, self.contrast = pooling, sharpness, share, contrast
        sides, pooled = SIDES[evidence], 1 if contrast else outputs
        self.sides = len(sides)
        signs = torch.tensor(sides).repeat(pooled) * (-1 if falls else 1)
        self.register_buffer("signs", signs, persistent=False)
        self.scores = nn.Linear(features, len(self.signs))

    def start(self) -> None:
        """All tiles alike: what is learned first is what the mean tile says."""
        with torch.no_grad():
            self.scores.weight.zero_()
            self.scores.bias.fill_(-math.log(OR_TILES) if self.pooling == "noisy_or" else 0.0)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.standardised_linear(x, self.scores),)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (B, N, M) -> pooled scores (B, M)."""
        (t,) = encoded
        real = torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if mask is None else mask
        count, inside = real.sum(1, keepdim=True).to(t.dtype), real[..., None]
        if self.pooling == "lse":
            scaled = (self.sharpness * t).masked_fill(~inside, float("-inf"))
            return (scaled.logsumexp(1) - count.log()) / self.sharpness, self.shares(scaled.softmax(1))
        if self.pooling == "noisy_or":
            chance = F.softplus(t) * inside
            total = chance.sum(1)
            return _log_odds(OR_TILES * total / count), self.shares(chance / total[:, None])
        if self.pooling == "top":
            k = self.taken(count)
            order = t.masked_fill(~inside, float("-inf")).argsort(dim=1, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(1, order, _places(order))
            inside = inside & (place < k[..., None])
            count = k.to(t.dtype)
        weight = inside / count[..., None]
        return (weight * t).sum(1), self.shares(weight.expand_as(t))

    def shares(self, each: Tensor) -> Tensor:
        """(B, N, M) shares in every pooled score -> (B, N), mean over outputs."""
        return each[..., :: self.sides].mean(-1)

    def taken(self, count: Tensor) -> Tensor:
        """How many of so many tiles "the highest share" are: the half rounds up, one at least."""
        return (count * self.share + 0.5).floor().clamp_min(1).to(torch.long)

    def classify(self, hidden: Tensor) -> Tensor:
        each = (hidden * self.signs).unflatten(-1, (1 if self.contrast else self.outputs, -1)).sum(-1)
        return torch.cat([-each / 2, each / 2], -1) if self.contrast else each

    def tile_scores(self, features: Tensor) -> Tensor:
        """(N, D) features of a bag -> (N, O) what each tile says by itself: logits of a bag of that tile alone, for all
        poolings but noisy-or. Linear in the features."""
        return self.classify(self.encode(features)[0])

    def removed(self, encoded: tuple[Tensor, ...], rows: slice) -> Tensor | None:
        (t,) = encoded
        n, own = len(t), t[rows]
        if self.pooling == "lse":
            scaled = self.sharpness * t
            most = scaled.amax(0)
            rest = (scaled - most).exp().sum(0) - (self.sharpness * own - most).exp()
            return (rest.clamp_min(1e-30).log() + most - math.log(n - 1)) / self.sharpness
        if self.pooling == "noisy_or":
            return _log_odds(OR_TILES * (F.softplus(t).sum(0) - F.softplus(own)) / (n - 1))
        if self.pooling == "mean":
            return (t.sum(0) - own) / (n - 1)
        k = int(self.taken(torch.tensor(n - 1.0)))
        order = t.argsort(dim=0, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, _places(order[None])[0])[rows]
        best = t.sort(0, descending=True).values
        return torch.where(place < k, best[: k + 1].sum(0) - own, best[:k].sum(0)) / k

    def removed_by_hand(self, encoded: tuple[Tensor, ...]) -> Tensor:
        if self.pooling != "lse":
            return super().removed_by_hand(encoded)
        return ((self.sharpness * encoded[0]).softmax(0) > 0.5).any(1).nonzero().flatten()


def _places(order: Tensor) -> Tensor:
    """0, 1, 2 ... along dimension 1, in the shape of `order` (B, N, M)."""
    return torch.arange(order.shape[1], device=order.device)[None, :, None].expand_as(order)


def _log_odds(total: Tensor) -> Tensor:
    """Log-odds of 1 - exp(-total), total > 0: log(exp(total) - 1)."""
    total = total.clamp_min(1e-12)
    return total + torch.log(-torch.expm1(-total))
