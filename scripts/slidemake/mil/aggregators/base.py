"""What all aggregators share: the interface, standardisation of features, dropout with a generator of its own.

An aggregator takes features (B, N, D) with a mask (B, N) (True = a real tile) and returns logits (B, O) and attention
(B, N) that sums to 1 over the real tiles. It does so in three steps, which a method overrides as it needs:

    encode    tile by tile, so that large bags go through in chunks: features -> tensors of one row per tile
    pool      those tensors and the mask -> pooled vector (B, P) and attention (B, N)
    classify  `readout(pooled)`, the vector that the last layer reads -> logits (B, O)

`step` is what training calls: a method with a loss of its own (instances, pseudo-bags) overrides it. What the O outputs
mean (classes, risks, thresholds) is the task's business. Features are standardised inside the model with a mean, a
deviation and, where the model works on principal components, axes (buffers, so they travel with the weights) that
`scaling` takes from training tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slidemake.core.onednn import linear


class SeededDropout(nn.Module):
    """Dropout that draws from its own generator, so that models trained in parallel threads stay reproducible."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        # Four 16-bit numbers from every word drawn: `bernoulli_` draws one each, and was a ninth of a training step.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: x.numel()].view(x.shape)
        keep = (bits >= round(self.p * 65536) - 32768).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p))


class Learned(nn.Module):
    """A learned tensor that belongs to no layer (a token, latent vectors, a query)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))


class Batch(NamedTuple):
    """Bags of one training step: features (B, N, D), mask (B, N) where something was padded, labels (B,) class indices
    where the task has classes, the number of each tile's slide within its bag (B, N) where attention asks for it, and
    row and column (B, N, 2) of each tile where the method looks at neighbours.
    """

    features: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    slides: Tensor | None = None
    places: Tensor | None = None


BagLoss = Callable[[Tensor], Tensor]  # logits (B, O) -> scalar


class Step(NamedTuple):
    """Of one training batch: the method's loss, logits (B, O), and the vectors (B, H) that the last layer reads."""

    loss: Tensor
    logits: Tensor
    hidden: Tensor


