"""KL divergence from a reference distribution, and its gradient, without logits in memory.

For logits ``z = x W^T`` of a linear head the gradient of KL(r || p) by the row is the difference of two means of
the head's rows, under p and under r. So fitting through a vocabulary takes two products of its size, one that gives
``p`` and one that takes the mean, both in the same pass, and no more memory than reading does.
Behind a soft-cap, or where a model itself decodes, it is summed tile by tile, or row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from logitlab.logits.choose import choose
from logitlab.logits.head import Head, LogitSource
from logitlab.logits.native import NativeRows
from logitlab.logits.rows import HeadRows
from logitlab.logits.statistics import statistics

TILE = 2048
"""Columns that are worked on together."""

SOURCE_VALUES = 2**24
"""Most logits that are held where a model itself decodes."""


@dataclass
class Divergence:
    """KL(r || p) of rows [groups, positions], and where it goes.

    Attributes:
        kl: [groups, positions] float64, nats.
        gradient: [groups, positions, d] float32, by each row, nats per unit.
    """

    kl: torch.Tensor
    gradient: torch.Tensor


def divergence(
    x: torch.Tensor, final: torch.Tensor, source: Head | LogitSource, backend: str = "auto", *, narrow: bool = False
) -> Divergence:
    """KL divergence from the distributions of ``final`` to those of ``x``, with the gradient by ``x``.

    Args:
        x: rows [groups, positions, d], as `logitlab.models.tail.Tail.prepare` gives them.
        final: rows [positions, d] of the reference.
        source: what decodes both.
        backend: as in `logitlab.logits.statistics`.
        narrow: whether products with a linear head may be of numbers rounded to bfloat16, where that is quicker, summed
            in float32. Both means are then of the same rounded head, so that the gradient still is zero where p is r.

    Example:
        >>> found = divergence(torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0]]), Head(torch.eye(2)))
        >>> [round(v, 4) for v in found.gradient[0, 0].tolist()]
        [-0.2311, 0.2311]
    """
    x, final = x.detach(), final.detach()
    if not isinstance(source, Head):
        return _by_logits(x, final, source)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if source.softcap is not None:
            own = statistics(final.unsqueeze(0), source, top_k=1, entropy=False, backend=backend)
            found = statistics(x, source, top_k=1, entropy=False, backend=backend)
            return _by_tiles(x, final, source, found.logsumexp, own.logsumexp[0])
        kind = NativeRows if choose(backend, source) == "native" else HeadRows
        base, flat = kind(final, source), kind(x.reshape(-1, x.shape[-1]), source)
        theirs, normal = (v.to(x.device) for v in base.expected(narrow, like=len(flat.x)))
        mean, lse = (v.to(x.device) for v in flat.expected(narrow))
        rounded = torch.bfloat16 if narrow and base.narrows else torch.float64  # as those products have taken them
        wide = final.to(rounded).double()  # group by group, so that little is held in float64
        gap = torch.stack([((wide - rows.to(rounded).double()) * theirs).sum(-1) for rows in x])
        kl = gap * source.scale + lse.reshape(x.shape[:2]) - normal
        return Divergence(kl.clamp_min(0.0), mean.reshape(x.shape).sub_(theirs).mul_(source.scale))


def _by_tiles(
    x: torch.Tensor, final: torch.Tensor, head: Head, lse: torch.Tensor, final_lse: torch.Tensor
) -> Divergence:
    """Behind a soft-cap: what each column adds, with the slope of the cap at its logit."""
    device, cap = head.weight.device, head.softcap
    assert cap is not None
    groups, positions, d = x.shape
    flat, base = x.reshape(-1, d).to(device, torch.float32), final.to(device, torch.float32)
    normal = lse.reshape(-1, 1).to(device).float()
    theirs = final_lse.reshape(-1, 1).to(device).float()
    gradient = torch.zeros(groups * positions, d, device=device)
    gap = torch.zeros(groups, positions, dtype=torch.float64, device=device)
    for start, stop in pairwise([*range(0, head.vocab_size, TILE), head.vocab_size]):
        columns = slice(start, stop)
        reference = head.logits(base, columns)
        r = (reference - theirs).exp()
        z = head.logits(flat, columns)
        p = (z - normal).exp().reshape(groups, positions, -1)
        capped = z if head.offset is None else z - head.offset[columns].to(z.dtype)
        slope = (1 - (capped / cap) ** 2).nan_to_num(0.0) * head.scale
        gradient += ((p - r).reshape(slope.shape) * slope) @ head.weight[columns].float()
        step = torch.where(r > 0, r * (reference - z.reshape(groups, positions, -1)), 0.0)
        gap += step.sum(-1, dtype=torch.float64)
    kl = gap.to(lse.device) + lse - final_lse
    return Divergence(kl.clamp_min(0.0), gradient.reshape(x.shape).to(x.device))


def _by_logits(x: torch.Tensor, final: torch.Tensor, source: LogitSource) -> Divergence:
    """Where a model itself decodes: a few rows at a time, differentiated by PyTorch."""
    groups, positions, d = x.shape
    many = max(1, SOURCE_VALUES // source.vocab_size)
    flat, kl, gradient = x.reshape(-1, d), [], []
    place = torch.arange(positions, device=x.device).repeat(groups)
    for start in range(0, len(flat), many):
        rows = flat[start : start + many].clone().requires_grad_(True)
        with torch.no_grad():
            r = source.compute(final[place[start : start + many]]).double().log_softmax(-1)
        with torch.enable_grad():
            p = source.compute(rows).double().log_softmax(-1)
            each = torch.where(r > -torch.inf, r.exp() * (r - p), 0.0).sum(-1)
            (slope,) = torch.autograd.grad(each.sum(), rows)
        kl.append(each.detach())
        gradient.append(slope.float())
    return Divergence(
        torch.cat(kl).reshape(groups, positions).clamp_min(0.0), torch.cat(gradient).reshape(groups, positions, d)
    )
