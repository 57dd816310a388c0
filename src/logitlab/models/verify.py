"""What was proved about a loaded model, in values, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from logitlab.errors import VerificationError
from logitlab.logits.head import Head
from logitlab.models.decompose import BlockParts
from logitlab.models.hooks import FORWARD_ERRORS, first_tensor
from logitlab.models.output import Output, output_of
from logitlab.models.tail import Tail
from logitlab.models.trace import Run, rebuilt

IDENTITIES = {
    "residual": "resid_post = resid_pre + attn_out + mlp_out",
    "heads": "heads (and bias) sum to attn_out",
    "neurons": "neurons (and bias) sum to mlp_out",
}
"""The decompositions that are checked, by name."""

_KINDS_OF = {"residual": ("attn_out", "cross_attn_out", "mlp_out"), "heads": ("head_out",), "neurons": ("neuron",)}


@dataclass(frozen=True)
class Check:
    """One identity that was tested on the loaded model.

    Attributes:
        name: what should be equal.
        holds: whether it is.
        error: largest absolute difference that was seen; None where it could not be measured.
        tolerance: largest difference that rounding explains.
        note: where it holds, or why it does not.
        ordinary: the difference on the template's own states, where `error` was also taken on others.
    """

    name: str
    holds: bool
    error: float | None
    tolerance: float | None
    note: str = ""
    ordinary: float | None = None

    def __str__(self) -> str:
        mark = "holds" if self.holds else "does not hold"
        numbers = ""
        if self.error is not None and self.tolerance is not None:
            numbers = f": max |difference| {self.error:.1e}, tolerance {self.tolerance:.1e}"
        return f"{self.name} {mark}{numbers}{'; ' + self.note if self.note else ''}"


class UnrelatedStackError(VerificationError):
    """A stack is not on the way to the answer; another one may be."""


Judgement = tuple[tuple[Check, ...], dict[str, int], dict[str, str]]
"""The checks, the site kinds that are offered (in how many layers), and why others are not."""


@dataclass(frozen=True, eq=False)
class Verification:
    """Everything that was proved about a model.

    The tail is proved when the model is loaded. The blocks are taken apart, at the price of one more
    forward pass on the same few tokens, when `decompositions`, `offered` or `refused` is first asked for.

    Attributes:
        tail: the last hidden states decoded by the tail, against the model's own logits.
        fast_form: the linear fast form against the tail; not holding means the tail itself is used.
        head: the fast form in words, or None.
        judge: takes the blocks apart and judges them, see `verify_decompositions`.
    """

    tail: Check
    fast_form: Check
    head: str | None
    judge: Callable[[], Judgement] = field(repr=False)

    @cached_property
    def _judged(self) -> Judgement:
        return self.judge()

    @property
    def decompositions(self) -> tuple[Check, ...]:
        """The identities of `IDENTITIES`."""
        return self._judged[0]

    @property
    def offered(self) -> dict[str, int]:
        """Site kinds that can be read, with the number of layers that offer them."""
        return self._judged[1]

    @property
    def refused(self) -> dict[str, str]:
        """Site kinds that cannot be read, with the reason."""
        return self._judged[2]

    @property
    def max_abs_difference(self) -> float:
        """Largest difference between the decoded last states of the template and the model's logits.

        It is that of the form that is used: the fast one if there is one, else the tail.
        """
        assert self.tail.error is not None
        return max(self.tail.error, self.fast_form.ordinary or 0.0) if self.fast_form.holds else self.tail.error

    @property
    def text(self) -> str:
        """The result in one line."""
        return f"last site decoded equals the model's logits within {self.max_abs_difference:.1e}"

    def lines(self) -> list[str]:
        """The whole record, one statement a line."""
        kinds = ", ".join(f"{kind} ({n} layers)" for kind, n in self.offered.items())
        return [
            str(self.tail),
            str(self.fast_form),
            *map(str, self.decompositions),
            f"sites that can be read: {kinds}",
            *(f"not offered: {kind}: {why}" for kind, why in self.refused.items()),
        ]

    def as_dict(self, *, decompositions: bool = True) -> dict[str, Any]:
        """Plain values for provenance and JSON.

        Args:
            decompositions: also what was found about the parts of the blocks.
        """

        def plain(check: Check) -> dict[str, Any]:
            return {
                "name": check.name,
                "holds": check.holds,
                "error": check.error,
                "tolerance": check.tolerance,
                "note": check.note,
            }

        record = {
            "max_abs_difference": self.max_abs_difference,
            "text": self.text,
            "tail": plain(self.tail),
            "fast_form": plain(self.fast_form),
            "head": self.head,
        }
        if not decompositions:
            return record
        return record | {
            "decompositions": [plain(check) for check in self.decompositions],
            "offered": dict(self.offered),
            "refused": dict(self.refused),
        }


def tolerance(dtype: torch.dtype, size: float) -> float:
    """Largest difference that rounding explains between two ways of computing numbers of this size.

    Both ways start from the same numbers in the model's dtype and sum in float32; what can differ is:

    * The order of a float32 sum. For d terms the errors grow like sqrt(d), about ``0.2 sqrt(d)`` units of
      2**-24 of the largest logit: 32 units of 2**-23 cover widths of many thousands. Below a size of 1
      the allowance stays what it is at 1, since terms that cancel are larger than what they leave.
    * Where the dtype is coarser, each step of the model ends in a rounding of at most ``u`` times the
      size (u = eps / 2, half a unit in the last place), and the other way does none of them. A head has
      at most four: product, then scale (or bias and offset) or the division, tanh and product of a
      soft-cap. That a tanh is bent only makes what was rounded before it smaller. Four times u is 2 eps.

    The product of one normed state is never rounded twice: the norm is the model's own in both ways.

    Args:
        dtype: the coarsest dtype in which the model computes.
        size: largest absolute value that takes part.
    """
    single = torch.finfo(torch.float32).eps
    own = torch.finfo(dtype).eps if dtype.is_floating_point else single
    return 32 * single * max(1.0, size) + (2 * own * size if own > single else 0.0)


def verify_tail(tail: Tail, dtype: torch.dtype) -> tuple[Check, Check]:
    """Prove a tail on the template: in context, by rows where that is possible, and in its fast form.

    Three things are asked. Does the recorded pass, played again with the stack's last state put back,
    give the model's own answer? Does the answer change with that state (else this is the wrong
    stack)? And does it follow from the state alone, so that single rows can be decoded?

    Args:
        tail: the tail; how it decodes rows, and its fast form, are set here.
        dtype: the model's dtype.

    Returns:
        The check of the tail and the check of the fast form.

    Raises:
        VerificationError: the tail does not reproduce the model's answer, or does not depend on the stack.
    """
    last = first_tensor(tail.run.blocks[-1])
    own = output_of(tail.run.output, texts=tail.texts, pixels=tail.pixels)
    assert last is not None
    assert own is not None
    truth = own.flat
    name = "tail(last hidden state) = the model's logits"
    if not bool(torch.isfinite(truth).any()) or bool((torch.isnan(truth) | (truth == torch.inf)).any()):
        remedy = "load it in float32, or look at its weights"
        if dtype == torch.float16:
            remedy = "float16 ends at 65504: load it in bfloat16 or float32"
        raise VerificationError(
            f"the model's own logits are not finite on a few ordinary tokens{_first_not_finite(tail)}; {remedy}"
        )
    allowed = tolerance(dtype, finite_size(truth))
    try:
        elsewhere = tail.moved(_moved(last, 6)).flat
        replayed = tail.output(last).flat
    except FORWARD_ERRORS as failure:
        raise VerificationError(
            f"{tail.stack.name} cannot be short-circuited: the model stops with {type(failure).__name__}: "
            f"{' '.join(str(failure).split())[:200]}"
        ) from failure
    error = max_difference(replayed, truth)
    if not error <= allowed:
        raise VerificationError(
            f"the short-circuited tail of {tail.stack.name} does not give the model's own logits: they differ by "
            f"{error:.2g} where rounding explains {allowed:.1g}; this model cannot be read"
        )
    if not max_difference(elsewhere, truth) > allowed:
        raise UnrelatedStackError(
            f"the model's answer does not depend on the last state of {tail.stack.name}: it leads somewhere else"
        )
    note = _verify_rows(tail, last, own, allowed)
    if tail.by is None:
        return Check(name, True, error, allowed, note), Check(FAST, False, None, None, "whole states are decoded")
    hidden = tail.stack.layout.rows(last)
    decoded = tail.logits(hidden).to(truth.device)
    truth = own.rows if tail.space.per == "position" else decoded  # of a pooled answer there is no row
    error = max(error, max_difference(decoded, truth))
    return Check(name, True, error, allowed, note), _verify_fast_form(tail, hidden, decoded, truth, dtype)


FAST = "fast form (linear head and what follows it) = tail"


def _moved(state: torch.Tensor, seed: int) -> torch.Tensor:
    """A state with noise of its own size added."""
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed)).to(state)
    return state + noise * state.float().std().clamp_min(1e-3).to(state)


def _verify_rows(tail: Tail, last: torch.Tensor, own: Output, allowed: float) -> str:
    """Find how single rows can be decoded, prove it, and say in words what was found."""
    space, stack = tail.space, tail.stack
    rows = stack.layout.rows(last)
    if space.per == "position" and space.name != "boxes":
        if stack.batch == 1 and _agrees(tail, "tokens", rows, own.rows, allowed):
            tail.alone = True
            return "token by token"
        tail.alone = _alone(tail, last, own, allowed)
        # A row must mean the same at another position and in other company.
        shifted = torch.cat([rows[-1:], _moved(10 * rows, 9), rows[:-1]])
        expected = torch.cat([own.rows[-1:], own.rows[:-1]])
        n = len(rows)
        tail.by = "states"
        mixed = tail.logits(shifted) if tail.alone else None
        kept = None if mixed is None else torch.cat([mixed[:1], mixed[n + 1 :]])
        if kept is None or not max_difference(kept, expected.to(kept.device)) <= allowed:
            tail.by = None
        else:
            tail.batched = _batch_agrees(tail, rows, allowed)
            return "position by position"
    else:
        tail.alone = _alone(tail, last, own, allowed)
    if space.per == "input" and tail.alone:
        few = torch.cat([rows[:2], _moved(rows[:2], 7)])
        tail.by = "states"
        tail.batched = _batch_agrees(tail, few, allowed)
        by_states = tail.logits(few)
        if space.name == "classes" and stack.batch == 1 and _agrees(tail, "tokens", few, by_states, allowed):
            return "pooled; single positions as inputs of one token"
        tail.by = "states"
        return "pooled; single positions as inputs that are the same everywhere"
    tail.by = None
    return "whole states" if tail.alone else "whole states, given what else this input left in the model"


def _agrees(tail: Tail, by: str, rows: torch.Tensor, truth: torch.Tensor, allowed: float) -> bool:
    """Whether rows decoded in one way give the truth; the way stays set on the tail if they do."""
    tail.by = by
    if by == "tokens" and tail.template.tokens is None:
        tail.by = None
        return False
    try:
        decoded = tail.logits(rows)
        fine = decoded.shape == truth.shape and max_difference(decoded, truth.to(decoded.device)) <= allowed
    except FORWARD_ERRORS:  # a model that cannot run on such inputs is decoded in another way
        fine = False
    if not fine:
        tail.by = None
    return fine


def _batch_agrees(tail: Tail, rows: torch.Tensor, allowed: float) -> bool:
    """Whether several states may go through one replay."""
    if tail.stack.layout.batch is None or tail.stack.batch != 1:
        return False
    states = torch.stack([rows.roll(i, 0) for i in range(3)])
    n = tail.stack.positions
    states = torch.cat([states] * (1 + n // states.shape[1]), dim=1)[:, :n]
    try:
        tail.batched = True
        together = tail.decode_states(states)
        tail.batched = False
        singly = tail.decode_states(states)
    except FORWARD_ERRORS:
        tail.batched = False
        return False
    return together.shape == singly.shape and max_difference(together, singly) <= allowed


def _alone(tail: Tail, last: torch.Tensor, own: Output, allowed: float) -> bool:
    """Whether the answer stays what it is when everything else in the record is disturbed."""

    def disturbed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _moved(value, 8) if value.is_floating_point() and value.numel() > 1 else value
        return rebuilt(value, disturbed)

    run = tail.run
    noisy = Run(
        run.inputs,
        run.output,
        tuple((path, module, disturbed(output)) for path, module, output in run.upstream),
        tuple(map(disturbed, run.blocks)),  # the last one hands on ``last`` itself
        run.beside,
    )
    try:
        return max_difference(tail.output(last, noisy).flat, own.flat) <= allowed
    except FORWARD_ERRORS:
        return False


def _first_not_finite(tail: Tail) -> str:
    """The block, in words, from which on hidden states are not finite; nothing if they all are."""
    for layer, output in enumerate(tail.run.blocks):
        state = first_tensor(output)
        if state is not None and not bool(torch.isfinite(state).all()):
            return f": hidden states are not, from {layer}.resid_post of {tail.stack.name} on"
    return ""


def _verify_fast_form(
    tail: Tail, hidden: torch.Tensor, decoded: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> Check:
    name = FAST
    why = tail.derive_head()
    if tail.head is None:
        return Check(name, False, None, None, f"{why}; the tail itself is used")
    rows = _random_hidden(hidden, tail.head)
    by_tail = tail.logits(rows).to(decoded.device)
    within = torch.isfinite(by_tail).all(1)  # float16 ends at 65504; beyond it there is nothing to compare with
    rows, by_tail = rows[within.to(rows.device)], torch.cat([decoded, by_tail[within]])
    by_head = tail.head.logits(tail.head_input(torch.cat([hidden, rows.to(hidden)]))).to(decoded.device)
    added = max((finite_size(t) for t in (tail.head.bias, tail.head.offset) if t is not None), default=0.0)
    # Real states are judged by themselves too: beside much larger ones a fault in them would look like rounding.
    ordinary = max_difference(by_head[: len(truth)], truth)
    usual = tolerance(dtype, max(added, finite_size(truth)))
    error = max(max_difference(by_head, by_tail), ordinary)
    allowed = tolerance(dtype, max(added, finite_size(by_tail)))
    if not ordinary <= usual:
        tail.drop_head()
        return Check(name, False, ordinary, usual, "the tail itself is used")
    if not error <= allowed:
        tail.drop_head()
        return Check(name, False, error, allowed, "the tail itself is used")
    tested = f"tested on {len(by_tail)} hidden states up to 100 times as large as real ones"
    if not bool(within.all()):
        tested += f"; {int((~within).sum())} more are beyond what the model can compute"
    return Check(name, True, error, allowed, tested, ordinary)


def _random_hidden(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Random hidden states of many sizes, and some that point along rows of the head."""
    generator = torch.Generator().manual_seed(4)
    size = hidden.float().std().clamp_min(1e-6).cpu()
    noise = torch.randn(8, hidden.shape[1], generator=generator) * size
    rows = noise * torch.tensor([0.1, 1, 1, 3, 10, 30, 100, 100]).unsqueeze(1)
    if head.weight.shape[1] == hidden.shape[1]:
        along = head.weight[torch.linspace(0, head.vocab_size - 1, 4).long().to(head.weight.device)].float().cpu()
        rows = torch.cat([rows, 100 * size * along / along.std().clamp_min(1e-6)])
    most = min(torch.finfo(t).max for t in (hidden.dtype, torch.float32))
    return rows.clamp(-most, most).to(hidden)


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; positions where both are the same infinity count as equal."""
    a, b = a.double(), b.double().to(a.device)
    gap = torch.where(a == b, 0.0, (a - b).abs())
    return float(gap.max()) if gap.numel() else 0.0


def finite_size(z: torch.Tensor) -> float:
    """Largest finite absolute value."""
    return float(torch.where(torch.isfinite(z), z, 0.0).abs().max()) if z.numel() else 0.0


def verify_decompositions(parts: Sequence[BlockParts], dtype: torch.dtype) -> Judgement:
    """Judge the parts of every block; parts whose identity fails are removed from ``parts``.

    Returns:
        The checks, the site kinds that are offered with their number of layers, and the reasons
        for those that are not.
    """
    checks: list[Check] = []
    n = len(parts)
    for identity, text in IDENTITIES.items():
        errors: list[float] = []
        allowed = 0.0
        for block in parts:
            limit = tolerance(dtype, block.sizes.get(identity, 0.0))
            error = block.errors.get(identity)
            if error is not None and error <= limit:
                errors.append(error)
                allowed = max(allowed, limit)
            elif error is not None:
                _withdraw(block, identity, f"{text} fails by {error:.1e}, more than rounding ({limit:.1e})")
        whys = [block.reasons[k] for block in parts for k in _KINDS_OF[identity] if k in block.reasons]
        if identity == "residual" and any("cross_attn_out" in block.components for block in parts):
            text = text.replace("attn_out +", "attn_out + cross_attn_out +")
        elif identity == "residual" and errors and not any("mlp_out" in block.components for block in parts):
            text = text.replace(" + mlp_out", "")
        largest = max((block.sizes.get(identity, 0.0) for block in parts), default=0.0)
        note = (
            f"{len(errors)} of {n} layers, values up to {largest:.3g}" if errors else whys[0] if whys else "not found"
        )
        checks.append(Check(text, bool(errors), max(errors, default=None), allowed if errors else None, note))
    offered = {"resid_pre": n, "resid_post": n}
    refused: dict[str, str] = {}
    for kind in ("attn_out", "cross_attn_out", "mlp_out", "head_out", "neuron"):
        layers = sum(offers(block, kind) for block in parts)
        if layers:
            offered[kind] = layers
        elif kind != "cross_attn_out" or any(block.reasons.get(kind) is None for block in parts):
            refused[kind] = next((block.reasons[kind] for block in parts if kind in block.reasons), "not found")
    return tuple(checks), offered, refused


def offers(block: BlockParts, kind: str) -> bool:
    """Whether a block offers a site kind."""
    if kind in ("resid_pre", "resid_post"):
        return True
    if kind == "head_out":
        return block.heads is not None
    if kind == "neuron":
        return block.neurons is not None
    return kind in block.components


def _withdraw(block: BlockParts, identity: str, why: str) -> None:
    for kind in _KINDS_OF[identity]:
        block.components.pop(kind, None)
        block.reasons[kind] = why
    if identity in ("residual", "heads"):
        block.heads = None
        block.reasons["head_out"] = why
    if identity in ("residual", "neurons"):
        block.neurons = None
        block.reasons["neuron"] = why
