"""Arrays of a reading, filled as statistics arrive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from logitlab.logits import Statistics
from logitlab.models.passes import Part
from logitlab.reading import Array

_NAMES = {
    "top_id": ("top_ids", np.int64),
    "top_logprob": ("top_logprob", np.float32),
    "entropy": ("entropy", np.float32),
    "kl": ("kl", np.float32),
    "target_logprob": ("target_logprob", np.float32),
    "target_rank": ("target_rank", np.int64),
    "bound": ("bound", np.float32),
}
"""By the name of an array, the statistic that it holds and its type."""


class Table:
    """Arrays [prompts, sites, positions, ...] of a reading.

    Args:
        where: by prompt, the positions that are read.
        sites: number of sites.

    Attributes:
        arrays: by name; short prompts are filled up with NaN (-1 for ids and ranks).
        total: positions in all, counted once for each prompt.
    """

    def __init__(self, where: Sequence[Sequence[int]], sites: int) -> None:
        self.where, self.sites = where, sites
        self.arrays: dict[str, Array] = {}
        self.total = sum(map(len, where))
        self._slots = [{position: i for i, position in enumerate(positions)} for positions in where]
        self._filled = [np.zeros(len(positions), dtype=bool) for positions in where]

    @property
    def done(self) -> int:
        """Positions filled, counted once for each prompt."""
        return int(sum(filled.sum() for filled in self._filled))

    def put(self, part: Part, rows: slice, found: Statistics) -> None:
        """Put in the statistics [sites, rows] of some rows of a pass, for every prompt that they belong to."""
        places = [
            (row, n, self._slots[n][position])
            for row, (owners, position) in enumerate(_rows(part)[rows])
            for n in owners
            if position in self._slots[n]
        ]
        if not places:
            return
        row, prompt, slot = (np.array(axis) for axis in zip(*places, strict=True))
        for name, values in _named(found):
            self._array(name, values)[prompt, :, slot] = values[:, row].swapaxes(0, 1)
        for n, i in zip(prompt, slot, strict=True):
            self._filled[n][i] = True

    def put_prompt(self, n: int, found: Statistics, boxes: torch.Tensor | None = None) -> None:
        """Put in the statistics [sites, positions] of a whole prompt, and its boxes [sites, positions, 4]."""
        named = _named(found)
        if boxes is not None:
            named.append(("box", boxes.cpu().numpy().astype(np.float32)))
        for name, values in named:
            self._array(name, values)[n, :, : values.shape[1]] = values
        self._filled[n][:] = True

    def _array(self, name: str, values: Array) -> Array:
        if name not in self.arrays:
            fill = np.nan if values.dtype.kind == "f" else -1
            shape = (len(self.where), self.sites, max(map(len, self.where)), *values.shape[2:])
            self.arrays[name] = np.full(shape, fill, dtype=values.dtype)
        return self.arrays[name]


def _rows(part: Part) -> list[tuple[tuple[int, ...], int]]:
    """For each row of a pass, the prompts that it belongs to, and its position."""
    return [
        (owners, position)
        for owners, positions in zip(part.owners, part.positions, strict=True)
        for position in positions
    ]


def _named(found: Statistics) -> list[tuple[str, Array]]:
    named = ((name, getattr(found, own), dtype) for name, (own, dtype) in _NAMES.items())
    return [(name, tensor.cpu().numpy().astype(dtype)) for name, tensor, dtype in named if tensor is not None]
