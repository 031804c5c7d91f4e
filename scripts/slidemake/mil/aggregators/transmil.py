"""TransMIL: self-attention between tiles, with a class token and positions from a square into which tiles are laid.

Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole slide image classification",
NeurIPS 2021: tiles are projected, laid row by row into a square of ceil(sqrt(N)) a side (the first tiles again at the
end), and go through an attention layer, depthwise convolutions of 7, 5 and 3 over the square, another attention layer
and a layer norm; the class token is the bag. Attention is Nystroem's (Xiong et al., AAAI 2021) with 256 landmarks, 6
iterations for the pseudo-inverse and a convolution of the values over 33 tokens. Up to 256 tokens it is plain
attention, of which Nystroem's is the approximation; landmarks are means of 256 runs of tokens of nearly equal length,
where the paper's code fills up with zeros. The paper's sizes: hidden 512, learning rate 2e-4.

NOT permutation invariant: positions are the tiles' order (rows of the slide from top to bottom), not the tissue's
geometry. The attention reported is the class token's in the last layer, mean over heads, negative parts of the
approximation cut off. Bags of a batch are computed one by one, because each has its own square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from slidemake.mil.aggregators.base import Aggregator, Learned, SeededDropout
from slidemake.mil.aggregators.registration import aggregator

LANDMARKS, ITERATIONS, HEADS = 256, 6, 8


@aggregator("transmil", takes=("hidden", "dropout"), in_order=True)
class TransMIL(Aggregator):
    def __init__(self, features: int, outputs: int, hidden: int = 128, dropout: float = 0.1):
        super().__init__(features, outputs)
        self.project = nn.Linear(features, hidden)
        self.token = Learned(1, hidden)
        self.first, self.second = AttentionLayer(hidden, dropout), AttentionLayer(hidden, dropout)
        self.position = nn.ModuleList(nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (7, 5, 3))
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.standardised_linear(x, self.project)),)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (x,) = encoded
        found = [self._bag(x[i] if mask is None else x[i][mask[i]]) for i in range(len(x))]
        attention = x.new_zeros(x.shape[:2])
        for i, (_, weights) in enumerate(found):
            attention[i, slice(None) if mask is None else mask[i]] = weights
        return torch.stack([pooled for pooled, _ in found]), attention

    def _bag(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L) -> class token (L,) and its attention (N,)."""
        n = len(x)
        side = math.isqrt(n - 1) + 1
        tokens = self.first(torch.cat([self.token.value, x, x[: side * side - n]]))
        square = tokens[1:].T.reshape(1, -1, side, side)
        square = square + sum(conv(square) for conv in self.position)
        tokens = torch.cat([tokens[:1], square.flatten(2)[0].T])
        with torch.no_grad():
            weights = self.second.token_weights(tokens)[1:].clamp_min(0)
            again = weights[n:]
            weights = weights[:n].clone()
            weights[: len(again)] += again
            total = weights.sum()
            weights = weights / total if total > 0 else torch.full_like(weights, 1 / n)
        return self.norm(self.second(tokens)[0]), weights


class AttentionLayer(nn.Module):
    """x + attention(norm(x)) on tokens (n, L)."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.heads = math.gcd(hidden, HEADS)
        self.norm, self.qkv = nn.LayerNorm(hidden), nn.Linear(hidden, 3 * hidden, bias=False)
        self.values = nn.Conv2d(self.heads, self.heads, (33, 1), padding=(16, 0), groups=self.heads, bias=False)
        self.out, self.drop = nn.Linear(hidden, hidden), SeededDropout(dropout)

    def _split(self, tokens: Tensor) -> list[Tensor]:
        """q, k, v, each (1, heads, n, L / heads)."""
        return [
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
            for part in self.qkv(self.norm(tokens)).chunk(3, -1)
        ]

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self._split(tokens)
        if q.shape[2] <= LANDMARKS:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            few_q, few_k = landmarks(q), landmarks(k)
            middle = pseudo_inverse(_weights(few_q, few_k))
            mixed = scaled_dot_product_attention(q, few_k, middle @ scaled_dot_product_attention(few_q, k, v))
        mixed = mixed + self.values(v)
        return tokens + self.drop(self.out(mixed[0].transpose(0, 1).flatten(1)))

    def token_weights(self, tokens: Tensor) -> Tensor:
        """(n,) attention of the first token, mean over heads."""
        q, k, _ = self._split(tokens)
        if q.shape[2] <= LANDMARKS:
            return _weights(q[:, :, :1], k).mean(1)[0, 0]
        few_q, few_k = landmarks(q), landmarks(k)
        row = _weights(q[:, :, :1], few_k) @ pseudo_inverse(_weights(few_q, few_k))
        heads = [row[0, h] @ _weights(few_q[0, h], k[0, h]) for h in range(self.heads)]  # one at a time: (256, n) each
        return torch.cat(heads).mean(0)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


def landmarks(x: Tensor) -> Tensor:
    """(1, heads, n, d) -> (1, heads, 256, d): means of runs of tokens."""
    n = x.shape[2]
    run = torch.arange(n, device=x.device) * LANDMARKS // n
    total = x.new_zeros((*x.shape[:2], LANDMARKS, x.shape[3])).index_add(2, run, x)
    return total / torch.bincount(run, minlength=LANDMARKS)[:, None]


def pseudo_inverse(x: Tensor) -> Tensor:
    """Moore-Penrose inverse of square matrices by the iteration of Razavi et al. (2014), as Nystroemformer uses it."""
    size = x.abs()
    z = x.transpose(-2, -1) / (size.sum(-1).amax(-1) * size.sum(-2).amax(-1))[..., None, None]
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        xz = x @ z
        z = z @ (13 * one - xz @ (15 * one - xz @ (7 * one - xz))) / 4
    return z
