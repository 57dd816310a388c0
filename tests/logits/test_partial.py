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
from logitlab.logits.partial import BASE, Base, Candidates, Partial, Rough, _bound, conclude
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
    order.shuffle(parts)
    merged = reduce(Partial.merge, parts)
    found = conclude(merged, whole, head, request, base, place)
    exact = statistics(x, head, top_k=4, targets=targets[0], allowed=allowed, reference=x[0], backend="reference")
    assert_same(found.map(lambda v: v.reshape(3, 7, *v.shape[1:])), exact, tolerance=3e-6)


def test_the_smaller_of_two_does_not_cut_the_larger() -> None:
    """Parts of few columns may have found little; whichever comes first, nothing is lost."""
    few = Candidates(torch.tensor([[5.0, 1.0]]), torch.tensor([[10, 11]]))
    many = Candidates(torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([[0, 1, 2]]))
    for merged in (few.merge(many), many.merge(few)):
        assert merged.ids.tolist() == [[10, 0, 1]]
        assert merged.z.tolist() == [[5.0, 4.0, 3.0]]


@pytest.mark.parametrize("kernel", [False, True])
def test_parts_of_one_column(kernel: bool) -> None:
    """Each has fewer columns than are wanted of the whole."""
    head, x = random_head(9, 8), random_rows(5, 8)
    request = Request(6, 9)
    place = torch.arange(5)
    parts: list[Partial] = []
    for column in range(9):
        local = part_of(head, column, column + 1)
        rows = ElsewhereNative(x, local, head) if kernel else Elsewhere(x, local, head)
        parts.append((by_kernel if kernel else by_tiles)(rows, request, None, place, column))
    found = conclude(reduce(Partial.merge, parts), HeadRows(x, head), head, request)
    exact = statistics(x, head, top_k=6, backend="reference")
    assert_same(found.map(lambda v: v.unsqueeze(0)), exact, tolerance=1e-6)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_part_without_a_distribution_takes_it_from_the_whole(value: float, kernel: bool) -> None:
    offset = torch.zeros(300)
    offset[120] = value
    head, x = random_head(300, 8, offset=offset), random_rows(5, 8)
    request = Request(3, 300)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        parts: list[Partial] = []
        for i in order:
            local = part_of(head, 100 * i, 100 * (i + 1))
            rows = ElsewhereNative(x, local, head) if kernel else Elsewhere(x, local, head)
            parts.append((by_kernel if kernel else by_tiles)(rows, request, None, torch.arange(5), 100 * i))
        found = conclude(reduce(Partial.merge, parts), HeadRows(x, head), head, request)
        assert bool(torch.isnan(found.logsumexp).all())
        assert found.entropy is not None
        assert bool(torch.isnan(found.entropy).all())
        assert found.top_ids.tolist() == [[0, 1, 2]] * 5


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


@pytest.mark.parametrize("largest", [0.05, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("spread", [0.3, 3.0, 8.0])
def test_a_bound_covers_the_worst_case(largest: float, share: float, spread: float) -> None:
    """Push every rough logit to its limit in the direction that hurts: the bound has to cover it."""
    generator = torch.Generator().manual_seed(0)
    n, columns = 60, 60
    z = torch.randn(n, columns, generator=generator, dtype=torch.float64) * spread
    limit = torch.rand(n, columns, generator=generator, dtype=torch.float64) * largest
    limit[::3] = largest
    rough = torch.rand(n, columns, generator=generator) < share
    limit[~rough] = 0.0
    top = z.amax(1)
    p = (z - top.unsqueeze(1)).exp()
    r = (torch.randn(n, columns, generator=generator, dtype=torch.float64) * spread).softmax(1)
    nothing = Candidates(z[:, :1], torch.zeros(n, 1, dtype=torch.int64))
    limits = Rough(
        (p * limit).sum(1),
        (p * limit * (top.unsqueeze(1) - z)).sum(1),
        (r * limit).sum(1),
        limit.amax(1),
        torch.zeros(n),
    )
    partial = Partial(top, p.sum(1), (p * (z - top.unsqueeze(1))).sum(1), nothing, nothing, rough=limits)
    lse = z.logsumexp(1)
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    only_lse = _bound(
        replace(partial, rough=replace(limits, cross=None)), lse, entropy, Request(1, columns, entropy=False)
    )
    with_entropy = _bound(replace(partial, rough=replace(limits, cross=None)), lse, entropy, Request(1, columns))
    with_kl = _bound(partial, lse, entropy, Request(1, columns, entropy=False))
    slope = -z.softmax(1) * (z.log_softmax(1) + entropy.unsqueeze(1))
    ones = torch.ones_like(z)
    pull = (z.softmax(1) - r).sign()
    for direction in (
        ones,
        -ones,
        slope.sign(),
        -slope.sign(),
        pull,
        -pull,
        *torch.randn(20, n, columns).sign().double(),
    ):
        for part in (0.25, 1.0):
            moved = z + direction * limit * part
            new = -(moved.softmax(1) * moved.log_softmax(1)).sum(1)
            assert bool(((new - entropy).abs() <= with_entropy).all())
            assert bool(((moved.logsumexp(1) - lse).abs() <= only_lse).all())
            gap = (r * (z.log_softmax(1) - moved.log_softmax(1))).sum(1)
            assert bool((gap.abs() <= with_kl).all())
    assert bool((only_lse <= with_entropy).all())
    assert bool((only_lse <= with_kl).all())
    if largest == 0.05:  # and it is no excuse for anything
        assert float((with_entropy / limit.amax(1).clamp_min(1e-3)).max()) < 30


def test_beyond_some_limit_there_is_no_bound() -> None:
    """Shares that are 0 in float32 could then be those of the likeliest columns."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    nothing = Candidates(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    most = torch.tensor([0.5, 8.5, torch.nan], dtype=torch.float64)
    partial = Partial(zero.float(), one, zero, nothing, nothing, rough=Rough(zero, zero, None, most, zero.long()))
    assert _bound(partial, zero, zero, Request(1, 60)).tolist() == [0.0, torch.inf, torch.inf]
