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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from logitlab.errors import KernelError
from logitlab.logits import tiled as _tiled
from logitlab.logits.choose import interpreted
from logitlab.logits.gpu_scan import pairs_kernel, scan_kernel
from logitlab.logits.head import Head, LogitSource
from logitlab.logits.partial import BASE, SPARE, Base, Candidates, Partial, conclude, ruled_out_before
from logitlab.logits.rows import HeadRows, product
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

CLOSE = (64, 1024)
"""Least and most columns too close to a target to call that are listed, of each row, target and part of the columns.

In the middle of 128,000 logits some hundreds can be that close, and a row with more is scanned again, which is slow."""

CLOSE_VALUES = 2**24
"""Most columns that are listed in all, while there are no fewer than the least for each."""

PART_TILES = 4
"""Tiles whose time the start of a part of the columns takes: its first columns are nearly all candidates."""


class Tile(NamedTuple):
    """What a program multiplies at once, and with what.

    Attributes:
        rows: rows of the logits that it has in registers.
        columns: their columns.
        depth: how much of the width is multiplied between two loads.
        warps: warps of a program.
        stages: pieces of that depth that are loaded ahead.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3


TILE = Tile(64, 128, 64)
"""For any GPU. Two of three stages wait in shared memory: 48 KiB; with those of Hopper's tensor cores three, 72 KiB."""

HOPPER = Tile(128, 256, 64)
"""For capability 9.0 where nothing but the top and the sums is wanted: 144 KiB."""

HOPPER_TARGETS = Tile(128, 128, 64)
"""For capability 9.0 with targets, which take registers: 96 to 128 KiB."""

PAIR_DEPTH = 512
"""Numbers of two rows that `pairs_kernel` multiplies at once."""

MEAN_COLUMNS = 8192
"""Columns that are weighed at once."""

MEAN_ROWS = 1024
"""Rows at a time, there."""

