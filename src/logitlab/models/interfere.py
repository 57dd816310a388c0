"""Who is changing a model's passes at the moment, in this context: a thread, or what it has started.

It stands this deep because reading has to know: passes of a changed model are not shared, nor cut.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_ACTIVE: ContextVar[tuple[tuple[int, Any, tuple[dict[str, Any], ...]], ...]] = ContextVar("logitlab", default=())


@contextmanager
def interfering(module: nn.Module, work: Any, described: list[dict[str, Any]]) -> Generator[None]:
    """Say that ``work`` changes what ``module`` does, for the length of a ``with`` block.

    ``work.on`` becomes False at its end, wherever that is.
    """
    _ACTIVE.set((*_ACTIVE.get(), (id(module), work, tuple(described))))
    try:
        yield
    finally:
        work.on = False
        _ACTIVE.set(tuple(entry for entry in _ACTIVE.get() if entry[1].on))


@contextmanager
def suspended() -> Generator[None]:
    """Examine models as they are, whatever is being done to them in this context."""
    token = _ACTIVE.set(())
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active(module: nn.Module) -> list[Any]:
    """What changes a module's passes here and now."""
    return [work for owner, work, _ in _ACTIVE.get() if owner == id(module) and work.on]


def described(module: nn.Module) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [d for owner, work, some in _ACTIVE.get() if owner == id(module) and work.on for d in some]
