"""The native backend: the compiled scan of ``scan.c``, for heads in a processor's memory.

Python cuts the work into blocks and settles what is left; the scan does everything that costs time.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import OutOfMemoryError
from logitlab.logits.compiled import Job, Library, library, reason
from logitlab.logits.head import Head, LogitSource, largest_finite
from logitlab.logits.partial import BASE, SPARE, Base, Candidates, Partial, Rough, conclude, ruled_out_before
from logitlab.logits.rows import HeadRows, together
from logitlab.logits.statistics import TIE, Request, Statistics

ROWS = 8192
"""Rows of one scan: its results are some hundred bytes a row."""

BLOCK_ROWS = 1024
"""Rows that use a tile of the head before the next one is brought: enough that bringing it costs nothing."""

SCREENED_ROWS = 1024
"""Rows from which on screening can pay: for fewer, writing the head in bfloat16 takes what its products save."""

THETA, THETA_ENTROPY, THETA_REFERENCE = 16.0, 18.0, 13.5
"""Columns less likely than exp(-THETA) may keep their rough logit, less where the entropy is wanted, which weighs
columns by their log-probability too; columns that the reference finds less likely than exp(-THETA_REFERENCE) as well.
`benchmarks/thresholds.py` measures what they cost."""

PATIENCE = 1 / 12
"""Part of the columns from which on computing them again one by one takes longer than doing the row in full."""

EXPECT_TILES = 6
"""Products, twice as wide as usual, of a tile whose rows are multiplied a second time."""

NO_MEMORY = "there is not enough memory to decode: free some, or read fewer positions at once"

IntArray = NDArray[Any]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_EXACT, _BFLOAT16, _SCREENED = 0, 1, 2


def why_not(head: Head) -> str | None:
    """Why the scan cannot decode with this head; None if it can."""
    w = head.weight
    if w.device.type != "cpu":
        return f"its head is on {w.device}"
    if w.dtype not in _TYPES or w.numel() == 0 or w.stride(1) != 1 or w.shape[0] >= 2**31:
        return f"its head is a {w.dtype} matrix of shape {tuple(w.shape)} and strides {w.stride()}"
    return None if library() is not None else reason()


def native(x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None) -> Statistics:
    """See `logitlab.logits.statistics`; holds no logits beyond the processor's caches."""
    assert isinstance(source, Head)
    groups, positions = x.shape[:2]
    x = x.to("cpu")
    wide = max(1, min(positions, ROWS // groups))
    tall = max(1, min(groups, ROWS // wide))
    columns: list[Statistics] = []
    for p in range(0, positions, wide):
        part = slice(p, p + wide)
        columns.append(_columns(x[:, part], source, request.at(part), None if against is None else against[part], tall))
    return Statistics.join(columns, dim=1)


def _columns(x: torch.Tensor, head: Head, request: Request, against: torch.Tensor | None, tall: int) -> Statistics:
    """Statistics of a few positions, [groups, positions]; the reference is worked out once for all groups."""
    groups, positions = x.shape[:2]
    if against is None:
        return Statistics.join([_block(x[g : g + tall], head, request, None) for g in range(0, groups, tall)], dim=0)
    against = against.to("cpu")
    rows = NativeRows(against, head)
    asked = request.for_rows(1, positions)
    partial = scan(rows, replace(asked, top_k=max(asked.top_k, BASE)))
    base = Base.of(rows, partial)
    last: list[Statistics] = []
    if x.dtype == against.dtype and torch.equal(x[-1], against):  # the last group usually is the reference
        last = [_itself(conclude(partial, rows, head, asked), base, request)]
        groups -= 1
    parts = [_block(x[g : min(g + tall, groups)], head, request, base) for g in range(0, groups, tall)]
    return Statistics.join([*parts, *last], dim=0)


def _itself(found: Statistics, base: Base, request: Request) -> Statistics:
    """Statistics of the reference's own rows."""
    found.kl = torch.where(base.lse.isnan(), base.lse, 0.0)
    found.cross_entropy = base.entropy
    found.bound = None if request.precision == "exact" else torch.zeros_like(base.lse)
    return found.map(lambda v: v.unsqueeze(0))


def _block(x: torch.Tensor, head: Head, request: Request, base: Base | None) -> Statistics:
    """Statistics of [groups, positions, d] rows that are scanned together."""
    groups, positions = x.shape[:2]
    rows = NativeRows(x.reshape(-1, x.shape[-1]), head)
    place = torch.arange(positions).repeat(groups)
    asked = request.for_rows(groups, positions)
    pace = _pace(head, request, base)
    able = rows.lib.bfloat16 and not rows.narrow and len(place) >= SCREENED_ROWS
    screened = able and pace.screens(request.precision)
    start = time.perf_counter()
    found = conclude(scan(rows, asked, base, place, screened=screened), rows, head, asked, base, place)
    if found.bound is not None:
        _redo(found, rows, asked, base, place)
    elif request.precision != "exact":
        found.bound = torch.zeros_like(found.logsumexp)
    pace.note(screened, len(place), time.perf_counter() - start)
    return found.map(lambda v: v.reshape(groups, positions, *v.shape[1:]))


@dataclass
class Pace:
    """Seconds a row that the precisions took; ``auto`` goes by it.

    Attributes:
        seconds: by whether rows were screened, the least that was seen on enough rows.
    """

    seconds: dict[bool, float] = field(default_factory=dict[bool, float])

    def screens(self, precision: str) -> bool:
        """Whether the next rows are screened."""
        if precision != "auto":
            return precision == "screened"
        known = self.seconds
        return known[True] < known[False] if len(known) == 2 else False in known

    def note(self, screened: bool, rows: int, seconds: float) -> None:
        """Take a measurement in, if it was of enough rows to mean something."""
        if rows >= BLOCK_ROWS:
            self.seconds[screened] = min(seconds / rows, self.seconds.get(screened, math.inf))


def _pace(head: Head, request: Request, base: Base | None) -> Pace:
    """What was measured with this head for requests of this kind."""
    kind = (base is not None, request.entropy, 0 if request.targets is None else request.targets.shape[1])
    return head.kept(f"pace {kind} {request.max_error}", Pace)


def _redo(found: Statistics, rows: NativeRows, request: Request, base: Base | None, place: torch.Tensor) -> None:
    """Do in full the rows whose bound is beyond what is allowed."""
    assert found.bound is not None
    # The bound of a row that was given up is infinite: then its numbers mean nothing, whatever is allowed.
    bad = (~(found.bound <= request.max_error) | ~torch.isfinite(found.bound)).nonzero().squeeze(1)
    if bad.numel() == 0:
        return
    some, where = rows.some(bad), place[bad]
    asked = request if request.targets is None else request.with_targets(request.targets[bad])
    exact = conclude(scan(some, asked, base, where), some, rows.head, asked, base, where)
    for name, value in vars(exact).items():
        if value is not None:
            getattr(found, name)[bad] = value
    found.bound[bad] = 0.0


# -- one scan ----------------------------------------------------------------------------------


class _Memory:
    """A job for the kernel, and everything that its pointers point to."""

    def __init__(self, lib: Library, head: Head, x: torch.Tensor | None = None) -> None:
        self._alive: list[object] = []
        weight = head.weight.detach()
        rows = torch.empty(0, weight.shape[1]) if x is None else x.contiguous()
        self.lib = lib
        self.job = Job(
            n=rows.shape[0],
            d=weight.shape[1],
            columns=weight.shape[0],
            x=self.at(rows),
            w=self.at(weight),
            ldw=weight.stride(0),
            w_type=_TYPES[weight.dtype],
            bias=self._floats(head.bias),
            offset=self._floats(head.offset),
            scale=head.scale,
            softcap=head.softcap or 0.0,
            threads=torch.get_num_threads(),
        )

    def at(self, tensor: torch.Tensor) -> int:
        """Where a contiguous tensor lies; it is kept from now on."""
        self._alive.append(tensor)
        return tensor.data_ptr()

    def array(self, values: IntArray) -> int:
        """Where an array lies; it is kept from now on."""
        values = np.ascontiguousarray(values)
        self._alive.append(values)
        return int(values.ctypes.data)

    def _floats(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self.at(tensor.detach().to("cpu", torch.float32).contiguous())


class NativeRows(HeadRows):
    """Rows whose single logits the kernel computes too."""

    def __init__(self, x: torch.Tensor, head: Head) -> None:
        super().__init__(x, head)
        lib = library()
        assert lib is not None
        self.lib = lib
        self.size, self.lost = head.kept("sizes", lambda: _sizes(lib, head))  # rounded up, unlike `Head.row_sizes`

    @cached_property
    def bound(self) -> torch.Tensor:
        """Bound [n, 1] on the error of a float32 logit, whatever the numbers are.

        Here the order of summation is known, so the worst case is: see ``roundings`` in scan.c.
        """
        d, narrow = self.x.shape[1], self.narrow and self.lib.bfloat16
        part = max(self.lib.rounding(d, 0), self.lib.rounding(d, 1) if narrow else 0.0) * (1 + 1e-6)
        largest = self.head.kept("largest_size", lambda: largest_finite(self.size))
        size = torch.linalg.vector_norm(self.x, dim=1, keepdim=True, dtype=torch.float64)
        return part * abs(self.head.scale) * largest * size + 2 * TIE + self.head.extra_error

    @property
    def finite(self) -> bool:
        """Whether all rows of the head are."""
        return self.head.kept("finite_size", lambda: bool(torch.isfinite(self.size).all()))

    def at_all(self, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits at ``ids`` [n, c], row by row -> [n, c]."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.head.vocab_size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise IndexError(f"column {wrong} is not in the head, which has columns 0 to {self.head.vocab_size - 1}")
        memory = _Memory(self.lib, self.head, self.x)
        wanted = ids.to("cpu", torch.int64).contiguous()
        out = torch.empty(wanted.shape, dtype=torch.float64)
        self.lib.logits_at(ctypes.byref(memory.job), wanted.data_ptr(), wanted.shape[1], out.data_ptr())
        return out

    def mean_row(self, lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadRows.mean_row`."""
        memory, (n, d) = _Memory(self.lib, self.head, self.x), self.x.shape
        tile = tile_of(self.lib.panel, self.lib.columns)
        panels, tiles = math.ceil(n / self.lib.panel), math.ceil(self.head.vocab_size / tile)
        slices = min(tiles, max(1, 16 // panels))
        mean = torch.empty(slices, n, d, dtype=torch.float64)
        mass = torch.empty(slices, n, dtype=torch.float64)
        job = memory.job
        job.tile, job.slices, job.ref_keep = tile, slices, ids.shape[1]
        job.ref_lse = memory.at(lse.contiguous())
        job.ref_ids = memory.at(ids.to(torch.int32).contiguous())
        if self.lib.means(ctypes.byref(job), mean.data_ptr(), mass.data_ptr()) != 0:
            raise OutOfMemoryError(NO_MEMORY)
        return mean.sum(0), mass.sum(0)

    def expected(self, narrow: bool = False, like: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadRows.expected`."""
        (n, d), threads = self.x.shape, torch.get_num_threads()
        if n == 0:
            return torch.empty(0, d), torch.empty(0, dtype=torch.float64)

        def cut(rows: int) -> list[IntArray]:
            most = min(BLOCK_ROWS, max(self.lib.panel, math.ceil(rows / threads)))
            return _runs(np.arange(rows), most, self.lib.panel)

        blocks = cut(n)
        tiles = math.ceil(self.head.vocab_size / (tile := EXPECT_TILES * 2 * self.lib.columns))
        slices = slices_of(len(cut(like or n)), threads, max(1, tiles // 8))
        mean = torch.empty(slices, n, d)
        lse = torch.empty(slices, n, dtype=torch.float64)
        memory = _Memory(self.lib, self.head, self.x)
        job = memory.job
        job.blocks = memory.array(np.cumsum([0, *map(len, blocks)]).astype(np.int64))
        job.n_blocks, job.slices, job.tile = len(blocks), slices, tile
        job.mode = _BFLOAT16 if narrow and self.narrows else _EXACT
        if self.lib.expect(ctypes.byref(job), mean.data_ptr(), lse.data_ptr()) != 0:
            raise OutOfMemoryError(NO_MEMORY)
        return together(mean, lse)

    @property
    def narrows(self) -> bool:
        """See `HeadRows.narrows`."""
        return self.lib.bfloat16

    def some(self, rows: torch.Tensor) -> NativeRows:
        """A few of the rows."""
        return NativeRows(self.x[rows], self.head)


def _sizes(lib: Library, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms [V] of the head's rows, and of what bfloat16 takes away from each."""
    memory = _Memory(lib, head)
    size, lost = torch.empty(head.vocab_size), torch.empty(head.vocab_size)
    if lib.sizes(ctypes.byref(memory.job), size.data_ptr(), lost.data_ptr()) != 0:
        raise OutOfMemoryError(NO_MEMORY)
    return size, lost


def scan(
    rows: NativeRows,
    request: Request,
    base: Base | None = None,
    place: torch.Tensor | None = None,
    *,
    screened: bool = False,
    first: int = 0,
    tile: int | None = None,
    slices: int | None = None,
) -> Partial:
    """One pass over the columns of ``rows.head``.

    Args:
        rows: the rows, [n, d].
        request: what is wanted, for these rows.
        base: the reference distributions.
        place: [n] which of them each row is compared with; rows that share one are best together.
        screened: whether a first look in bfloat16 is taken.
        first: id of the head's first column, where it is a part of a larger one.
        tile: columns that are worked on together; by default what fits the processor's cache.
        slices: parts that the columns are cut into for threads; by default by the number of rows.

    Raises:
        OutOfMemoryError: there is not enough memory.
    """
    lib, head, n = rows.lib, rows.head, rows.x.shape[0]
    mode = _SCREENED if screened else _BFLOAT16 if rows.narrow and lib.bfloat16 else _EXACT
    if base is not None and base.mean is not None:
        base = None  # nothing has to be summed column by column
    where = None if base is None or place is None else place.numpy()
    tile = tile_of(lib.panel, lib.columns) if tile is None else tile
    tiles = math.ceil(head.vocab_size / tile)
    plan = plan_of(n, where, lib.panel, BLOCK_ROWS)
    if slices is None:
        slices = slices_of(len(plan.first), torch.get_num_threads(), max(1, tiles // 4))
    slices = min(slices, tiles)

    memory = _Memory(lib, head, rows.x)
    keep = request.top_k + SPARE  # also of a part with fewer columns, which then takes in what other parts found
    keep_ranked = 0 if request.allowed is None else keep
    m = 0 if request.targets is None else request.targets.shape[1]
    sums = {name: torch.zeros(slices, n, dtype=torch.float64) for name in ("sum", "moment", "cross")}
    sums["mass"] = torch.zeros(slices, 0 if base is None else base.lse.shape[0], dtype=torch.float64)
    if screened:
        names = ("tail", "tail_moment", "tail_cross", "most")
        sums |= {name: torch.zeros(slices, n, dtype=torch.float64) for name in names}
        sums["again"] = torch.zeros(slices, n, dtype=torch.int64)
    largest = torch.empty(slices, n)
    best = torch.empty(slices, n, keep), torch.empty(slices, n, keep, dtype=torch.int32)
    ranked = torch.empty(slices, n, keep_ranked), torch.empty(slices, n, keep_ranked, dtype=torch.int32)
    before = torch.zeros(slices, n, m, dtype=torch.int64)
    asked: dict[str, Any] = {
        "first": first,
        "w_size": memory.at(rows.size),
        "w_lost": memory.at(rows.lost),
        "bound": memory.at(rows.bound.contiguous()),
        "order": memory.array(plan.order),
        "blocks": memory.array(plan.blocks),
        "n_blocks": len(plan.first),
        "keep": keep,
        "keep_ranked": keep_ranked,
        "targets": m,
        "slices": slices,
        "tile": tile,
        "theta": THETA_ENTROPY if request.entropy else THETA,
        "theta_ref": THETA_REFERENCE,
        "patience": PATIENCE * head.vocab_size / slices,
        "mode": mode,
        "max": memory.at(largest),
        "best_z": memory.at(best[0]),
        "best_id": memory.at(best[1]),
        "ranked_z": memory.at(ranked[0]),
        "ranked_id": memory.at(ranked[1]),
        "before": memory.at(before),
        **{name: memory.at(values) for name, values in sums.items()},
    }
    if request.allowed is not None:
        asked["allowed"] = memory.at(request.allowed.to("cpu", torch.uint8).contiguous())
    target_z = None
    if request.targets is not None:
        target_z = rows.at_all(request.targets)
        asked["target_ids"] = memory.at(request.targets.to("cpu", torch.int64).contiguous())
        asked["target_z"] = memory.at(target_z)
    if base is not None:
        assert where is not None
        assert isinstance(base.rows, HeadRows)
        asked |= {
            "place": memory.array(where.astype(np.int32)),
            "ref_first": memory.array(plan.first),
            "ref_count": memory.array(plan.count),
            "ref_counts": memory.array(plan.counts),
            "ref": memory.at(base.rows.x.contiguous()),
            "ref_lse": memory.at(base.lse.contiguous()),
            "ref_ids": memory.at(base.ids.to(torch.int32).contiguous()),
            "n_ref": base.ids.shape[0],
            "ref_keep": base.ids.shape[1],
        }
    for name, value in asked.items():
        setattr(memory.job, name, value)
    if lib.scan(ctypes.byref(memory.job)) != 0:
        raise OutOfMemoryError(NO_MEMORY)
    if target_z is not None:
        before[0] += ruled_out_before(target_z, head, request, first)

    found = Candidates(best[0][0], best[1][0].long())
    got = {name: values[0] for name, values in sums.items()}
    return Partial(
        largest[0],
        got["sum"],
        got["moment"],
        found,
        Candidates(ranked[0][0], ranked[1][0].long()) if keep_ranked else found,
        before[0] if m else None,
        got["cross"] if base is not None else None,
        sums["mass"].sum(0) if base is not None else None,
        Rough(
            got["tail"],
            got["tail_moment"],
            got["tail_cross"] if base is not None else None,
            got["most"],
            got["again"],
        )
        if screened
        else None,
    )


# -- how work is cut ---------------------------------------------------------------------------


@dataclass
class Plan:
    """Rows in the order of work, cut into blocks; the reference rows that each block needs lie together.

    Attributes:
        order: [n] int32, rows.
        blocks: [blocks + 1] int64, where each begins.
        first: [blocks] int32, number of the first reference row.
        count: [blocks] int32, how many there are.
        counts: [blocks] uint8, 1 where no earlier block needs them: the sum of their weights is taken there.
    """

    order: IntArray
    blocks: IntArray
    first: IntArray
    count: IntArray
    counts: IntArray

    @staticmethod
    def of(parts: list[IntArray], ranges: list[tuple[int, int]]) -> Plan:
        """The plan of these blocks; two ranges are the same or apart."""
        starts = np.array([first for first, _ in ranges], dtype=np.int32)
        counts = np.ones(len(parts), dtype=np.uint8)
        counts[1:] = starts[1:] != starts[:-1]
        return Plan(
            np.concatenate(parts).astype(np.int32),
            np.cumsum([0, *map(len, parts)]).astype(np.int64),
            starts,
            np.array([count for _, count in ranges], dtype=np.int32),
            counts,
        )


def plan_of(n: int, place: IntArray | None, panel: int, most: int = BLOCK_ROWS) -> Plan:
    """Cut ``n`` rows into blocks that share tiles of the head, and few reference rows each.

    Args:
        n: number of rows.
        place: [n] the reference row of each, or None.
        panel: rows that are worked on together.
        most: rows of a block.
    """
    if place is None:
        parts = _runs(np.arange(n), most, panel)
        return Plan.of(parts, [(0, 0)] * len(parts))
    positions = int(place[-1]) + 1
    groups = n // positions
    if n == groups * positions and np.array_equal(place, np.tile(np.arange(positions), groups)):
        return _grid(groups, positions, panel, most)
    order = np.argsort(place, kind="stable")
    parts, ranges = [], []
    for run in _cut(place[order], most):
        rows = order[run]
        first, last = int(place[rows[0]]), int(place[rows[-1]])
        for part in _runs(rows, most, panel):
            parts.append(part)
            ranges.append((first, last - first + 1))
    return Plan.of(parts, ranges)


def _grid(groups: int, positions: int, panel: int, most: int) -> Plan:
    """Blocks of [groups, positions] rows: few positions and many groups, so that the reference costs little."""
    parts, ranges = [], []
    width = min(max(most // groups // panel, 1), 8) * panel
    for run in _runs(np.arange(positions), width, panel):
        tall = max(1, most // len(run))
        for some in _runs(np.arange(groups), tall, 1):
            parts.append((some[:, None] * positions + run).reshape(-1))
            ranges.append((int(run[0]), len(run)))
    return Plan.of(parts, ranges)


def _cut(places: IntArray, most: int) -> Iterator[slice]:
    """Runs of sorted places, cut between different ones, of about ``most`` rows and few places."""
    starts = np.flatnonzero(np.diff(places, prepend=places[0] - 1))
    begin = 0
    for here, after in zip(starts, [*starts[1:], len(places)], strict=True):
        if here > begin and (after - begin > most or places[here] - places[begin] >= most // 4):
            yield slice(begin, here)
            begin = int(here)
    yield slice(begin, len(places))


def _runs(rows: IntArray, most: int, panel: int) -> list[IntArray]:
    """Runs of about equal length, at most ``most``, whole panels where possible."""
    runs = math.ceil(len(rows) / most)
    size = math.ceil(len(rows) / runs / panel) * panel
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def slices_of(blocks: int, threads: int, most: int) -> int:
    """Parts that columns are cut into, so that threads that take turns end at about the same time.

    Each part finds candidates of its own, so few parts are better where blocks alone occupy all threads.
    """
    wanted = [s for s in range(1, min(16, most) + 1) if blocks * s >= 2 * threads]
    even = [s for s in wanted if blocks * s % threads == 0 or blocks * s >= 8 * threads]
    return (even or wanted or [max(1, min(16, most))])[0]


@cache
def _first_cache() -> int:
    """Bytes of the first-level data cache of one core."""
    try:
        found = os.sysconf("SC_LEVEL1_DCACHE_SIZE")
    except (ValueError, OSError, AttributeError):
        found = 0
    return found if found > 0 else 2**15


def tile_of(panel: int, columns: int) -> int:
    """Columns of a tile, in whole products of ``columns``.

    The logits of a tile and ``panel`` rows take three fifths of the first-level cache, where they are written and read
    several times. The head's rows themselves stream from further away, each once for a panel: it was measured
    (`benchmarks/tiles.py`) that this rule comes within some per cent of the best tile at widths from 576 to 4096.
    """
    return max(1, _first_cache() * 3 // 5 // (4 * panel) // columns) * columns
