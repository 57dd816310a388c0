"""Find the layer stacks of a model by watching one forward pass; nothing is configured by name.

A stack is a container (``ModuleList`` or ``Sequential``) whose children are called one after the
other on hidden states of one shape. Blocks are *calls*, not modules, so a model that calls one
module twelve times (ALBERT) has twelve blocks. Where the children of a container differ in shape
(the stages of Swin or ResNet) the stacks are looked for inside them, or the longest runs of equal
shape are taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError
from logitlab.models.hooks import Taps, first_tensor
from logitlab.models.layout import MOST_BATCH, Layout, find_layout
from logitlab.models.output import output_of
from logitlab.models.template import Template
from logitlab.models.trace import Call, Run, Trace, copied


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
        layout: the axes of its hidden states.
        outputs: what each block returned on the template (kept to rebuild its form).
        continuous: whether each block receives exactly what the one before returned.
        start: when, in the template's pass, its first block began.
        end: when its last block returned.
        enters_alike: whether the first block is given a state of the shape that it returns.
    """

    name: str
    blocks: tuple[Block, ...]
    layout: Layout
    outputs: tuple[Any, ...] = field(repr=False)
    continuous: bool = True
    start: int = 0
    end: int = 0
    enters_alike: bool = True

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def container(self) -> str:
        """Path of the module that holds the blocks."""
        return self.blocks[0].path.rpartition(".")[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of a hidden state on the template."""
        state = first_tensor(self.outputs[-1])
        assert state is not None
        return state.shape

    @property
    def width(self) -> int:
        """Number of features of a hidden state at one position."""
        return self.layout.width(self.shape)

    @property
    def positions(self) -> int:
        """Number of positions of one item of the template."""
        return self.layout.count(self.shape)

    @property
    def batch(self) -> int:
        """Number of items in the template's batch."""
        return self.layout.batch_size(self.shape)

    @property
    def batch_first(self) -> bool:
        """Whether hidden states are [batch, tokens, width]; XLNet's are [tokens, batch, width]."""
        return self.layout == Layout(0, (1,), (2,))

    @property
    def composed(self) -> bool:
        """Whether the blocks are made of several modules, with a matrix among them.

        A chain of bare linear maps is rather a head, and one of norms stands for blocks only where
        a model keeps their parts in lists side by side (XLM).
        """
        made = any(True for block in self.blocks for _ in block.module.children())
        return made and any(p.ndim >= 2 for block in self.blocks for p in block.module.parameters())

    @property
    def n_parameters(self) -> int:
        """Number of parameters in the stack, shared ones counted once."""
        seen = {id(p): p.numel() for block in self.blocks for p in block.module.parameters()}
        return sum(seen.values())


@dataclass(frozen=True)
class Found:
    """What one pass over the template showed.

    Attributes:
        stacks: the layer stacks, largest first.
        output: what the model returned, copied.
        trace: the recorded calls.
        template: the inputs.
    """

    stacks: tuple[Stack, ...]
    output: Any
    trace: Trace
    template: Template

    def run(self, stack: Stack) -> Run:
        """The recorded pass, cut for one stack."""
        return Run(self.template.full(), self.output, self.trace.upstream(stack.start), stack.outputs)


def find_stacks(module: nn.Module, template: Template) -> Found:
    """Run the template once and find every layer stack that it passes through.

    Raises:
        ModelError: the model cannot run on its example inputs, gives no logits, or has no stack.
    """
    trace = Trace(module)
    with Taps() as taps:
        trace.attach(taps)
        try:
            with torch.no_grad():
                output = module(**template.full())
        except Exception as error:  # a model's code can raise anything; the reason is passed on
            raise ModelError(
                f"{type(module).__name__} did not run on {template.described}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
    if output_of(output) is None:
        raise ModelError(
            f"{type(module).__name__} returns no logits; load the class that carries the output head "
            "(for instance AutoModelForCausalLM instead of AutoModel)"
        )
    calls = sorted((call for call in trace.calls if call.container is not None), key=lambda c: c.start)
    stacks = _stacks_from(calls, template.lengths, _numbered(calls))
    if not stacks:
        raise ModelError(f"{type(module).__name__} has no chain of blocks of one width that logitlab could find")
    return Found(tuple(sorted(stacks, key=lambda s: s.n_parameters, reverse=True)), copied(output), trace, template)


def _numbered(calls: Sequence[Call]) -> dict[int, int]:
    """By call, how many calls of its module came before it."""
    counts: dict[int, int] = defaultdict(int)
    numbers: dict[int, int] = {}
    for call in calls:
        numbers[id(call)] = counts[id(call.module)]
        counts[id(call.module)] += 1
    return numbers


def _stacks_from(calls: Sequence[Call], lengths: Iterable[int], numbers: Mapping[int, int]) -> list[Stack]:
    """Stacks among calls of containers' children; inner calls count where the outer ones are no chain."""
    stacks: list[Stack] = []
    outer = _outermost(calls)
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in outer:
        assert call.container is not None
        groups[call.container].append(call)
    for name, group in groups.items():
        runs = [run for run in _runs(group) if _is_chain(run)]
        inner = [c for c in calls for o in group if o.start < c.start and c.end < o.end]
        if (max(map(len, runs), default=0) < 2 and len(group) > 1) or not runs:
            found = _stacks_from(inner, lengths, numbers)
            if found:
                stacks += found
                continue
        for run in runs:
            stack = _stack(name if len(runs) == 1 else f"{name}[{_span(run)}]", run, lengths, numbers)
            if stack is not None:
                stacks.append(stack)
    return stacks


def _outermost(calls: Sequence[Call]) -> list[Call]:
    chosen: list[Call] = []
    for call in sorted(calls, key=lambda c: c.start):
        if not chosen or call.start > chosen[-1].end:
            chosen.append(call)
    return chosen


def _runs(group: Sequence[Call]) -> list[list[Call]]:
    """Cut calls into runs whose outputs have one shape."""
    runs: list[list[Call]] = []
    for call in group:
        state = first_tensor(call.output)
        before = first_tensor(runs[-1][-1].output) if runs else None
        if state is not None and before is not None and state.shape == before.shape:
            runs[-1].append(call)
        else:
            runs.append([call])
    return runs


def _is_chain(run: Sequence[Call]) -> bool:
    """Whether calls follow one another on hidden states of one shape, and do something."""
    states = [(c.entering, first_tensor(c.output)) for c in run]
    if any(left is None or right is None for left, right in states):
        return False
    if any(left is not None and right is not None and left.shape != right.shape for left, right in states[1:]):
        return False  # only the first block of a run may change the shape
    links = [_same(left, right) for (_, left), (right, _) in pairwise(states)]
    if links and not any(links) and all(_same(states[0][0], left) for left, _ in states[1:]):
        return False  # side by side on one input, not one after the other
    return any(True for c in run for _ in c.module.parameters())


def _stack(name: str, run: Sequence[Call], lengths: Iterable[int], numbers: Mapping[int, int]) -> Stack | None:
    states = [(c.entering, first_tensor(c.output)) for c in run]
    last = states[-1][1]
    assert last is not None
    layout = find_layout(last.shape, lengths, run[-1].module)
    if layout is None or layout.batch_size(last.shape) > MOST_BATCH:
        return None
    blocks = [Block(call.module, call.path, numbers[id(call)]) for call in run]
    links = [_same(left, right) for (_, left), (right, _) in pairwise(states)]
    outputs = tuple(c.output for c in run)
    entering = states[0][0]
    alike = entering is not None and entering.shape == last.shape
    return Stack(name, tuple(blocks), layout, outputs, all(links), run[0].start, run[-1].end, alike)


def _span(run: Sequence[Call]) -> str:
    first, last = (c.path.rpartition(".")[2] for c in (run[0], run[-1]))
    return first if first == last else f"{first}:{last}"


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None or left.shape != right.shape:
        return False
    return torch.equal(left, right.to(left.device))
