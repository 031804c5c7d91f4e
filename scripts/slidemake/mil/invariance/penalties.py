"""Penalties on what a batch of scans gives: hidden vectors (B, H), scores (B, K), and each scan's patient and domain.

Each returns exactly 0, without a gradient, where the batch has nothing to compare.

Score consistency and the cross-scanner InfoNCE are in the spirit of Henriksen et al. 2026 (arXiv 2602.22347), whose
equations are not public. CORAL: Sun, Saenko, ECCV workshops 2016. MMD: Gretton et al., JMLR 2012.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TEMPERATURE = 0.2  # of InfoNCE
SMALLEST = 2  # scans of a domain (and class) in a batch, from which its mean and covariance are compared


def nothing(x: Tensor) -> Tensor:
    return x.new_zeros(())


def score_consistency(scores: Tensor, patients: Tensor, domains: Tensor) -> Tensor:
    """Mean squared difference of scores over pairs of scans of one patient in two domains.

    scores (B, K): probabilities of classes (for two classes this is the squared difference of the positive's), of
    labels, or a standardised value. patients, domains (B,): numbers.
    """
    first, second = _pairs(patients, domains)
    if len(first) == 0:
        return nothing(scores)
    half = 2 if scores.shape[1] > 1 else 1
    return (scores[first] - scores[second]).square().sum(1).mean() / half


def _pairs(patients: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
    same = (patients[:, None] == patients) & (domains[:, None] != domains)
    first, second = same.triu(1).nonzero(as_tuple=True)
    return first, second


def info_nce(hidden: Tensor, patients: Tensor, domains: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross-scanner InfoNCE with all other scans of the patient as positives and the rest of the batch as negatives.

    On the very vector that the classifier reads: behind a projection head the vector could keep the scanner. It rewards
    telling patients apart, and large weights pay for consistency with the task: keep the weight below 0.1.
    """
    same = (patients[:, None] == patients) & (domains[:, None] != domains)
    anchors = same.any(1)
    if not anchors.any() or len(patients.unique()) < 2:
        return nothing(hidden)
    unit = torch.nn.functional.normalize(hidden, dim=1)
    logits = unit @ unit.T / temperature
    others = ~torch.eye(len(hidden), dtype=torch.bool, device=hidden.device)
    log_share = logits - logits.masked_fill(~others, float("-inf")).logsumexp(1, keepdim=True)
    each = -(log_share * same).sum(1)[anchors] / same.sum(1)[anchors]
    return each.mean()


def coral(hidden: Tensor, classes: Tensor, domains: Tensor) -> Tensor:
    """|mean - mean'|^2 + |cov - cov'|_F^2 / 4 H^2, mean over pairs of domains within a class.

    Within a class: where label and domain go together, aligning all would take the signal away.
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        gap = (x.mean(0) - y.mean(0)).square().sum()
        return gap + (_covariance(x) - _covariance(y)).square().sum() / (4 * x.shape[1] ** 2)

    return _within_class(hidden, classes, domains, distance)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def mmd(hidden: Tensor, classes: Tensor, domains: Tensor) -> Tensor:
    """Squared maximum mean discrepancy, mean over pairs of domains within a class.

    The kernel is the mean of three Gaussians with 0.5, 1 and 2 times the median distance of the pair's scans.
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y])
        squares = (both[:, None] - both).square().sum(2)
        off = ~torch.eye(len(both), dtype=torch.bool, device=x.device)
        width = squares.detach()[off].median().clamp_min(1e-12)
        kernel = torch.stack([torch.exp(-squares / (2 * width * f * f)) for f in (0.5, 1, 2)]).mean(0)
        n = len(x)
        return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()

    return _within_class(hidden, classes, domains, distance)


def _within_class(
    hidden: Tensor, classes: Tensor, domains: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    found = []
    for c in classes.unique().tolist():
        parts = [hidden[(classes == c) & (domains == d)] for d in domains[classes == c].unique().tolist()]
        parts = [part for part in parts if len(part) >= SMALLEST]
        found += [distance(a, b) for i, a in enumerate(parts) for b in parts[i + 1 :]]
    return torch.stack(found).mean() if found else nothing(hidden)


def effective_rank(hidden: Tensor) -> float:
    """exp(entropy) of the singular values' shares of centred vectors (B, H): how many directions are in use."""
    values = torch.linalg.svdvals((hidden - hidden.mean(0)).double())
    share = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
