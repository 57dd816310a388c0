"""The compiled scan: any way of cutting the work, every build of the kernel, screening and its bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.errors import LogitlabError
from logitlab.logits import Head, Statistics, compiled, native, statistics
from logitlab.logits.partial import BASE, Base, conclude
from logitlab.logits.statistics import Request
from tests.logits.common import NAMES, assert_same, both, random_head, random_rows


def bfloat16_products() -> bool:
    found = compiled.library()
    return found is not None and found.bfloat16


screens = pytest.mark.skipif(not bfloat16_products(), reason="this processor does not multiply bfloat16")


def scanned(
    head: Head,
    x: torch.Tensor,
    *,
    top_k: int = 4,
    targets: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    **how: Any,
) -> Statistics:
    """Statistics of [groups, positions, d] against the first group, with the work cut as ``how`` says."""
    groups, positions = x.shape[:2]
    columns = head.vocab_size if allowed is None else int(allowed.sum())
    asked = Request(top_k, columns, None if targets is None else targets.unsqueeze(0), allowed)
    base_rows = native.NativeRows(x[0], head)
    cut = {name: value for name, value in how.items() if name != "screened"}
    base = Base.of(base_rows, native.scan(base_rows, replace(asked.for_rows(1, positions), top_k=BASE), **cut))
    rows = native.NativeRows(x.reshape(-1, x.shape[-1]), head)
    place = torch.arange(positions).repeat(groups)
    request = asked.for_rows(groups, positions)
    found = conclude(native.scan(rows, request, base, place, **how), rows, head, request, base, place)
    return found.map(lambda v: v.reshape(groups, positions, *v.shape[1:]))


# -- how the work is cut -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tile=st.integers(1, 700),
    slices=st.integers(1, 9),
    groups=st.integers(1, 6),
    positions=st.integers(1, 70),
    width=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    filtered=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
)
def test_any_tile_and_any_split_gives_the_same(
    tile: int, slices: int, groups: int, positions: int, width: int, seed: int, filtered: bool, softcap: float | None
) -> None:
    head = random_head(601, width, seed, softcap=softcap)  # behind a cap, KL is summed column by column
    x = random_rows(groups, positions, width, seed=seed + 1, size=8 / width**0.5)
    targets = torch.tensor([0, 300, 600])
    allowed = torch.arange(601) % 3 != 1 if filtered else None
    exact = statistics(x, head, top_k=4, targets=targets, reference=x[0], allowed=allowed, backend="reference")
    found = scanned(head, x, targets=targets, allowed=allowed, tile=tile, slices=slices)
    assert_same(found, scanned(head, x, targets=targets, allowed=allowed), tolerance=1e-6)
    assert_same(found, exact)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits_of_one_cut(threads: int, softcap: float | None) -> None:
    """Each piece of work is summed by one thread in one order, so threads only change who does it.

    By default they also change the cut, and then sums are the same up to rounding.
    """
    head, x = random_head(3000, 48, softcap=softcap), random_rows(7, 33, 48)
    before = torch.get_num_threads()
    whole = scanned(head, x, targets=torch.tensor([5]), slices=4)
    default = statistics(x, head, targets=torch.tensor([5]), reference=x[0], top_k=4, backend="native")
    try:
        torch.set_num_threads(threads)
        found = scanned(head, x, targets=torch.tensor([5]), slices=4)
        default_found = statistics(x, head, targets=torch.tensor([5]), reference=x[0], top_k=4, backend="native")
    finally:
        torch.set_num_threads(before)
    for name in ("top_ids", *NAMES, "target_rank"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert_same(default_found, default, tolerance=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3, 63, 191, 192, 193, 287, 288, 289, 1000])
def test_widths_that_no_vector_divides(d: int) -> None:
    head, x = random_head(500, d, scale=1 / d**0.5), random_rows(2, 37, d, size=5)
    assert_same(*both("native", x, head, targets=torch.tensor([3]), reference=x[1]), tolerance=3e-6)


def test_a_head_whose_rows_are_part_of_longer_ones() -> None:
    whole = random_head(500, 40)
    x = random_rows(2, 5, 24)
    part = Head(whole.weight[:, 8:32])
    assert not part.weight.is_contiguous()
    assert_same(*both("native", x, part, targets=torch.tensor([3]), reference=x[1]), tolerance=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    most=st.integers(1, 90),
    panel=st.sampled_from([1, 4, 32]),
)
def test_a_plan_has_every_row_once(places: list[int], most: int, panel: int) -> None:
    place = np.array(places)
    plan = native.plan_of(len(places), place, panel, most)
    assert sorted(plan.order.tolist()) == list(range(len(places)))
    assert plan.blocks[0] == 0
    assert plan.blocks[-1] == len(places)
    counted: list[int] = []
    for b in range(len(plan.first)):
        rows = plan.order[plan.blocks[b] : plan.blocks[b + 1]]
        assert len(rows)
        first, count = int(plan.first[b]), int(plan.count[b])
        assert place[rows].min() >= first
        assert place[rows].max() < first + count
        if plan.counts[b]:
            counted += range(first, first + count)
    assert len(counted) == len(set(counted))  # each reference row's weights are summed once
    assert set(counted) >= set(places)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_any_order_find_their_reference(softcap: float | None) -> None:
    """Rows that are done again after screening come in no regular order."""
    head, x = random_head(800, 32, softcap=softcap), random_rows(5, 40, 32, size=2)
    rows = native.NativeRows(x[0], head)
    base = Base.of(rows, native.scan(rows, Request(BASE, 800)))
    some = torch.tensor([199, 3, 44, 41, 3, 160, 77, 0])
    flat = x.reshape(-1, 32)[some]
    place = some % 40
    chosen = native.NativeRows(flat, head)
    request = Request(3, 800)
    found = conclude(native.scan(chosen, request, base, place), chosen, head, request, base, place)
    exact = statistics(x, head, top_k=3, reference=x[0], backend="reference")
    assert exact.kl is not None
    torch.testing.assert_close(found.kl, exact.kl.reshape(-1)[some], atol=1e-6, rtol=0)


def test_the_last_group_is_not_worked_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It usually is the reference itself: its statistics come from the pass over the reference."""
    rows: list[int] = []
    original = native.scan

    def watched(given: native.NativeRows, *args: Any, **options: Any) -> Any:
        rows.append(given.x.shape[0])
        return original(given, *args, **options)

    monkeypatch.setattr(native, "scan", watched)
    head, x = random_head(300, 16), random_rows(4, 10, 16)
    assert_same(*both("native", x, head, targets=torch.tensor([7]), reference=x[-1]))
    assert rows == [10, 30]
    rows.clear()
    assert_same(*both("native", x, head, targets=torch.tensor([7]), reference=x[0] * 2))
    assert rows == [10, 40]
    rows.clear()
    assert_same(*both("native", x[:1], head, targets=torch.tensor([7]), reference=x[0]))
    assert rows == [10]


