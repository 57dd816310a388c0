"""The kernels of the triton backend. Types are those of Triton's own language, so Python's are not declared."""

# ruff: noqa: N803, ANN

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pushed(z, columns, best_z, best_id, first, COLUMNS: tl.constexpr, PADDED: tl.constexpr, KEEP: tl.constexpr):
    """Best columns so far, with a tile's columns [ROWS, COLUMNS] taken in."""
    place = tl.arange(0, COLUMNS)
    slots = tl.arange(0, PADDED)
    held = tl.where(slots[None, :] < KEEP, best_z, float("inf"))
    worst = tl.min(held, 1)
    top = tl.max(z, 1)
    while tl.max((top > worst).to(tl.int32), 0) > 0:
        better = top > worst
        at = tl.argmax(z, 1)
        slot = tl.argmin(held, 1)
        here = (slots[None, :] == slot[:, None]) & better[:, None]
        held = tl.where(here, top[:, None], held)
        best_id = tl.where(here, (first + columns + at)[:, None], best_id)
        z = tl.where((place[None, :] == at[:, None]) & better[:, None], float("-inf"), z)
        worst = tl.min(held, 1)
        top = tl.max(z, 1)
    return tl.where(slots[None, :] < KEEP, held, float("-inf")), best_id


@triton.jit(do_not_specialize=["n", "first", "slots"])
def scan_kernel(
    xs,
    w,
    factor,
    bias,
    offset,
    allowed,
    targets,
    low,
    high,
    ref_z,
    ref_w,
    place,
    out_max,
    out_sum,
    out_moment,
    out_cross,
    out_best_z,
    out_best_id,
    out_ranked_z,
    out_ranked_id,
    out_above,
    out_near,
    out_close,
    n,
    d,
    size,
    width,
    stride,
    first,
    slots,
    slope,
    cap,
    step,
    PIECES: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAP: tl.constexpr,
    FILTER: tl.constexpr,
    KL: tl.constexpr,
    TARGETS: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_PADDED: tl.constexpr,
    RANKED: tl.constexpr,
    RANKED_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`ROWS` rows over ``width`` columns; what comes out is described in `Partial`.

    ``TARGETS`` is a power of two, or 0. Columns that surely come before a target are counted in ``out_above``
    [splits, n, TARGETS]. Those that are too close to call, the target's own not among them, are counted in
    ``out_near``, and the first ``slots`` of them are listed in ``out_close`` [splits, n, TARGETS, slots].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    here = row < n
    row64 = row.to(tl.int64)
    begin = split * width
    end = tl.minimum(begin + width, size)
    scale = tl.load(factor + row, mask=here, other=0.0)
    depth = tl.arange(0, DEPTH)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float64)
    moment = tl.zeros([ROWS], tl.float64)
    cross = tl.zeros([ROWS], tl.float64)
    best_z = tl.full([ROWS, KEEP_PADDED], float("-inf"), tl.float32)
    best_id = tl.full([ROWS, KEEP_PADDED], 0, tl.int32) + first
    ranked_z = tl.full([ROWS, RANKED_PADDED], float("-inf"), tl.float32)
    ranked_id = tl.full([ROWS, RANKED_PADDED], 0, tl.int32) + first
    bad = tl.zeros([ROWS], tl.int32)  # rows with a logit that is not a number
    if TARGETS > 0:
        numbers = tl.arange(0, TARGETS)
        above = tl.zeros([ROWS, TARGETS], tl.int32)
        near = tl.zeros([ROWS, TARGETS], tl.int32)
    at = row64  # the reference row of each
    if KL:
        at = tl.load(place + row, mask=here, other=0).to(tl.int64)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < end
        both = here[:, None] & there[None, :]
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for number in tl.static_range(PIECES):
            piece = PIECES - 1 - number
            if number > 0:
                z = z * step
            for k in range(0, d, DEPTH):
                inside = (k + depth) < d
                a = tl.load(
                    xs + (piece * n + row64[:, None]) * d + (k + depth)[None, :],
                    mask=here[:, None] & inside[None, :],
                    other=0.0,
                )
                b = tl.load(
                    w + column.to(tl.int64)[None, :] * stride + (k + depth)[:, None],
                    mask=there[None, :] & inside[:, None],
                    other=0.0,
                )
                if WIDEN:
                    z += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
                else:
                    z = tl.dot(a, b, z)
        z = z * scale[:, None]
        if BIAS:
            z += tl.load(bias + column, mask=there, other=0.0)[None, :]
        z = z * slope
        if CAP:
            e = tl.exp(-2.0 * tl.abs(z))
            t = (1.0 - e) / (1.0 + e)
            z = tl.where(z < 0, -t, t) * cap
        if OFFSET:
            z += tl.load(offset + column, mask=there, other=0.0)[None, :]
        odd = both & (z != z)  # kept out of maxima and candidates, so that ids stay ids
        bad = tl.maximum(bad, tl.max(odd.to(tl.int32), 1))
        z = tl.where(both & (z == z), z, float("-inf"))
        ranked = z
        if FILTER:
            fine = tl.load(allowed + column, mask=there, other=0) != 0
            ranked = tl.where(fine[None, :], z, float("-inf"))
        if TARGETS > 0:
            for m in range(TARGETS):
                own = tl.load(targets + row * TARGETS + m, mask=here, other=-1) - first
                lo = tl.load(low + row * TARGETS + m, mask=here, other=float("inf"))
                hi = tl.load(high + row * TARGETS + m, mask=here, other=float("inf"))
                rival = column[None, :] != own[:, None]  # what does not compete is -inf, and lo and hi are not
                over = tl.sum((rival & (ranked > hi[:, None])).to(tl.int32), 1)
                above += tl.where(numbers[None, :] == m, over[:, None], 0)
                close = rival & (ranked >= lo[:, None]) & (ranked <= hi[:, None])
                count = tl.sum(close.to(tl.int32), 1)
                if tl.max(count, 0) > 0:
                    had = tl.sum(tl.where(numbers[None, :] == m, near, 0), 1)
                    slot = had[:, None] + tl.cumsum(close.to(tl.int32), 1) - 1
                    at_close = ((split.to(tl.int64) * n + row64) * TARGETS + m)[:, None] * slots + slot
                    tl.store(out_close + at_close, column[None, :] + tl.zeros_like(slot), mask=close & (slot < slots))
                    near += tl.where(numbers[None, :] == m, count[:, None], 0)
        if KL:
            where = at[:, None] * size + column.to(tl.int64)[None, :]
            rz = tl.load(ref_z + where, mask=both, other=0.0)
            rw = tl.load(ref_w + where, mask=both, other=0.0)
            cross += tl.sum(tl.where(both, rw * (rz - tl.maximum(z, -1e38)), 0.0), 1).to(tl.float64)
        new = tl.maximum(largest, tl.max(z, 1))
        safe = tl.maximum(new, -3e38)
        shift = tl.where(largest == float("-inf"), 0.0, largest - safe)
        old = tl.exp(shift).to(tl.float64)
        moment = (moment + total * shift.to(tl.float64)) * old
        total = total * old
        low_z = tl.maximum(z - safe[:, None], -104.0)
        e = tl.where(low_z > -104.0, tl.exp(low_z), 0.0)
        total += tl.sum(e, 1).to(tl.float64)
        moment += tl.sum(e * low_z, 1).to(tl.float64)
        largest = new
        best_z, best_id = _pushed(z, start, best_z, best_id, first, COLUMNS, KEEP_PADDED, KEEP)
        if RANKED > 0:
            ranked_z, ranked_id = _pushed(ranked, start, ranked_z, ranked_id, first, COLUMNS, RANKED_PADDED, RANKED)
    total = tl.where(bad > 0, float("nan"), total)
    moment = tl.where(bad > 0, float("nan"), moment)
    to = split.to(tl.int64) * n + row64
    tl.store(out_max + to, largest, mask=here)
    tl.store(out_sum + to, total, mask=here)
    tl.store(out_moment + to, moment, mask=here)
    if KL:
        tl.store(out_cross + to, cross, mask=here)
    at_best = to[:, None] * KEEP_PADDED + tl.arange(0, KEEP_PADDED)[None, :]
    tl.store(out_best_z + at_best, best_z, mask=here[:, None])
    tl.store(out_best_id + at_best, best_id, mask=here[:, None])
    if RANKED > 0:
        at_ranked = to[:, None] * RANKED_PADDED + tl.arange(0, RANKED_PADDED)[None, :]
        tl.store(out_ranked_z + at_ranked, ranked_z, mask=here[:, None])
        tl.store(out_ranked_id + at_ranked, ranked_id, mask=here[:, None])
    if TARGETS > 0:
        at_target = to[:, None] * TARGETS + numbers[None, :]
        tl.store(out_above + at_target, above, mask=here[:, None])
        tl.store(out_near + at_target, near, mask=here[:, None])


@triton.jit
def pairs_kernel(x, w, rows, ids, out, d, x_stride, w_stride, DEPTH: tl.constexpr):
    """``out[i] = x[rows[i]] . w[ids[i]]`` in float64, a program for each; all are summed in the same order."""
    pair = tl.program_id(0).to(tl.int64)
    a_row = x + tl.load(rows + pair) * x_stride
    b_row = w + tl.load(ids + pair) * w_stride
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([DEPTH], tl.float64)
    for k in range(0, d, DEPTH):
        inside = (k + depth) < d
        a = tl.load(a_row + k + depth, mask=inside, other=0.0)
        b = tl.load(b_row + k + depth, mask=inside, other=0.0)
        total += a.to(tl.float64) * b.to(tl.float64)
    tl.store(out + pair, tl.sum(total, 0))
