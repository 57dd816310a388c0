"""What each block adds to the residual stream, found by watching the additions and then checked.

During one pass over the template every tensor addition inside a block is recorded. Starting from
the block's input, an addition that has the running residual on one side is a residual addition,
and its other side is a component. A component is kept if it is a number times the output of one
module, so that it can be captured (and later edited) at that module. That covers post-norms,
residual multipliers and parallel blocks without a word about any architecture; where it does not
hold, the kind is not offered and the reason is kept.

Which component is the attention? The one that mixes positions: it changes at the last position
when the block's input changes at the one before, with the components before it held fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from logitlab.errors import ModelError
from logitlab.models.hooks import FORWARD_ERRORS, Taps, first_tensor, hidden_input, with_hidden
from logitlab.models.stack import Block, Stack
from logitlab.models.template import Template
from logitlab.models.weights import dense


@dataclass(frozen=True)
class Component:
    """One term of a block's sum: ``scale`` times the output of the module at ``path``.

    Attributes:
        kind: ``attn_out``, ``cross_attn_out`` or ``mlp_out``.
        path: path of the module relative to the block.
        scale: constant factor between the module's output and what is added.
    """

    kind: str
    module: nn.Module
    path: str
    scale: float


@dataclass(frozen=True)
class Projection:
    """The linear map that ends a component, cut into parts: heads of attention, neurons of an MLP.

    ``component = scale * (input @ weight + bias)``; part ``i`` is ``scale * input_i @ weight_i``.

    Attributes:
        module: the linear module; its input is captured.
        path: path of the module relative to the block.
        scale: as in `Component`.
        parts: number of heads, or of neurons.
        transposed: whether the module keeps its weight as [in, out] (``Conv1D``).
    """

    module: nn.Module
    path: str
    scale: float
    parts: int
    transposed: bool

    def matrix(self) -> torch.Tensor:
        """The scaled map as [inputs, width] float32; row ``i`` is the value vector of input ``i``."""
        weight = dense(self.module)
        if weight is None:
            raise ModelError(f"the weights at {self.path} cannot be had as plain numbers")
        return (weight if self.transposed else weight.T).float() * self.scale

    def expand(self, given: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
        """What chosen parts add: inputs [n, inputs] -> [n, len(parts), width] float32."""
        matrix, size = self.matrix(), given.shape[-1] // self.parts
        pieces = given.float().reshape(-1, self.parts, size)[:, list(parts)]
        return torch.einsum("npi,piw->npw", pieces, matrix.reshape(self.parts, size, -1)[list(parts)])


@dataclass
class BlockParts:
    """What was found in one block, with the largest absolute error of each identity.

    Attributes:
        components: by kind; empty where the block's output is not a sum.
        heads: the attention's output projection, if its inputs are heads.
        neurons: the MLP's down projection, if there is a single one.
        errors: by identity: ``residual``, ``heads``, ``neurons``.
        sizes: by identity, the largest absolute value of what is summed, to judge the errors by.
        reasons: by site kind, why it is not offered.
    """

    components: dict[str, Component] = field(default_factory=dict[str, Component])
    heads: Projection | None = None
    neurons: Projection | None = None
    errors: dict[str, float] = field(default_factory=dict[str, float])
    sizes: dict[str, float] = field(default_factory=dict[str, float])
    reasons: dict[str, str] = field(default_factory=dict[str, str])


# -- recording ---------------------------------------------------------------------------------


@dataclass
class _Add:
    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor


@dataclass
class _Output:
    path: str
    module: nn.Module
    given: torch.Tensor | None
    out: torch.Tensor


class _Additions(TorchDispatchMode):
    """Record same-shape additions, and tensors that look like [1, tokens, heads, size]."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.adds: list[_Add] = []
        self.split: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        name = func.overloadpacket
        is_add = name in (torch.ops.aten.add, torch.ops.aten.add_)
        before = None
        if is_add and isinstance(args[1], torch.Tensor) and args[0].shape == args[1].shape and args[0].ndim >= 2:
            before = (args[0].clone(), args[1].clone() * kwargs.get("alpha", 1))
        out = func(*args, **kwargs)
        if before is not None:
            self.adds.append(_Add(*before, out.clone()))
        elif isinstance(out, torch.Tensor) and out.ndim == 4 and out.shape[0] == 1 and out.is_floating_point():
            self.split.append(out)
        return out