SETTLED = 2**22
"""Columns that are too close to call, settled at a time."""

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
    size, device = min(head.vocab_size, TILE.columns), head.weight.device
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

    def at(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits of (row, column) pairs, both [m] -> [m]; there can be hundreds for each row."""
        if self.x.device.type != "cuda" or not rows.numel():
            return super().at(rows, ids)
        return logits_at(self.x, self.head, rows, ids)

    def mean_row(self, lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadRows.mean_row`; on tensor cores where rows and head are bfloat16."""
        if self.x.device.type != "cuda" or not self.narrow:
            return super().mean_row(lse, ids)
        return self.weighed(lse, ids)

    def weighed(self, lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean_row` by products of bfloat16 numbers: rows as they are, weights in pieces that hold all their bits."""
        few = [slice(i, i + MEAN_ROWS) for i in range(0, max(len(self.x), 1), MEAN_ROWS)]
        total, mass = zip(*(self._weighed(rows, lse[rows], ids[rows]) for rows in few), strict=True)
        return torch.cat(total), torch.cat(mass)

    def _weighed(self, rows: slice, lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of some rows: the weights of so many columns are held at once."""
        head, given, (n, d) = self.head, self.given[rows], self.x[rows].shape
        total = torch.zeros(n, d, dtype=torch.float64, device=self.x.device)
        mass = torch.zeros(n, dtype=torch.float64, device=self.x.device)
        for start in range(0, head.vocab_size, MEAN_COLUMNS):
            columns = slice(start, min(start + MEAN_COLUMNS, head.vocab_size))
            weight = head.weight[columns]
            z = product(given, weight.T)
            z = head.postmap(z if head.bias is None else z + head.bias[columns].float())
            z = z if head.offset is None else z + head.offset[columns].float()
            weights = (z - lse.float().unsqueeze(1)).exp()
            row, place = ((ids >= columns.start) & (ids < columns.stop)).nonzero(as_tuple=True)
            weights[row, ids[row, place] - columns.start] = 0.0
            mass += weights.sum(dim=1, dtype=torch.float64)
            pieces, factor, step = pieces_of(weights, weight.dtype)
            part = product(pieces[-1], weight)
            for piece in reversed(pieces[:-1]):
                part = product(piece, weight) + step * part
            total += part * factor.unsqueeze(1)
        return total, mass

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


def logits_at(x: torch.Tensor, head: Head, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Float64 logits of (row, column) pairs; a GPU need not write out the numbers that it multiplies.

    Args:
        x: rows [n, d].
        head: the head.
        rows: [m] int64.
        ids: [m] int64.

    Raises:
        KernelError: the kernel cannot be compiled or started here.
    """
    w = head.weight.detach()
    x, rows, ids = (v.to(w.device).contiguous() for v in (x, rows, ids))  # ids of targets come from the caller
    z = torch.empty(len(rows), dtype=torch.float64, device=w.device)
    given = x, w, rows, ids, z, x.shape[1], x.stride(0), w.stride(0)
    _launch(pairs_kernel, head, (len(rows),), *given, DEPTH=PAIR_DEPTH)
    if head.bias is not None:
        z = z + head.bias.detach()[ids].double()
    z = head.postmap(z)
    return z if head.offset is None else z + head.offset.detach()[ids].double()


def tile_for(head: Head, n: int, request: Request, base: Base | None) -> Tile:
    """What a program had best work on at once. Measured on capability 9.0; elsewhere what fits anywhere."""
    lean = base is None and request.allowed is None and request.top_k + SPARE <= BASE + SPARE
    if _capability(head.weight.device) != (9, 0) or n <= TILE.rows or not lean:
        return TILE
    return HOPPER if request.targets is None or not request.targets.shape[1] else HOPPER_TARGETS


def scan(
    rows: HeadRows,
    request: Request,
    base: Base | None = None,
    place: torch.Tensor | None = None,
    *,
    first: int = 0,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Partial:
    """One pass over the columns of ``rows.head``.

    Args:
        rows: the rows, [n, d].
        request: what is wanted, for these rows.
        base: the reference distributions.
        place: [n] which of them each row is compared with.
        first: id of the head's first column, where it is a part of a larger one.
        tile: what a program works on at once; by default `tile_for`.
        splits: parts that the columns are cut into; by default enough to occupy the GPU.
    """
    if base is not None and base.mean is not None:
        base = None  # nothing has to be summed column by column
    head, device = rows.head, rows.x.device
    n, d = rows.x.shape
    size = head.vocab_size
    tile = tile or tile_for(head, n, request, base)
    programs = math.ceil(n / tile.rows)
    if splits is None:
        splits = _parts(programs, math.ceil(size / tile.columns), _processors(device))
    width = math.ceil(size / splits / tile.columns) * tile.columns
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
    slots = min(CLOSE[1], max(CLOSE[0], CLOSE_VALUES // max(1, splits * n * padded)))
    close = torch.empty(splits, n, padded, slots, dtype=torch.int32, device=device)
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
        scan_kernel,
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
        slots,
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
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        WIDEN=interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    whole = _merged(largest, floats, best, ranked if keep_ranked else None, keep, cross=base is not None)
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
    for few in ((near > 0) & ~crowded[:, None]).nonzero().split(max(1, SETTLED // slots)):
        split, row, m = few.unbind(1)
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


def _launch(kernel: Any, head: Head, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """Start a kernel where the head is.

    Raises:
        KernelError: it cannot be compiled or started; noted, so that `why_not` says so from then on.
    """
    try:
        with _on(head.weight.device):
            kernel[grid](*given, **constants)
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


def _parts(programs: int, tiles: int, processors: int) -> int:
    """Parts of the columns with which all multiprocessors are done soonest, of ``tiles`` tiles of columns."""
    most = max(1, min(tiles // 8, 2 * math.ceil(processors / programs)))

    def steps(parts: int) -> int:
        return math.ceil(programs * parts / processors) * (math.ceil(tiles / parts) + PART_TILES)

    return min(range(1, most + 1), key=steps)


def _padded(size: int) -> int:
    """The next power of two, which tensors in a kernel need."""
    return 1 << (size - 1).bit_length()


def _empty(splits: int, n: int, keep: int, device: torch.device) -> Candidates:
    z = torch.full((splits, n, keep), -torch.inf, device=device)
    return Candidates(z, torch.zeros(splits, n, keep, dtype=torch.int32, device=device))


def _merged(
    largest: torch.Tensor,
    floats: dict[str, torch.Tensor],
    best: Candidates,
    ranked: Candidates | None,
    keep: int,
    *,
    cross: bool,
) -> Partial:
    """`Partial.merge` of all parts at once: there can be a hundred, and a GPU waits for each small step."""
    top = largest.amax(0)
    shift = (largest.double() - top.double()).nan_to_num(nan=0.0, neginf=-1e30)
    old, total, moment = shift.exp(), floats["sum"], floats["moment"]
    moment = torch.where(total == 0, moment, moment + total * shift)
    likeliest = _best(best, keep)
    return Partial(
        top,
        (total * old).sum(0),
        (moment * old).sum(0),
        likeliest,
        likeliest if ranked is None else _best(ranked, keep),
        cross=floats["cross"].sum(0) if cross else None,
    )


def _best(found: Candidates, keep: int) -> Candidates:
    """The best of all parts [splits, n, padded], without the places that pad them to a power of two."""
    z, ids = (v.transpose(0, 1).flatten(1) for v in (found.z, found.ids))
    best = z.topk(keep, dim=1)
    return Candidates(best.values, ids.gather(1, best.indices).long())
