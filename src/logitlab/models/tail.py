"""The tail: everything a model does between its last block's output and its logits.

The tail is the model itself with its layer stack short-circuited: every block hands on what it was
given, the last one hands on the hidden state to decode, and the model's own code does the rest.
No model's mathematics is written down here.

Most tails end in one linear map and something elementwise (a scale, a soft-cap, an offset). For
those a fast form is derived by measurement: the head module is short-circuited too, once to see
what it is given, once to see what becomes of chosen numbers put in its place. It is used only
after it was proved equal to the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError
from logitlab.logits.head import Head, LogitSource
from logitlab.models.hooks import StopForward, Taps, hidden_input, with_hidden
from logitlab.models.stack import Stack, logits_of
from logitlab.models.template import Template

HEAD_ROWS = 2048
"""Rows of a short-circuited pass that stops at the head: it holds [rows, d] only."""

LOGIT_VALUES = 2**24
"""Most logits that a short-circuited pass through the whole tail may hold at once."""


class Tail:
    """Decode hidden states with a model's own last step.

    Args:
        module: the model.
        stack: the layer stack that is short-circuited last.
        others: the model's other stacks (an encoder, say), which are skipped.
        template: its inputs.
        vocab_size: number of columns of the model's logits.
    """

    def __init__(
        self, module: nn.Module, stack: Stack, others: Sequence[Stack], template: Template, vocab_size: int
    ) -> None:
        self.module = module
        self.stack = stack
        self.template = template
        self.vocab_size = vocab_size
        self.head_module: nn.Module | None = None
        self.head: Head | None = None
        self._others = tuple(others)

    # -- the definition ------------------------------------------------------------------------

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states by the model itself: [n, d] -> [n, V] float32.

        This is the definition that every faster form is held against. It holds [n, V].
        """
        size = max(1, LOGIT_VALUES // self.vocab_size)
        parts = [self._logits_chunk(part) for part in hidden.split(size)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, self.vocab_size, dtype=torch.float32)

    def _logits_chunk(self, hidden: torch.Tensor) -> torch.Tensor:
        with Taps() as taps:
            output = self._replay(taps, hidden)
        logits = logits_of(output)
        if logits is None:
            raise ModelError("the short-circuited model returned no logits")
        return logits.reshape(hidden.shape[0], -1).float()

    def _replay(self, taps: Taps, hidden: torch.Tensor) -> Any:
        """Run the model on ``n`` one-token rows with every block short-circuited."""
        for stack in self._others:
            _skip(taps, stack, None)
        _skip(taps, self.stack, hidden)
        with torch.no_grad():
            return self.module(**self.template.rows(hidden.shape[0]))

    # -- the fast form -------------------------------------------------------------------------

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is given for hidden states [n, d]: [n, d_head], by the model's own code.

        Raises:
            ModelError: this tail has no fast form.
        """
        if self.head_module is None:
            raise ModelError("this model's tail does not end in one linear head")
        parts = [self._head_input_chunk(part, self.head_module) for part in hidden.split(HEAD_ROWS)]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

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
        found = self._find_head_module()
        if found is None:
            return "no linear module of the tail gives the vocabulary"
        self.head_module = found
        weight: Any = found.weight
        if weight.device.type == "meta":
            self.head_module = None
            return "the head's weights are off-loaded"
        bias: Any = getattr(found, "bias", None)
        postmap = self._measure_postmap(found)
        if isinstance(postmap, str):
            self.head_module = None
            return postmap
        scale, softcap, offset = postmap
        self.head = Head(weight.detach(), None if bias is None else bias.detach(), scale, softcap, offset)
        return None

    def drop_head(self) -> None:
        """Give up the fast form; the tail itself is used from now on."""
        self.head = self.head_module = None

    def _find_head_module(self) -> nn.Module | None:
        """The last module called in the tail that is a plain linear map onto the vocabulary."""
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
        return found[-1] if found else None

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
        return scale, softcap, offset.to(_device(head)) if bool(offset.any()) else None

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
        logits = logits_of(output)
        if logits is None or logits.numel() != z.numel():
            return None
        return logits.reshape(z.shape).float()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _rounded(value: float) -> float:
    """The shortest decimal within the accuracy of the measurement (0.0624999 -> 0.0625)."""
    for digits in range(1, 7):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= 2e-6 * abs(value):
            return short
    return value


def _skip(taps: Taps, stack: Stack, hidden: torch.Tensor | None) -> None:
    """Short-circuit a stack: blocks hand on their input; the last one hands on ``hidden`` if given."""
    last = len(stack) - 1
    by_module: dict[int, list[int]] = {}
    for i, block in enumerate(stack.blocks):
        by_module.setdefault(id(block.module), []).append(i)
    for numbers in by_module.values():
        taps.replace(stack.blocks[numbers[0]].module, _short_circuit(stack, numbers, last, hidden))


def _short_circuit(stack: Stack, numbers: list[int], last: int, hidden: torch.Tensor | None) -> Callable[..., Any]:
    queue = iter(numbers)

    def answer(*args: Any, **kwargs: Any) -> Any:
        number = next(queue)
        given = hidden_input(args, kwargs)
        if given is None:
            raise ModelError(f"block {stack.blocks[number].path} was called without a hidden state")
        if number == last and hidden is not None:
            given = hidden.to(device=given.device, dtype=given.dtype).reshape(given.shape)
        return with_hidden(stack.outputs[number], given)

    return answer