@dataclass
class _Record:
    """Everything seen during one call of one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: torch.Tensor
    leaving: torch.Tensor
    adds: list[_Add]
    split: list[torch.Tensor]
    outputs: list[_Output]


def decompose(module: nn.Module, stack: Stack, template: Template) -> list[BlockParts]:
    """Find the parts of every block of a stack, from one forward pass over the template.

    Args:
        module: the model.
        stack: the stack whose blocks are taken apart.
        template: inputs of the pass.
    """
    if len(stack.layout.order) != 3 or not stack.enters_alike:
        return [_refused("states of this form are not taken apart") for _ in stack.blocks]
    if stack.positions < 2:
        return [
            _refused("the example has one position only, so what mixes positions cannot be told") for _ in stack.blocks
        ]
    kinds: dict[Any, list[str] | str] = {}
    return [_block_parts(record, block, kinds) for record, block in _records(module, stack, template)]


def _records(module: nn.Module, stack: Stack, template: Template) -> list[tuple[_Record, Block]]:
    """Run the template once, recording every block's call."""
    finished: list[tuple[_Record, Block]] = []
    mode = _Additions()
    current: dict[str, Any] = {}
    blocks = {(id(b.module), b.call): b for b in stack.blocks}
    calls: Counter[int] = Counter()

    def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block = blocks.get((id(owner), calls[id(owner)]))
        calls[id(owner)] += 1
        given = hidden_input(args, kwargs)
        if block is None or given is None:
            return  # a call of the module outside of the stack
        mode.adds, mode.split = [], []
        current.update(block=block, args=args, kwargs=kwargs, entering=given.clone(), outputs=[])
        mode.active = True

    def leave(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        mode.active = False
        left = first_tensor(output)
        if "block" not in current or left is None:
            return
        block: Block = current.pop("block")
        finished.append((_Record(leaving=left.clone(), adds=mode.adds, split=mode.split, **current), block))
        current.clear()

    with Taps() as taps:
        for owner in {id(b.module): b.module for b in stack.blocks}.values():
            taps.before(owner, enter)
            for path, child in owner.named_modules():
                if path:
                    taps.after(child, _noting(path, current, mode))
            taps.after(owner, leave)
        with torch.no_grad(), mode:
            module(**template.full())
    return finished


def _noting(path: str, current: dict[str, Any], mode: _Additions) -> Any:
    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first_tensor(output)
        if out is None or "outputs" not in current:
            return
        mode.active = False  # our own copies are not the model's arithmetic
        given = hidden_input(args, kwargs)
        keep = None if given is None else given.clone()
        current["outputs"].append(_Output(path, child, keep, out.clone()))
        mode.active = True

    return note


# -- analysis ----------------------------------------------------------------------------------


def _block_parts(record: _Record, block: Block, cache: dict[Any, list[str] | str]) -> BlockParts:
    """Take one block apart; blocks of the same make share the answer to what mixes positions."""
    terms = _residual_terms(record)
    if isinstance(terms, str):
        return _refused(terms)
    known = [source for term in terms if (source := _source_of(term, record)) is not None]
    if len(known) < len(terms):
        return _refused("a term of the residual sum is not a multiple of one module's output")
    key = (type(block.module), tuple((type(source.module), source.path) for source in known))
    if key not in cache:
        try:
            cache[key] = _kinds(record, block, known)
        except FORWARD_ERRORS as error:  # a block that cannot be called by itself
            cache[key] = f"a block cannot be called again by itself ({type(error).__name__})"
    kinds = cache[key]
    if isinstance(kinds, str):
        return _refused(kinds)
    parts = BlockParts()
    total = record.entering.double()
    for kind, source, term in zip(kinds, known, terms, strict=True):
        component = Component(kind, source.module, source.path, source.scale)
        parts.components[kind] = component
        total = total + (source.out.double() * source.scale).reshape(total.shape)
        if kind == "attn_out":
            _find_heads(parts, term, record)
        elif kind == "mlp_out":
            _find_neurons(parts, term, record)
    parts.errors["residual"] = float((total - record.leaving.double()).abs().max())
    parts.sizes["residual"] = max(float(t.abs().max()) for t in (record.entering, record.leaving, *terms))
    for kind, what in (("attn_out", "mixes positions"), ("mlp_out", "works on each position by itself")):
        if kind not in parts.components:
            parts.reasons[kind] = f"nothing that the block adds {what}"
    if "cross_attn_out" not in parts.components:
        parts.reasons["cross_attn_out"] = "the block does not attend to an encoder"
    if "attn_out" not in parts.components:
        parts.reasons["head_out"] = parts.reasons["attn_out"]
    if "mlp_out" not in parts.components:
        parts.reasons["neuron"] = parts.reasons["mlp_out"]
    return parts


def _refused(why: str) -> BlockParts:
    return BlockParts(reasons=dict.fromkeys(("attn_out", "cross_attn_out", "mlp_out", "head_out", "neuron"), why))


def _residual_terms(record: _Record) -> list[torch.Tensor] | str:
    """The tensors added to the residual on its way through the block, in order."""
    residual, terms = record.entering, []
    for add in record.adds:
        if add.out.numel() != residual.numel():
            continue
        if _equal(add.left, residual):
            terms.append(add.right)
        elif _equal(add.right, residual):
            terms.append(add.left)
        else:
            continue
        residual = add.out
    if not terms or not _equal(residual, record.leaving):
        return "the block's output is not its input plus what its parts add (a norm after the sum?)"
    split: list[torch.Tensor] = []
    for term in terms:
        split += _split_sum(term, record)
    return split


def _split_sum(term: torch.Tensor, record: _Record) -> list[torch.Tensor]:
    """A parallel block adds ``attention + mlp`` at once: take that sum apart again."""
    if _source_of(term, record) is not None:
        return [term]
    for add in record.adds:
        if _equal(add.out, term):
            return _split_sum(add.left, record) + _split_sum(add.right, record)
    return [term]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


@dataclass(frozen=True)
class _Source:
    module: nn.Module
    path: str
    scale: float
    out: torch.Tensor


def _source_of(term: torch.Tensor, record: _Record) -> _Source | None:
    """The last module whose output is the term up to a constant factor, if it is called only once."""
    calls = Counter(output.path for output in record.outputs)
    flat = term.double().reshape(-1)
    size = float(flat.abs().max())
    tolerance = 8 * torch.finfo(term.dtype).eps * size
    for output in reversed(record.outputs):
        if output.out.numel() != flat.numel() or calls[output.path] > 1:
            continue
        out = output.out.double().reshape(-1)
        norm = float(out @ out)
        if norm == 0.0:
            continue
        scale = float(flat @ out) / norm
        if abs(scale - 1) < 1e-6:
            scale = 1.0
        if float((flat - scale * out).abs().max()) <= tolerance and scale != 0.0:
            return _Source(output.module, output.path, scale, output.out)
    return None


def _kinds(record: _Record, block: Block, sources: list[_Source]) -> list[str] | str:
    """Name each component by what it depends on; a sentence instead where that gives no clear answer."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(record.entering[:, -2].shape, generator=generator).to(record.entering)
    shaken = record.entering.clone()
    shaken[:, -2] += noise * shaken.std()  # next to the last position: short convolutions see no further

    def other_hidden(value: torch.Tensor) -> torch.Tensor:
        return shaken.clone() if _equal(value, record.entering) else value.clone()

    def other_encoder(value: torch.Tensor) -> torch.Tensor:
        return value + 1 if value.ndim == 3 and value.shape[1] != record.entering.shape[1] else value

    kinds: list[str] = []
    for i, source in enumerate(sources):
        before = source.out.reshape(record.entering.shape)
        moved = _rerun(record, block, sources[:i], source, other_hidden).reshape(before.shape)
        crossed = _rerun(record, block, sources[:i], source, other_encoder).reshape(before.shape)
        noticeable = 1e-4 * float(before.abs().max())  # regrouped experts differ by rounding only
        if float((moved[:, -1] - before[:, -1]).abs().max()) > noticeable:
            kinds.append("attn_out")
        else:
            kinds.append("cross_attn_out" if float((crossed - before).abs().max()) > noticeable else "mlp_out")
    for kind in set(kinds):
        if kinds.count(kind) > 1:
            what = "work on each position by itself" if kind == "mlp_out" else "mix positions"
            return f"{kinds.count(kind)} of the things that the block adds {what}"
    return kinds


def _rerun(
    record: _Record,
    block: Block,
    fixed: Sequence[_Source],
    wanted: _Source,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Call one block again with changed inputs, some components held at what they were."""

    def changed(value: Any) -> Any:
        if hasattr(value, "get_seq_length"):
            return None  # a cache that the recorded call has filled already
        return change(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first_tensor(output)
        if out is not None:
            seen.append(out.clone())

    def hold(source: _Source) -> Any:
        def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return with_hidden(output, source.out.clone())  # some blocks add in place

        return answer

    with Taps() as taps, torch.no_grad():
        for source in fixed:
            taps.after(source.module, hold(source))
        taps.after(wanted.module, note)
        block.module(*map(changed, record.args), **{k: changed(v) for k, v in record.kwargs.items()})
    return seen[-1]


def _linear_source(term: torch.Tensor, record: _Record) -> tuple[_Output, float, bool, float] | None:
    """The plain linear module that ends in the term: (its call, scale, transposed, error)."""
    flat = term.double().reshape(-1)
    tolerance = 64 * torch.finfo(term.dtype).eps * float(flat.abs().max())
    for output in reversed(record.outputs):
        if output.given is None or output.out.numel() != flat.numel():
            continue
        weight = dense(output.module)
        if weight is None or weight.ndim != 2:
            continue
        out = output.out.double().reshape(-1)
        scale = float(flat @ out) / max(float(out @ out), 1e-300)
        scale = 1.0 if abs(scale - 1) < 1e-6 else scale
        if float((flat - scale * out).abs().max()) > tolerance:
            continue
        given = output.given.double().reshape(-1, output.given.shape[-1])
        bias = dense(output.module, "bias")
        for transposed in (False, True):
            matrix = weight.double() if transposed else weight.double().T
            if matrix.shape[0] != given.shape[1]:
                continue
            value = given @ matrix + (0 if bias is None else bias.double())
            if value.numel() != flat.numel():
                continue
            error = float((scale * value.reshape(-1) - flat).abs().max())
            if error <= tolerance:
                return output, scale, transposed, error
    return None


def _find_heads(parts: BlockParts, term: torch.Tensor, record: _Record) -> None:
    found = _linear_source(term, record)
    if found is None:
        parts.reasons["head_out"] = "attn_out is not the output of one linear map (a norm after it, or packed weights)"
        return
    output, scale, transposed, _ = found
    given = output.given
    assert given is not None
    tokens = record.entering.shape[1]
    for tensor in record.split:
        if tensor.shape[1] == tokens and tensor.numel() == given.numel() and _equal(tensor, given):
            parts.heads = Projection(output.module, output.path, scale, int(tensor.shape[2]), transposed)
            parts.errors["heads"] = _sum_error(parts.heads, output, term)
            parts.sizes["heads"] = float(term.abs().max())
            return
    parts.reasons["head_out"] = "the output projection's input was not seen to be made of heads"


def _find_neurons(parts: BlockParts, term: torch.Tensor, record: _Record) -> None:
    found = _linear_source(term, record)
    if found is None:
        parts.reasons["neuron"] = "mlp_out is not the output of one linear map (experts, a norm, or packed weights)"
        return
    output, scale, transposed, _ = found
    assert output.given is not None
    parts.neurons = Projection(output.module, output.path, scale, int(output.given.shape[-1]), transposed)
    parts.errors["neurons"] = _sum_error(parts.neurons, output, term)
    parts.sizes["neurons"] = float(term.abs().max())


def _sum_error(projection: Projection, output: _Output, term: torch.Tensor) -> float:
    """Largest difference between the sum of all parts plus the bias, and the component."""
    assert output.given is not None
    given = output.given.reshape(-1, output.given.shape[-1])
    total = projection.expand(given, range(projection.parts)).sum(1)
    bias = dense(projection.module, "bias")
    if bias is not None:
        total = total + bias.float() * projection.scale
    return float((total - term.reshape(total.shape).float()).abs().max())
