"""logitlab as it is by default."""

from __future__ import annotations

from collections.abc import Callable

import torch

import logitlab as ll

TARGET = 7042


class Contestant:
    """`logitlab.read`."""

    precision = "exact"

    def __init__(self, folder: str) -> None:
        self.model = ll.load(folder)
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""
        work: dict[str, Callable[[], object]] = {
            "top": lambda: ll.read(self.model, ids, statistics=(), precision=self.precision),
            "all": lambda: ll.read(self.model, ids, target=TARGET, precision=self.precision),
        }
        return work.get(what)
