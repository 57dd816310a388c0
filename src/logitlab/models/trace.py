"""One forward pass, recorded: which modules were called, in which order, and what they returned.

A recorded pass (`Run`) can be played again with one hidden state changed: what ended before a
stack began answers from the record, the stack's blocks answer from the record too, the last one
hands on the changed state, and everything after it is computed by the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from logitlab.models.hooks import Taps, collect, hidden_input


@dataclass
class Call:
    """One call of one module.

    Attributes:
        module: what was called.
        path: its dotted path in the model.
        container: path of the ``ModuleList`` or ``Sequential`` that holds it, or None.
        start: number of the event at which it began.
        end: number of the event at which it returned.
        entering: the hidden state that it was given (copied; for children of containers only).
        output: what it returned, copied.
    """

    module: nn.Module
    path: str
    container: str | None
    start: int
    end: int = -1
    entering: torch.Tensor | None = None
    output: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Run:
    """A recorded forward pass, as needed to decode the states of one stack in its context.

    Attributes:
        inputs: keyword arguments of the pass.
        output: what the model returned.
        upstream: calls that ended before the stack began, none inside another, in order: path of the
            module, the module, what it returned.
        blocks: what each block of the stack returned.
        beside: calls that ended later, in the same form, but were seen not to depend on the stack.
    """

    inputs: Mapping[str, Any]
    output: Any = field(repr=False)
    upstream: tuple[tuple[str, nn.Module, Any], ...] = field(repr=False)
    blocks: tuple[Any, ...] = field(repr=False)
    beside: tuple[tuple[str, nn.Module, Any], ...] = field(default=(), repr=False)


def copied(value: Any) -> Any:
    """A copy of an output in which no tensor is shared with the original; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return rebuilt(value, copied)


def _cloned(value: Any) -> Any:
    """`copied`, but what is differentiated stays so: records are not, a state put in their place may be."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return rebuilt(value, _cloned)


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or mapping of the same type with every item changed; anything else as it is."""
    if isinstance(value, tuple):
        items: Any = value
        made = [change(item) for item in items]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if type(value) is list:
        entries: list[Any] = value
        return [change(item) for item in entries]
    if isinstance(value, dict) and (type(value) is dict or hasattr(value, "to_tuple")):
        pairs: dict[Any, Any] = value
        changed = {key: change(item) for key, item in pairs.items()}
        return changed if type(value) is dict else type(value)(**changed)
    return value


class Trace:
    """Record the calls of a forward pass while it runs inside ``with Taps() as taps``.

    Args:
        module: the model.
        within: path of a stack whose context is wanted: modules that do not hold it are recorded as
            one, whatever is inside them. By default everything that may hold a stack is kept apart.
    """

    def __init__(self, module: nn.Module, within: str | None = None) -> None:
        self.module = module
        self.calls: list[Call] = []
        self._open: list[tuple[Call, int]] = []
        self._clock = 0
        names = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        wanted = (
            [n for n in names if any(True for _ in module.get_submodule(n).children())] if within is None else [within]
        )
        self._holders = {"", *(_up(name, levels) for name in wanted for levels in range(name.count(".") + 1))}
        self._containers = set(names)

    def attach(self, taps: Taps) -> None:
        """Put the watchers in place."""
        seen: set[int] = set()
        for path, module in self.module.named_modules():
            if path and id(module) not in seen:
                seen.add(id(module))
                self._watch(taps, path, module)

    def _watch(self, taps: Taps, path: str, module: nn.Module) -> None:
        parent = path.rpartition(".")[0]
        container = parent if parent in self._containers else None
        transparent = path in self._holders

        def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = hidden_input(args, kwargs) if container is not None else None
            call = Call(owner, path, container, self._clock, entering=None if given is None else given.detach().clone())
            self._clock += 1
            self._open.append((call, len(self.calls)))

        def leave(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call, mark = self._open.pop()
            if not transparent:
                del self.calls[mark:]
            call.end = self._clock
            self._clock += 1
            call.output = copied(output)
            self.calls.append(call)

        taps.before(module, enter)
        taps.after(module, leave)

    def upstream(self, start: int, since: int = 0) -> tuple[tuple[str, nn.Module, Any], ...]:
        """Calls that had ended at an event, none inside another, in the order of their beginning.

        Args:
            start: the event.
            since: leave out calls that began before this event.
        """
        ended = sorted((c for c in self.calls if since <= c.start and 0 <= c.end < start), key=lambda c: c.start)
        outermost: list[Call] = []
        for call in ended:
            if not outermost or call.start > outermost[-1].end:
                outermost.append(call)
        return tuple((c.path, c.module, c.output) for c in outermost)


def _up(name: str, levels: int) -> str:
    """The path ``levels`` above a path."""
    return name.rsplit(".", levels)[0] if levels else name


def answer_from(record: list[Any], module: nn.Module) -> Callable[..., Any]:
    """Answer a module's calls from a record, in order; calls beyond it are computed."""
    queue = iter(record)

    def answer(*args: Any, **kwargs: Any) -> Any:
        for output in queue:
            answered = _cloned(output)
            collect(module, args, answered)
            return answered
        return nn.Module._call_impl(module, *args, **kwargs)  # pyright: ignore[reportPrivateUsage]

    return answer


def play(taps: Taps, upstream: Iterable[tuple[str, nn.Module, Any]]) -> None:
    """Let modules that ended before a stack began answer from the record."""
    by_module: dict[int, tuple[nn.Module, list[Any]]] = {}
    for _, module, output in upstream:
        by_module.setdefault(id(module), (module, []))[1].append(output)
    for module, record in by_module.values():
        taps.replace(module, answer_from(record, module))
