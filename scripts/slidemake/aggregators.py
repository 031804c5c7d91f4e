"""Aggregators: from the tiles of a bag to class logits, with an attention weight per tile.

Every aggregator takes features (B, N, D) with a mask (B, N) (True = a real tile) and returns logits (B, C) and
attention (B, N) that sums to 1 over the real tiles. Features are standardised inside the model with a mean and
deviation (buffers, so they travel with the weights) that `training` fits on training tiles. All are permutation
invariant.

Gated attention: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018, equations 7 to 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slidemake.linear import linear

CHUNK = 8192  # tiles that go through the projection at once at inference; bounds memory on slides with 1e5 tiles


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


class Aggregator(nn.Module):
    """Standardisation and the two steps that chunked inference and leave-one-out use: `encode` and `pool`."""

    feature_mean: Tensor  # (D,)
    feature_std: Tensor  # (D,)
    classifier: nn.Linear

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.feature_mean) / self.feature_std

    def standardised_linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """`layer(self.standardise(x))` with mean and deviation folded into the layer: W (x - m) / s + b is
        (W / s) x + (b - (W / s) m), which spares two passes over all tiles."""
        weight = layer.weight * self.feature_std.reciprocal()
        return linear(x, weight, layer.bias - weight @ self.feature_mean)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., N, D) features -> (..., N, L) tile embeddings and (..., N) attention scores before the softmax."""
        raise NotImplementedError

    def classify(self, pooled: Tensor) -> Tensor:
        """(..., L) bag embedding -> (..., C) logits."""
        raise NotImplementedError

    def pool(self, embedding: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        attention = scores.softmax(-1)
        return torch.einsum("...n,...nl->...l", attention, embedding), attention

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """features (B, N, D), mask (B, N) bool or None -> logits (B, C), attention (B, N). A bag needs one real
        tile.
        """
        embedding, scores = self.encode(features)
        pooled, attention = self.pool(embedding, scores, mask)
        return self.classify(pooled), attention

    def seed_dropout(self, seed: int, device: str | torch.device = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, SeededDropout):
                module.generator = generator


class GatedABMIL(Aggregator):
    """Attention pooling: e = ReLU(W h), a = softmax(w . (tanh(V e) * sigmoid(U e))), logits = C sum(a e).

    hidden is L, attention the width of the gate; gated=False leaves out U (plain ABMIL).
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: int = 128,
        attention: int = 64,
        dropout: float = 0.25,
        gated: bool = True,
    ):
        super().__init__(features, classes)
        self.project = nn.Linear(features, hidden)
        self.tanh = nn.Linear(hidden, attention)
        self.gate = nn.Linear(hidden, attention) if gated else None
        self.score = nn.Linear(attention, 1)
        self.classifier = nn.Linear(hidden, classes)
        self.drop = SeededDropout(dropout)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.drop(torch.relu(self.standardised_linear(x, self.project)))
        gated = torch.tanh(self.tanh(embedding))
        if self.gate is not None:
            gated = gated * torch.sigmoid(self.gate(embedding))
        return embedding, self.score(self.drop(gated)).squeeze(-1)

    def classify(self, pooled: Tensor) -> Tensor:
        return self.classifier(pooled)


class MeanPool(Aggregator):
    """Linear classifier on the mean standardised tile; attention is uniform. Also the form in which mean_pool_lr is
    kept.
    """

    def __init__(self, features: int, classes: int):
        super().__init__(features, classes)
        self.classifier = nn.Linear(features, classes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.standardise(x), x.new_zeros(x.shape[:-1])

    def classify(self, pooled: Tensor) -> Tensor:
        return self.classifier(pooled)


# name -> (class, fixed arguments); the names that configuration and bundles use
AGGREGATORS: dict[str, tuple[type[Aggregator], dict[str, Any]]] = {
    "abmil_gated": (GatedABMIL, {"gated": True}),
    "abmil": (GatedABMIL, {"gated": False}),
    "mean_pool": (MeanPool, {}),
}
PARAMETERS: dict[str, tuple[str, ...]] = {
    "abmil_gated": ("hidden", "attention", "dropout"),
    "abmil": ("hidden", "attention", "dropout"),
    "mean_pool": (),
}


def build_aggregator(
    name: str, features: int, classes: int, parameters: Mapping[str, Any], seed: int = 0
) -> Aggregator:
    """A freshly initialised aggregator; the same seed gives the same weights and leaves torch's global state alone."""
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}; one of {', '.join(AGGREGATORS)}")
    cls, fixed = AGGREGATORS[name]
    known = {k: parameters[k] for k in PARAMETERS[name] if k in parameters}
    model = cls(features, classes, **known, **fixed)
    _initialise(model, seed)
    model.seed_dropout(seed)
    return model


