"""The axes of hidden states: rows and states are each other's inverse, and what layers are made for decides."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from logitlab.models.layout import Layout, find_layout

LAYOUTS = {
    "batch, tokens, width": Layout(0, (1,), (2,)),
    "tokens, batch, width": Layout(1, (0,), (2,)),
    "batch, width, frames": Layout(0, (2,), (1,)),
    "batch, channels, height, width": Layout(0, (2, 3), (1,)),
    "batch, height, width, channels": Layout(0, (1, 2), (3,)),
    "tokens, width": Layout(None, (0,), (1,)),
    "streams, batch, tokens, width": Layout(1, (2,), (0, 3)),
    "batch, tokens, streams, width": Layout(0, (1,), (2, 3)),
}

_SIZE = st.integers(1, 5)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(_SIZE, _SIZE, _SIZE, _SIZE))
def test_rows_and_states_are_inverse(name: str, sizes: tuple[int, ...]) -> None:
    layout = LAYOUTS[name]
    shape = sizes[: len(layout.order)]
    state = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    rows = layout.rows(state)
    assert rows.shape == (layout.batch_size(shape) * layout.count(shape), layout.width(shape))
    assert torch.equal(layout.state(rows, shape), state)
    assert torch.equal(layout.rows(layout.state(rows, shape)), rows)
    # every value, by its own indices: batch outermost, then positions in reading order; features in theirs
    expected: dict[tuple[int, int], float] = {}
    for index in itertools.product(*map(range, shape)):
        item = 0 if layout.batch is None else index[layout.batch]
        place = feature = 0
        for axis in layout.positions:
            place = place * shape[axis] + index[axis]
        for axis in layout.features:
            feature = feature * shape[axis] + index[axis]
        expected[item * layout.count(shape) + place, feature] = float(state[index])
    assert {(i, j): float(rows[i, j]) for i, j in itertools.product(*map(range, rows.shape))} == expected


def test_rows_of_a_state_that_is_not_contiguous() -> None:
    state = torch.randn(2, 7, 5).transpose(1, 2)  # [2, 5, 7] as a model's permute leaves it
    rows = LAYOUTS["batch, tokens, width"].rows(state)
    assert torch.equal(rows[5 + 3], state[1, 3])


class Mixed(nn.Module):
    """Modules side by side; never called."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


@pytest.mark.parametrize(
    ("shape", "lengths", "parts", "expected"),
    [
        # three axes: the one with the template's length counts positions
        ((1, 7, 32), {7}, (nn.Linear(32, 32),), "batch, tokens, width"),
        ((7, 1, 32), {7}, (nn.Linear(32, 32),), "tokens, batch, width"),
        ((1, 7, 7), {7}, (nn.Linear(7, 7),), "batch, tokens, width"),
        ((1, 5, 32), {7, 5}, (nn.Linear(32, 64),), "batch, tokens, width"),
        # ... and without one what the layers are made for
        ((1, 17, 32), set(), (nn.Linear(32, 96),), "batch, tokens, width"),
        ((1, 17, 32), set(), (nn.LayerNorm(32),), "batch, tokens, width"),
        ((1, 32, 17), set(), (nn.Conv1d(32, 32, 3),), "batch, width, frames"),
        ((1, 32, 17), set(), (nn.BatchNorm1d(32),), "batch, width, frames"),
        ((1, 32, 17), set(), (nn.GroupNorm(4, 32),), "batch, width, frames"),
        ((3, 17, 32), set(), (nn.Linear(32, 32),), "batch, tokens, width"),
        # four axes: pictures
        ((1, 8, 4, 6), set(), (nn.Conv2d(8, 8, 3),), "batch, channels, height, width"),
        ((1, 8, 4, 6), set(), (nn.Conv2d(3, 8, 1),), "batch, channels, height, width"),
        ((1, 4, 6, 8), set(), (nn.Linear(8, 32),), "batch, height, width, channels"),
        ((1, 8, 8, 8), set(), (nn.Conv2d(8, 8, 1),), "batch, channels, height, width"),
        ((1, 8, 8, 8), set(), (nn.Linear(8, 8),), "batch, height, width, channels"),
        # ConvNeXt's block has both; its depthwise convolution is on the second axis
        ((1, 8, 4, 6), set(), (nn.Conv2d(8, 8, 7, groups=8), nn.Linear(8, 32)), "batch, channels, height, width"),
        # four axes: residual streams
        ((4, 1, 7, 32), {7}, (nn.Linear(32, 32),), "streams, batch, tokens, width"),
        ((1, 7, 4, 32), {7}, (nn.Linear(32, 32),), "batch, tokens, streams, width"),
        # two axes: packed
        ((16, 32), set(), (nn.Linear(32, 32),), "tokens, width"),
    ],
)
def test_find_layout(shape: tuple[int, ...], lengths: set[int], parts: tuple[nn.Module, ...], expected: str) -> None:
    assert find_layout(shape, lengths, Mixed(*parts)) == LAYOUTS[expected]


@pytest.mark.parametrize("shape", [(), (8,), (1, 32), (3, 32), (1, 2, 3, 4, 5), (5, 7, 9, 32)])
def test_what_is_no_state(shape: tuple[int, ...]) -> None:
    """One vector for each input, too many axes, or no axis that can be the batch."""
    assert find_layout(shape, {7}, nn.Linear(32, 32)) is None
