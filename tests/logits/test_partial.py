"""Partials of any cut of the columns merge, in any order, to the partial of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.logits import Head, native, statistics, tiled
from logitlab.logits.partial import BASE, Base, Candidates, Partial, Rough, conclude
from logitlab.logits.rows import HeadRows
from logitlab.logits.statistics import Request
from tests.logits.common import assert_same, random_head, random_rows

Scan = Callable[..., Partial]


def by_tiles(rows: HeadRows, request: Request, base: Base | None, place: torch.Tensor, first: int) -> Partial:
    return tiled.scan(rows, rows.head.vocab_size, request, base, first)


def by_kernel(rows: HeadRows, request: Request, base: Base | None, place: torch.Tensor, first: int) -> Partial:
    return native.scan(native.NativeRows(rows.x, rows.head), request, base, place, first=first)


class Elsewhere(HeadRows):
    """Rows over a part of the columns, with single logits from the whole head."""

    def __init__(self, x: torch.Tensor, part: Head, whole: Head) -> None:
        super().__init__(x, part)
        self.whole = HeadRows(x, whole)

    def at_all(self, ids: torch.Tensor) -> torch.Tensor:
        return self.whole.at_all(ids)


class ElsewhereNative(native.NativeRows):
    """The same for the kernel."""

    def __init__(self, x: torch.Tensor, part: Head, whole: Head) -> None:
        super().__init__(x, part)
        self.whole = HeadRows(x, whole)

    def at_all(self, ids: torch.Tensor) -> torch.Tensor:
        return self.whole.at_all(ids)


def part_of(head: Head, start: int, stop: int) -> Head:
    cut = slice(start, stop)
    return replace(
        head,
        weight=head.weight[cut],
        bias=None if head.bias is None else head.bias[cut],
        offset=None if head.offset is None else head.offset[cut],
    )


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 299), max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
    kernel=st.booleans(),
    softcap=st.booleans(),
    filtered=st.booleans(),
)
def test_any_cut_in_any_order(
    cuts: set[int], order: Any, seed: int, kernel: bool, softcap: bool, filtered: bool
) -> None:
    head = random_head(300, 16, seed, softcap=6.0 if softcap else None, bias=torch.linspace(-1, 1, 300))
    x = random_rows(3, 7, 16, seed=seed + 1, size=3)
    flat, place = x.reshape(-1, 16), torch.arange(7).repeat(3)
    allowed = torch.arange(300) % 4 != 1 if filtered else None
    targets = torch.tensor([[0, 150, 299]]).expand(21, 3)
    request = Request(4, 300 if allowed is None else int(allowed.sum()), targets, allowed)
    whole = HeadRows(flat, head)
    base_rows = HeadRows(x[0], head)
    base = Base.of(base_rows, tiled.scan(base_rows, 300, Request(BASE, 300)))
    edges = [0, *sorted(cuts), 300]
    parts: list[Partial] = []
    for start, stop in pairwise(edges):
        local = part_of(head, start, stop)
        own = replace(base, rows=HeadRows(x[0], local))
        asked = replace(request, allowed=None if allowed is None else allowed[start:stop])
        if kernel:
            parts.append(native.scan(ElsewhereNative(flat, local, head), asked, own, place, first=start))
        else:
            parts.append(tiled.scan(Elsewhere(flat, local, head), stop - start, asked, own, start))
    keep = max(p.best.z.shape[1] for p in parts)
    parts = [widened(p, keep) for p in parts]
    order.shuffle(parts)
    merged = reduce(Partial.merge, parts)
    found = conclude(merged, whole, head, request, base, place)
    exact = statistics(x, head, top_k=4, targets=targets[0], allowed=allowed, reference=x[0], backend="reference")
    assert_same(found.map(lambda v: v.reshape(3, 7, *v.shape[1:])), exact, tolerance=3e-6)


def widened(partial: Partial, keep: int) -> Partial:
    """The same with empty places, so that a part with few columns can take in what others found."""

    def more(found: Candidates) -> Candidates:
        short = keep - found.z.shape[1]
        if short <= 0:
            return found
        z = torch.cat([found.z, torch.full((found.z.shape[0], short), -torch.inf)], dim=1)
        return Candidates(z, torch.cat([found.ids, torch.zeros(found.z.shape[0], short, dtype=torch.int64)], dim=1))

    best = more(partial.best)
    return replace(partial, best=best, ranked=best if partial.ranked is partial.best else more(partial.ranked))


def test_empty_and_impossible_parts_change_nothing() -> None:
    """A part all of whose logits are -inf has no weight, and its maximum is none."""
    head = random_head(50, 8)
    ruled_out = Head(torch.ones(20, 8), offset=torch.full((20,), -torch.inf))
    rows = HeadRows(random_rows(5, 8), head)
    request = Request(3, 50)
    own = tiled.scan(rows, 50, request)
    other = tiled.scan(HeadRows(rows.x, ruled_out), 20, request, first=50)
    for merged in (own.merge(other), other.merge(own)):
        found = conclude(merged, rows, head, request)
        assert_same(found, conclude(own, rows, head, request), tolerance=1e-12)


def test_screened_partials_do_not_merge() -> None:
    rows = HeadRows(random_rows(5, 8), random_head(50, 8))
    own = tiled.scan(rows, 50, Request(3, 50))
    zeros = torch.zeros(5, dtype=torch.float64)
    screened = replace(own, rough=Rough(zeros, zeros, None, zeros, torch.zeros(5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="merged where they are made"):
        own.merge(screened)


def test_a_bound_covers_the_worst_case() -> None:
    """Push every rough logit to its limit in the direction that hurts: the bound has to cover it."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 60, generator=generator, dtype=torch.float64) * 3
    limit = torch.rand(40, 60, generator=generator, dtype=torch.float64) * 0.05
    rough = torch.rand(40, 60, generator=generator) < 0.7
    limit[~rough] = 0.0
    top = z.amax(1)
    p = (z - top.unsqueeze(1)).exp()
    partial = Partial(
        top,
        p.sum(1),
        (p * (z - top.unsqueeze(1))).sum(1),
        Candidates(z[:, :1], torch.zeros(40, 1, dtype=torch.int64)),
        Candidates(z[:, :1], torch.zeros(40, 1, dtype=torch.int64)),
        rough=Rough(
            (p * limit).sum(1), (p * limit * (top.unsqueeze(1) - z)).sum(1), None, limit.amax(1), torch.zeros(40)
        ),
    )
    from logitlab.logits.partial import _bound

    lse = z.logsumexp(1)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    bound = _bound(partial, lse, entropy, Request(1, 60))
    only_lse = _bound(partial, lse, entropy, Request(1, 60, entropy=False))
    slope = -z.softmax(1) * (z.log_softmax(1) + entropy.unsqueeze(1))
    for direction in (torch.ones_like(z), -torch.ones_like(z), slope.sign(), -slope.sign()):
        moved = z + direction * limit
        new = -(moved.softmax(1) * moved.log_softmax(1)).sum(1)
        assert bool(((new - entropy).abs() <= bound).all())
        assert bool(((moved.logsumexp(1) - lse).abs() <= only_lse).all())
    assert bool((only_lse <= bound).all())
    assert float((bound / limit.amax(1)).max()) < 20  # and it is no excuse for anything
