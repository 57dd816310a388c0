"""Several processes that fit one lens together, as torchrun and accelerate start them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from logitlab.errors import InputError
from logitlab.models.handle import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a fit. Each does a part of every step; sums are the same in all of them.

    Attributes:
        rank: number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def part(self, items: Sequence[T]) -> list[T]:
        """What this process does of some items."""
        return list(items[self.rank :: self.size])

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0


@contextmanager
def joined(model: Model) -> Generator[Group]:
    """The group that this process belongs to, which is joined if nobody has yet; of one, where it was started alone.

    Processes that share one model, each with a part of its weights, count as one: they all do all of the work.

    Raises:
        InputError: the environment names a group that cannot be joined.
    """
    if not distributed.is_available() or _is_shared(model):
        alone = not (distributed.is_available() and distributed.is_initialized())
        yield Group(0 if alone else distributed.get_rank(), 1)
        return
    started = False
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            yield Group()
            return
        try:
            distributed.init_process_group()
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be reached "
                f"({' '.join(str(error).split())[:200]}): start with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from error
        started = True
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        if started:
            distributed.destroy_process_group()


def _is_shared(model: Model) -> bool:
    """Whether weights are spread over processes (tensor parallelism)."""
    return any(hasattr(p, "placements") for p in model.module.parameters())
