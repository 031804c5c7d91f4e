"""Scanners imitated in feature space: no pixels needed, and no re-scans.

mean_shift: z + a (mean of another domain - mean of its own), a uniform in 0..1, on half of the scans. MixStyle (Zhou et
al., ICLR 2021): a bag takes on a mixture of its own and another bag's mean and deviation of every feature, the share
drawn from Beta(0.1, 0.1), on half of the scans.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SHARE, CONCENTRATION = 0.5, 0.1


def mean_shift(x: Tensor, domains: np.ndarray, means: Tensor, rng: np.random.Generator) -> Tensor:
    """x (B, N, D); domains (B,), -1: unknown, left as it is; means (K, D), NaN for domains that are not trained on."""
    known = torch.isfinite(means).all(1).nonzero().flatten().numpy()
    shift = torch.zeros(len(x), x.shape[2], device=x.device)
    for b, domain in enumerate(domains):
        others = known[known != domain]
        use, amount, pick = rng.random(), rng.random(), rng.random()
        if use < SHARE and domain in known and len(others):
            target = means[others[int(pick * len(others))]]
            shift[b] = (amount * (target - means[domain])).to(x.device)
    return x + shift[:, None]


def mix_style(x: Tensor, mask: Tensor | None, rng: np.random.Generator) -> Tensor:
    """x (B, N, D), mask (B, N) or None. Padding is changed, too, and stays hidden."""
    real = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.to(x.dtype)
    count = real.sum(1)[:, None, None]
    mean = (x * real[..., None]).sum(1, keepdim=True) / count
    deviation = (((x - mean).square() * real[..., None]).sum(1, keepdim=True) / count + 1e-6).sqrt()
    other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    own = rng.beta(CONCENTRATION, CONCENTRATION, len(x))
    own[rng.random(len(x)) >= SHARE] = 1.0
    share = torch.from_numpy(own).to(x.dtype).to(x.device)[:, None, None]
    new_mean = share * mean + (1 - share) * mean[other]
    new_deviation = share * deviation + (1 - share) * deviation[other]
    return (x - mean) / deviation * new_deviation + new_mean
