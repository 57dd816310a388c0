"""The kernel of the triton backend. Types are those of Triton's own language, so Python's are not declared."""

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


@triton.jit
def scan_kernel(
    xs,
    w,
    factor,
    bias,
    offset,
    allowed,
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
    n,
    d,
    size,
    width,
    stride,
    first,
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
    TARGETS_PADDED: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_PADDED: tl.constexpr,
    RANKED: tl.constexpr,
    RANKED_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`ROWS` rows over ``width`` columns; what comes out is described in `Partial`."""
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
    numbers = tl.arange(0, TARGETS_PADDED)
    above = tl.zeros([ROWS, TARGETS_PADDED], tl.int32)
    near = tl.zeros([ROWS, TARGETS_PADDED], tl.int32)
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
        z = tl.where(both, z, float("-inf"))
        ranked = z
        if FILTER:
            fine = tl.load(allowed + column, mask=there, other=0) != 0
            ranked = tl.where(fine[None, :], z, float("-inf"))
        for m in tl.static_range(TARGETS):
            lo = tl.load(low + row * TARGETS + m, mask=here, other=float("inf"))
            hi = tl.load(high + row * TARGETS + m, mask=here, other=float("inf"))
            over = tl.sum((ranked > hi[:, None]).to(tl.int32), 1)
            maybe = tl.sum((ranked >= lo[:, None]).to(tl.int32), 1)
            above += tl.where(numbers[None, :] == m, over[:, None], 0)
            near += tl.where(numbers[None, :] == m, (maybe - over)[:, None], 0)
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
    to = split.to(tl.int64) * n + row64
    tl.store(out_max + to, largest, mask=here)
    tl.store(out_sum + to, total, mask=here)
    tl.store(out_moment + to, moment, mask=here)
    if KL:
        tl.store(out_cross + to, cross, mask=here)
    slots = tl.arange(0, KEEP_PADDED)
    at_best = to[:, None] * KEEP_PADDED + slots[None, :]
    tl.store(out_best_z + at_best, best_z, mask=here[:, None])
    tl.store(out_best_id + at_best, best_id, mask=here[:, None])
    if RANKED > 0:
        ranked_slots = tl.arange(0, RANKED_PADDED)
        at_ranked = to[:, None] * RANKED_PADDED + ranked_slots[None, :]
        tl.store(out_ranked_z + at_ranked, ranked_z, mask=here[:, None])
        tl.store(out_ranked_id + at_ranked, ranked_id, mask=here[:, None])
    if TARGETS > 0:
        at_target = to[:, None] * TARGETS_PADDED + numbers[None, :]
        tl.store(out_above + at_target, above, mask=here[:, None])
        tl.store(out_near + at_target, near, mask=here[:, None])
