"""Watch the wanted sites of a forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from torch import nn

from logitlab.models.decompose import Projection
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps, first_tensor, hidden_input

Key = tuple[int, str]
"""A layer and a kind of site."""


def projection_of(model: Model, key: Key) -> Projection | None:
    """The map that turns what is captured at heads or neurons into what they write; None at other kinds."""
    layer, kind = key
    if kind not in ("head_out", "neuron"):
        return None
    return {"head_out": model.parts[layer].heads, "neuron": model.parts[layer].neurons}.get(kind)


def watch(model: Model, keys: Sequence[Key], keep: Callable[..., None], taps: Taps) -> None:
    """Have ``keep(key, value, scale)`` called at every wanted site.

    A module that several blocks share is told apart by counting its calls.
    """
    wanted: dict[int, list[str]] = defaultdict(list)
    for layer, kind in keys:
        wanted[layer].append(kind)
    layers_of: dict[int, list[int]] = defaultdict(list)
    for layer, block in enumerate(model.stack.blocks):
        layers_of[id(block.module)].append(layer)
    for layers in layers_of.values():
        if any(layer in wanted for layer in layers):
            _attach_block(model, layers, wanted, keep, taps)


OTHER = -1
"""Stands for a call of a block's module that is not part of the stack."""


def _attach_block(
    model: Model, layers: list[int], wanted: dict[int, list[str]], keep: Callable[..., None], taps: Taps
) -> None:
    module = model.stack.blocks[layers[0]].module
    layer_of = {model.stack.blocks[layer].call: layer for layer in layers}
    calls = count()
    current = [OTHER]

    def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[0] = layer_of.get(next(calls), OTHER)  # a module may also be called outside of the stack
        if "resid_pre" in wanted.get(current[0], ()):
            keep((current[0], "resid_pre"), hidden_input(args, kwargs))

    def leave(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if "resid_post" in wanted.get(current[0], ()):
            keep((current[0], "resid_post"), first_tensor(output))

    taps.before(module, enter)
    for kind in {kind for layer in layers for kind in wanted.get(layer, [])}:
        for part, takers in _modules(model, layers, kind).items():
            taps_input = kind in ("head_out", "neuron")
            hook = _input_hook if taps_input else _output_hook
            (taps.before if taps_input else taps.after)(part, hook(kind, takers, current, wanted, keep))
    taps.after(module, leave)


def _modules(model: Model, layers: list[int], kind: str) -> dict[nn.Module, dict[int, float]]:
    """The modules to hook for a kind, each with the layers it serves and their scales."""
    modules: dict[nn.Module, dict[int, float]] = defaultdict(dict)
    if kind in ("resid_pre", "resid_post"):
        return modules
    for layer in layers:
        projection = projection_of(model, (layer, kind))
        component = model.parts[layer].components.get(kind)
        if projection is not None:
            modules[projection.module][layer] = 1.0
        elif component is not None:
            modules[component.module][layer] = component.scale
    return modules


def _output_hook(
    kind: str, scales: dict[int, float], current: list[int], wanted: dict[int, list[str]], keep: Callable[..., None]
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = current[0]
        if layer in scales and kind in wanted[layer]:
            keep((layer, kind), first_tensor(output), scales[layer])

    return hook


def _input_hook(
    kind: str, scales: dict[int, float], current: list[int], wanted: dict[int, list[str]], keep: Callable[..., None]
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = current[0]
        if layer in scales and kind in wanted[layer]:
            keep((layer, kind), hidden_input(args, kwargs))

    return hook
