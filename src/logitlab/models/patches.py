"""Which positions stand for which part of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from logitlab.models.hooks import StopForward, Taps, first_tensor, hidden_input
from logitlab.models.output import configs_of
from logitlab.models.stack import Stack

Grid = tuple[tuple[int, int], tuple[tuple[int, int, int], ...]]
"""Rows and columns of the patches, and (position, row, column) of each."""

NONE: Grid = ((0, 0), ())


def token_patches(module: nn.Module, processor: Any, ids: Sequence[int], extra: Mapping[str, Any]) -> list[Grid]:
    """The patch grids of a text with image tokens in it, one for each picture; empty where there are none.

    The model's configuration names its image token. A grid is what the processor says
    (``image_grid_thw``), else a square where the number of tokens is one. A model that cuts a picture
    into tiles has a grid for each tile.
    """
    token = _image_token(module, processor)
    places = [i for i, token_id in enumerate(ids) if token_id == token]
    if token is None or not places:
        return []
    grids = extra.get("image_grid_thw")
    if isinstance(grids, torch.Tensor):
        merge = next((m for c in configs_of(_config(module)) if (m := getattr(c, "spatial_merge_size", None))), 1)
        sizes = [(int(t) * int(h) // merge, int(w) // merge) for t, h, w in grids.tolist()]
    else:
        runs = _pictures_apart(places, extra.get("pixel_values"))
        pixels = extra.get("pixel_values")
        if isinstance(pixels, torch.Tensor) and pixels.ndim >= 4 and pixels.shape[-1] != pixels.shape[-2]:
            return []  # not square, and nothing says how many patches stand in a line
        sizes = [(side, side) for run in runs if (side := math.isqrt(len(run))) ** 2 == len(run)]
        if len(sizes) != len(runs):
            return []
    if sum(r * c for r, c in sizes) != len(places):
        return []
    found: list[Grid] = []
    start = 0
    for rows, columns in sizes:
        part = places[start : start + rows * columns]
        found.append(((rows, columns), tuple((p, i // columns, i % columns) for i, p in enumerate(part))))
        start += rows * columns
    return found


def _pictures_apart(places: Sequence[int], pixels: Any) -> list[list[int]]:
    """The places of each picture: they lie side by side, or other tokens stand between them."""
    runs = _runs(places)
    many = len(pixels) if isinstance(pixels, torch.Tensor) and pixels.ndim == 4 else len(runs)
    if many == len(runs) or not many or len(places) % many:
        return runs
    size = len(places) // many
    return [list(places[i : i + size]) for i in range(0, len(places), size)]


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _image_token(module: nn.Module, processor: Any) -> int | None:
    names = ("image_token_id", "image_token_index")
    for source in (*configs_of(_config(module)), processor):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    return None


def _runs(places: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def state_patches(module: nn.Module, stack: Stack, inputs: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    """The patch grid of a vision stack's own positions.

    An image-shaped state is its own grid. In a sequence it is measured: a change in the picture's
    uppermost line of pixels moves the first row of patches, one in its leftmost line the first
    column. Where states are mixed before the stack begins (the last stage of Swin), all of them move;
    such blocks are told the grid, as two numbers whose product is the number of positions.
    """
    layout = stack.layout
    if len(layout.positions) == 2:
        rows, columns = (shape[axis] for axis in layout.positions)
        return _filled(rows, columns)
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        return NONE
    count = layout.count(shape)
    top, left = _moved_positions(module, stack, inputs, pixels)
    first = next((i for i in top if i in left), None)
    rows, columns = len(left), len(top)
    if first is not None and first + rows * columns <= count:
        in_rows = top == list(range(first, first + columns))
        if in_rows and left == list(range(first, first + rows * columns, columns)):
            return _filled(rows, columns, first)
    if top and left and len(top) * len(left) <= count:  # nothing is mixed yet
        return NONE  # the patches were seen, and they lie in another order
    return next((_filled(*pair) for pair in _told(module, stack, inputs) if math.prod(pair) == count), NONE)


def _filled(rows: int, columns: int, first: int = 0) -> Grid:
    """The grid whose patches are consecutive positions, line by line."""
    return (rows, columns), tuple((first + i, i // columns, i % columns) for i in range(rows * columns))


def _moved_positions(
    module: nn.Module, stack: Stack, inputs: Mapping[str, Any], pixels: torch.Tensor
) -> tuple[list[int], list[int]]:
    """Positions of the first block's input that follow the picture's uppermost, and its leftmost, line of pixels."""
    moved: tuple[list[int], list[int]] = ([], [])
    base = _entering(module, stack, inputs)
    if base is None:
        return moved
    for line, found in zip(((..., slice(0, 1), slice(None)), (..., slice(0, 1))), moved, strict=True):
        changed = pixels.clone()
        changed[line] += 1.0
        state = _entering(module, stack, {**inputs, "pixel_values": changed})
        if state is None or state.shape != base.shape:
            return [], []
        gap = (stack.layout.rows(state) - stack.layout.rows(base)).abs().amax(1)
        found += [int(i) for i in (gap > 0).nonzero().flatten()]
    return moved


def _entering(module: nn.Module, stack: Stack, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first block's input, by a pass that stops there."""
    args, kwargs = _arguments(module, stack.blocks[0].module, inputs)
    given = hidden_input(args, kwargs)
    last = first_tensor(stack.outputs[-1])
    assert last is not None
    return given.detach().clone() if given is not None and given.ndim == last.ndim else None


def _told(module: nn.Module, stack: Stack, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Pairs of whole numbers that the last block is given, in order."""
    args, kwargs = _arguments(module, stack.blocks[-1].module, inputs)
    values = [*args, *kwargs.values()]
    found = [tuple(v) for v in values if isinstance(v, list | tuple | torch.Size) and len(v) == 2]
    found += list(pairwise(values))
    return [(a, b) for a, b in found if type(a) is int and type(b) is int and a > 0]


def _arguments(
    module: nn.Module, block: nn.Module, inputs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with first, by a pass that stops there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise StopForward

    with Taps() as taps, suppress(StopForward), torch.no_grad():
        taps.before(block, stop)
        module(**inputs)
    return seen[0] if seen else ((), {})
