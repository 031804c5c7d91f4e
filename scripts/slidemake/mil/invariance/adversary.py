"""Domain-adversarial training: a small classifier learns the domain from hidden vectors, and the model unlearns it.

Ganin et al., "Domain-adversarial training of neural networks", JMLR 2016 (DANN); Long et al., "Conditional adversarial
domain adaptation", NeurIPS 2018 (CDAN: the classifier sees the outer product of the vector and the predicted classes).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 32


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Identity forward, the gradient times -strength backward."""
    return _Reversed.apply(x, strength)


def schedule(progress: float) -> float:
    """2 / (1 + e^(-10 t)) - 1 over the course t = 0..1 of training."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class Adversary(nn.Module):
    """Tells the domain from hidden vectors (B, H), or with `scores` > 0 from their outer product with scores (B, K)."""

    def __init__(self, hidden: int, domains: int, scores: int, seed: int):
        super().__init__()
        self.conditional = scores > 0
        self.first, self.last = nn.Linear(hidden * max(1, scores), WIDTH), nn.Linear(WIDTH, domains)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.first, self.last):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden: Tensor, scores: Tensor, domains: Tensor, progress: float) -> Tensor:
        """Cross-entropy of the domain; adding it to the loss teaches the adversary, and reversed the model."""
        x = torch.nn.functional.layer_norm(hidden, hidden.shape[1:])  # so that the model cannot win by shrinking
        x = reverse_gradient(x, schedule(progress))
        if self.conditional:
            x = (x[:, :, None] * scores.detach()[:, None]).flatten(1)
        return torch.nn.functional.cross_entropy(self.last(torch.relu(self.first(x))), domains)