def test_many_rows_are_scanned_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = random_head(300, 16), random_rows(4, 30, 16)
    whole = statistics(x, head, targets=torch.tensor([7]), reference=x[-1], backend="native")
    for rows in (1, 7, 50):
        monkeypatch.setattr(native, "ROWS", rows)
        assert_same(statistics(x, head, targets=torch.tensor([7]), reference=x[-1], backend="native"), whole, 1e-6)


def test_no_memory_is_said_in_one_line() -> None:
    head = Head(torch.zeros(1, 1).expand(10, 2**40))
    x = torch.zeros(1, 1).expand(1, 2**40)
    rows = native.NativeRows.__new__(native.NativeRows)
    lib = compiled.library()
    assert lib is not None
    rows.__dict__.update(lib=lib, head=head, x=x, given=x, narrow=False, size=torch.ones(10), lost=torch.ones(10))
    rows.__dict__["bound"] = torch.zeros(1, 1, dtype=torch.float64)

    memory = native._Memory.__new__(native._Memory)
    memory.__dict__.update(
        _alive=[], lib=lib, job=compiled.Job(n=1, d=2**40, columns=10, x=1, w=1, ldw=2**40, threads=1)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_Memory", lambda *args: memory)
        with pytest.raises(LogitlabError, match="not enough memory to decode: free some, or read fewer positions"):
            native.scan(rows, Request(1, 10))


# -- builds of the kernel ----------------------------------------------------------------------


@pytest.fixture(params=[4, 8])
def other_build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """The kernel built with shorter vectors, as for processors without AVX-512."""
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path_factory.getbasetemp() / "builds"))
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, f"-DLOGITLAB_LANES={request.param}"))
    compiled._found.cache_clear()
    yield request.param
    compiled._found.cache_clear()


