"""Watch the wanted sites of a forward pass, or change what is there."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from logitlab.errors import InputError
from logitlab.models.decompose import Projection
from logitlab.models.handle import Model
from logitlab.models.hooks import Taps, first_tensor, hidden_input, with_hidden
from logitlab.models.interfere import active

Key = tuple[int, str]
"""A layer and a kind of site."""


def projection_of(model: Model, key: Key) -> Projection | None:
    """The map that turns what is captured at heads or neurons into what they write; None at other kinds."""
    layer, kind = key
    if kind not in ("head_out", "neuron"):
        return None
    return {"head_out": model.parts[layer].heads, "neuron": model.parts[layer].neurons}.get(kind)


def watch(
    model: Model, keys: Sequence[Key], keep: Callable[..., torch.Tensor | None], taps: Taps, *, edit: bool = False
) -> None:
    """Have ``keep(key, value, scale)`` called at every wanted site.

    A module that several blocks share is told apart by counting its calls. That holds for one pass, unless ``edit``.

    Args:
        model: the model.
        keys: layers and kinds of the sites.
        keep: is given the state as it is in memory; at heads and neurons the input of their projection. What the site
            means is ``scale`` times the value.
        taps: what the hooks are put on with.
        edit: whether what ``keep`` returns takes the value's place, in any number of passes. At heads and neurons it is
            then given what the projection gives as well, ``keep(key, output, scale, given)``, and that is exchanged.
    """
    changed = {key for work in active(model.module) for key in work.changes} if not edit else set[Key]()
    wanted: dict[int, list[str]] = defaultdict(list)
    for layer, kind in keys:
        if kind in ("head_out", "neuron") and (layer, kind) in changed:
            raise InputError(
                f"{kind} of layer {layer} is being changed, and what is read there would be what it was before: read "
                "attn_out or mlp_out, which have the change in them"
            )
        wanted[layer].append(kind)
    layers_of: dict[int, list[int]] = defaultdict(list)
    for layer, block in enumerate(model.stack.blocks):
        layers_of[id(block.module)].append(layer)
    for layers in layers_of.values():
        if any(layer in wanted for layer in layers):
            _attach_block(model, layers, wanted, keep, taps, edit)


OTHER = -1
"""Stands for a call of a block's module that is not part of the stack."""


class _Here(threading.local):
    """Which call of a block's module is being made, in each thread."""

    calls = 0
    layer = OTHER


def _attach_block(
    model: Model,
    layers: list[int],
    wanted: dict[int, list[str]],
    keep: Callable[..., torch.Tensor | None],
    taps: Taps,
    edit: bool,
) -> None:
    module = model.stack.blocks[layers[0]].module
    layer_of = {model.stack.blocks[layer].call: layer for layer in layers}
    here = _Here()
    alone = len(layers) == 1 and model.stack.blocks[layers[0]].call == 0

    def begin(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here.calls = 0

    def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (edit and alone):
            here.layer = layer_of.get(here.calls, OTHER)  # a module may also be called outside of the stack
            here.calls += 1
        else:  # in any number of passes, whoever begins them
            here.layer = layers[0]
        if "resid_pre" in wanted.get(here.layer, ()):
            given = hidden_input(args, kwargs)
            return _exchanged_input(args, kwargs, given, keep((here.layer, "resid_pre"), given))
        return None

    def leave(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if "resid_post" in wanted.get(here.layer, ()):
            return _exchanged(output, keep((here.layer, "resid_post"), first_tensor(output)))
        return None

    if edit:
        taps.before(model.module, begin)
    taps.before(module, enter)
    for kind in dict.fromkeys(kind for layer in layers for kind in wanted.get(layer, [])):
        for part, takers in _modules(model, layers, kind).items():
            projected = kind in ("head_out", "neuron")
            if projected and not edit:
                taps.before(part, _input_hook(kind, takers, here, wanted, keep))
            else:
                taps.after(part, _output_hook(kind, takers, here, wanted, keep, both=projected))
    taps.after(module, leave)


def _exchanged(output: Any, value: torch.Tensor | None) -> Any:
    return None if value is None else with_hidden(output, value)


def _exchanged_input(args: tuple[Any, ...], kwargs: dict[str, Any], old: Any, value: torch.Tensor | None) -> Any:
    if value is None:
        return None
    return (
        tuple(value if item is old else item for item in args),
        {name: value if item is old else item for name, item in kwargs.items()},
    )


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
    kind: str,
    scales: dict[int, float],
    here: _Here,
    wanted: dict[int, list[str]],
    keep: Callable[..., torch.Tensor | None],
    *,
    both: bool,
) -> Any:
    """A hook that keeps what a module gives; ``both``: with what it was given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layer = here.layer
        if layer in scales and kind in wanted[layer]:
            given = (hidden_input(args, kwargs),) if both else ()
            return _exchanged(output, keep((layer, kind), first_tensor(output), scales[layer], *given))
        return None

    return hook


def _input_hook(
    kind: str,
    scales: dict[int, float],
    here: _Here,
    wanted: dict[int, list[str]],
    keep: Callable[..., torch.Tensor | None],
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = here.layer
        if layer in scales and kind in wanted[layer]:
            keep((layer, kind), hidden_input(args, kwargs))

    return hook
