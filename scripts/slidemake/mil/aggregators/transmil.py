"""TransMIL: self-attention between tiles, with a class token and positions from the tissue.

Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole slide image classification",
NeurIPS 2021: tiles are projected, go through an attention layer, depthwise convolutions of 7, 5 and 3 over the square
into which they were laid, another attention layer and a layer norm; the class token is the bag. Attention is
Nystroem's (Xiong et al., AAAI 2021) with 256 landmarks, 6 iterations for the pseudo-inverse and a convolution of the
values over 33 tokens.

Two things differ from the paper. It lays tiles row by row into a square of ceil(sqrt(N)) a side, with the first tiles
again at the end, whatever the tissue's outline: tiles above each other there are neighbours in the tissue in a sixth of
the cases on a disc, and never on a core biopsy. Here the convolutions run over the slide's own grid (places: row and
column of each tile), of which empty cells are 0, and no tile comes twice; on a full square that is the same. Where no
places are known tiles lie row by row in a square. And where not all tiles of a bag are drawn in training, pieces of 256
neighbours are (`batches`), so that training sees the distances that prediction sees; `tile_fraction` is 1 unless it is
set. Up to 256 tokens attention is plain, of which Nystroem's is the approximation; landmarks are means of 256 runs of
tokens of nearly equal length, where the paper's code fills up with zeros. `preset: paper` has the published sizes.

NOT permutation invariant: the convolution of values and the landmarks follow the order of tiles (rows of the slide from
top to bottom). The attention reported is the class token's in the last layer, mean over heads, negative parts of the
approximation cut off. Bags of a batch are computed one by one, because each has its own tissue.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from slidemake.mil.aggregators.base import Aggregator, Learned, SeededDropout
from slidemake.mil.aggregators.registration import aggregator
from slidemake.mil.places import square_cells

REACH = 7  # of the widest convolution
LANDMARKS, ITERATIONS, HEADS = 256, 6, 8


@aggregator("transmil", takes=("hidden", "dropout"), in_order=True)
class TransMIL(Aggregator):
    placed = True

    def __init__(self, features: int, outputs: int, hidden: int = 128, dropout: float = 0.1):
        super().__init__(features, outputs)
        self.project = nn.Linear(features, hidden)
        self.token = Learned(1, hidden)
        self.first, self.second = AttentionLayer(hidden, dropout), AttentionLayer(hidden, dropout)
        self.position = nn.ModuleList(
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (REACH, 5, 3)
        )
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.standardised_linear(x, self.project)),)

    def pool(self, *encoded: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, places = encoded if len(encoded) == 2 else (encoded[0], None)
        attention, pooled = x.new_zeros(x.shape[:2]), []
        for i in range(len(x)):
            real = slice(None) if mask is None else mask[i]
            tiles = x[i][real]
            if places is None:
                known = torch.from_numpy(square_cells(len(tiles))).to(x.device, torch.int64)
            else:
                known = places[i][real]
            vector, attention[i, real] = self._bag(tiles, known)
            pooled.append(vector)
        return torch.stack(pooled), attention

    def _bag(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L) and (N, 2) -> class token (L,) and its attention (N,)."""
        tokens = self.first(torch.cat([self.token.value, x]))
        tokens = torch.cat([tokens[:1], self._neighbours(tokens[1:], places)])
        with torch.no_grad():
            weights = self.second.token_weights(tokens)[1:].clamp_min(0)
            total = weights.sum()
            weights = weights / total if total > 0 else torch.full_like(weights, 1 / len(x))
        return self.norm(self.second(tokens)[0]), weights

    def _neighbours(self, x: Tensor, places: Tensor) -> Tensor:
        """x + the three convolutions over the grid in which tile i lies at places[i]: only pairs of tiles that are
        there are computed, so that memory follows the tiles and not the extent of the tissue."""
        convolutions = [conv for conv in self.position if isinstance(conv, nn.Conv2d)]
        kernel, out = x.new_zeros(x.shape[1], REACH, REACH), x
        for conv in convolutions:
            kernel = kernel + pad(conv.weight[:, 0], [(REACH - conv.kernel_size[0]) // 2] * 4)
            assert conv.bias is not None
            out = out + conv.bias
        half = REACH // 2
        width = int(places[:, 1].max()) + 1 + 2 * half  # a row's end is no neighbour of the next one's beginning
        key = places[:, 0] * width + places[:, 1]
        ordered, order = key.sort()
        for row in range(-half, half + 1):
            for column in range(-half, half + 1):
                wanted = key + row * width + column
                at = torch.searchsorted(ordered, wanted).clamp_max(len(key) - 1)
                there = (ordered[at] == wanted).nonzero().flatten()
                if len(there):
                    beside = x[order[at[there]]] * kernel[:, row + half, column + half]
                    out.index_add_(0, there, beside)
        return out


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
