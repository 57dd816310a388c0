"""Find the layer stacks of a model by watching one forward pass; nothing is configured by name.

A stack is a container (``ModuleList`` or ``Sequential``) whose children are called one after the
other on hidden states of one shape. Blocks are *calls*, not modules, so a model that calls one
module twelve times (ALBERT) has twelve blocks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError
from logitlab.models.hooks import Taps, first_tensor, hidden_input
from logitlab.models.template import Template


@dataclass(frozen=True)
class Block:
    """One call in a layer stack: the ``call``-th call (from 0) of ``module`` in a forward pass."""

    module: nn.Module
    path: str
    call: int


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a model, in the order in which a forward pass runs them.

    Attributes:
        name: dotted path of the container inside the model, for instance ``model.layers``.
        blocks: the calls.
        width: size of the hidden state's last dimension.
        outputs: what each block returned on the template (kept to rebuild its form).
        continuous: whether each block receives exactly what the one before returned.
    """

    name: str
    blocks: tuple[Block, ...]
    width: int
    outputs: tuple[Any, ...] = field(repr=False)
    continuous: bool = True

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def batch_first(self) -> bool:
        """Whether hidden states are [batch, tokens, width]; XLNet's are [tokens, batch, width]."""
        first = first_tensor(self.outputs[0])
        return first is not None and first.shape[0] == 1

    @property
    def n_parameters(self) -> int:
        """Number of parameters in the stack, shared ones counted once."""
        seen = {id(p): p.numel() for block in self.blocks for p in block.module.parameters()}
        return sum(seen.values())


@dataclass
class _Call:
    container: str
    path: str
    module: nn.Module
    entering: torch.Tensor | None
    output: Any = None


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits in a model's output: its ``logits`` (or ``prediction_logits``), else None."""
    for name in ("logits", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    return output if isinstance(output, torch.Tensor) else None


def find_stacks(module: nn.Module, template: Template) -> tuple[list[Stack], torch.Tensor]:
    """Run the template once and find every layer stack that it passes through.

    Returns:
        The stacks, largest first, and the model's logits on the template [1, tokens, vocabulary].

    Raises:
        ModelError: the model cannot run on token ids alone, gives no logits, or has no stack.
    """
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    with Taps() as taps:
        for name, container in module.named_modules():
            if isinstance(container, nn.ModuleList | nn.Sequential):
                for key, child in container.named_children():
                    _watch(taps, name, f"{name}.{key}", child, calls, open_calls)
        try:
            with torch.no_grad():
                output = module(**template.full())
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise ModelError(
                f"{type(module).__name__} did not run on a few token ids alone: {type(error).__name__}: {error}"
            ) from error
    logits = logits_of(output)
    if logits is None:
        raise ModelError(
            f"{type(module).__name__} returns no logits; load the class that carries the output head "
            "(for instance AutoModelForCausalLM instead of AutoModel)"
        )
    stacks = _stacks_from(calls)
    if not stacks:
        raise ModelError(f"{type(module).__name__} has no chain of blocks of one width that logitlab could find")
    return stacks, logits.detach()


def _watch(
    taps: Taps, container: str, path: str, child: nn.Module, calls: list[_Call], open_calls: list[_Call]
) -> None:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(container, path, module, hidden_input(args, kwargs))
        if not open_calls:  # only the outermost repeated modules are candidates
            calls.append(call)
        open_calls.append(call)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        open_calls.pop().output = output

    taps.before(child, enter)
    taps.after(child, leave)


def _stacks_from(calls: list[_Call]) -> list[Stack]:
    by_container: dict[str, list[_Call]] = defaultdict(list)
    for call in calls:
        by_container[call.container].append(call)
    stacks: list[Stack] = []
    for name, group in by_container.items():
        states = [(c.entering, first_tensor(c.output)) for c in group]
        shapes = {None if t is None else t.shape for pair in states for t in pair}
        shape = shapes.pop()
        if shapes or shape is None or len(shape) != 3:
            continue
        links = [_same(left, right) for (_, left), (right, _) in pairwise(states)]
        if links and not any(links):
            continue  # side by side, not one after the other
        counts: dict[int, int] = defaultdict(int)
        blocks: list[Block] = []
        for call in group:
            blocks.append(Block(call.module, call.path, counts[id(call.module)]))
            counts[id(call.module)] += 1
        stacks.append(Stack(name, tuple(blocks), int(shape[-1]), tuple(c.output for c in group), all(links)))
    return sorted(stacks, key=lambda s: s.n_parameters, reverse=True)


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return False
    return left is right or torch.equal(left, right.to(left.device))
