"""The triton backend: the scan as one kernel, for bfloat16 and float16 heads on a GPU.

Rows of the head's own dtype are multiplied as they are. Other rows are written as a sum of three pieces of
that dtype, which together hold all 24 bits of a float32, so products are exact and only sums round.
A program takes some rows over a part of the columns and keeps, in registers, what `Partial` holds; parts are
merged afterwards. Where a target's rank cannot be told within the rounding error, those rows are counted
again by the tiled backend, which settles them in float64.

With ``TRITON_INTERPRET=1`` the same kernel runs on a processor, slowly, for tests.
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from typing import Any

import torch

from logitlab.logits import tiled as _tiled
from logitlab.logits.gpu_scan import scan_kernel
from logitlab.logits.head import Head, LogitSource
from logitlab.logits.partial import BASE, SPARE, Base, Candidates, Partial, conclude
from logitlab.logits.reference import reference
from logitlab.logits.rows import HeadRows
from logitlab.logits.statistics import Request, Statistics

ROWS = 8192
"""Rows of one launch."""

REFERENCE_VALUES = 2**24
"""Most logits of reference rows that are held at once."""

MOST_CANDIDATES = 64
"""Candidates that a program keeps in registers; where more are wanted the tiled backend decodes."""

_PIECES = {torch.bfloat16: (3, 2.0**-8), torch.float16: (3, 2.0**-11)}
"""By the head's dtype, how many pieces hold a float32, and the size of each beside the one before."""


def why_not(head: Head) -> str | None:
    """Why the kernel cannot decode with this head; None if it can."""
    w = head.weight
    if w.dtype not in _PIECES:
        return f"its head is in {str(w.dtype).removeprefix('torch.')}; the kernel takes bfloat16 and float16"
    return None if w.stride(1) == 1 and w.numel() > 0 else "its head's rows do not lie together"


class _Rows(HeadRows):
    """Rows whose products a tensor core sums."""

    @cached_property
    def bound(self) -> torch.Tensor:
        """As of any float32 sum, times four: a tensor core cuts off where a processor rounds."""
        return 4 * super().bound

    def some(self, rows: torch.Tensor) -> _Rows:
        """A few of the rows."""
        return _Rows(self.x[rows], self.head)


