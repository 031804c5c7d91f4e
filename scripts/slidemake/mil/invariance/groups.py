"""What is minimised over groups of scans: the worst (GroupDRO) or mean and variance (V-REx) instead of the mean.

Sagawa et al., "Distributionally robust neural networks", ICLR 2020; Krueger et al., "Out-of-distribution generalization
via risk extrapolation", ICML 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GroupDRO:
    """Weights of groups that grow with their loss: q_g proportional to q_g exp(eta loss_g)."""

    def __init__(self, groups: int, eta: float):
        self.eta, self.q = eta, torch.full((groups,), 1 / groups)

    def loss(self, losses: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
        """losses (B,) of a batch -> sum over its groups of q_g times the group's (weighted) mean loss."""
        present, means = group_means(losses, groups, weights)
        self.q = self.q.to(losses.device)
        self.q[present] *= torch.exp(self.eta * means.detach())
        self.q /= self.q.sum()
        share = self.q[present] / self.q[present].sum()
        return (share * means).sum()


def vrex(losses: Tensor, domains: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Mean over domains of their losses, plus beta times the variance between them (none with one domain)."""
    _, means = group_means(losses, domains, weights)
    return means.mean() + beta * means.var(unbiased=False)


def group_means(losses: Tensor, groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Groups in the batch, sorted, and their weighted mean losses."""
    present, place = groups.unique(return_inverse=True)
    member = (place == torch.arange(len(present), device=losses.device)[:, None]) * weights
    return present, member @ losses / member.sum(1)
