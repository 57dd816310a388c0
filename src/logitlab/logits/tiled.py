"""The tiled backend: one pass over tiles of the head, statistics accumulated while a tile is in cache.

A float32 product of width d and logits around 100 is off by up to 5e-5, which is enough to swap
near-equal tokens. So the pass only *finds* the columns that can matter (the top candidates; for a
target's rank, the columns that are too close to call), within a bound on the product's rounding
error. Those few are computed again in float64, and the sums are corrected with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.reference import reference
from logitlab.logits.statistics import TIE, Request, Statistics, in_order

ROWS = 1024
TILE = 2048
GROUP = 32  # columns that share one maximum when candidates are looked for
SPARE = 11  # candidates beyond top_k: they also carry the float64 correction of the sums
RUN = 128  # products that are summed in float32 before float64 takes over
CROWD = 64  # columns of a tile that are rescored one by one; where more are close, the row's tile is
PAIRS = 2**15  # (row, column) pairs rescored at once


def tiled(x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None) -> Statistics:
    """See `logitlab.logits.statistics`; holds [`ROWS`, `TILE`] at a time."""
    groups, positions = x.shape[:2]
    limit = ROWS if isinstance(source, Head) else max(1, 2**24 // source.vocab_size)
    tall = max(1, min(groups, limit))
    wide = max(1, min(positions, limit // tall))
    columns: list[Statistics] = []
    for p in range(0, positions, wide):
        base = None
        if against is not None:
            base = _Reference.of(against[p : p + wide], source)
        parts = [_block(x[g : g + tall, p : p + wide], source, request, base) for g in range(0, groups, tall)]
        columns.append(Statistics.join(parts, dim=0))
    if not columns:
        return reference(x, source, request, against)
    return Statistics.join(columns, dim=1)


# -- logits of a few rows, by tiles ------------------------------------------------------------


class _HeadRows:
    """Rows whose logits come from a linear head."""

    def __init__(self, x: torch.Tensor, head: Head) -> None:
        self.x = x.to(device=head.weight.device, dtype=torch.float32)
        self.head = head

    def tile(self, columns: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.head.logits(self.x, columns, dtype)

    def some(self, rows: torch.Tensor) -> _HeadRows:
        return _HeadRows(self.x[rows], self.head)

    def at(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits of (row, column) pairs, both [n]."""
        parts = [
            self.head.logits_at(self.x[r], i.unsqueeze(1)).squeeze(1)
            for r, i in zip(rows.split(PAIRS), ids.split(PAIRS), strict=True)
        ]
        return torch.cat(parts) if parts else self.x.new_zeros(0, dtype=torch.float64)

    @cached_property
    def bound(self) -> torch.Tensor:
        """Bound [n, 1] on the error of a tile's logits.

        Rounding errors of a sum of d products behave like a random walk, so they stay below
        ``2 sqrt(d) u |x| |w|`` (Higham and Mary 2019, with u = 2**-24) with room to spare: |x| |w|
        already over-estimates the sum of absolute products.
        """
        d = self.x.shape[1]
        slack = 2 * math.sqrt(d) * 2.0**-24 * self.head.largest_row * abs(self.head.scale)
        return (slack * self.x.norm(dim=1, keepdim=True)).double() + 2 * TIE + self.head.extra_error


