"""Quicker float32 products on processors, for gradients by states.

PyTorch multiplies float32 matrices with MKL, which on some processors leaves half of their vector units idle; oneDNN,
which comes with PyTorch too, does not. Both sum in float32; only the order differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@cache
def onednn() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """OneDNN's product ``a @ b.T`` of float32 matrices, or None where PyTorch comes without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(2, 2)
        multiply(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return lambda a, b: multiply(a, b, None, "none", [], "")


class QuickGradients(TorchFunctionMode):
    """While it is active, linear layers with fixed weights give gradients by their input with oneDNN's product.

    Args:
        forward: whether they use it for what they give as well, where no gradient is asked for. The last bits are then
            not those of the model's own code: for fitting, which rounds more than that, not for reading.
    """

    def __init__(self, *, forward: bool = False) -> None:
        super().__init__()
        self.forward = forward

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and onednn() is not None:
            given: Any = (*args, None)[:3] if len(args) > 1 else (None, None, None)
            x, weight, bias = given
            if self.forward and not kwargs and not torch.is_grad_enabled() and _plain(x, weight, bias):
                multiply = onednn()
                assert multiply is not None
                return multiply(x, weight) if bias is None else multiply(x, weight) + bias
            if not kwargs and _suits(x, weight, bias):
                return _Linear.apply(x, weight, bias)
        elif func is torch.addmm and onednn() is not None and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if _suits(x, weight, bias):
                return _Linear.apply(x, weight.t(), bias)
        return func(*args, **kwargs)


def _suits(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the weights are fixed and the input asks for a gradient."""
    if not _plain(x, weight, bias) or (bias is not None and bias.requires_grad):
        return False
    return x.requires_grad and not weight.requires_grad


def _plain(x: Any, weight: Any, bias: Any) -> bool:
    """Whether these are plain float32 numbers of a processor."""
    if torch.is_autocast_enabled("cpu") or (bias is not None and bias.ndim != 1):
        return False
    return (
        isinstance(x, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.ndim == 2
    )


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias``, with a gradient by ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        multiply = onednn()
        assert multiply is not None
        return multiply(gradients[0], weight.t()), None, None