def _initialise(model: nn.Module, seed: int) -> None:
    # torch's own initialisation draws from the global generator, which parallel threads share: draw again from ours.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)


@torch.inference_mode()
def encode_bag(model: Aggregator, features: np.ndarray, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(N, D) features of one bag -> (N, L) embeddings and (N,) scores, chunk by chunk; model in eval mode."""
    device = model.feature_mean.device
    parts = [
        model.encode(torch.as_tensor(np.asarray(features[i : i + chunk], np.float32), device=device))
        for i in range(0, len(features), chunk)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.inference_mode()
def predict_bag(model: Aggregator, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features, N >= 1 -> logits (C,) and attention (N,), float64."""
    if len(features) == 0:
        raise ValueError("a bag without tiles has no prediction")
    was_training = model.training
    model.eval()
    embedding, scores = encode_bag(model, features)
    pooled, attention = model.pool(embedding, scores)
    logits = model.classify(pooled)
    model.train(was_training)
    return logits.double().cpu().numpy(), attention.double().cpu().numpy()


def log_odds(logits: Tensor, target: int) -> Tensor:
    """Log-odds of class `target` from (..., C) logits: with two classes simply their difference."""
    others = [c for c in range(logits.shape[-1]) if c != target]
    return logits[..., target] - torch.logsumexp(logits[..., others], -1)


@torch.inference_mode()
def leave_one_out(model: Aggregator, features: np.ndarray, target: int = 1) -> np.ndarray:
    """How much each tile adds to the log-odds of class `target`: with all tiles minus without that tile, (N,) float64.

    Positive = the tile speaks for the class. Exact and in one pass, because the rest renormalises:
    z_-i = (z - a_i e_i) / (1 - a_i). Where a_i > 0.5 (one tile at most) this cancels badly and the sum over the others
    is formed instead. A bag of one tile is compared with the empty bag, whose embedding is 0. Computed in float64.
    """
    was_training = model.training
    model.eval()
    embedding, scores = encode_bag(model, features)
    embedding, scores = embedding.double(), scores.double()
    attention = scores.softmax(0)
    pooled = attention @ embedding
    weight, bias = (p.double() for p in (model.classifier.weight, model.classifier.bias))

    def odds(z: Tensor) -> Tensor:
        return log_odds(z @ weight.T + bias, target)

    model.train(was_training)
    if len(scores) == 1:
        return (odds(pooled) - odds(torch.zeros_like(pooled))).reshape(1).cpu().numpy()
    rest = (1 - attention).clamp_min(1e-12)[:, None]
    without = torch.empty(len(scores), device=scores.device, dtype=torch.float64)
    for i in range(0, len(scores), CHUNK):
        s = slice(i, i + CHUNK)
        without[s] = odds((pooled - attention[s, None] * embedding[s]) / rest[s])
    top = int(attention.argmax())
    if attention[top] > 0.5:
        others = torch.arange(len(scores), device=scores.device) != top
        without[top] = odds(scores[others].softmax(0) @ embedding[others])
    return (odds(pooled) - without).cpu().numpy()