class _SourceRows:
    """Rows whose logits come from the model's own tail; they are taken as they are."""

    def __init__(self, z: torch.Tensor) -> None:
        self.z = z.float().clamp_min(-1e38)  # -inf would turn 0 * -inf into NaN
        self.bound = torch.full((z.shape[0], 1), 2 * TIE, dtype=torch.float64, device=z.device)

    def some(self, rows: torch.Tensor) -> _SourceRows:
        return _SourceRows(self.z[rows])

    def tile(self, columns: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.z[:, columns].to(dtype)

    def at(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.z[rows, ids].double()


_Rows = _HeadRows | _SourceRows


def _rows(x: torch.Tensor, source: Head | LogitSource) -> _Rows:
    flat = x.reshape(-1, x.shape[-1])
    return _HeadRows(flat, source) if isinstance(source, Head) else _SourceRows(source.compute(flat))


def _at_all(rows: _Rows, ids: torch.Tensor) -> torch.Tensor:
    """Float64 logits at ``ids`` [n, c], row by row."""
    n, c = ids.shape
    numbers = torch.arange(n, device=ids.device).unsqueeze(1).expand(n, c)
    return rows.at(numbers.reshape(-1), ids.reshape(-1)).reshape(n, c)


# -- the reference distribution ----------------------------------------------------------------


@dataclass
class _Reference:
    """The distribution that ``kl`` starts from, for a few positions.

    It is computed in float64: an error in its normaliser enters every row's KL magnified by the
    spread of the log-ratio. These are few rows, one for all the groups that are compared with it.
    """

    rows: _Rows
    lse: torch.Tensor  # [p] float64
    ids: torch.Tensor  # [p, c] its likeliest columns, treated in float64
    z: torch.Tensor  # [p, c] their logits, float64

    @staticmethod
    def of(x: torch.Tensor, source: Head | LogitSource) -> _Reference:
        rows = _rows(x, source)
        scan = _Scan(rows, source.vocab_size, Request(1, None, None), None, torch.float64)
        scan.run()
        return _Reference(rows, scan.sums()[0], scan.best.ids, scan.best.exact)

    def tile(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and probabilities with the columns in ``ids`` left out, both [p, tile] float32."""
        z = self.rows.tile(columns, torch.float64)
        w = (z - self.lse.unsqueeze(1)).exp_().float()
        inside = (self.ids >= columns.start) & (self.ids < columns.stop)
        row, place = inside.nonzero(as_tuple=True)
        w[row, self.ids[row, place] - columns.start] = 0.0
        return z.float(), w


# -- one pass over the vocabulary --------------------------------------------------------------


def _block(x: torch.Tensor, source: Head | LogitSource, request: Request, base: _Reference | None) -> Statistics:
    """Statistics of [groups, positions, d] rows that are scanned together."""
    groups, positions = x.shape[:2]
    scan = _Scan(_rows(x, source), source.vocab_size, request, base)
    scan.run()
    lse, entropy = scan.sums()
    best = scan.ranked
    order = in_order(best.exact, best.ids)[:, : request.top_k]
    result = Statistics(best.ids.gather(1, order), best.exact.gather(1, order) - lse.unsqueeze(1), lse, entropy)
    if request.targets is not None:
        assert scan.target is not None
        result.target_logprob = scan.target - lse.unsqueeze(1)
        result.target_rank = 1 + scan.before
    if base is not None:
        result.kl = scan.kl(lse)
    unsure = scan.unsure(request.top_k)
    if bool(unsure.any()):  # more near-ties than candidates: settle those rows in full
        distinct, copies = x.reshape(-1, x.shape[-1])[unsure].unique(dim=0, return_inverse=True)
        exact = reference(distinct.unsqueeze(0), source, Request(request.top_k, None, request.allowed), None)
        result.top_ids[unsure] = exact.top_ids[0][copies].to(result.top_ids.device)
        result.top_logprob[unsure] = exact.top_logprob[0][copies].to(result.top_ids.device)
    values = (getattr(result, name) for name in Statistics.__dataclass_fields__)
    return Statistics(*(None if v is None else v.reshape(groups, positions, *v.shape[1:]) for v in values))  # pyright: ignore[reportArgumentType]


class _Best:
    """The best columns of every row so far, in the precision of the tiles."""

    def __init__(self, rows: int, keep: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keep, self.size = keep, size
        self.z = torch.full((rows, keep), -torch.inf, dtype=dtype, device=device)
        self.ids = torch.zeros((rows, keep), dtype=torch.int64, device=device)
        self.exact = torch.empty(0)

    def merge(self, z: torch.Tensor, columns: slice) -> torch.Tensor:
        """Take a tile's best columns in; return the tile's maximum of each row."""
        width = z.shape[1]
        whole = width - width % GROUP
        groups = z[:, :whole].reshape(z.shape[0], -1, GROUP).amax(dim=2)
        if whole < width:
            groups = torch.cat([groups, z[:, whole:].amax(dim=1, keepdim=True)], dim=1)
        top = groups.amax(dim=1)
        rows = (top > self.z[:, -1]).nonzero().squeeze(1)
        if rows.numel():
            # The best columns lie in the groups with the best maxima.
            places = groups[rows].topk(min(self.keep, groups.shape[1]), dim=1).indices
            ids = (places.unsqueeze(2) * GROUP + torch.arange(GROUP, device=z.device)).flatten(1)
            found = z[rows.unsqueeze(1), ids.clamp_max(width - 1)].masked_fill(ids >= width, -torch.inf)
            pool = torch.cat([self.z[rows], found], dim=1)
            pool_ids = torch.cat([self.ids[rows], ids + columns.start], dim=1)
            best = pool.topk(self.keep, dim=1)
            self.z[rows] = best.values
            self.ids[rows] = pool_ids.gather(1, best.indices).clamp_max(self.size - 1)
        return top

    def rescore(self, rows: _Rows) -> None:
        """Compute the kept columns again in float64."""
        self.exact = _at_all(rows, self.ids)
        self.exact[self.z == -torch.inf] = -torch.inf


class _Scan:
    """Accumulators of one pass over the vocabulary for ``n`` rows."""

    def __init__(
        self,
        rows: _Rows,
        size: int,
        request: Request,
        base: _Reference | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.size, self.request, self.base, self.dtype = rows, size, request, base, dtype
        n, device = rows.bound.shape[0], rows.bound.device
        self.n = n
        self.max = torch.full((n,), -torch.inf, dtype=dtype, device=device)
        self.sum = torch.zeros(n, dtype=torch.float64, device=device)  # of exp(z - max)
        self.moment = torch.zeros(n, dtype=torch.float64, device=device)  # of exp(z - max) (z - max)
        self.cross = torch.zeros(n, dtype=torch.float64, device=device)  # of weights times (reference z - z)
        self.mass = torch.zeros((), dtype=torch.float64, device=device)  # [positions], of weights
        self.best = self.ranked = _Best(n, min(size, request.top_k + SPARE), size, dtype, device)
        if request.allowed is not None:  # what is ranked is then not what weighs most in the sums
            self.ranked = _Best(n, min(int(request.allowed.sum()), request.top_k + SPARE), size, dtype, device)
        self.target: torch.Tensor | None = None
        if request.targets is not None:
            ids = request.targets.to(device).expand(n, -1)
            self.target = _at_all(rows, ids)
            self.low, self.high = (self.target - rows.bound).float(), (self.target + rows.bound).float()
            self.before = torch.zeros_like(ids)

    def run(self) -> None:
        """Go over all tiles, then settle in float64 what float32 cannot."""
        for start in range(0, self.size, TILE):
            columns = slice(start, min(start + TILE, self.size))
            z = self.rows.tile(columns, self.dtype)
            ranked = z
            if self.request.allowed is not None:
                ranked = z.masked_fill(~self.request.allowed[columns].to(z.device), -torch.inf)
                self.ranked.merge(ranked, columns)
            self._rank(ranked, columns)
            if self.base is not None:
                self._cross(z, *self.base.tile(columns))
            self._sums(z, self.best.merge(z, columns))
        self.best.rescore(self.rows)
        if self.ranked is not self.best:
            self.ranked.rescore(self.rows)

    def _sums(self, z: torch.Tensor, top: torch.Tensor) -> None:
        new = torch.maximum(self.max, top)
        shift = (self.max - new).double()
        shift[self.max == -torch.inf] = 0.0
        old = shift.exp()
        self.moment = (self.moment + self.sum * shift) * old
        self.sum *= old
        d = z - new.unsqueeze(1)
        e = d.exp()
        self.sum += e.sum(dim=1)
        self.moment += torch.linalg.vecdot(e, d)
        self.max = new

    def _cross(self, z: torch.Tensor, base: torch.Tensor, weights: torch.Tensor) -> None:
        self.cross -= _weighted_sums(z, weights)
        self.cross += _weighted_sums(base, weights).repeat(self.n // weights.shape[0])
        self.mass = self.mass + weights.sum(dim=1, dtype=torch.float64)

    def _rank(self, z: torch.Tensor, columns: slice) -> None:
        if self.target is None:
            return
        for m in range(self.target.shape[1]):
            above = (z > self.high[:, m : m + 1]).sum(dim=1)
            maybe = (z >= self.low[:, m : m + 1]).sum(dim=1)
            self.before[:, m] += above
            rows = (maybe > above).nonzero().squeeze(1)
            if rows.numel():
                crowded = (maybe - above)[rows] > CROWD
                self._settle_pairs(z, rows[~crowded], columns, m)
                self._settle_rows(z, rows[crowded], columns, m)

    def _settle_pairs(self, z: torch.Tensor, rows: torch.Tensor, columns: slice, m: int) -> None:
        """Count the columns of a tile that are too close to call, one by one in float64."""
        near = (z[rows] >= self.low[rows, m : m + 1]) & (z[rows] <= self.high[rows, m : m + 1])
        row, column = near.nonzero(as_tuple=True)
        row, column = rows[row], column + columns.start
        first = self._first(self.rows.at(row, column), column, row, m)
        self.before[:, m].index_put_((row,), first.long(), accumulate=True)

    def _settle_rows(self, z: torch.Tensor, rows: torch.Tensor, columns: slice, m: int) -> None:
        """The same for rows where many columns are close (a zero row ties them all): a float64 tile."""
        ids = torch.arange(columns.start, columns.stop, device=rows.device)
        for row in rows.split(64):
            near = (z[row] >= self.low[row, m : m + 1]) & (z[row] <= self.high[row, m : m + 1])
            exact = self.rows.some(row).tile(columns, torch.float64)
            first = self._first(exact, ids, row.unsqueeze(1), m)
            self.before[row, m] += (near & first).sum(dim=1)

    def _first(self, z: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, m: int) -> torch.Tensor:
        """Whether columns with float64 logits ``z`` come before target ``m`` of their rows."""
        assert self.target is not None
        assert self.request.targets is not None
        steps, own = torch.round(z / TIE), torch.round(self.target[rows, m] / TIE)
        return (steps > own) | ((steps == own) & (ids < self.request.targets[m].to(ids.device)))

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp and entropy, the candidates' share taken from their float64 logits."""
        top = self.max.double().unsqueeze(1)
        real = self.best.z > -torch.inf
        rough = torch.where(real, self.best.z.double() - top, 0.0)
        fine = torch.where(real, self.best.exact - top, 0.0)
        weight = real.double()
        total = self.sum + (weight * (fine.exp() - rough.exp())).sum(1)
        moment = self.moment + (weight * (fine.exp() * fine - rough.exp() * rough)).sum(1)
        log = total.log()
        return self.max.double() + log, (log - moment / total).clamp_min(0.0)

    def kl(self, lse: torch.Tensor) -> torch.Tensor:
        """KL divergence [n] from the reference, in nats."""
        base = self.base
        assert base is not None
        groups = self.n // base.lse.shape[0]
        # sum_v r_v (z_ref - z) rather than two separate sums: what is wrong with r cancels.
        r = (base.z - base.lse.unsqueeze(1)).exp()
        likely = r.repeat(groups, 1) * (base.z.repeat(groups, 1) - _at_all(self.rows, base.ids.repeat(groups, 1)))
        rest = (1 - r.sum(1)).clamp_min(0.0) / self.mass.clamp_min(1e-300)
        gap = likely.sum(1) + rest.repeat(groups) * self.cross
        return (gap + lse - base.lse.repeat(groups)).clamp_min(0.0)

    def unsure(self, top_k: int) -> torch.Tensor:
        """Rows [n] bool whose candidates may lack a column that belongs to the top."""
        columns = self.size if self.request.allowed is None else int(self.request.allowed.sum())
        if self.ranked.keep >= columns:
            return torch.zeros(self.n, dtype=torch.bool, device=self.max.device)
        kth = self.ranked.exact.topk(top_k, dim=1).values[:, -1]
        return self.ranked.z[:, -1].double() >= kth - self.rows.bound.squeeze(1)


def _weighted_sums(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums [n] over a tile of ``weights`` [p, tile] times ``z`` [n, tile], row ``i`` taking ``i % p``."""
    positions, width = weights.shape
    total = z.new_zeros(z.shape[0], dtype=torch.float64)
    rest = width % RUN
    for size, part in ((RUN, slice(0, width - rest)), (rest, slice(width - rest, width))):
        if part.stop > part.start:  # short runs are summed in float32, the runs in float64
            w = weights[:, part].reshape(positions, -1, size)
            runs = torch.einsum("gprc,prc->gpr", z[:, part].reshape(-1, *w.shape), w)
            total += runs.sum(dim=2, dtype=torch.float64).reshape(-1)
    return total
