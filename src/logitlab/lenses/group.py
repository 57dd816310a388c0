"""Several processes that fit one lens together, as torchrun and accelerate start them."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from logitlab.errors import InputError, ModelError
from logitlab.models.handle import Model

log = logging.getLogger("logitlab")

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a fit. Each does a part of every step; sums are the same in all of them.

    Attributes:
        rank: number of this one.
        size: how many there are.
        device: where what they exchange lies.
    """

    rank: int = 0
    size: int = 1
    device: str | torch.device = "cpu"

    def part(self, items: Sequence[T]) -> list[T]:
        """What this process does of some items."""
        return list(items[self.rank :: self.size])

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes.

        Raises:
            ModelError: another process has failed.
        """
        if self.size == 1:
            return
        try:
            for tensor in tensors:
                there = tensor.to(self.device)
                distributed.all_reduce(there)
                if there is not tensor:
                    tensor.copy_(there)
        except RuntimeError as error:
            raise ModelError("another process of this fit has failed: see what it has said") from error

    def wait(self) -> None:
        """Go on when all processes have come this far."""
        together = torch.zeros(1)
        self.add([together])
        together.sum().item()  # on a GPU a sum is there when it is looked at, not before

    def check_alike(self, what: Any) -> None:
        """Raise `InputError` in all processes unless ``what`` is the same in all of them."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, what)
        other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            differing = [name for name in found[0] if found[0][name] != found[other].get(name)]
            raise InputError(
                f"processes 0 and {other} of this fit differ in their {', '.join(differing)}: give all of them the "
                "same arguments and corpus, and a folder that all of them can see"
            )

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0


def joined(model: Model) -> Group:
    """The group that this process belongs to, which is joined if nobody has yet; of one, where it was started alone.

    Processes that share one model, each with a part of its weights, count as one: they all do all of the work. A group
    that is joined here stays until the process ends: it could not be joined twice.

    Raises:
        InputError: the environment names a group that cannot be joined.
    """
    if not distributed.is_available():
        return Group()
    if _is_shared(model):
        return Group(distributed.get_rank() if distributed.is_initialized() else 0, 1)
    if not distributed.is_initialized():
        wanted = os.environ.get("WORLD_SIZE", "1")
        if not wanted.isdigit():
            raise InputError(f"WORLD_SIZE is {wanted!r}; it is a number of processes: start with torchrun, or unset it")
        if int(wanted) < 2:
            return Group()
        log.warning("waiting for the %s processes that WORLD_SIZE names", wanted)
        try:
            distributed.init_process_group()
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"WORLD_SIZE is {wanted}, but the other processes cannot be reached "
                f"({' '.join(str(error).split())[:200]}): start with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from error
        atexit.register(_leave)
    backend = str(distributed.get_backend())
    device = model.device if "nccl" in backend else "cpu"
    return Group(distributed.get_rank(), distributed.get_world_size(), device)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _is_shared(model: Model) -> bool:
    """Whether weights are spread over processes (tensor parallelism)."""
    return any(hasattr(p, "placements") for p in model.module.parameters())