def triton(x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None) -> Statistics:
    """See `logitlab.logits.statistics`; of logits it holds those of a few reference rows only."""
    assert isinstance(source, Head)
    groups, positions = x.shape[:2]
    if groups == 0 or positions == 0:
        return reference(x, source, request, against)
    if request.top_k + SPARE > MOST_CANDIDATES:
        return _tiled.tiled(x, source, request, against)
    most = REFERENCE_VALUES // source.vocab_size if against is not None and source.softcap is not None else ROWS
    wide = max(1, min(positions, ROWS // groups, most))
    tall = max(1, min(groups, ROWS // wide))
    columns: list[Statistics] = []
    for p in range(0, positions, wide):
        part = slice(p, p + wide)
        base = None
        if against is not None:
            rows = _Rows(against[part], source)
            base = Base.of(rows, scan(rows, Request(BASE, source.vocab_size)))
        parts = [_block(x[g : g + tall, part], source, request.at(part), base) for g in range(0, groups, tall)]
        columns.append(Statistics.join(parts, dim=0))
    return Statistics.join(columns, dim=1)


def _block(x: torch.Tensor, head: Head, request: Request, base: Base | None) -> Statistics:
    """Statistics of [groups, positions, d] rows that are scanned together."""
    groups, positions = x.shape[:2]
    rows = _Rows(x.reshape(-1, x.shape[-1]), head)
    asked = request.for_rows(groups, positions)
    place = torch.arange(positions, device=rows.x.device).repeat(groups)
    found = conclude(scan(rows, asked, base, place), rows, head, asked, base, place)
    return found.map(lambda v: v.reshape(groups, positions, *v.shape[1:]))


def pieces_of(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows [n, d] as a sum of pieces of a narrower dtype.

    Returns:
        Pieces [pieces, n, d]; a factor [n] of each row; by how much a piece is smaller than the one before.
        ``x = factor * (piece 0 + step * (piece 1 + step * piece 2))``.
    """
    if x.dtype == dtype:
        return x.unsqueeze(0), torch.ones(x.shape[0], device=x.device), 1.0
    count, step = _PIECES[dtype]
    x = x.float()
    factor = x.abs().amax(dim=1).clamp_min(1e-30)
    factor = torch.exp2(torch.floor(torch.log2(factor)))  # a power of two: dividing by it is exact
    left = x / factor.unsqueeze(1)
    pieces: list[torch.Tensor] = []
    for _ in range(count):
        pieces.append(left.to(dtype))
        left = (left - pieces[-1].float()) / step
    return torch.stack(pieces), factor, step


def scan(
    rows: HeadRows,
    request: Request,
    base: Base | None = None,
    place: torch.Tensor | None = None,
    *,
    first: int = 0,
    block: tuple[int, int, int] | None = None,
    splits: int | None = None,
) -> Partial:
    """One pass over the columns of ``rows.head``.

    Args:
        rows: the rows, [n, d].
        request: what is wanted, for these rows.
        base: the reference distributions.
        place: [n] which of them each row is compared with.
        first: id of the head's first column, where it is a part of a larger one.
        block: rows, columns and depth of a program's tile.
        splits: parts that the columns are cut into; by default enough to occupy the GPU.
    """
    if base is not None and base.mean is not None:
        base = None  # nothing has to be summed column by column
    head, device = rows.head, rows.x.device
    n, d = rows.x.shape
    size = head.vocab_size
    block = block or (64, 128, 64)
    programs = math.ceil(n / block[0])
    if splits is None:
        splits = max(1, min(size // 1024, math.ceil(_processors(device) * 2 / programs)))
    width = math.ceil(size / splits / block[1]) * block[1]
    splits = math.ceil(size / width)
    xs, factor, step = pieces_of(rows.given, head.weight.dtype)
    keep = min(size, request.top_k + SPARE)
    keep_ranked = 0 if request.allowed is None else min(request.columns, request.top_k + SPARE)
    m = 0 if request.targets is None else request.targets.shape[1]
    nothing = torch.empty(1, device=device)
    floats = {name: torch.zeros(splits, n, dtype=torch.float64, device=device) for name in ("sum", "moment", "cross")}
    largest = torch.empty(splits, n, device=device)
    best = _empty(splits, n, _padded(keep), device)
    ranked = _empty(splits, n, _padded(max(1, keep_ranked)), device)
    above = torch.zeros(splits, n, _padded(max(1, m)), dtype=torch.int32, device=device)
    near = torch.zeros_like(above)
    low = high = ref_z = ref_w = nothing
    if request.targets is not None:
        target = rows.at_all(request.targets.to(device))
        low = (target - rows.bound).float().contiguous()
        high = (target + rows.bound).float().contiguous()
    mass = None
    if base is not None:
        assert isinstance(base.rows, HeadRows)
        ref_z = base.rows.tile(slice(0, size)).clamp_min(-1e38).contiguous()
        ref_w = (ref_z - base.lse.float().unsqueeze(1)).exp()
        ids = base.ids - first
        mine = (ids >= 0) & (ids < size)
        row, at = mine.nonzero(as_tuple=True)
        ref_w[row, ids[row, at]] = 0.0  # these are treated in float64
        mass = ref_w.sum(dim=1, dtype=torch.float64)
    weight = head.weight.detach()
    launch: Any = scan_kernel
    launch[(programs, splits)](
        xs,
        weight,
        factor,
        nothing if head.bias is None else head.bias.detach().float().to(device),
        nothing if head.offset is None else head.offset.detach().float().to(device),
        nothing if request.allowed is None else request.allowed.to(device, torch.int8),
        low,
        high,
        ref_z,
        ref_w,
        nothing if place is None else place.to(device, torch.int32),
        largest,
        floats["sum"],
        floats["moment"],
        floats["cross"],
        best.z,
        best.ids,
        ranked.z,
        ranked.ids,
        above,
        near,
        n,
        d,
        size,
        width,
        weight.stride(0),
        first,
        head.scale / head.softcap if head.softcap else head.scale,
        head.softcap or 0.0,
        step,
        PIECES=xs.shape[0],
        BIAS=head.bias is not None,
        OFFSET=head.offset is not None,
        CAP=bool(head.softcap),
        FILTER=request.allowed is not None,
        KL=base is not None,
        TARGETS=m,
        TARGETS_PADDED=above.shape[2],
        KEEP=keep,
        KEEP_PADDED=best.z.shape[2],
        RANKED=keep_ranked,
        RANKED_PADDED=ranked.z.shape[2],
        ROWS=block[0],
        COLUMNS=block[1],
        DEPTH=block[2],
        WIDEN=interpreted(),
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    partials = [
        _partial(
            largest[s],
            {name: v[s] for name, v in floats.items()},
            _some(best, s, keep),
            _some(ranked, s, keep_ranked),
            base,
        )
        for s in range(splits)
    ]
    whole = partials[0]
    for part in partials[1:]:
        whole = whole.merge(part)
    whole.mass = mass
    if m:
        whole.before = above.sum(0)[:, :m].long()
        unsure = (near.sum(0)[:, :m] > 0).any(dim=1).nonzero().squeeze(1)
        if unsure.numel():
            assert request.targets is not None
            asked = request.with_targets(request.targets.to(device)[unsure])
            counted = _tiled.scan(rows.some(unsure), size, asked, first=first)
            assert counted.before is not None
            whole.before[unsure] = counted.before
    return whole


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel, on a processor."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _padded(size: int) -> int:
    """The next power of two, which tensors in a kernel need."""
    return 1 << (size - 1).bit_length()


def _empty(splits: int, n: int, keep: int, device: torch.device) -> Candidates:
    z = torch.full((splits, n, keep), -torch.inf, device=device)
    return Candidates(z, torch.zeros(splits, n, keep, dtype=torch.int32, device=device))


def _some(found: Candidates, split: int, keep: int) -> Candidates | None:
    """Candidates of one split, without the places that pad them to a power of two."""
    if keep == 0:
        return None
    best = found.z[split].topk(keep, dim=1)
    return Candidates(best.values, found.ids[split].gather(1, best.indices).long())


def _partial(
    largest: torch.Tensor,
    floats: dict[str, torch.Tensor],
    best: Candidates | None,
    ranked: Candidates | None,
    base: Base | None,
) -> Partial:
    assert best is not None
    cross = floats["cross"] if base is not None else None
    return Partial(largest, floats["sum"], floats["moment"], best, best if ranked is None else ranked, cross=cross)
