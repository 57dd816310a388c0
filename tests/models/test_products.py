"""Gradients through oneDNN's product, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logitlab.models.products import QuickGradients, onednn

has = pytest.mark.skipif(onednn() is None, reason="this PyTorch comes without oneDNN")


def gradient(f: Any, x: torch.Tensor, quick: bool) -> tuple[torch.Tensor, torch.Tensor, str]:
    leaf = x.clone().requires_grad_(True)
    if quick:
        with QuickGradients():
            y = f(leaf)
    else:
        y = f(leaf)
    (found,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return y.detach(), found, type(y.grad_fn).__name__


@has
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (1, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    layer = torch.nn.Linear(12, 5, bias=bias).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y, found, name = gradient(layer, x, quick=True)
    expected_y, expected, _ = gradient(layer, x, quick=False)
    assert name == "_LinearBackward"
    assert torch.equal(y, expected_y)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@has
def test_layers_whose_weight_lies_the_other_way() -> None:
    """As GPT-2's do."""
    weight, bias = torch.randn(12, 5), torch.randn(5)
    x = torch.randn(7, 12)
    y, found, name = gradient(lambda v: torch.addmm(bias, v, weight), x, quick=True)
    expected_y, expected, _ = gradient(lambda v: torch.addmm(bias, v, weight), x, quick=False)
    assert name == "_LinearBackward"
    torch.testing.assert_close(y, expected_y, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@has
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_layer_gives(bias: bool) -> None:
    layer = torch.nn.Linear(12, 5, bias=bias)
    x = torch.randn(2, 7, 12)
    with torch.no_grad(), QuickGradients(forward=True):
        found, half = layer(x), torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16())
    torch.testing.assert_close(found, layer(x).detach(), atol=1e-6, rtol=1e-6)
    assert half.dtype == torch.bfloat16


@has
def test_what_it_leaves_alone() -> None:
    x = torch.randn(7, 12)
    asking = torch.nn.Linear(12, 5)
    assert gradient(asking, x, quick=True)[2] == "AddmmBackward0"
    wide = torch.nn.Linear(12, 5).double().requires_grad_(False)
    y, found, name = gradient(wide, x.double(), quick=True)
    assert name == "AddmmBackward0"
    assert (y.dtype, found.dtype) == (torch.float64, torch.float64)
    fixed = torch.nn.Linear(12, 5).requires_grad_(False)
    residual = torch.randn(7, 5, requires_grad=True)
    with QuickGradients():
        y = torch.addmm(residual, x.clone().requires_grad_(True), torch.randn(12, 5))
    assert torch.autograd.grad(y.sum(), residual)[0].sum() == residual.numel()  # what is added has a gradient too
    with torch.autocast("cpu", torch.bfloat16):
        assert gradient(fixed, x, quick=True)[0].dtype == torch.bfloat16
    with QuickGradients():
        assert fixed(x).grad_fn is None
        by_name = torch.nn.functional.linear(input=x.requires_grad_(True), weight=fixed.weight, bias=fixed.bias)
    assert torch.equal(by_name, fixed(x))
