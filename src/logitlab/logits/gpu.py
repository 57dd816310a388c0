"""The triton backend: the scan as one kernel, for bfloat16 and float16 heads on a GPU.

Rows of the head's own dtype are multiplied as they are. Other rows are written as a sum of three pieces of
that dtype, which together hold all 24 bits of a float32, so products are exact and only sums round.
A program takes some rows over a part of the columns and keeps, in registers, what `Partial` holds; parts are
merged afterwards. Columns whose logits are too close to a target's to tell which comes first are listed by the
kernel and settled in float64; a row with more of them than are listed is counted again by the tiled backend.

Before a head is decoded on a GPU for the first time the kernel is tried there on a few of its rows, so that `why_not`
knows: with ``backend="auto"`` the tiled backend then does the work.

With ``TRITON_INTERPRET=1`` the same kernel runs on a processor, slowly, for tests.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from logitlab.errors import KernelError
from logitlab.logits import tiled as _tiled
from logitlab.logits.choose import interpreted
from logitlab.logits.gpu_scan import scan_kernel
from logitlab.logits.head import Head, LogitSource
from logitlab.logits.partial import BASE, SPARE, Base, Candidates, Partial, conclude, ruled_out_before
from logitlab.logits.rows import HeadRows
from logitlab.logits.statistics import TIE, Request, Statistics

log = logging.getLogger("logitlab")

ROWS = 8192
"""Rows of one launch."""

REFERENCE_VALUES = 2**24
"""Most logits of reference rows that are held at once."""

MOST_CANDIDATES = 64
"""Candidates that a program keeps in registers; where more are wanted the tiled backend decodes."""

MOST_TARGETS = 16
"""Targets of a row that a program counts for; where more are wanted the tiled backend decodes."""

CLOSE = 64
"""Columns too close to a target to call that are listed, of each row, target and part of the columns."""

BLOCK = (64, 128, 64)
"""Rows, columns and depth of a program's tile. Two of three stages wait in shared memory: 48 KiB; with those of
Hopper's tensor cores three, 72 KiB."""

_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 5)}
"""By the head's dtype, the least compute capability of an NVIDIA GPU that the kernel is compiled for."""

_PIECES = {torch.bfloat16: (3, 2.0**-8), torch.float16: (3, 2.0**-11)}
"""By the head's dtype, how many pieces hold a float32, and the size of each beside the one before."""


_tried: dict[tuple[Any, ...], str | None] = {}
"""By GPU and kind of head, why the kernel does not run; None where it does."""