def test_shorter_vectors(other_build: int) -> None:
    lib = compiled.library()
    assert lib is not None
    assert lib.panel == 2 * other_build
    assert not lib.bfloat16
    for options in ({}, {"softcap": 5.0, "scale": 0.5}, {"bias": torch.linspace(-3, 3, 777)}):
        head, x = random_head(777, 45, **options), random_rows(3, 21, 45, size=3)
        assert_same(*both("native", x, head, top_k=6, targets=torch.tensor([7, 776]), reference=x[2]), tolerance=2e-6)
    half = Head(random_head(500, 33).weight.bfloat16())
    x = random_rows(3, 9, 33).bfloat16()
    assert_same(*both("native", x, half, targets=torch.tensor([7]), reference=x[2]))


def test_the_expected_row_with_shorter_vectors(other_build: int) -> None:
    generator = torch.Generator().manual_seed(11)
    for width, dtype in ((2 * other_build + 3, torch.float32), (1, torch.float16), (40, torch.bfloat16)):
        head = Head(torch.randn(311, width, generator=generator).to(dtype))
        rows = native.NativeRows(torch.randn(41, width, generator=generator), head)
        z = head.logits(rows.x.double(), dtype=torch.float64)
        for narrow in (False, True):  # there are no bfloat16 products here, so they are not used
            mean, lse = rows.expected(narrow)
            torch.testing.assert_close(mean.double(), z.softmax(-1) @ head.weight.double(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse, z.logsumexp(-1), atol=1e-5, rtol=1e-6)


def test_half_precision_with_shorter_vectors(other_build: int) -> None:
    """Every number there is, as rows of 2 whole vectors and a rest."""
    bits = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    d = 2 * other_build + 3
    head = Head(bits.where(torch.isfinite(bits), 0.0).unsqueeze(1).repeat(1, d).half())
    x = torch.zeros(1, d, d)
    x[0] = torch.eye(d) * 2.0**20
    torch.set_flush_denormal(True)
    try:
        ids = torch.tensor([[1, 513, 1023, 1024, 32_769, 60_000]]).repeat(d, 1)
        single = native.NativeRows(x[0], head).at_all(ids)
        s = statistics(x, head, targets=ids[0], backend="native")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(single, head.weight[ids[0], 0].double().mul(2.0**20).repeat(d, 1))
    exact = statistics(x, head, targets=ids[0], backend="reference")
    assert torch.equal(s.top_ids, exact.top_ids)
    assert s.target_rank is not None
    assert exact.target_rank is not None
    assert torch.equal(s.target_rank, exact.target_rank)


def test_no_number_is_made_of_none_with_shorter_vectors(other_build: int) -> None:
    x = random_rows(2, 40, 45)
    x[1, 7, 3] = torch.nan
    for softcap in (None, 5.0):
        found, exact = both(
            "native", x, random_head(777, 45, softcap=softcap), targets=torch.tensor([7]), reference=x[0]
        )
        assert bool(torch.isnan(found.logsumexp[1, 7]))
        assert int(torch.isnan(found.logsumexp).sum()) == 1
        assert_same(found, exact, equal_nan=True)


# -- how far a float32 logit can be off --------------------------------------------------------


def test_rounding_that_always_goes_the_same_way() -> None:
    """Every addend is lost beside the first: no random walk. Only the worst case covers that."""
    d = 200
    x, weight = torch.ones(1, 40, d), torch.zeros(3000, d)
    x[..., 0] = 65_536.0
    weight[0, 0], weight[0, 1:] = 1.0, 0.0038
    weight[1, 0], weight[1, 1] = 1.0, 0.5
    for precision in ("exact", "screened"):
        s = statistics(x, Head(weight), targets=torch.tensor([1]), backend="native", precision=precision)
        assert s.target_rank is not None
        assert s.target_rank.flatten().tolist() == [2] * 40
        assert s.top_ids[0, 0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("d", [1, 2, 40, 200, 287, 288, 1000, 4097])
def test_the_bound_covers_what_is_lost(d: int, narrow: bool) -> None:
    """Addends just below half of the first one's last digit, in the order in which they are summed."""
    dtype = torch.bfloat16 if narrow else torch.float32
    small = 0.0038 if not narrow else float(torch.tensor(0.0038).bfloat16())
    x, weight = torch.ones(33, d), torch.full((60, d), small)
    x[:, 0], weight[:, 0] = 65_536.0, 1.0
    rows = native.NativeRows(x.to(dtype), Head(weight.to(dtype)))
    partial = native.scan(rows, Request(5, 60))
    exact = rows.at_all(torch.zeros(33, 1, dtype=torch.int64))
    lost = (partial.max.double().unsqueeze(1) - exact).abs()
    assert bool((lost <= rows.bound).all())
    assert d < 40 or float(lost.max()) > float(rows.bound.max()) / 50  # the case is near the worst one


def test_ids_beyond_the_head_are_refused() -> None:
    """A part of a head has columns of its own; ids of the whole would be read from behind it."""
    rows = native.NativeRows(random_rows(3, 16), random_head(50, 16))
    for wrong in (50, -1):
        with pytest.raises(IndexError, match=f"column {wrong} is not in the head, which has columns 0 to 49"):
            rows.at_all(torch.tensor([[0, wrong]] * 3))
    with pytest.raises(IndexError, match="column 120 is not in the head"):
        native.scan(rows, Request(5, 50, torch.full((3, 1), 120)), first=100)


def test_norms_are_the_kernels_own() -> None:
    """They are rounded up, whatever PyTorch has measured of the same head before."""
    head = random_head(3000, 576)
    assert head.row_sizes.shape == (3000,)
    rows = native.NativeRows(random_rows(2, 576), head)
    assert bool((rows.size.double() >= head.weight.double().norm(dim=1)).all())
    assert torch.equal(rows.size, native.NativeRows(rows.x, random_head(3000, 576)).size)


def test_a_row_that_was_given_up_is_never_finished() -> None:
    """Whatever error is allowed: its numbers mean nothing."""
    head, x = random_head(300, 16), random_rows(20, 16)
    rows, request = native.NativeRows(x, head), Request(5, 300, precision="screened", max_error=torch.inf)
    found = conclude(native.scan(rows, request), rows, head, request)
    right = found.logsumexp.clone()
    found.bound = torch.full((20,), 0.5, dtype=torch.float64)
    for i, value in ((3, torch.inf), (7, torch.nan)):
        found.bound[i], found.logsumexp[i] = value, 99.0
    native._redo(found, rows, request, None, torch.arange(20))
    torch.testing.assert_close(found.logsumexp, right, atol=1e-9, rtol=0)
    assert found.bound.tolist() == [0.0 if i in (3, 7) else 0.5 for i in range(20)]


def test_screening_needs_bfloat16_products(other_build: int) -> None:
    """Elsewhere a screened request is done in full, which keeps its promise."""
    head, x = random_head(777, 45), random_rows(3, 21, 45, size=3)
    found, exact = both("native", x, head, targets=torch.tensor([7]), reference=x[2], precision="screened")
    assert_same(found, exact)
    assert found.bound is not None
    assert not bool(found.bound.any())


# -- bfloat16 ----------------------------------------------------------------------------------


@screens
@pytest.mark.parametrize("d", [2, 31, 64, 500])
def test_bfloat16_rows_and_heads_are_multiplied_as_they_are(d: int) -> None:
    """Their products are exact in float32, so this is as exact as float32 is, at the rate of bfloat16."""
    head = Head((random_head(900, d).weight / d**0.5).bfloat16())
    x = (random_rows(3, 40, d) * 4).bfloat16()
    assert native.NativeRows(x[0], head).narrow
    assert_same(*both("native", x, head, targets=torch.tensor([3, 899]), reference=x[2]), tolerance=3e-6)


@screens
def test_bfloat16_rows_of_a_float32_head_are_not_rounded() -> None:
    head = random_head(900, 64)
    x = random_rows(2, 5, 64).bfloat16()
    assert not native.NativeRows(x[0], head).narrow
    assert_same(*both("native", x, head, targets=torch.tensor([3]), reference=x[1]), tolerance=1e-5)


# -- screening ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen however few rows there are."""
    monkeypatch.setattr(native, "SCREENED_ROWS", 1)


def test_few_rows_are_not_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SCREENED_ROWS", 41)
    monkeypatch.setattr(native, "PATIENCE", 1.0)
    monkeypatch.setattr(native, "THETA_ENTROPY", 9.0)
    head, x = random_head(9000, 96), random_rows(1, 41, 96, size=0.3)
    few, many = (statistics(x[:, :n], head, precision="screened", max_error=9.0) for n in (40, 41))
    assert few.bound is not None
    assert many.bound is not None
    assert not bool(few.bound.any())
    assert bool(many.bound.any()) == bfloat16_products()


def assert_within_bound(found: Statistics, exact: Statistics, max_error: float = 1e-3) -> None:
    """Ids and ranks are exact; everything else is off by no more than the stated bound and what float32 is off by.

    An infinite bound marks a row that one pass has given up; only what has been done again is left in the end.
    """
    assert found.bound is not None
    assert bool((found.bound >= 0).all())
    assert float(found.bound.max()) <= max_error
    kept = torch.isfinite(found.bound)
    assert torch.equal(found.top_ids[kept], exact.top_ids[kept])
    if exact.target_rank is not None:
        assert found.target_rank is not None
        assert torch.equal(found.target_rank[kept], exact.target_rank[kept])
    for name in NAMES:
        a, b = getattr(found, name), getattr(exact, name)
        if b is not None:
            allowed = (found.bound if a.ndim == 2 else found.bound.unsqueeze(-1))[kept]
            gap = (a[kept] - b[kept]).abs()
            assert bool((gap <= allowed + 1e-5).all()), (name, float(gap.max()))


@screens
@pytest.mark.parametrize("size", [0.05, 0.5, 2.0, 8.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.25}, {"softcap": 4.0}, {"bias": torch.linspace(-2, 2, 9000)}, {"scale": -1.5}],
    ids=["plain", "scale", "cap", "bias", "negative"],
)
def test_a_screened_statistic_is_within_its_bound(size: float, options: dict[str, Any]) -> None:
    head, x = random_head(9000, 96, **options), random_rows(5, 50, 96, size=size)
    targets = torch.tensor([0, 4000, 8999])
    found, exact = both("native", x, head, top_k=10, targets=targets, reference=x[-1], precision="screened")
    assert_within_bound(found, exact)


@screens
@settings(max_examples=40, deadline=None)
@given(
    tile=st.integers(1, 700),
    slices=st.integers(1, 9),
    groups=st.integers(1, 5),
    positions=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    size=st.floats(0.01, 10),
    softcap=st.sampled_from([None, 5.0]),
)
def test_any_split_of_a_screened_pass(
    tile: int, slices: int, groups: int, positions: int, seed: int, size: float, softcap: float | None
) -> None:
    head = random_head(1500, 24, seed, softcap=softcap)
    x = random_rows(groups, positions, 24, seed=seed + 1, size=size)
    targets = torch.tensor([0, 300, 1499])
    exact = statistics(x, head, top_k=4, targets=targets, reference=x[0], backend="reference")
    found = scanned(head, x, targets=targets, screened=True, tile=tile, slices=slices)
    assert_within_bound(found, exact, max_error=torch.inf)


@screens
def test_the_bound_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screened sums do differ from exact ones, by less than is stated but not by nothing."""
    monkeypatch.setattr(native, "THETA_ENTROPY", 7.0)
    head, x = random_head(9000, 96), random_rows(1, 200, 96, size=0.6)
    found, exact = both("native", x, head, precision="screened", max_error=0.5)
    assert found.bound is not None
    assert found.entropy is not None
    assert exact.entropy is not None
    gap = (found.entropy - exact.entropy).abs()
    assert float(gap.max()) > 1e-5
    assert float(found.bound.max()) < 1000 * float(gap.max())


@screens
def test_rows_that_cannot_be_bounded_are_done_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat distribution has its mass in columns that stay rough: at 1e-9 nats nearly every row is done again."""
    monkeypatch.setattr(native, "PATIENCE", 1.0)
    monkeypatch.setattr(native, "THETA_ENTROPY", 9.0)
    head, x = random_head(9000, 96), random_rows(2, 60, 96, size=0.3)
    strict, exact = both("native", x, head, reference=x[1], precision="screened", max_error=1e-9)
    assert_within_bound(strict, exact, max_error=1e-9)
    loose = statistics(x, head, reference=x[1], precision="screened", max_error=10.0)
    assert strict.bound is not None
    assert loose.bound is not None
    assert int((strict.bound == 0).sum()) > 100
    assert int((loose.bound == 0).sum()) <= 60  # those of the reference itself
    assert_within_bound(loose, exact, max_error=10.0)


@screens
@pytest.mark.parametrize("slices", [1, 5])
def test_a_row_that_takes_too_much_is_given_up(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever part of the columns that shows, and however little weight that part has."""
    monkeypatch.setattr(native, "PATIENCE", 0.01)
    head = random_head(3000, 32)
    x = torch.cat([random_rows(30, 32, size=0.01), random_rows(30, 32, size=12)])
    rows, request = native.NativeRows(x, head), Request(5, 3000, torch.full((60, 1), 1500))
    partial = native.scan(rows, request, screened=True, slices=slices)
    assert partial.rough is not None
    given_up = torch.isinf(partial.rough.most)
    assert bool(given_up[:30].all())
    found = conclude(partial, rows, head, request)
    assert found.bound is not None
    assert torch.equal(torch.isinf(found.bound), given_up)
    whole, exact = both("native", x, head, targets=torch.tensor([1500]), precision="screened")
    assert_within_bound(whole, exact)


@screens
def test_screening_with_a_filter() -> None:
    head, x = random_head(5000, 64), random_rows(3, 40, 64)
    allowed = torch.arange(5000) % 7 == 1
    options = {"top_k": 6, "targets": torch.tensor([8, 5]), "allowed": allowed, "reference": x[0]}
    found, exact = both("native", x, head, precision="screened", **options)
    assert_within_bound(found, exact)


@screens
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_screening_narrow_heads(dtype: torch.dtype) -> None:
    """Of a bfloat16 head nothing is lost, so less of it has to be computed again."""
    wide = random_head(6000, 80)
    head = Head(wide.weight.to(dtype))
    x = random_rows(3, 40, 80)
    found, exact = both("native", x, head, targets=torch.tensor([8, 5]), reference=x[0], precision="screened")
    assert_within_bound(found, exact)
    if dtype == torch.bfloat16:
        rows = native.NativeRows(x.reshape(-1, 80), head)
        assert not bool(rows.lost.any())
        again = [
            native.scan(native.NativeRows(x.reshape(-1, 80), h), Request(5, 6000), screened=True) for h in (head, wide)
        ]
        assert again[0].rough is not None
        assert again[1].rough is not None
        assert int(again[0].rough.again.sum()) < int(again[1].rough.again.sum())


@screens
def test_columns_that_look_impossible_and_are_not() -> None:
    """Rounded to bfloat16 these have a logit of 0 and no share at all; their true logit is 124.5, and many they are."""
    weight = torch.empty(200_000, 2)
    weight[:, 0], weight[:, 1] = 1.0038, -8.0
    weight[:20, 0], weight[:20, 1] = 139 / 32_768, 0.0
    x, head = torch.tensor([32_768.0, 4096.0]).expand(1, 64, 2), Head(weight)
    exact = statistics(x[:, :1], head, entropy=False, backend="reference")
    rows, request = native.NativeRows(x[0], head), Request(5, 200_000, entropy=False, precision="screened")
    for slices in (1, 2):
        found = conclude(native.scan(rows, request, screened=True, slices=slices), rows, head, request)
        assert found.bound is not None
        gap = (found.logsumexp - exact.logsumexp[0]).abs()
        assert bool((gap <= found.bound.clamp_min(1e-5)).all())
    whole = statistics(x, head, entropy=False, precision="screened", backend="native")
    assert whole.bound is not None
    assert float(whole.bound.max()) <= 1e-3
    assert bool(((whole.logsumexp - exact.logsumexp).abs() <= whole.bound.clamp_min(1e-5)).all())
    assert torch.equal(whole.top_ids, exact.top_ids.expand_as(whole.top_ids))


@screens
@pytest.mark.parametrize("softcap", [None, 6.0], ids=["linear", "cap"])
@pytest.mark.parametrize(
    "case", ["ties", "equal rows", "ruled out", "zero rows", "many top", "repeated", "subnormal", "scaled bias", "NaN"]
)
def test_screening_what_is_out_of_the_way(case: str, softcap: float | None) -> None:
    weight, x = random_head(3000, 32).weight.clone(), random_rows(3, 40, 32)
    more: dict[str, Any] = {"softcap": softcap}
    options: dict[str, Any] = {"top_k": 6, "targets": torch.tensor([0, 1500, 2999])}
    if case == "ties":
        weight, x = weight.mul(2).round().clamp(-3, 3), x.mul(2).round()
    elif case == "equal rows":
        weight[100:300] = weight[100]
        weight[2990:] = weight[100]
        options["targets"] = torch.tensor([100, 250, 2999])
    elif case == "ruled out":
        more["offset"] = torch.zeros(3000).masked_fill(torch.arange(3000) % 3 == 0, -torch.inf)
    elif case == "zero rows":
        x[1, ::3] = 0.0
        weight[50:60] = 0.0
    elif case == "many top":
        options["top_k"] = 700
    elif case == "repeated":
        options["targets"] = torch.tensor([7, 7, 1500, 7])
    elif case == "subnormal":
        weight, x = (weight * 2.0**-20).half(), x * 2.0**20
    elif case == "scaled bias":
        more |= {"scale": 40.0, "bias": torch.linspace(-20, 20, 3000)}
        x = x / 40
    else:
        x[1, 3, 5] = torch.nan
    head = Head(weight, **more)
    found, exact = both("native", x, head, reference=x[0], precision="screened", **options)
    if case == "NaN":
        assert int(torch.isnan(found.logsumexp).sum()) == 1
        assert found.bound is not None
        assert torch.isfinite(found.bound).all()
    assert_within_bound(numbers(found), numbers(exact))
    cut = scanned(head, x, screened=True, tile=100, slices=3, **options)
    if case != "NaN":
        assert_within_bound(numbers(cut), numbers(exact), max_error=torch.inf)


def numbers(s: Statistics) -> Statistics:
    """With -inf and NaN as numbers, whose difference is one. Infinite bounds stay."""
    return s.map(lambda v: v.nan_to_num(nan=-1e9, neginf=-1e9, posinf=torch.inf) if v.is_floating_point() else v)


@screens
def test_outliers_in_a_row() -> None:
    """One large coordinate dominates what rounding takes away."""
    head, x = random_head(4000, 64), random_rows(1, 40, 64)
    x[..., 7] = 300.0
    found, exact = both("native", x, head, targets=torch.tensor([8]), precision="screened")
    assert_within_bound(found, exact)


@screens
def test_auto_takes_what_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = random_head(400, 16), random_rows(1, 64, 16)
    monkeypatch.setattr(native, "BLOCK_ROWS", 16)
    seen: list[bool] = []
    original = native.scan

    def watched(*args: Any, screened: bool = False, **options: Any) -> Any:
        seen.append(screened)
        return original(*args, screened=screened, **options)

    monkeypatch.setattr(native, "scan", watched)
    for _ in range(2):  # each precision is tried once
        statistics(x, head, precision="auto", backend="native")
    assert seen[0] is False
    assert True in seen
    pace = native._pace(head, Request(5, 400), None)
    assert set(pace.seconds) == {True, False}
    for faster in (True, False):
        pace.seconds = {faster: 0.0, not faster: 1.0}
        seen.clear()
        found = statistics(x, head, precision="auto", backend="native")
        assert seen[0] is faster
        assert found.bound is not None


def test_few_rows_measure_nothing() -> None:
    pace = native.Pace()
    pace.note(True, native.BLOCK_ROWS - 1, 1.0)
    assert pace.seconds == {}
    pace.note(False, native.BLOCK_ROWS, 2.0)
    pace.note(False, native.BLOCK_ROWS, 1.0)
    pace.note(False, native.BLOCK_ROWS, 3.0)
    assert pace.seconds == {False: 1.0 / native.BLOCK_ROWS}
    assert pace.screens("auto")  # the other has not been tried yet
    assert not pace.screens("exact")
    assert pace.screens("screened")


@screens
def test_real_rows_are_screened_within_a_thousandth(default_model: Any) -> None:
    """Every row of a real text at every layer, against float64."""
    from logitlab.models.capture import capture

    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    ids = default_model.tokenizer(text)["input_ids"][:24]
    states = capture(default_model, ids)
    x = states.stacked(states.sites)
    x = default_model.tail.prepare(x.reshape(-1, x.shape[-1])).reshape(len(states.sites), -1, default_model.width)
    options = {"top_k": 10, "targets": torch.tensor([7042]), "reference": x[-1]}
    found, exact = both("native", x, default_model.tail.source, precision="screened", **options)
    assert_within_bound(found, exact)


# -- changes of the head -----------------------------------------------------------------------


def test_a_changed_head_is_measured_again() -> None:
    head, x = random_head(300, 16), random_rows(1, 40, 16)
    first = native.NativeRows(x[0], head)
    before = float(first.bound.max())
    with torch.no_grad():
        head.weight.mul_(3.0)
    second = native.NativeRows(x[0], head)
    torch.testing.assert_close(second.size, 3 * first.size)
    assert float(second.bound.max()) > 2 * before
    torch.testing.assert_close(second.size, head.weight.double().norm(dim=1).float(), rtol=1e-5, atol=0)
    assert bool((second.size.double() >= head.weight.double().norm(dim=1)).all())
