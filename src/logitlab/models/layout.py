"""How a hidden state lies in memory: which axes are the batch, the positions and the features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

MOST_BATCH = 3
"""Largest batch of a template: a smaller leading axis of a flat state is a batch, not positions."""


@dataclass(frozen=True)
class Layout:
    """The axes of a hidden state.

    A text model's state is [batch, tokens, width]; an image model's may be [batch, channels, height,
    width]; a packed vision tower has [patches, width]; a model with several residual streams keeps
    [streams, batch, tokens, width], where streams and width together are the features.

    Attributes:
        batch: the batch axis, or None where the state has none.
        positions: axes that count positions.
        features: all other axes.
    """

    batch: int | None
    positions: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as batch, positions, features."""
        return (*(() if self.batch is None else (self.batch,)), *self.positions, *self.features)

    def width(self, shape: Sequence[int]) -> int:
        """Number of features at one position."""
        return math.prod(shape[axis] for axis in self.features)

    def count(self, shape: Sequence[int]) -> int:
        """Number of positions in one item of the batch."""
        return math.prod(shape[axis] for axis in self.positions)

    def batch_size(self, shape: Sequence[int]) -> int:
        """Number of items in the batch."""
        return 1 if self.batch is None else shape[self.batch]

    def rows(self, state: torch.Tensor) -> torch.Tensor:
        """A state as [batch x positions, width], positions in reading order."""
        return state.permute(self.order).reshape(-1, self.width(state.shape))

    def state(self, rows: torch.Tensor, like: Sequence[int]) -> torch.Tensor:
        """Rows [batch x positions, width] as a state of the shape ``like``; the inverse of `rows`."""
        order = self.order
        shaped = rows.reshape([like[axis] for axis in order])
        return shaped.permute([order.index(axis) for axis in range(len(order))])


def find_layout(shape: Sequence[int], lengths: Iterable[int], block: nn.Module) -> Layout | None:
    """The layout of a state of this shape; None where it cannot be told or is none.

    Args:
        shape: the state's shape on the template.
        lengths: numbers of tokens that the template put in; an axis of such a length counts positions.
        block: a block that the state goes through; its layers tell channels from pixels.
    """
    sizes, known = tuple(shape), set(lengths)
    if len(sizes) == 2:
        return Layout(None, (0,), (1,)) if sizes[0] > MOST_BATCH else None
    if len(sizes) == 3:
        if sizes[1] in known or sizes[0] not in known:
            last = _channels_last(block, sizes[1], sizes[2])
            return Layout(0, (1,), (2,)) if last or sizes[1] in known else Layout(0, (2,), (1,))
        return Layout(1, (0,), (2,))
    if len(sizes) != 4:
        return None
    token = next((axis for axis in range(3) if sizes[axis] in known), None)
    if token is not None:
        batch = next((axis for axis in (0, 1, 2) if axis != token and sizes[axis] <= MOST_BATCH), None)
        if batch is None:
            return None
        return Layout(batch, (token,), tuple(axis for axis in range(4) if axis not in (batch, token)))
    if _channels_last(block, sizes[1], sizes[3]):
        return Layout(0, (1, 2), (3,))
    return Layout(0, (2, 3), (1,))


def _channels_last(block: nn.Module, second: int, last: int) -> bool:
    """Whether features are on the last axis: what the block's layers are made for decides."""
    if second == last:
        return not any(isinstance(m, nn.Conv2d) for m in block.modules())
    for module in block.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            if second in (module.in_channels, module.out_channels):
                return False
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            if second == (module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features):
                return False
        elif isinstance(module, nn.Linear) and last in (module.in_features, module.out_features):
            return True
    return True