class Aggregator(nn.Module):
    """The interface; see the head of this file. `features` is D, `outputs` is O. Built for K components it becomes a
    model of D features by `set_scaling`."""

    feature_mean: Tensor  # (D,)
    feature_std: Tensor  # (D,)
    feature_axes: Tensor | None  # (D, K)
    domain_scale: Tensor | None
    domain_shift: Tensor | None
    classifier: nn.Linear
    placed = False  # whether `pool` takes the tiles' places besides, as the last of `encoded`

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.outputs = outputs
        self.slide_scores: nn.Module | None = None  # attention over slides (`registry.build_aggregator`)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("feature_axes", None)
        self.register_buffer("domain_scale", None)  # (K + 1, D), see `set_domains`
        self.register_buffer("domain_shift", None)

    def start(self) -> None:
        """Set weights that a method does not want to be random; called once they have been drawn."""

    def set_scaling(self, mean: Any, std: Any, axes: Any = None) -> None:
        """Mean and deviation (D,) and axes (D, K), arrays or tensors: the model's layers see K numbers of a tile."""
        device, dtype = self.feature_mean.device, self.feature_mean.dtype
        for name, value in (("mean", mean), ("std", std), ("axes", axes)):
            if value is not None:
                value = torch.as_tensor(value, dtype=dtype, device=device).clone()
            setattr(self, f"feature_{name}", value)

    def set_domains(self, scale: Tensor, shift: Tensor) -> None:
        """Scale and shift (K, D) that harmonise the features of K domains; kept with a last row for all others."""
        self.domain_scale = torch.cat([scale, torch.ones_like(scale[:1])]).to(self.feature_mean.device)
        self.domain_shift = torch.cat([shift, torch.zeros_like(shift[:1])]).to(self.feature_mean.device)

    def harmonise(self, x: Tensor, domains: Tensor) -> Tensor:
        """x (..., D) of domains (...): x scale + shift; -1, an unknown domain, and models without them: as it is."""
        if self.domain_scale is None or self.domain_shift is None:
            return x
        return x * self.domain_scale[domains] + self.domain_shift[domains]

    def standardise(self, x: Tensor) -> Tensor:
        x = (x - self.feature_mean) / self.feature_std
        return x if self.feature_axes is None else x @ self.feature_axes

    def standardised_linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """`layer(self.standardise(x))` with mean, deviation and axes folded into the layer: W (x - m) / s + b is
        (W / s) x + (b - (W / s) m), which spares two passes over all tiles."""
        weight = layer.weight if self.feature_axes is None else layer.weight @ self.feature_axes.T
        weight = weight * self.feature_std.reciprocal()
        return linear(x, weight, layer.bias - weight @ self.feature_mean)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., N, D) features -> tensors (..., N, *), each row from its own tile only."""
        raise NotImplementedError

    def encode_placed(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:
        """`encode` and, where the method asks for them and they are known, places (..., N, 2): row and column."""
        return (*self.encode(x), places) if self.placed and places is not None else self.encode(x)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tensors (B, N, *) of `encode` -> pooled (B, P) and attention (B, N). A bag needs one real tile."""
        raise NotImplementedError

    def readout(self, pooled: Tensor) -> Tensor:
        """(..., P) pooled -> (..., H), what the last layer reads."""
        return pooled

    def classify(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., O) logits."""
        return self.classifier(hidden)

    def logits(self, pooled: Tensor) -> Tensor:
        return self.classify(self.readout(pooled))

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        slides: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """features (B, N, D), mask (B, N) bool or None -> logits (B, O), attention (B, N).

        slides (B, N): number of each tile's slide within its bag, for models with attention over slides. places
        (B, N, 2): row and column of each tile, for those that look at neighbours.
        """
        pooled, attention = self.represent(self.encode_placed(features, places), mask, slides)
        return self.logits(pooled), attention

    def represent(
        self, encoded: tuple[Tensor, ...], mask: Tensor | None = None, slides: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`pool`, over all tiles of a bag or, where the model has attention over slides, slide by slide."""
        if slides is None or self.slide_scores is None:
            return self.pool(*encoded, mask=mask)
        return pool_slides(self, encoded, mask, slides)

    def step(self, batch: Batch, bag_loss: BagLoss) -> Step:
        """A training step's loss; bag_loss is the task's."""
        pooled, _ = self.represent(self.encode_placed(batch.features, batch.places), batch.mask, batch.slides)
        hidden = self.readout(pooled)
        logits = self.classify(hidden)
        return Step(bag_loss(logits), logits, hidden)

    def removed(self, encoded: tuple[Tensor, ...], rows: slice) -> Tensor | None:
        """Pooled vectors (n, P) of one bag without each of its tiles `rows`, where the method has a closed form.

        encoded: tensors (N, *). None: no closed form. Tiles in `removed_by_hand` are recomputed.
        """
        return None

    def removed_by_hand(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Indices of the few tiles for which the closed form of `removed` does not hold, or cancels badly."""
        return torch.empty(0, dtype=torch.long)

    def seed_dropout(self, seed: int, device: str | torch.device = "cpu") -> None:
        """Give everything random in training (dropout, pseudo-bags) one generator of its own."""
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            if hasattr(module, "generator"):
                setattr(module, "generator", generator)  # noqa: B010 (nn.Module's types know no generators)


class AttentionPool(Aggregator):
    """Pooling by K weighted means: pooled_k = sum_i a_ki e_i with a_k = softmax over tiles of the scores.

    `encode` gives embeddings (..., N, L) and scores (..., N, K); pooled is (B, K L), attention the mean over k.
    """

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        embedding, scores = encoded
        attention = masked_softmax(scores, mask)
        return torch.einsum("bkn,bnl->bkl", attention, embedding).flatten(1), attention.mean(1)

    def removed(self, encoded: tuple[Tensor, ...], rows: slice) -> Tensor | None:
        """The rest renormalises: z_-i = (z - a_i e_i) / (1 - a_i)."""
        embedding, scores = encoded
        attention = scores.softmax(0)  # (N, K)
        pooled = attention.T @ embedding  # (K, L)
        a = attention[rows, :, None]
        return ((pooled - a * embedding[rows, None]) / (1 - a).clamp_min(1e-12)).flatten(1)

    def removed_by_hand(self, encoded: tuple[Tensor, ...]) -> Tensor:
        return (encoded[1].softmax(0) > 0.5).any(1).nonzero().flatten()


class GatedScores(nn.Module):
    """Gated attention scores (..., M) of vectors (..., M, L), without their projection."""

    def __init__(self, width: int, attention: int):
        super().__init__()
        self.tanh, self.gate = nn.Linear(width, attention), nn.Linear(width, attention)
        self.score = nn.Linear(attention, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.tanh(x)) * torch.sigmoid(self.gate(x))).squeeze(-1)


def pool_slides(
    model: Aggregator, encoded: tuple[Tensor, ...], mask: Tensor | None, slides: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over slides: each slide is pooled by itself into z_s, b = softmax_s(score(z_s)), and the bag is
    sum b_s z_s. A tile's attention is b_s times its attention within its slide. A bag of one slide is as `pool` has it.
    """
    assert model.slide_scores is not None
    real = torch.ones_like(slides, dtype=torch.bool) if mask is None else mask
    vectors, inside, present = [], [], []
    for s in range(int(slides.max()) + 1):
        member = (slides == s) & real
        has = member.any(1)
        if not has.any():
            continue
        pooled, attention = model.pool(*(e[has] for e in encoded), mask=member[has])
        vectors.append(pooled.new_zeros((len(slides), pooled.shape[1])).index_put((has,), pooled))
        inside.append(attention.new_zeros(slides.shape).index_put((has,), attention))
        present.append(has)
    stacked = torch.stack(vectors, 1)  # (B, S, P)
    scores = model.slide_scores(stacked).masked_fill(~torch.stack(present, 1), float("-inf"))
    weights = scores.softmax(1)[:, None]
    return (weights @ stacked)[:, 0], (weights @ torch.stack(inside, 1))[:, 0]


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, K) scores -> (B, K, N) weights that sum to 1 over the real tiles and are 0 elsewhere."""
    scores = scores.transpose(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1)
