"""What a pass over some columns of the vocabulary leaves, and how it becomes statistics.

A `Partial` holds sums, counts and candidates. Partials over different columns merge in any order to the
partial over all of them: that is what makes tiles, slices between threads and shards between devices one
and the same thing. `conclude` then settles in float64 what float32 cannot, and gives the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.reference import reference
from logitlab.logits.rows import HeadRows, Rows
from logitlab.logits.statistics import Request, Statistics, in_order

SPARE = 11
"""Candidates beyond top_k: they also carry the float64 correction of the sums."""

MOST_OFF = 8.0
"""Nats that a rough logit may be off if anything is to be said about its row."""

BASE = 21
"""Top columns of a reference distribution that are looked for, besides `SPARE`: its likeliest weigh in every row."""


@dataclass
class Candidates:
    """The best columns of every row so far, in no order.

    Attributes:
        z: [n, keep] logits in the precision of the pass; -inf where there is no column yet.
        ids: [n, keep] int64.
    """

    z: torch.Tensor
    ids: torch.Tensor

    def merge(self, other: Candidates) -> Candidates:
        """The best of two, as many as the larger of them holds."""
        z, ids = torch.cat([self.z, other.z], dim=1), torch.cat([self.ids, other.ids], dim=1)
        best = z.topk(max(self.z.shape[1], other.z.shape[1]), dim=1)
        return Candidates(best.values, ids.gather(1, best.indices))


@dataclass
class Rough:
    """Of a screened pass: how far columns that were not computed again can have moved the sums.

    Each sum is over those columns, of their share times the most that their logit can be off.

    Attributes:
        tail: [n] float64, shares ``exp(z - max)``.
        moment: [n] float64, shares ``exp(z - max) (max - z)``.
        cross: [n] float64, shares of the reference distribution; None without one.
        most: [n] float64, the most that any logit of the row can be off; infinite where the pass has given up.
        again: [n] int64, columns computed again.
    """

    tail: torch.Tensor
    moment: torch.Tensor
    cross: torch.Tensor | None
    most: torch.Tensor
    again: torch.Tensor


@dataclass
class Partial:
    """Sums, counts and candidates of rows over some columns.

    A row with a NaN or +inf among its logits has no distribution; it has a NaN in ``sum`` or ``moment``, or +inf in
    ``max``, and the rest means nothing.

    Attributes:
        max: [n] largest logit.
        sum: [n] float64, of ``exp(z - max)``.
        moment: [n] float64, of ``exp(z - max) (z - max)``.
        best: likeliest columns.
        ranked: likeliest columns among those that are ranked (the same object where all are).
        before: [n, m] int64, ranked columns that come before each target.
        cross: [n] float64, of reference weights times (reference logit - z); None where it is not needed.
        mass: [positions] float64, sum of those weights.
        rough: of a screened pass.
    """

    max: torch.Tensor
    sum: torch.Tensor
    moment: torch.Tensor
    best: Candidates
    ranked: Candidates
    before: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    rough: Rough | None = None

    def merge(self, other: Partial) -> Partial:
        """The partial over the columns of both; neither may have a column of the other's.

        Raises:
            ValueError: one of them is of a screened pass.
        """
        if self.rough is not None or other.rough is not None:
            raise ValueError("screened partials are merged where they are made")
        top = torch.maximum(self.max, other.max)
        mine, its = self._moved(top), other._moved(top)
        best = self.best.merge(other.best)
        ranked = best if self.ranked is self.best else self.ranked.merge(other.ranked)
        return Partial(
            top,
            mine[0] + its[0],
            mine[1] + its[1],
            best,
            ranked,
            _added(self.before, other.before),
            _added(self.cross, other.cross),
            _added(self.mass, other.mass),
        )

    def _moved(self, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and moment relative to a larger maximum."""
        shift = (self.max.double() - top.double()).nan_to_num(nan=0.0, neginf=-1e30)
        old = shift.exp()
        return self.sum * old, torch.where(self.sum == 0, self.moment, self.moment + self.sum * shift) * old

    @property
    def broken(self) -> torch.Tensor:
        """Rows [n] bool without a distribution."""
        return torch.isnan(self.sum + self.moment) | ~(self.max < torch.inf)


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a + b


