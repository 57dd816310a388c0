"""The one hook mechanism: watch module calls, or answer them, for the length of a ``with`` block."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


FORWARD_ERRORS = (
    ModelError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What a model's own code raises on inputs that it was not made for."""


class StopForward(BaseException):
    """Raised inside a forward pass once everything that was wanted has been seen.

    It derives from ``BaseException`` so that an ``except Exception`` in model code cannot keep it.
    """


class Taps:
    """Hooks on modules that are gone when the ``with`` block ends, however it ends.

    Watching uses torch's own hooks, which run after hooks that were there before, so a value that
    somebody else's hook has edited is seen as edited. Answering (`replace`) puts a function where
    the whole call would have been, so neither ``forward`` nor any other hook of that module runs.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with Taps() as taps:
        ...     taps.replace(layer, lambda *args, **kwargs: args[0] * 0)
        ...     float(layer(torch.ones(1, 2)).sum())
        0.0
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def before(self, module: nn.Module, fn: Before) -> None:
        """Call ``fn(module, args, kwargs)`` before each call of ``module``.

        A result other than None is a pair that takes the place of ``(args, kwargs)``.
        """
        self._undo.append(module.register_forward_pre_hook(fn, with_kwargs=True).remove)

    def after(self, module: nn.Module, fn: After) -> None:
        """Call ``fn(module, args, kwargs, output)`` after each call of ``module``.

        A result other than None takes the place of the output.
        """
        self._undo.append(module.register_forward_hook(fn, with_kwargs=True).remove)

    def around(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """Let ``fn(forward, *args, **kwargs)`` run a module's own ``forward``; its hooks stay outside of that."""
        self._undo.append(wrapped(module, "forward", fn))

    def replace(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """Answer every call of ``module`` with ``fn(*args, **kwargs)`` instead of running it."""
        own = module.__dict__
        # Modules that were compiled in place are called through _compiled_call_impl.
        for name in ("_call_impl", "_compiled_call_impl"):
            if name == "_compiled_call_impl" and own.get(name) is None:
                continue
            had, old = name in own, own.get(name)
            own[name] = fn

            def undo(own: dict[str, Any] = own, name: str = name, had: bool = had, old: Any = old) -> None:
                if had:
                    own[name] = old
                else:
                    own.pop(name, None)

            self._undo.append(undo)


_WRAPPING = threading.Lock()


class _Wrapper:
    """What stands in the place of a module's function. It can be taken away while others stand on top of it."""

    def __init__(self, fn: Callable[..., Any], old: Callable[..., Any], had: bool) -> None:
        self.fn, self.old, self.had, self.on = fn, old, had, True
        functools.update_wrapper(self, old, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(self.old, *args, **kwargs) if self.on else self.old(*args, **kwargs)


def wrapped(module: nn.Module, name: str, fn: Callable[..., Any]) -> Callable[[], None]:
    """Let ``fn(old, *args, **kwargs)`` answer for a module's function ``old``; gives what ends that, in any order."""
    own = module.__dict__
    with _WRAPPING:
        mine = own[name] = _Wrapper(fn, getattr(module, name), name in own)

    def undo() -> None:
        with _WRAPPING:
            mine.on = False
            while isinstance(top := own.get(name), _Wrapper) and not top.on:
                if top.had:
                    own[name] = top.old
                else:
                    del own[name]

    return undo


def collect(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Run the hooks of a module by which transformers collects ``hidden_states``, and no others.

    A declared rule: a module that is answered for runs no hooks, since somebody's hook may edit its output
    and the answer has been edited already. These only look, and models whose head works on all layers'
    states (``use_weighted_layer_sum``, backbones) cannot go on without what they collect.
    """
    for hook in list(module._forward_hooks.values()):  # pyright: ignore[reportPrivateUsage]
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            hook(module, args, output)


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor of a module's output (a tensor, tuple, list or mapping)."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, list | tuple):
        items: Any = value
    elif hasattr(value, "values"):
        items = value.values()
    else:
        return None
    for item in items:
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return item
    return None


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden state that a block was called with: its first floating-point tensor argument."""
    if "hidden_states" in kwargs and isinstance(kwargs["hidden_states"], torch.Tensor):
        return kwargs["hidden_states"]
    found = first_tensor(args)
    return found if found is not None else first_tensor(kwargs)


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A copy of a module's output in which the first floating-point tensor is ``hidden``."""
    if isinstance(output, torch.Tensor):
        return hidden
    old = first_tensor(output)
    if isinstance(output, tuple | list):
        items: list[Any] = [hidden if item is old else item for item in output]
        if isinstance(output, tuple) and hasattr(output, "_fields"):  # a named tuple
            return type(output)(*items)
        return type(output)(items)
    copy = type(output)(output)
    for key, item in output.items():
        copy[key] = hidden if item is old else item
    return copy
