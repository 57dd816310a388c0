"""What was proved about a loaded model, in values, and the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from logitlab.errors import VerificationError
from logitlab.logits.head import Head
from logitlab.models.decompose import BlockParts
from logitlab.models.hooks import first_tensor
from logitlab.models.tail import Tail

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
    """

    name: str
    holds: bool
    error: float | None
    tolerance: float | None
    note: str = ""

    def __str__(self) -> str:
        mark = "holds" if self.holds else "does not hold"
        numbers = ""
        if self.error is not None and self.tolerance is not None:
            numbers = f": max |difference| {self.error:.1e}, tolerance {self.tolerance:.1e}"
        return f"{self.name} {mark}{numbers}{'; ' + self.note if self.note else ''}"


@dataclass(frozen=True)
class Verification:
    """Everything that was proved when a model was loaded.

    Attributes:
        tail: the last hidden states decoded by the tail, against the model's own logits.
        fast_form: the linear fast form against the tail; not holding means the tail itself is used.
        head: the fast form in words, or None.
        decompositions: the identities of `IDENTITIES`.
        offered: site kinds that can be read, with the number of layers that offer them.
        refused: site kinds that cannot, with the reason.
    """

    tail: Check
    fast_form: Check
    head: str | None
    decompositions: tuple[Check, ...]
    offered: dict[str, int]
    refused: dict[str, str]

    @property
    def max_abs_difference(self) -> float:
        """Largest difference between the decoded last site and the model's logits."""
        errors = [self.tail.error or 0.0] + ([self.fast_form.error or 0.0] if self.fast_form.holds else [])
        return max(errors)

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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for provenance and JSON."""

        def plain(check: Check) -> dict[str, Any]:
            return {
                "name": check.name,
                "holds": check.holds,
                "error": check.error,
                "tolerance": check.tolerance,
                "note": check.note,
            }

        return {
            "max_abs_difference": self.max_abs_difference,
            "text": self.text,
            "tail": plain(self.tail),
            "fast_form": plain(self.fast_form),
            "head": self.head,
            "decompositions": [plain(check) for check in self.decompositions],
            "offered": dict(self.offered),
            "refused": dict(self.refused),
        }


def tolerance(dtype: torch.dtype, size: float) -> float:
    """Largest difference that rounding explains between two ways of computing logits of this size.

    Two float32 sums in different orders (32 units in the last place of the largest logit covers
    widths of many thousands), and one more rounding each where the model's own numbers are coarser.
    """
    single = torch.finfo(torch.float32).eps
    own = torch.finfo(dtype).eps if dtype.is_floating_point else single
    return max(1.0, size) * (32 * single + (2 * own if own > single else 0.0))


def verify_tail(tail: Tail, logits: torch.Tensor, dtype: torch.dtype) -> tuple[Check, Check]:
    """Hold the tail against the model's logits, and the fast form against the tail.

    Args:
        tail: the tail; its fast form is thrown away if it is not equal.
        logits: the model's logits on the template, [1, tokens, V].
        dtype: the model's dtype.

    Returns:
        The check of the tail and the check of the fast form.

    Raises:
        VerificationError: the tail does not reproduce the logits.
    """
    last = first_tensor(tail.stack.outputs[-1])
    assert last is not None
    hidden = last.reshape(-1, tail.stack.width)
    truth = logits.float().reshape(-1, logits.shape[-1])
    name = "tail(last hidden state) = the model's logits"
    if hidden.shape[0] != truth.shape[0]:
        raise VerificationError(
            f"{tail.stack.name} has {hidden.shape[0]} positions where the logits have {truth.shape[0]}: "
            "its hidden states do not lead to the logits one by one"
        )
    if not bool(torch.isfinite(truth).any()):
        raise VerificationError(
            f"the model's own logits are not finite on a few ordinary tokens{_first_not_finite(tail)}; "
            "load it in float32, or look at its weights"
        )
    decoded = tail.logits(hidden).to(truth.device)
    error = max_difference(decoded, truth)
    allowed = tolerance(dtype, finite_size(truth))
    if not error <= allowed:
        raise VerificationError(
            f"the short-circuited tail of {tail.stack.name} does not give the model's own logits: they differ by "
            f"{error:.2g} where rounding explains {allowed:.1g}; this model cannot be read"
        )
    return Check(name, True, error, allowed), _verify_fast_form(tail, hidden, decoded, truth, dtype)


def _first_not_finite(tail: Tail) -> str:
    """The block, in words, from which on hidden states are not finite; nothing if they all are."""
    for layer, output in enumerate(tail.stack.outputs):
        state = first_tensor(output)
        if state is not None and not bool(torch.isfinite(state).all()):
            return f": hidden states are not, from {layer}.resid_post of {tail.stack.name} on"
    return ""


def _verify_fast_form(
    tail: Tail, hidden: torch.Tensor, decoded: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> Check:
    name = "fast form (linear head and what follows it) = tail"
    why = tail.derive_head()
    if tail.head is None:
        return Check(name, False, None, None, f"{why}; the tail itself is used")
    rows = _random_hidden(hidden, tail.head)
    by_tail = torch.cat([decoded, tail.logits(rows).to(decoded.device)])
    by_head = tail.head.logits(tail.head_input(torch.cat([hidden, rows.to(hidden)]))).to(decoded.device)
    error = max(max_difference(by_head, by_tail), max_difference(by_head[: len(truth)], truth))
    allowed = tolerance(dtype, finite_size(by_tail))
    if not error <= allowed:
        tail.drop_head()
        return Check(name, False, error, allowed, "the tail itself is used")
    return Check(
        name, True, error, allowed, f"tested on {len(by_tail)} hidden states up to 100 times as large as real ones"
    )


def _random_hidden(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Random hidden states of many sizes, and some that point along rows of the head."""
    generator = torch.Generator().manual_seed(4)
    size = hidden.float().std().clamp_min(1e-6).cpu()
    noise = torch.randn(8, hidden.shape[1], generator=generator) * size
    rows = noise * torch.tensor([0.1, 1, 1, 3, 10, 30, 100, 100]).unsqueeze(1)
    if head.weight.shape[1] == hidden.shape[1]:
        along = head.weight[torch.linspace(0, head.vocab_size - 1, 4).long().to(head.weight.device)].float().cpu()
        rows = torch.cat([rows, 100 * size * along / along.std().clamp_min(1e-6)])
    return rows.to(hidden)


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; positions where both are the same infinity count as equal."""
    a, b = a.double(), b.double().to(a.device)
    gap = torch.where(a == b, 0.0, (a - b).abs())
    return float(gap.max()) if gap.numel() else 0.0


def finite_size(z: torch.Tensor) -> float:
    """Largest finite absolute value."""
    return float(torch.where(torch.isfinite(z), z, 0.0).abs().max()) if z.numel() else 0.0


def verify_decompositions(
    parts: Sequence[BlockParts], dtype: torch.dtype
) -> tuple[tuple[Check, ...], dict[str, int], dict[str, str]]:
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