@dataclass
class Base:
    """The distribution ``r`` that ``kl`` starts from, for a few positions, settled in float64.

    With a linear head ``sum_v r_v (z_ref,v - z_v) = scale (x_ref - x) . sum_v r_v w_v``: one vector for each
    position, the mean of the head's rows, gives that sum for every row that is compared with it. Behind a
    soft-cap it has to be summed column by column, see `Partial.cross`.

    Attributes:
        rows: its rows.
        lse: [positions] float64.
        entropy: [positions] float64, nats.
        ids: [positions, c] its likeliest columns, treated in float64 and left out of `Partial.cross`.
        z: [positions, c] their logits, float64.
        mean: [positions, d] float64; None where there is none.
    """

    rows: Rows
    lse: torch.Tensor
    entropy: torch.Tensor
    ids: torch.Tensor
    z: torch.Tensor
    mean: torch.Tensor | None = None

    @staticmethod
    def of(rows: Rows, partial: Partial) -> Base:
        """The base that a pass over its rows gives."""
        exact = _exact(rows, partial.best)
        lse, entropy = _sums(partial, exact)
        base = Base(rows, lse, entropy, partial.best.ids, exact)
        if isinstance(rows, HeadRows) and rows.linear:
            base._take_mean(rows)
        return base

    def _take_mean(self, rows: HeadRows) -> None:
        """Take the mean, and the normaliser that its very weights sum to 1 with."""
        mean, mass = rows.mean_row(self.lse, self.ids)
        rounded = (self.lse.float().double() - self.lse).exp()  # weights are relative to the float32 normaliser
        r = (self.z - self.lse.unsqueeze(1)).exp()
        total = r.sum(1) + mass * rounded
        self.mean = (rows.weigh(r, self.ids) + mean * rounded.unsqueeze(1)) / total.unsqueeze(1)
        self.lse = self.lse + total.log()


def ruled_out_before(target: torch.Tensor, head: Head, request: Request, first: int) -> torch.Tensor:
    """How many ranked columns of -inf come before each target, [n, m] int64: all of a lower id, if it is -inf too.

    A scan does not compare what is ruled out, so that is added to what it counts.

    Args:
        target: [n, m] float64, logits of the targets.
        head: columns ``first`` and on.
        request: what is wanted, for these rows; its filter is of the head's columns.
        first: id of the head's first column.
    """
    out = target == -torch.inf
    assert request.targets is not None
    ids = request.targets.to(target.device)
    ruled_out = head.ruled_out
    if ruled_out is None or not bool(out.any()):
        return torch.zeros_like(ids)
    tied = ruled_out.to(target.device).long()
    if request.allowed is not None:
        tied *= request.allowed.to(target.device)
    lower = torch.cat([tied.new_zeros(1), tied.cumsum(0)])
    return torch.where(out, lower[(ids - first).clamp(0, head.vocab_size)], 0)


