"""Which positions stand for which part of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    (``image_grid_thw``), else a square where the number of tokens is one.
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
        runs = _runs(places)
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

    An image-shaped state is its own grid. In a sequence, the number of patches is that of the
    pixels' first convolution; where the first patch stands is measured: it is the first position
    that changes when the upper left corner of the picture changes.
    """
    pixels = inputs.get("pixel_values")
    layout = stack.layout
    if len(layout.positions) == 2:
        rows, columns = (shape[axis] for axis in layout.positions)
        return (rows, columns), tuple((i, i // columns, i % columns) for i in range(rows * columns))
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
        return NONE
    count = layout.count(shape)
    changed = _changed_positions(module, stack, inputs, pixels)
    if not changed:
        return NONE
    ratio = pixels.shape[2] / pixels.shape[3]
    first, last = changed[0], changed[-1]
    patches = last - first + 1
    rows = round(math.sqrt(patches * ratio))
    if rows < 1 or patches % rows or last >= count:
        return NONE
    columns = patches // rows
    return (rows, columns), tuple((first + i, i // columns, i % columns) for i in range(patches))


def _changed_positions(module: nn.Module, stack: Stack, inputs: Mapping[str, Any], pixels: torch.Tensor) -> list[int]:
    """Positions of the first block's input that follow the picture's first and last corner, in order.

    Positions that follow both (a class token after attention, say) stand for no patch.
    """
    moved: list[list[int]] = []
    base = _entering(module, stack, inputs)
    if base is None:
        return []
    for corner in ((slice(0, 1), slice(0, 1)), (slice(-1, None), slice(-1, None))):
        changed = pixels.clone()
        changed[..., corner[0], corner[1]] += 1.0
        state = _entering(module, stack, {**inputs, "pixel_values": changed})
        if state is None or state.shape != base.shape:
            return []
        gap = (stack.layout.rows(state) - stack.layout.rows(base)).abs().amax(1)
        moved.append([int(i) for i in (gap > 0).nonzero().flatten()])
    if not moved[0] or not moved[1]:
        return []
    first = [i for i in moved[0] if i not in moved[1]]
    last = [i for i in moved[1] if i not in moved[0]]
    return [first[0], last[-1]] if first and last else []


def _entering(module: nn.Module, stack: Stack, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first block's input, by a pass that stops there."""
    seen: list[torch.Tensor] = []

    def stop(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = hidden_input(args, kwargs)
        if given is not None:
            seen.append(given.detach().clone())
        raise StopForward

    with Taps() as taps, suppress(StopForward), torch.no_grad():
        taps.before(stack.blocks[0].module, stop)
        module(**inputs)
    last = first_tensor(stack.outputs[-1])
    assert last is not None
    return seen[0] if seen and seen[0].ndim == last.ndim else None
