"""The tail: everything a model does between its last block's output and its logits.

The tail is the model itself with its layer stack short-circuited: every block hands on what it was
given, the last one hands on the hidden state to decode, and the model's own code does the rest.
No model's mathematics is written down here.

A tail has up to two forms. In *context* (`Tail.output`) a recorded pass is played again with the
last block's whole state changed: that is always possible, and is how pooled answers, boxes and
stacks with other stacks behind them are decoded. By *rows* (`Tail.logits`) single vectors are
decoded; that needs an answer that follows from the hidden state alone.

Most tails end in one linear map and something elementwise (a scale, a soft-cap, an offset). For
those a fast form is derived by measurement: the head module is short-circuited too, once to see
what it is given, once to see what becomes of chosen numbers put in its place. It is used only
after it was proved equal to the tail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError
from logitlab.logits.head import Head, LogitSource
from logitlab.models.hooks import StopForward, Taps, first_tensor, hidden_input, with_hidden
from logitlab.models.output import Output, Space, output_of
from logitlab.models.stack import Found, Stack
from logitlab.models.trace import Run, answer_from, copied, play, rebuilt
from logitlab.models.weights import dense

HEAD_ROWS = 1024
"""Rows of a short-circuited pass that stops at the head: it holds [rows, d] only."""

LOGIT_VALUES = 2**24
"""Most logits that a short-circuited pass through the whole tail may hold at once."""

STATE_VALUES = 2**23
"""Most hidden values that one replay with several states may hold at once."""


def _differentiable(hidden: torch.Tensor) -> torch.set_grad_enabled:
    """Gradients only where a hidden state asks for them: fitting needs them, reading does not."""
    return torch.set_grad_enabled(hidden.requires_grad and torch.is_grad_enabled())


class Tail:
    """Decode hidden states with a model's own last step.

    Args:
        module: the model.
        stack: the layer stack that is short-circuited last.
        found: the recorded pass over the template, with the model's other stacks.
        space: what comes out.

    Attributes:
        by: how single rows are decoded: ``tokens`` (each is a sequence of one token), ``states``
            (the template's positions are filled with them), or None (only whole states can be
            decoded, in the context of their own input).
        alone: whether the answer follows from the hidden state alone.
    """

    def __init__(self, module: nn.Module, stack: Stack, found: Found, space: Space) -> None:
        self.module = module
        self.stack = stack
        self.template = found.template
        self.space = space
        self.by: str | None = None
        self.alone = False
        self.batched = False
        self.head_module: nn.Module | None = None
        self.head: Head | None = None
        self.texts = False
        self.pixels = found.template.pixels
        self._run = found.run(stack)
        # An encoder is left out as a whole: the outermost module around it that does not hold this stack.
        others = [s.container for s in found.stacks if s is not stack and s.end < stack.start]
        self._skipped = [call for call in self._run.upstream if any(f"{o}.".startswith(f"{call[0]}.") for o in others)]

        # Stacks that begin later but may not depend on this one (the other tower of CLIP), as a whole.
        later = [s.container for s in found.stacks if s is not stack and s.start > stack.start]
        mine = f"{stack.container}."
        self._later = [
            call
            for call in found.trace.upstream(2**62, since=stack.start)
            if any(f"{o}.".startswith(f"{call[0]}.") for o in later) and not mine.startswith(f"{call[0]}.")
        ]

    @property
    def vocab_size(self) -> int:
        """Number of columns of the space."""
        return self.space.size

    @property
    def run(self) -> Run:
        """The recorded pass over the template."""
        return self._run

    def moved(self, state: torch.Tensor) -> Output:
        """`output` of a state that is not the model's own, over the template.

        What comes out of later stacks unchanged does not depend on this one, and is taken from the
        record from now on.
        """
        seen: dict[int, list[Any]] = {}
        modules = {id(module): module for _, module, _ in self._later}
        with Taps() as taps:
            for key, module in modules.items():
                taps.after(module, _noting(seen.setdefault(key, [])))
            value = self._replay(taps, state, self._run)
        recorded: dict[int, list[Any]] = {}
        for _, module, output in self._later:
            recorded.setdefault(id(module), []).append(output)
        same = {key for key in modules if _alike(seen[key], recorded[key])}
        self._run = replace(self._run, beside=tuple(call for call in self._later if id(call[1]) in same))
        output = output_of(value, texts=self.texts, pixels=self.pixels)
        if output is None:
            raise ModelError("the short-circuited model returned no logits")
        return output

    # -- in context ----------------------------------------------------------------------------

    def output(self, state: torch.Tensor, run: Run | None = None) -> Output:
        """What the model makes of a whole state of this stack, in the context of a recorded pass.

        Args:
            state: hidden state of the last block, in the shape that it has in ``run``.
            run: the recorded pass; by default the one over the template.

        Raises:
            ModelError: the changed model returned no logits.
        """
        with Taps() as taps:
            value = self._replay(taps, state, self._run if run is None else run)
        output = output_of(value, texts=self.texts, pixels=self.pixels)
        if output is None:
            raise ModelError("the short-circuited model returned no logits")
        return output

    # -- by rows -------------------------------------------------------------------------------

    def logits(self, hidden: torch.Tensor, run: Run | None = None) -> torch.Tensor:
        """Logits of hidden states by the model itself: [n, d] -> [n, V] float32.

        This is the definition that every faster form is held against. It holds [n, V]. For a pooled
        answer the row is decoded as an input that has this hidden state at every position.

        Args:
            hidden: the rows.
            run: the pass in whose context they are decoded (what a picture is compared with is part of
                it); by default the one over the template.

        Raises:
            ModelError: this tail decodes whole states only.
        """
        if self.by == "states":
            return self._logits_by_states(hidden, self._run if run is None else run)
        size = max(1, LOGIT_VALUES // self.vocab_size)
        parts = [self._logits_chunk(part) for part in hidden.split(size)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, self.vocab_size, dtype=torch.float32)

    def _logits_chunk(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.by is None:
            raise ModelError(f"{self.stack.name} is decoded by whole states only: {self.space.per} answers")
        with Taps() as taps:
            value = self._replay(taps, hidden)
        output = output_of(value, texts=self.texts, pixels=self.pixels)
        if output is None:
            raise ModelError("the short-circuited model returned no logits")
        return output.logits.reshape(hidden.shape[0], -1).float()

    def _logits_by_states(self, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        """Rows decoded as states of a recorded pass: one row everywhere, or another at each position."""
        shape = shape_of(run.blocks[-1])
        n = self.stack.layout.batch_size(shape) * self.stack.layout.count(shape)
        if self.space.per != "position":
            parts = hidden.split(max(1, STATE_VALUES // (n * hidden.shape[-1])))
            return torch.cat([self.decode_states(p.unsqueeze(1).expand(-1, n, -1), run)[:, 0] for p in parts])
        short = -len(hidden) % n
        rows = torch.cat([hidden, hidden[-1:].expand(short, -1)]) if short else hidden
        return self.decode_states(rows.reshape(-1, n, rows.shape[-1]), run).flatten(0, 1)[: len(hidden)]

    def decode_states(self, rows: torch.Tensor, run: Run | None = None) -> torch.Tensor:
        """Logits [states, answers, V] of whole states of a recorded pass, [states, positions, d]."""
        run = self._run if run is None else run
        if not self.batched or self._one_concept(run):
            shape = shape_of(run.blocks[-1])
            states = (self.stack.layout.state(r, shape) for r in rows)
            return torch.stack([self.output(state, run).rows for state in states])
        many = max(1, STATE_VALUES // (rows.shape[1] * rows.shape[2]))
        return torch.cat([self._decode_batch(part, run) for part in rows.split(many)])

    def _one_concept(self, run: Run) -> bool:
        """Whether there is one concept only: repeating what has one item would repeat it too."""
        own = output_of(run.output, texts=self.texts, pixels=self.pixels) if self.space.name == "concepts" else None
        return own is not None and own.logits.shape[-1] == 1

    def _decode_batch(self, rows: torch.Tensor, run: Run) -> torch.Tensor:
        """One replay with the recorded pass's single item repeated."""
        n = rows.shape[0]
        shape = list(shape_of(run.blocks[-1]))
        assert self.stack.layout.batch is not None
        shape[self.stack.layout.batch] = n

        def repeated(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.expand(n, *value.shape[1:]) if value.ndim and value.shape[0] == 1 else value
            return rebuilt(value, repeated)

        wide = Run(
            {k: repeated(v) for k, v in run.inputs.items()},
            run.output,
            tuple((path, module, repeated(output)) for path, module, output in run.upstream),
            run.blocks,
            tuple((path, module, repeated(output)) for path, module, output in run.beside),
        )
        output = self.output(self.stack.layout.state(rows.reshape(-1, rows.shape[-1]), shape), wide)
        return output.logits.detach().reshape(n, -1, output.logits.shape[-1]).float()

    def _replay(self, taps: Taps, hidden: torch.Tensor, run: Run | None = None) -> Any:
        """Run the model short-circuited: on ``n`` one-token rows, or on a whole state in a recorded pass."""
        if run is not None:
            play(taps, (*run.upstream, *run.beside))
            _recall(taps, self.stack, run, hidden)
            with _differentiable(hidden):
                return self.module(**run.inputs)
        inputs = self.template.rows(hidden.shape[0])
        assert inputs is not None
        n = hidden.shape[0]

        def repeated(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.expand(n, *value.shape[1:]) if value.ndim > 1 and value.shape[0] == 1 else value
            return rebuilt(value, repeated)

        play(taps, [(path, module, repeated(output)) for path, module, output in self._skipped])
        _skip(taps, self.stack, hidden)
        with _differentiable(hidden):
            return self.module(**inputs)

    # -- the fast form -------------------------------------------------------------------------

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is given for hidden states [n, d]: [n, d_head], by the model's own code.

        Raises:
            ModelError: this tail has no fast form.
        """
        if self.head_module is None:
            raise ModelError("this model's tail does not end in one linear head")
        whole: torch.Tensor | None = None
        for start in range(0, max(1, len(hidden)), HEAD_ROWS):
            part = self._head_input_chunk(hidden[start : start + HEAD_ROWS], self.head_module)
            if len(hidden) <= HEAD_ROWS:
                return part
            if whole is None:
                whole = part.new_empty(len(hidden), part.shape[1])
            whole[start : start + len(part)] = part
        assert whole is not None
        return whole

    def _head_input_chunk(self, hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            given = hidden_input(args, kwargs)
            if given is not None:
                seen.append(given)
            raise StopForward

        with Taps() as taps:
            taps.replace(head, stop)
            with suppress(StopForward):
                self._replay(taps, hidden)
        if not seen:
            raise ModelError("the head was not reached in the short-circuited model")
        return seen[0].reshape(hidden.shape[0], -1)

    def prepare(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows that `source` decodes: the head's input where there is a fast form, else ``hidden``."""
        return self.head_input(hidden) if self.head is not None else hidden

    @property
    def source(self) -> Head | LogitSource:
        """What turns prepared rows into logits."""
        return self.head if self.head is not None else LogitSource(self.logits, self.vocab_size)

    def derive_head(self) -> str | None:
        """Look for the fast form and keep it; return why there is none, or None when there is one.

        The result is a candidate: `logitlab.models.verify` proves it or throws it away.
        """
        if self.by != "tokens":
            return "answers are not decoded token by token"
        why = "no linear module of the tail gives the vocabulary"
        for found in reversed(self._linear_heads()):  # what comes last is most likely the head
            weight = dense(found)
            if weight is None:
                why = "the head's weights cannot be had as plain numbers (quantised or off-loaded)"
                continue
            try:
                postmap = self._measure_postmap(found)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                why = f"the model cannot go on from numbers put in the head's place ({type(error).__name__})"
                continue
            if isinstance(postmap, str):
                why = postmap
                continue
            scale, softcap, offset = postmap
            offset = None if offset is None else offset.to(weight.device)
            self.head_module = found
            self.head = Head(weight, dense(found, "bias"), scale, softcap, offset)
            return None
        return why

    def drop_head(self) -> None:
        """Give up the fast form; the tail itself is used from now on."""
        self.head = self.head_module = None

    def _linear_heads(self) -> list[nn.Module]:
        """Modules of the tail that are plain linear maps onto the vocabulary, in the order of their calls."""
        found: list[nn.Module] = []
        hidden = torch.randn(2, self.stack.width, generator=torch.Generator().manual_seed(1))

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = hidden_input(args, kwargs)
            if given is not None and isinstance(output, torch.Tensor) and output.shape[-1] == self.vocab_size:
                found.append(module)

        with Taps() as taps:
            for candidate in self.module.modules():
                weight = getattr(candidate, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == self.vocab_size:
                    taps.after(candidate, note)
            self._replay(taps, hidden)
        return found

    def _measure_postmap(self, head: nn.Module) -> tuple[float, float | None, torch.Tensor | None] | str:
        """Find ``f`` in ``logits = f(head output) + offset`` by putting numbers in the head's place."""
        size = self.vocab_size
        sizes = torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4])
        levels = torch.cat([torch.zeros(1), sizes, -sizes])
        y = self._answer(head, levels.unsqueeze(1).expand(-1, size))
        if y is None:
            return "what follows the head changes the number of columns"
        offset, y = y[0].clone(), y[1:] - y[0]
        if not bool(torch.isfinite(y).all()):
            return "what follows the head is not finite everywhere"
        f = y.median(dim=1).values.double()
        levels = levels[1:].double()
        scale, softcap = float(f[7] / levels[7]), None
        if abs(float(f[6]) - scale * 1e3) > 1e-4 * abs(scale) * 1e3:  # bends: a soft-cap
            softcap = float(f[7])
            if softcap <= 0:
                return "what follows the head is neither a scale nor a soft-cap"
            small = max(i for i in range(8) if i == 0 or abs(float(f[i])) < 2e-3 * softcap)
            scale = softcap * float(torch.atanh(f[small] / softcap) / levels[small])
        scale, softcap = _rounded(scale), None if softcap is None else _rounded(softcap)
        guess = Head(torch.empty(size, 0), scale=scale, softcap=softcap)
        generator = torch.Generator().manual_seed(2)
        z = torch.randn(4, size, generator=generator) * torch.tensor([[0.1], [3.0], [50.0], [1e3]])
        truth = self._answer(head, z)
        assert truth is not None
        error = (guess.postmap(z) + offset.cpu() - truth.cpu()).abs()
        if not bool((error <= 1e-5 * (1 + truth.cpu().abs())).all()):
            return "what follows the head is neither a scale nor a soft-cap"
        return scale, softcap, offset if bool(offset.any()) else None

    def _answer(self, head: nn.Module, z: torch.Tensor) -> torch.Tensor | None:
        """Logits [n, V] when the head is made to answer ``z`` [n, V]; None if the size changes."""
        hidden = torch.zeros(z.shape[0], self.stack.width)

        def answer(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = hidden_input(args, kwargs)
            assert given is not None
            return z.to(given.device).reshape(*given.shape[:-1], -1)

        with Taps() as taps:
            taps.replace(head, answer)
            output = self._replay(taps, hidden)
        found = output_of(output, texts=self.texts, pixels=self.pixels)
        if found is None or found.logits.numel() != z.numel():
            return None
        return found.logits.reshape(z.shape).float()


def _rounded(value: float) -> float:
    """The shortest decimal within the accuracy of the measurement (0.0624999 -> 0.0625)."""
    for digits in range(1, 7):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= 2e-6 * abs(value):
            return short
    return value


def _noting(found: list[Any]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(copied(output))

    return note


def _alike(left: Any, right: Any) -> bool:
    """Whether two outputs hold equal tensors."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        ours: dict[Any, Any] = left
        theirs: dict[Any, Any] = right
        return ours.keys() == theirs.keys() and all(_alike(ours[k], theirs[k]) for k in ours)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        mine: list[Any] = list(left)
        others: list[Any] = list(right)
        return len(mine) == len(others) and all(map(_alike, mine, others))
    return type(left) is type(right)


def _by_module(stack: Stack) -> list[list[int]]:
    """Numbers of the blocks, together where they are calls of one module."""
    groups: dict[int, list[int]] = {}
    for i, block in enumerate(stack.blocks):
        groups.setdefault(id(block.module), []).append(i)
    return list(groups.values())


def _skip(taps: Taps, stack: Stack, hidden: torch.Tensor) -> None:
    """Short-circuit a stack: blocks hand on their input, the last one hands on the rows ``hidden``."""
    for numbers in _by_module(stack):
        taps.replace(stack.blocks[numbers[0]].module, _short_circuit(stack, numbers, len(stack) - 1, hidden))


def _short_circuit(stack: Stack, numbers: list[int], last: int, hidden: torch.Tensor) -> Callable[..., Any]:
    queue = iter(numbers)

    def answer(*args: Any, **kwargs: Any) -> Any:
        number = next(queue, None)
        given = hidden_input(args, kwargs)
        if number is None or given is None:
            raise ModelError(f"block {stack.blocks[numbers[-1]].path} was called in another way than on the template")
        if number == last:
            moved = hidden.to(device=given.device, dtype=given.dtype)
            given = stack.layout.state(moved, given.shape)
        return with_hidden(stack.outputs[number], given)

    return answer


def _recall(taps: Taps, stack: Stack, run: Run, state: torch.Tensor) -> None:
    """Let a stack's blocks answer from a record, the last one with ``state`` in it."""
    last = len(stack) - 1
    for numbers in _by_module(stack):
        answers = [
            with_hidden(copied(run.blocks[i]), _like(state, run.blocks[i])) if i == last else run.blocks[i]
            for i in numbers
        ]
        module = stack.blocks[numbers[0]].module
        taps.replace(module, answer_from(answers, module))


def _like(state: torch.Tensor, output: Any) -> torch.Tensor:
    old = first_tensor(output)
    assert old is not None
    return state.to(device=old.device, dtype=old.dtype)


def shape_of(output: Any) -> torch.Size:
    """Shape of the hidden state in a block's output."""
    state = first_tensor(output)
    assert state is not None
    return state.shape
