"""Linear layers through oneDNN: values and gradients are those of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slidemake.core.onednn import ROWS, linear


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (ROWS - 1, 5), (ROWS, 5), (3, 50, 7), (2, 2, 40, 3)])
def test_values_and_gradients_are_those_of_float64(shape, wide, monkeypatch):
    monkeypatch.setattr("slidemake.core.onednn.WIDE", wide)  # with and without AVX-512
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn((4, shape[-1]), generator=generator)
    bias, upstream = torch.randn(4, generator=generator), torch.randn((*shape[:-1], 4), generator=generator)
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    got, expected = linear(*ours), F.linear(*exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    # a transposed gradient, as pooling hands it down, is not contiguous
    got.backward(upstream.transpose(0, -1).contiguous().transpose(0, -1))
    expected.backward(upstream.double())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=2e-5)


def test_only_what_is_asked_for_has_a_gradient():
    x, weight, bias = torch.ones(ROWS, 3), torch.ones(2, 3, requires_grad=True), torch.zeros(2)
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, torch.full((2, 3), float(ROWS)))
    with torch.inference_mode():
        assert linear(x, weight, bias).shape == (ROWS, 2)


def test_other_types_take_pytorchs_own_way():
    x = torch.ones(ROWS, 3, dtype=torch.float64)
    assert linear(x, x[:2], x[0, :2]).dtype == torch.float64
