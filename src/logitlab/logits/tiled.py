"""The tiled backend: the scan in PyTorch alone, for any device and for tails without a linear head.

A float32 product of width d and logits around 100 is off by up to 5e-5, which is enough to swap
near-equal tokens. So the pass only *finds* the columns that can matter (the top candidates; for a
target's rank, the columns that are too close to call), within a bound on the product's rounding
error. Those few are computed again in float64, and the sums are corrected with them.
"""

from __future__ import annotations

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.partial import BASE, SPARE, Base, Candidates, Partial, conclude, ruled_out_before
from logitlab.logits.rows import HeadRows, Rows, rows_of
from logitlab.logits.statistics import TIE, Request, Statistics

ROWS = 1024
TILE = 2048
GROUP = 32  # columns that share one maximum when candidates are looked for
RUN = 128  # products that are summed in float32 before float64 takes over
CROWD = 64  # columns of a tile that are rescored one by one; where more are close, the row's tile is


def tiled(x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None) -> Statistics:
    """See `logitlab.logits.statistics`; holds [`ROWS`, `TILE`] at a time."""
    groups, positions = x.shape[:2]
    limit = ROWS if isinstance(source, Head) else max(1, 2**24 // source.vocab_size)
    tall = max(1, min(groups, limit))
    wide = max(1, min(positions, limit // tall))
    columns: list[Statistics] = []
    for p in range(0, positions, wide):
        part = slice(p, p + wide)
        base = None
        if against is not None:
            rows = rows_of(against[part], source)
            base = Base.of(rows, scan(rows, source.vocab_size, Request(BASE, source.vocab_size)))
        parts = [_block(x[g : g + tall, part], source, request.at(part), base) for g in range(0, groups, tall)]
        columns.append(Statistics.join(parts, dim=0))
    return Statistics.join(columns, dim=1)


def _block(x: torch.Tensor, source: Head | LogitSource, request: Request, base: Base | None) -> Statistics:
    """Statistics of [groups, positions, d] rows that are scanned together."""
    groups, positions = x.shape[:2]
    rows = rows_of(x.reshape(-1, x.shape[-1]), source)
    asked = request.for_rows(groups, positions)
    place = torch.arange(positions, device=rows.bound.device).repeat(groups)
    found = conclude(scan(rows, source.vocab_size, asked, base), rows, source, asked, base, place)
    return found.map(lambda v: v.reshape(groups, positions, *v.shape[1:]))


def scan(rows: Rows, size: int, request: Request, base: Base | None = None, first: int = 0) -> Partial:
    """One pass over all columns.

    Args:
        rows: the rows, [n, d]; with a base they are [groups, positions], positions running fastest.
        size: number of columns.
        request: what is wanted, for these rows.
        base: the reference distributions of the positions.
        first: id of the first column, where it is a part of a larger head.
    """
    if base is not None and base.mean is not None:
        base = None  # nothing has to be summed column by column
    made = _Scan(rows, size, request, base, first)
    made.run()
    return made.partial


def _empty(n: int, keep: int, first: int, device: torch.device) -> Candidates:
    z = torch.full((n, keep), -torch.inf, device=device)
    return Candidates(z, torch.full((n, keep), first, dtype=torch.int64, device=device))


class _Scan:
    """Accumulators of one pass over the vocabulary for ``n`` rows."""

    def __init__(self, rows: Rows, size: int, request: Request, base: Base | None, first: int) -> None:
        self.rows, self.size, self.request, self.base, self.first = rows, size, request, base, first
        n, device = rows.bound.shape[0], rows.bound.device
        keep = request.top_k + SPARE  # also of a part with fewer columns, which then takes in what other parts found
        best = _empty(n, keep, first, device)
        ranked = best
        if request.allowed is not None:  # what is ranked is then not what weighs most in the sums
            ranked = _empty(n, keep, first, device)

        def zeros() -> torch.Tensor:
            return torch.zeros(n, dtype=torch.float64, device=device)

        self.partial = Partial(torch.full((n,), -torch.inf, device=device), zeros(), zeros(), best, ranked)
        if base is not None:
            self.partial.cross = zeros()
            self.partial.mass = torch.zeros(base.lse.shape[0], dtype=torch.float64, device=device)
        self.target: torch.Tensor | None = None
        if request.targets is not None:
            self.ids = request.targets.to(device)
            self.target = rows.at_all(self.ids)
            # Columns of -inf, ruled out or filtered, are not compared.
            self.low = (self.target - rows.bound).float().clamp_min(torch.finfo(torch.float32).min)
            self.high = (self.target + rows.bound).float()
            self.partial.before = torch.zeros_like(self.ids)
            if isinstance(rows, HeadRows):
                self.partial.before += ruled_out_before(self.target, rows.head, request, first)

    def run(self) -> None:
        """Go over all tiles."""
        state = self.partial
        for start in range(0, self.size, TILE):
            columns = slice(start, min(start + TILE, self.size))
            z = self.rows.tile(columns)
            ranked = z
            if self.request.allowed is not None:
                ranked = z.masked_fill(~self.request.allowed[columns].to(z.device), -torch.inf)
                self._merge(state.ranked, ranked, columns)
            self._rank(ranked, columns)
            if self.base is not None:
                self._cross(z, columns)
            self._sums(z, self._merge(state.best, z, columns))

    def _merge(self, best: Candidates, z: torch.Tensor, columns: slice) -> torch.Tensor:
        """Take a tile's best columns in, in place; return the tile's maximum of each row."""
        keep, width = best.z.shape[1], z.shape[1]
        whole = width - width % GROUP
        groups = z[:, :whole].reshape(z.shape[0], -1, GROUP).amax(dim=2)
        if whole < width:
            groups = torch.cat([groups, z[:, whole:].amax(dim=1, keepdim=True)], dim=1)
        top = groups.amax(dim=1)
        rows = (top > best.z[:, -1]).nonzero().squeeze(1)
        if rows.numel():
            # The best columns lie in the groups with the best maxima.
            places = groups[rows].topk(min(keep, groups.shape[1]), dim=1).indices
            ids = (places.unsqueeze(2) * GROUP + torch.arange(GROUP, device=z.device)).flatten(1)
            found = z[rows.unsqueeze(1), ids.clamp_max(width - 1)].masked_fill(ids >= width, -torch.inf)
            mine = Candidates(best.z[rows], best.ids[rows])
            new = mine.merge(Candidates(found, ids.clamp_max(width - 1) + columns.start + self.first))
            best.z[rows], best.ids[rows] = new.z[:, :keep], new.ids[:, :keep]  # best first
        return top

    def _sums(self, z: torch.Tensor, top: torch.Tensor) -> None:
        state = self.partial
        new = torch.maximum(state.max, top)
        shift = (state.max - new).double()
        shift[state.max == -torch.inf] = 0.0
        old = shift.exp()
        state.moment = (state.moment + state.sum * shift) * old
        state.sum *= old
        d = (z - new.clamp_min(-3e38).unsqueeze(1)).clamp_min_(-104.0)  # exp is 0 there; 0 * -inf would not be
        e = d.exp()
        state.sum += e.sum(dim=1)
        state.moment += torch.linalg.vecdot(e, d)
        state.max = new

    def _cross(self, z: torch.Tensor, columns: slice) -> None:
        base, state = self.base, self.partial
        assert base is not None
        assert state.cross is not None
        assert state.mass is not None
        reference = base.rows.tile(columns).clamp_min(-1e38)
        weights = (reference - base.lse.float().unsqueeze(1)).exp()
        ids = base.ids - self.first
        row, place = ((ids >= columns.start) & (ids < columns.stop)).nonzero(as_tuple=True)
        weights[row, ids[row, place] - columns.start] = 0.0  # these are treated in float64
        groups = z.shape[0] // weights.shape[0]
        state.cross += _weighted_sums(reference, weights).repeat(groups)
        state.cross -= _weighted_sums(z.clamp_min(-1e38), weights)
        state.mass += weights.sum(dim=1, dtype=torch.float64)

    def _rank(self, z: torch.Tensor, columns: slice) -> None:
        before = self.partial.before
        if self.target is None or before is None:
            return
        for m in range(self.target.shape[1]):
            above = (z > self.high[:, m : m + 1]).sum(dim=1)
            maybe = (z >= self.low[:, m : m + 1]).sum(dim=1)
            before[:, m] += above
            rows = (maybe > above).nonzero().squeeze(1)
            if rows.numel():
                crowded = (maybe - above)[rows] > CROWD
                self._settle_pairs(before, z, rows[~crowded], columns, m)
                self._settle_rows(before, z, rows[crowded], columns, m)

    def _settle_pairs(self, before: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, columns: slice, m: int) -> None:
        """Count the columns of a tile that are too close to call, one by one in float64."""
        near = (z[rows] >= self.low[rows, m : m + 1]) & (z[rows] <= self.high[rows, m : m + 1])
        row, column = near.nonzero(as_tuple=True)
        row, column = rows[row], column + columns.start
        first = self._first(self.rows.at(row, column), column, row, m)
        before[:, m].index_put_((row,), first.long(), accumulate=True)

    def _settle_rows(self, before: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, columns: slice, m: int) -> None:
        """The same for rows where many columns are close (a zero row ties them all): a float64 tile."""
        ids = torch.arange(columns.start, columns.stop, device=rows.device)
        for row in rows.split(64):
            near = (z[row] >= self.low[row, m : m + 1]) & (z[row] <= self.high[row, m : m + 1])
            exact = self.rows.some(row).tile(columns, torch.float64)
            first = self._first(exact, ids, row.unsqueeze(1), m)
            before[row, m] += (near & first).sum(dim=1)

    def _first(self, z: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor, m: int) -> torch.Tensor:
        """Whether columns with float64 logits ``z`` come before target ``m`` of their rows.

        It never comes before itself: summed in another order, a large logit may come out larger than the target's.
        """
        assert self.target is not None
        steps, own = torch.round(z / TIE), torch.round(self.target[rows, m] / TIE)
        ids, its = columns + self.first, self.ids[rows, m]
        return ((steps > own) & (ids != its)) | ((steps == own) & (ids < its))


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