def why_not(head: Head) -> str | None:
    """Why the kernel cannot decode with this head; None if it can."""
    w = head.weight
    if w.dtype not in _PIECES:
        return f"its head is in {str(w.dtype).removeprefix('torch.')}; the kernel takes bfloat16 and float16"
    if w.stride(1) != 1 or w.numel() == 0:
        return "its head's rows do not lie together"
    key = _kind(head)
    capability = _capability(w.device)
    if capability is None:
        return _tried.get(key)
    least = _CAPABILITY[w.dtype]
    if capability < least:
        have, need = (".".join(map(str, version)) for version in (capability, least))
        return (
            f"its GPU has compute capability {have}; for {str(w.dtype).removeprefix('torch.')} the kernel needs {need}"
        )
    if key not in _tried:
        _tried[key] = None  # a failure below is noted by the launch
        try:
            _try(head)
        except KernelError as error:
            log.warning("%s; backend='auto' uses PyTorch alone, which is slower", error)
        except BaseException:  # it has not been found out
            del _tried[key]
            raise
    return _tried[key]


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for anything else, of which nothing is asked."""
    if device.type != "cuda" or torch.version.hip is not None or interpreted():
        return None
    return torch.cuda.get_device_capability(device)


def _kind(head: Head) -> tuple[Any, ...]:
    """What a kernel is compiled for, as far as the head decides."""
    w = head.weight
    return w.device, w.dtype, head.bias is None, head.offset is None, head.softcap is None


def _try(head: Head) -> None:
    """Run the kernel once over some columns, with all that a request can add to it.

    Raises:
        KernelError: it does not run.
    """
    size, device = min(head.vocab_size, BLOCK[1]), head.weight.device
    part = replace(
        head,
        weight=head.weight.detach()[:size],
        bias=None if head.bias is None else head.bias[:size],
        offset=None if head.offset is None else head.offset[:size],
    )
    with torch.no_grad():
        rows = _Rows(torch.ones(1, head.weight.shape[1], device=device), part)
        place = torch.zeros(1, dtype=torch.int64, device=device)
        base = Base.of(rows, scan(rows, Request(BASE, size)))
        targets = torch.zeros(1, MOST_TARGETS, dtype=torch.int64, device=device)
        allowed = torch.ones(size, dtype=torch.bool, device=device)
        scan(rows, Request(MOST_CANDIDATES - SPARE, size, targets, allowed), base, place)


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
    """See `logitlab.logits.statistics`; of logits it holds those of a few reference rows only.

    Raises:
        KernelError: the kernel cannot be compiled or started here.
    """
    assert isinstance(source, Head)
    groups, positions = x.shape[:2]
    m = 0 if request.targets is None else request.targets.shape[1]
    if request.top_k + SPARE > MOST_CANDIDATES or m > MOST_TARGETS:
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
        return x.contiguous().unsqueeze(0), torch.ones(x.shape[0], device=x.device), 1.0
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
    block = block or BLOCK
    programs = math.ceil(n / block[0])
    if splits is None:
        splits = max(1, min(size // 1024, math.ceil(_processors(device) * 2 / programs)))
    width = math.ceil(size / splits / block[1]) * block[1]
    splits = math.ceil(size / width)
    xs, factor, step = pieces_of(rows.given, head.weight.dtype)
    keep = request.top_k + SPARE  # also of a part with fewer columns, which then takes in what other parts found
    keep_ranked = 0 if request.allowed is None else keep
    m = 0 if request.targets is None else request.targets.shape[1]
    nothing = torch.empty(1, device=device)
    floats = {name: torch.zeros(splits, n, dtype=torch.float64, device=device) for name in ("sum", "moment", "cross")}
    largest = torch.empty(splits, n, device=device)
    best = _empty(splits, n, _padded(keep), device)
    ranked = _empty(splits, n, _padded(max(1, keep_ranked)), device)
    padded = _padded(m) if m else 0  # a kernel for every power of two, not for every number of targets
    above = torch.zeros(splits, n, padded, dtype=torch.int32, device=device)
    near = torch.zeros_like(above)
    close = torch.empty(splits, n, padded, CLOSE, dtype=torch.int32, device=device)
    low = high = ref_z = ref_w = ids = target = nothing
    if m:
        assert request.targets is not None
        ids = request.targets.to(device)
        target = rows.at_all(ids)
        spare = (0, padded - m)  # nothing is above or near what is not a number
        # Columns of -inf, ruled out or filtered, are not compared.
        low = (target - rows.bound).float().clamp_min(torch.finfo(torch.float32).min)
        low = F.pad(low, spare, value=torch.nan).contiguous()
        high = F.pad((target + rows.bound).float(), spare, value=torch.nan).contiguous()
    mass = None
    if base is not None:
        assert isinstance(base.rows, HeadRows)
        ref_z = base.rows.tile(slice(0, size)).clamp_min(-1e38).contiguous()
        ref_w = (ref_z - base.lse.float().unsqueeze(1)).exp()
        likely = base.ids - first
        row, at = ((likely >= 0) & (likely < size)).nonzero(as_tuple=True)
        ref_w[row, likely[row, at]] = 0.0  # these are treated in float64
        mass = ref_w.sum(dim=1, dtype=torch.float64)
    weight = head.weight.detach()
    _launch(
        head,
        (programs, splits),
        xs,
        weight,
        factor,
        nothing if head.bias is None else head.bias.detach().float().to(device).contiguous(),
        nothing if head.offset is None else head.offset.detach().float().to(device).contiguous(),
        nothing if request.allowed is None else request.allowed.to(device, torch.int8).contiguous(),
        F.pad(ids, (0, padded - m), value=-1).int().contiguous() if m else nothing,
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
        close,
        n,
        d,
        size,
        width,
        weight.stride(0),
        first,
        CLOSE,
        head.scale / head.softcap if head.softcap else head.scale,
        head.softcap or 0.0,
        step,
        PIECES=xs.shape[0],
        BIAS=head.bias is not None,
        OFFSET=head.offset is not None,
        CAP=bool(head.softcap),
        FILTER=request.allowed is not None,
        KL=base is not None,
        TARGETS=padded,
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
    if request.targets is not None:
        whole.before = above.sum(0)[:, :m].long()
    if whole.before is not None and m:
        whole.before += ruled_out_before(target, head, request, first)
        _settle(whole.before, near[:, :, :m], close, rows, request.with_targets(ids), target, first)
    return whole


def _settle(
    before: torch.Tensor,
    near: torch.Tensor,
    close: torch.Tensor,
    rows: HeadRows,
    request: Request,
    target: torch.Tensor,
    first: int,
) -> None:
    """Count, in float64, columns that the kernel could not tell from a target.

    Args:
        before: [n, m] int64, columns that surely come before; changed in place.
        near: [splits, n, m] how many could not be told.
        close: [splits, n, padded m, slots] the first of them.
        rows: the rows, [n, d].
        request: what is wanted, for these rows.
        target: [n, m] float64, logits of the targets.
        first: id of the head's first column.
    """
    assert request.targets is not None
    slots = close.shape[3]
    crowded = (near > slots).any(dim=0).any(dim=1)  # [n]
    split, row, m = ((near > 0) & ~crowded[:, None]).nonzero(as_tuple=True)
    listed = torch.arange(slots, device=near.device) < near[split, row, m].unsqueeze(1)
    entry, slot = listed.nonzero(as_tuple=True)
    split, row, m = split[entry], row[entry], m[entry]
    column = close[split, row, m, slot].long()
    steps, own = torch.round(rows.at(row, column) / TIE), torch.round(target[row, m] / TIE)
    comes = (steps > own) | ((steps == own) & (column + first < request.targets[row, m]))
    before.index_put_((row, m), comes.long(), accumulate=True)
    many = crowded.nonzero().squeeze(1)
    if many.numel():
        asked = request.with_targets(request.targets[many])
        counted = _tiled.scan(rows.some(many), rows.head.vocab_size, asked, first=first)
        assert counted.before is not None
        before[many] = counted.before


def _launch(head: Head, grid: tuple[int, int], *given: Any, **constants: Any) -> None:
    """Start the kernel where the head is.

    Raises:
        KernelError: it cannot be compiled or started; noted, so that `why_not` says so from then on.
    """
    launch: Any = scan_kernel
    try:
        with _on(head.weight.device):
            launch[grid](*given, **constants)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Triton's compiler, ptxas, the C compiler of its launcher and the driver each have errors of their own.
        if interpreted() and _capability(head.weight.device) is None:
            raise  # there it is a mistake in the kernel
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _tried[_kind(head)] = f"the Triton kernel does not run on its GPU ({why})"
        raise KernelError(f"the Triton kernel does not run on {head.weight.device} ({why})") from error


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the head's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
