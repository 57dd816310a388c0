"""Weights as plain tensors, also where a model keeps them in another form: quantised, or off-loaded.

Two conventions are followed, and no package is imported for them. A quantised weight is a tensor
subclass with ``dequantize`` and, for its parts, ``__tensor_flatten__`` (torchao). An off-loaded weight is a
parameter on the meta device whose module has a hook with a ``weights_map`` (accelerate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (torch.Tensor, nn.Parameter)


def dense(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """A parameter of a module as a plain floating-point tensor; None if there is none, or it cannot be had.

    A quantised weight is given dequantised, in float32 if its kind can do that: its numbers are scales
    times small integers, which 8 bits of mantissa do not hold. An off-loaded weight is given as its store
    gives it; of a safetensors file that is a mapped tensor, which is read from disk where it is used.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        return None
    found = _opened(weight.detach()) if weight.device.type != "meta" else _brought(module, name)
    return found if found is not None and found.is_floating_point() and type(found) in PLAIN else None


def _opened(weight: torch.Tensor) -> torch.Tensor | None:
    """A weight without quantisation."""
    given: Any = weight
    if type(given) in PLAIN:
        return given
    try:
        return given.dequantize(torch.float32)
    except TypeError:  # it has one dtype to give
        pass
    except (NotImplementedError, RuntimeError, AttributeError):
        return None
    try:
        return given.dequantize()
    except (NotImplementedError, RuntimeError, AttributeError):
        return None


def _brought(module: nn.Module, name: str) -> torch.Tensor | None:
    """An off-loaded weight from the place where it is kept."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):  # several hooks are kept as one with a list
        store = getattr(part, "weights_map", None)
        try:
            found = None if store is None else store[name]
        except (KeyError, OSError):
            continue
        if isinstance(found, torch.Tensor) and found.device.type != "meta":
            return found.detach()
    return None


def stored(module: nn.Module, name: str) -> list[torch.Tensor]:
    """The plain tensors that a parameter consists of, in a fixed order; empty if they cannot be had."""
    weight = getattr(module, name)
    found = _brought(module, name) if weight.device.type == "meta" else weight.detach()
    return [] if found is None else _parts(found)


def _parts(value: torch.Tensor) -> list[torch.Tensor]:
    if type(value) in PLAIN:
        return [value]
    inner: Any = value
    try:
        names = inner.__tensor_flatten__()[0]
    except (AttributeError, NotImplementedError):
        return []
    return [part for name in names for part in _parts(getattr(inner, name))]
