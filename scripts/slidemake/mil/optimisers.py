"""What steps down the loss: AdamW, or what a paper used (`configuration.presets`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

OPTIMISERS = ("adamw", "adam", "lookahead_radam")


class LookaheadRAdam(torch.optim.RAdam):
    """Every k steps weights go back to alpha of the way that they went since (Zhang, Lucas, Hinton and Ba, NeurIPS
    2019, with their k = 5 and alpha = 0.5, around the rectified Adam of Liu et al., ICLR 2020)."""

    def __init__(self, parameters: Iterable[nn.Parameter], k: int = 5, alpha: float = 0.5, **settings: Any):
        super().__init__(parameters, **settings)
        self.k, self.alpha, self.steps = k, alpha, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for fast, behind in zip(group["params"], slow, strict=True):
                    behind.add_(fast - behind, alpha=self.alpha)
                    fast.copy_(behind)
        return found


def make_optimiser(parameters: list[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser of a model's settings. Fused where torch can: one call instead of a dozen per parameter, half of a
    step's time in models this small."""
    about: dict[str, Any] = {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}
    if settings["optimiser"] == "lookahead_radam":
        return LookaheadRAdam(parameters, **about)
    kind = torch.optim.Adam if settings["optimiser"] == "adam" else torch.optim.AdamW
    return kind(parameters, fused=True, **about)
