"""Linear layers on the CPU through oneDNN.

PyTorch gives float32 matrix products to MKL, which leaves the AVX-512 units of processors that are not Intel's unused;
the oneDNN that PyTorch carries uses them wherever they are. On such a processor products of some size take less than
half of the time (docs/performance.md). Without AVX-512 they take about the same, but for the gradient of the weights,
which takes half as long again: there training leaves them to MKL. Sums are formed in another order: results differ from
MKL's in the last digits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64  # with fewer the call costs more than it saves
WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()  # units of 512 bits


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, D) @ weight (L, D).T + bias (L,), float32 on the CPU; no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            product(grad, weight.T) if wanted[0] else None,
            product(grad.T, x.T) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., D), weight (L, D), bias (L,) -> (..., L), as `torch.nn.functional.linear`; once differentiable."""
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows < ROWS or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    if not WIDE and torch.is_grad_enabled() and weight.requires_grad:
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return linear(x, self.weight, bias)


def use_onednn(model: nn.Module) -> int:
    """Make every linear layer of a model a `Linear`, in place; returns how many there were. Their weights stay."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = Linear
    return len(layers)