def conclude(
    partial: Partial,
    rows: Rows,
    source: Head | LogitSource,
    request: Request,
    base: Base | None = None,
    place: torch.Tensor | None = None,
) -> Statistics:
    """Statistics [n] (flat) of rows from the partial over all columns.

    Args:
        partial: what the pass left.
        rows: the rows.
        source: what decodes them.
        request: what is wanted, for these rows.
        base: the reference distributions.
        place: [n] which of them each row is compared with.
    """
    best = _exact(rows, partial.best)
    lse, entropy = _sums(partial, best)
    ranked, exact = partial.ranked, best
    if partial.ranked is not partial.best:
        exact = _exact(rows, partial.ranked)
    order = in_order(exact, ranked.ids)[:, : request.top_k]
    top = exact.gather(1, order)
    result = Statistics(ranked.ids.gather(1, order), top - lse.unsqueeze(1), lse, entropy if request.entropy else None)
    if request.targets is not None:
        assert partial.before is not None
        result.target_logprob = rows.at_all(request.targets) - lse.unsqueeze(1)
        result.target_rank = 1 + partial.before
    if base is not None:
        assert place is not None
        result.kl = _kl(partial, rows, base, place, lse)
        result.cross_entropy = result.kl + base.entropy[place]
    if partial.rough is not None:
        result.bound = _bound(partial, lse, entropy, request)
    unsure = _unsure(partial, rows, exact, request)
    broken = partial.broken
    if result.bound is not None:  # rows that a screened pass has given up are done again as a whole
        result.bound = result.bound.masked_fill(broken, torch.inf)
        unsure &= torch.isfinite(result.bound)
    unsure &= ~broken
    if bool(unsure.any()):  # more near-ties than candidates: settle those rows in full
        _settle(result, unsure, rows, source, request)
    if bool(broken.any()):
        _give_up(result, broken, request)
    return result


def _give_up(result: Statistics, broken: torch.Tensor, request: Request) -> None:
    """Say of rows without a distribution that they have none: NaN, and ids and ranks as if all columns tied."""
    sums = result.top_logprob, result.logsumexp, result.entropy
    for values in (*sums, result.target_logprob, result.kl, result.cross_entropy):
        if values is not None:
            values[broken] = torch.nan
    k, device = result.top_ids.shape[1], result.top_ids.device
    allowed = None if request.allowed is None else request.allowed.to(device)
    result.top_ids[broken] = torch.arange(k, device=device) if allowed is None else allowed.nonzero()[:k, 0]
    if request.targets is not None:
        assert result.target_rank is not None
        before = request.targets.to(device)
        if allowed is not None:
            before = (allowed.cumsum(0) - allowed.long())[before]
        result.target_rank[broken] = 1 + before[broken]


def _exact(rows: Rows, found: Candidates) -> torch.Tensor:
    """Float64 logits of candidates; -inf where there is none."""
    exact = rows.at_all(found.ids)
    return exact.masked_fill_(found.z == -torch.inf, -torch.inf)


def _sums(partial: Partial, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and entropy, the candidates' share taken from their float64 logits."""
    top = partial.max.double().unsqueeze(1)
    real = partial.best.z > -torch.inf
    # Relative to the largest float64 logit: of logits of 1e10 and more, float32 is off by more than exp can take.
    pivot = exact.amax(1, keepdim=True)
    pivot = torch.where(torch.isfinite(pivot), pivot, top)
    rough = torch.where(real, partial.best.z.double() - top, -torch.inf)
    fine = torch.where(real, exact - pivot, -torch.inf)
    was, now = rough.exp(), fine.exp()
    shift = (top - pivot).nan_to_num(nan=0.0).clamp(-1.0, 1.0).squeeze(1)
    rest = partial.sum - was.sum(1)
    rest_moment = partial.moment - (was * rough.clamp_min(-1e30)).sum(1) + rest * shift
    total = rest * shift.exp() + now.sum(1)
    moment = rest_moment * shift.exp() + (now * fine.clamp_min(-1e30)).sum(1)
    log = total.log()
    entropy = torch.where(total == 0, 0.0, log - moment / total)  # of a row of -inf alone there is none
    lse, broken = pivot.squeeze(1) + log, partial.broken
    return lse.masked_fill(broken, torch.nan), entropy.clamp_min(0.0).masked_fill(broken, torch.nan)


def _kl(partial: Partial, rows: Rows, base: Base, place: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """KL divergence [n] from the reference, in nats."""
    # sum_v r_v (z_ref - z) rather than two separate sums: what is wrong with r cancels.
    if base.mean is not None:
        assert isinstance(rows, HeadRows)
        assert isinstance(base.rows, HeadRows)
        return (rows.along(base.mean, place, base.rows) + lse - base.lse[place]).clamp_min(0.0)
    assert partial.cross is not None
    assert partial.mass is not None
    # The base's own normaliser is taken from these very weights, so they sum to 1.
    r = (base.z - base.lse.unsqueeze(1)).exp()
    rounded = (base.lse.float().double() - base.lse).exp()  # weights are relative to the float32 normaliser
    total = r.sum(1) + partial.mass * rounded
    gap = base.z[place] - rows.at_all(base.ids[place])
    likely = torch.where(r[place] > 0, r[place] * gap, 0.0).sum(1)
    normal = base.lse + total.log()
    return ((likely + partial.cross * rounded[place]) / total[place] + lse - normal[place]).clamp_min(0.0)


def _bound(partial: Partial, lse: torch.Tensor, entropy: torch.Tensor, request: Request) -> torch.Tensor:
    """What screening can have added to the error of any of the statistics, [n] in nats.

    ``U`` are the columns that stayed rough, ``p`` the probabilities as computed, ``b_v`` the most that logit ``v`` can
    be off, ``B`` the largest of them, ``T = sum_U p_v b_v``.

    * log-sum-exp: moved by at most ``log(1 + sum_U p_v (e^b_v - 1)) <= e^B T = L`` up, and by at most ``T`` down
      (it is convex, and ``p`` its slope); the same holds for any part of the way to the true logits.
    * entropy: its slope by logit ``v`` is ``-p_v (log p_v + H)``. On the way ``p_v`` grows at most to ``p_v e^C``,
      ``C = B + L``, and ``-log p_v`` by at most ``C``, so ``H`` grows at most to ``e^C (H + C)``. Neither ``H`` nor
      ``-log p_v`` is negative, so the slope is nowhere larger than ``p_v e^C (-log p_v + C + e^C (H + C))``. The bound
      is the sum over ``U`` of that times ``b_v``.
    * KL: linear in the logits (`Rough.cross`) apart from the log-sum-exp.

    Where ``B`` is above `MOST_OFF` there is no bound: shares below e^-87 are 0 in float32, and ``e^B`` could make them
    matter. A little is added for ``T`` itself being summed in float32.
    """
    rough = partial.rough
    assert rough is not None
    gone = ~(rough.most <= MOST_OFF)
    most = rough.most.masked_fill(gone, 0.0)
    up = 1 + 1e-5
    tail, moment = up * rough.tail / partial.sum, up * rough.moment / partial.sum
    of_lse = most.exp() * tail
    bound = of_lse
    if request.entropy:
        path = most + of_lse
        grown = path.exp()
        # log p_v = (z_v - max) - (lse - max), whose first part is in `moment`
        slope = (lse - partial.max.double() + path + grown * (entropy + path)) * tail + moment
        bound = torch.maximum(bound, grown * slope)
    if rough.cross is not None:
        bound = torch.maximum(bound, of_lse + rough.cross * up)
    return bound.masked_fill(gone, torch.inf)


def _unsure(partial: Partial, rows: Rows, exact: torch.Tensor, request: Request) -> torch.Tensor:
    """Rows [n] bool whose candidates may lack a column that belongs to the top."""
    kth = exact.topk(request.top_k, dim=1).values[:, -1]
    if partial.ranked.z.shape[1] >= request.columns:
        return kth == -torch.inf  # columns of -inf are no candidates
    return partial.ranked.z.amin(dim=1).double() >= kth - rows.bound.squeeze(1)


def _settle(result: Statistics, unsure: torch.Tensor, rows: Rows, source: Head | LogitSource, request: Request) -> None:
    """Replace the top columns of some rows by those of a float64 computation."""
    own = source if isinstance(rows, HeadRows) else LogitSource(lambda z: z, source.vocab_size)
    x = rows.x if isinstance(rows, HeadRows) else rows.z
    distinct, copies = x[unsure].unique(dim=0, return_inverse=True)
    exact = reference(distinct.unsqueeze(0), own, request.only_top(), None)
    result.top_ids[unsure] = exact.top_ids[0][copies].to(result.top_ids.device)
    result.top_logprob[unsure] = exact.top_logprob[0][copies].to(result.top_logprob.device)
