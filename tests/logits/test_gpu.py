"""The Triton kernel against the reference, and compiled for GPUs that are not here.

Where there is a GPU the kernel runs on it, elsewhere (or with TRITON_INTERPRET=1) in Triton's interpreter.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernel needs the package triton")

from triton.runtime.errors import OutOfResources

from logitlab.errors import InputError, KernelError
from logitlab.logits import Head, Statistics, choose, gpu, statistics
from logitlab.logits.partial import Partial, conclude
from logitlab.logits.statistics import Request
from tests.logits import common

DEVICE = torch.device("cpu" if gpu.interpreted() or not torch.cuda.is_available() else "cuda")


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def narrow_head(
    vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> Head:
    weight = common.random_head(vocabulary, width, seed).weight.to(dtype)
    return Head(there(weight), **{name: there(value) for name, value in options.items()})


def random_rows(*shape: int, seed: int = 1, size: float = 1.0) -> torch.Tensor:
    return there(common.random_rows(*shape, seed=seed, size=size))


def both(x: torch.Tensor, head: Head, **options: Any) -> tuple[Statistics, Statistics]:
    return common.both("triton", x, head, **options)


def assert_same(fast: Statistics, exact: Statistics, tolerance: float = 1e-5) -> None:
    """On a GPU to what is promised: a tensor core cuts off where a processor rounds."""
    common.assert_same(fast, exact, tolerance if DEVICE.type == "cpu" else 1e-5)


@pytest.fixture
def scanned_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows whenever the tiled backend scans."""
    found: list[int] = []
    scan = gpu._tiled.scan

    def counted(rows: Any, *given: Any, **named: Any) -> Partial:
        found.append(rows.bound.shape[0])
        return scan(rows, *given, **named)

    monkeypatch.setattr(gpu._tiled, "scan", counted)
    return found


# Sizes that no tile divides: tiles are 64 rows, 128 columns, a depth of 64.
@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("width", [1, 63, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_sizes(vocabulary: int, width: int, dtype: torch.dtype) -> None:
    head = narrow_head(vocabulary, width, dtype)
    x = random_rows(3, 23, width, size=4 / width**0.5)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    assert_same(*both(x, head, top_k=7, targets=targets, reference=x[-1]), tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_heads_own_dtype(dtype: torch.dtype) -> None:
    head, x = narrow_head(700, 40, dtype), random_rows(2, 70, 40).to(dtype)
    assert_same(*both(x, head, targets=torch.tensor([3]), reference=x[1]), tolerance=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0625},
        {"softcap": 5.0, "scale": 0.5},
        {"bias": torch.linspace(-3, 3, 900)},
        {"offset": torch.linspace(3, -3, 900), "softcap": 2.0},
    ],
    ids=["scale", "cap", "bias", "offset"],
)
def test_everything_after_the_head(options: dict[str, Any]) -> None:
    head, x = narrow_head(900, 40, **options), random_rows(2, 9, 40, size=2)
    assert_same(*both(x, head, targets=torch.tensor([7, 899]), reference=x[0]), tolerance=3e-6)


def test_columns_that_are_ruled_out() -> None:
    offset = torch.zeros(300, device=DEVICE)
    offset[5:] = -torch.inf
    head, x = Head(narrow_head(300, 16).weight, offset=offset), random_rows(2, 4, 16)
    found = statistics(x, head, top_k=3, targets=torch.tensor([2]), reference=x[0], backend="triton")
    inside = Head(head.weight[:5])
    exact = statistics(x, inside, top_k=3, targets=torch.tensor([2]), reference=x[0], backend="reference")
    assert_same(found, exact, tolerance=1e-6)
    nothing = Head(head.weight, offset=torch.full((300,), -torch.inf, device=DEVICE))
    empty = statistics(x, nothing, backend="triton")
    assert bool((empty.logsumexp == -torch.inf).all())


def test_ranks_of_what_is_ruled_out(scanned_again: list[int]) -> None:
    """All of -inf tie; what is filtered does not count."""
    offset = torch.zeros(300)
    offset[5:200] = -torch.inf
    head, x = narrow_head(300, 16, offset=offset), random_rows(2, 4, 16)
    for filtered in ({}, {"allowed": torch.arange(300, device=DEVICE) % 2 == 0}):
        found, exact = both(x, head, top_k=3, targets=torch.tensor([6, 199, 250]), **filtered)
        assert found.target_rank is not None
        assert exact.target_rank is not None
        assert torch.equal(found.target_rank, exact.target_rank)
    assert scanned_again == []


def test_parts_of_fewer_columns_than_are_kept() -> None:
    head, x = narrow_head(30, 16), random_rows(5, 16)
    request = Request(12, 30)
    parts = [gpu.scan(gpu._Rows(x, Head(head.weight[i : i + 3])), request, first=i) for i in range(0, 30, 3)]
    rows = gpu._Rows(x, head)
    found = conclude(functools.reduce(Partial.merge, parts), rows, head, request)
    exact = statistics(x, head, top_k=12, backend="reference")
    assert_same(found.map(lambda v: v.unsqueeze(0)), exact, tolerance=2e-6)


def test_ties_go_by_id() -> None:
    weight = torch.zeros(500, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[[7, 30, 499], 0] = 1.0
    x = torch.ones(1, 3, 8, device=DEVICE)
    found, exact = both(x, Head(weight), top_k=6, targets=torch.tensor([30, 499, 0, 498]))
    assert found.top_ids[0, 0].tolist() == [7, 30, 499, 0, 1, 2]
    assert found.target_rank is not None
    assert found.target_rank[0, 0].tolist() == [2, 3, 4, 500]
    assert_same(found, exact)


def test_many_equal_rows_of_a_head() -> None:
    weight = narrow_head(600, 24).weight.clone()
    weight[100:250] = weight[100]
    x = weight[100].float().expand(1, 3, 24) + random_rows(1, 3, 24, size=0.1)
    assert_same(*both(x, Head(weight), top_k=20, targets=torch.tensor([100, 200, 599])))


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_extreme_logits(z: float) -> None:
    weight = torch.ones(300, 1, device=DEVICE).bfloat16()
    head = Head(weight, offset=there(torch.zeros(300).index_fill(0, torch.tensor([9]), 1e4)))
    x = torch.full((1, 2, 1), z, device=DEVICE)
    found = statistics(x, Head(weight), reference=x[0], backend="triton")
    assert found.entropy is not None
    assert found.entropy.flatten().tolist() == pytest.approx([torch.tensor(300.0).log().item()] * 2, abs=1e-6)
    hot = statistics(x, head, top_k=1, backend="triton")
    assert hot.top_ids.flatten().tolist() == [9, 9]
    assert hot.entropy is not None
    assert hot.entropy.abs().max() < 1e-6


def test_filter() -> None:
    head, x = narrow_head(700, 24), random_rows(2, 5, 24)
    allowed = torch.arange(700, device=DEVICE) % 7 == 1
    options = {"top_k": 5, "targets": torch.tensor([8, 5]), "allowed": allowed, "reference": x[1]}
    assert_same(*both(x, head, **options), tolerance=2e-6)


def test_targets_for_each_position() -> None:
    head, x = narrow_head(300, 16), random_rows(2, 4, 16)
    targets = torch.tensor([[1, 2], [299, 0], [7, 7], [5, 6]])
    assert_same(*both(x, head, targets=targets, reference=x[1]), tolerance=2e-6)


def test_more_candidates_than_a_program_holds() -> None:
    head, x = narrow_head(300, 16), random_rows(1, 3, 16)
    assert_same(*both(x, head, top_k=gpu.MOST_CANDIDATES))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([16, 32, 64]),
    columns=st.sampled_from([16, 64, 128]),
    depth=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 7),
    n=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_any_tile_and_any_split(rows: int, columns: int, depth: int, splits: int, n: int, seed: int) -> None:
    head = narrow_head(401, 24, seed=seed)
    x = random_rows(n, 24, seed=seed + 1, size=2)
    request = Request(4, 401, torch.tensor([[0, 200, 400]], device=DEVICE).expand(n, 3))
    given_rows = gpu._Rows(x, head)

    def made(**how: Any) -> Partial:
        return gpu.scan(given_rows, request, **how)

    found = conclude(made(tile=gpu.Tile(rows, columns, depth), splits=splits), given_rows, head, request)
    exact = statistics(x, head, top_k=4, targets=torch.tensor([0, 200, 400]), backend="reference")
    assert_same(found.map(lambda v: v.unsqueeze(0)), exact, tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_hold_every_bit(dtype: torch.dtype) -> None:
    x = common.random_rows(200, 33) * torch.logspace(-20, 20, 200).unsqueeze(1)
    x[:, 3] *= 1e-3  # small beside its row, where float16 has few bits left
    pieces, factor, step = gpu.pieces_of(x, dtype)
    assert pieces.dtype == dtype
    assert bool(torch.isfinite(pieces).all())
    back = sum(p.double() * step**i for i, p in enumerate(pieces)) * factor.double().unsqueeze(1)
    size = x.double().abs().amax(1, keepdim=True)
    assert float(((back - x.double()).abs() / size).max()) < 2.0**-24
    own, _, _ = gpu.pieces_of(x.clamp(-1e4, 1e4).to(dtype), dtype)
    assert own.shape[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 513])
def test_logits_of_chosen_columns(width: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"bias": torch.linspace(-1, 1, 90), "offset": torch.linspace(2, 0, 90)}
    options |= {"softcap": 3.0, "scale": 0.5}
    generator = torch.Generator().manual_seed(2)
    rows, ids = (torch.randint(0, most, (37,), generator=generator).to(DEVICE) for most in (8, 90))
    wide = random_rows(8, 2 * width)
    for chosen in ({}, options):
        head = narrow_head(90, width, dtype, **chosen)
        for x in (wide[:, :width], wide[:, ::2], wide[:, :width].to(dtype)):
            exact = head.logits(x.double(), dtype=torch.float64)[rows, ids]
            torch.testing.assert_close(gpu.logits_at(x, head, rows, ids), exact, atol=1e-12, rtol=1e-12)
    same = torch.zeros_like(ids)
    head = Head(head.weight[:1].expand(90, width).contiguous())
    assert len(gpu.logits_at(wide[:, :width], head, same, ids).unique()) == 1  # ties stay ties


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize(("dtype", "given"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_mean_of_the_heads_rows(
    cap: float | None, dtype: torch.dtype, given: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several blocks of columns, with some left out; on a processor too, where another way is the usual one."""
    monkeypatch.setattr(gpu, "MEAN_COLUMNS", 300)
    vectors: dict[str, Any] = {"bias": torch.linspace(-1, 1, 700), "offset": torch.linspace(1, 0, 700)}
    head = narrow_head(700, 40, dtype, scale=0.7, softcap=cap, **vectors)
    x = random_rows(23, 40, size=0.5).to(given)
    z = head.logits(x.double(), dtype=torch.float64)
    lse = z.logsumexp(-1)
    ids = torch.arange(23, device=DEVICE)[:, None] * 30 + torch.arange(3, device=DEVICE)
    weights = (z - lse.float().double()[:, None]).exp().scatter(1, ids, 0.0)
    rows = gpu._Rows(x, head)
    for found in (rows.mean_row(lse, ids), rows.weighed(lse, ids)) if rows.narrow else (rows.mean_row(lse, ids),):
        torch.testing.assert_close(found[0], weights @ head.weight.double(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found[1], weights.sum(1), atol=1e-6, rtol=1e-6)
    if rows.narrow:
        x[3] = torch.nan
        mean, mass = gpu._Rows(x, head).weighed(lse, ids)
        bad = torch.arange(23, device=DEVICE) == 3
        assert torch.equal(mean.isnan().any(1), bad)
        assert torch.equal(mass.isnan(), bad)


@pytest.mark.parametrize(("capability", "large"), [((8, 0), False), ((9, 0), True), ((10, 0), False)])
def test_tiles_by_gpu_and_request(capability: tuple[int, int], large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_capability", functools.partial(_given, capability))
    head, targets = narrow_head(30, 4), torch.zeros(100, 2, dtype=torch.int64)
    plain = Request(5, 30)
    assert gpu.tile_for(head, 100, plain, None) == (gpu.HOPPER if large else gpu.TILE)
    assert gpu.tile_for(head, 100, plain.with_targets(targets[:, :0]), None) == (gpu.HOPPER if large else gpu.TILE)
    assert gpu.tile_for(head, 100, plain.with_targets(targets), None) == (gpu.HOPPER_TARGETS if large else gpu.TILE)
    for n, request in ((64, plain), (100, replace(plain, allowed=targets[:30, 0] == 0)), (100, Request(40, 50))):
        assert gpu.tile_for(head, n, request, None) == gpu.TILE


@pytest.mark.parametrize("tile", [gpu.HOPPER, gpu.HOPPER_TARGETS])
def test_larger_tiles(tile: gpu.Tile) -> None:
    head, x = narrow_head(1100, 70), random_rows(140, 70, size=0.5).bfloat16()
    ids = torch.tensor([0, 600, 1099]) if tile is gpu.HOPPER_TARGETS else None
    request = Request(21, 1100, None if ids is None else ids.to(DEVICE).expand(140, 3))
    rows = gpu._Rows(x, head)
    found = conclude(gpu.scan(rows, request, tile=tile, splits=2), rows, head, request)
    exact = statistics(x, head, top_k=21, targets=ids, backend="reference")
    assert_same(found.map(lambda v: v.unsqueeze(0)), exact, tolerance=2e-6)


def test_parts_are_cut_so_that_a_gpu_is_busy() -> None:
    for programs, tiles in ((1, 1002), (16, 501), (33, 384), (64, 1002), (132, 500), (200, 10), (1, 1), (5, 7)):
        parts = gpu._parts(programs, tiles, 132)
        assert 1 <= parts <= max(1, tiles // 8)
        longest = -(-programs * parts // 132) * -(-tiles // parts)
        assert longest * 132 <= 1.6 * max(programs * tiles, 132 * 8) + 132 * programs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filter_cap_and_divergence_together(dtype: torch.dtype) -> None:
    head = narrow_head(600, 24, dtype, softcap=4.0, scale=0.5, bias=torch.linspace(-1, 1, 600))
    x, allowed = random_rows(3, 30, 24, size=2), torch.arange(600, device=DEVICE) % 3 != 1
    options = {"top_k": 6, "targets": torch.tensor([3, 599]), "allowed": allowed, "reference": x[2]}
    assert_same(*both(x, head, **options), tolerance=3e-6)


# -- ranks -------------------------------------------------------------------------------------


def test_rows_are_not_scanned_again_for_their_own_targets(
    scanned_again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    near: list[int] = []
    settle = gpu._settle

    def noted(before: torch.Tensor, count: torch.Tensor, *given: Any) -> None:
        near.append(int(count.sum()))
        settle(before, count, *given)

    monkeypatch.setattr(gpu, "_settle", noted)
    x = random_rows(2, 50, 16)
    assert_same(*both(x, narrow_head(700, 16), targets=torch.tensor([3, 350, 699])), tolerance=2e-6)
    assert scanned_again == []
    assert near
    assert sum(near) <= 10  # of 300 targets, each of which is close to itself


def test_columns_too_close_to_call_are_settled_one_by_one(scanned_again: list[int]) -> None:
    """Equal columns, and columns apart by less than float32 sums can tell, on both sides of a target."""
    weight, steps = narrow_head(500, 24).weight.clone(), there(torch.zeros(500))
    weight[100:140] = weight[100]
    steps[110:130] = torch.arange(20, device=DEVICE) % 5 * 2.0**-22 - 2.0**-21
    head, x = Head(weight, offset=steps), weight[100].float() + random_rows(1, 6, 24, size=0.1)
    targets = torch.tensor([100, 112, 120, 139, 499])
    assert_same(*both(x, head, top_k=45, targets=targets), tolerance=2e-6)
    assert_same(*both(x, head, targets=targets, allowed=torch.arange(500, device=DEVICE) % 2 == 0), tolerance=2e-6)
    assert scanned_again == []


def test_a_row_with_too_many_close_columns_is_scanned_again(
    scanned_again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = gpu.CLOSE[0]
    weight = narrow_head(300, 24).weight.clone()
    weight[100 : 101 + 2 * least] = weight[100]
    x = random_rows(1, 6, 24)
    x[:, 2:] *= 0.5
    assert_same(*both(x, Head(weight), targets=torch.tensor([100, 170, 5])), tolerance=2e-6)
    assert scanned_again == []  # of few rows many columns are listed
    monkeypatch.setattr(gpu, "CLOSE_VALUES", 0)
    assert_same(*both(x, Head(weight), targets=torch.tensor([100, 170, 5])), tolerance=2e-6)
    assert sum(scanned_again) == 6


def test_one_kernel_for_several_numbers_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[int] = set()
    kernel = gpu.scan_kernel

    class Noted:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def run(*given: Any, **constants: Any) -> None:
                made.add(constants["TARGETS"])
                kernel[grid](*given, **constants)

            return run

    monkeypatch.setattr(gpu, "scan_kernel", Noted())
    head, x = narrow_head(200, 16), random_rows(1, 3, 16)
    for m in (5, 6, 8):
        assert_same(*both(x, head, targets=torch.arange(m) * 20), tolerance=2e-6)
    assert made == {8}
    made.clear()
    assert_same(*both(x, head, targets=torch.arange(gpu.MOST_TARGETS + 1)), tolerance=2e-6)
    assert made == set()  # PyTorch alone
    none = gpu.scan(gpu._Rows(x[0], head), Request(4, 200, torch.empty(3, 0, dtype=torch.int64)))
    assert none.before is not None
    assert none.before.shape == (3, 0)


# -- what is given -----------------------------------------------------------------------------


def test_rows_and_vectors_that_do_not_lie_together() -> None:
    big = there(common.random_rows(1, 5, 32).bfloat16())
    head = narrow_head(300, 16)
    assert_same(*both(big[..., :16], head, targets=torch.tensor([7]), reference=big[0, :, :16]), tolerance=2e-6)
    assert_same(*both(big[..., ::2], head, targets=torch.tensor([7])), tolerance=2e-6)
    both_vectors = random_rows(300, 2, seed=5, size=3)
    strided = replace(head, bias=both_vectors[:, 0], offset=both_vectors[:, 1])
    allowed = (torch.arange(600, device=DEVICE) % 3 > 0)[::2]
    x = random_rows(1, 5, 16)
    assert_same(*both(x, strided, targets=torch.tensor([7]), allowed=allowed), tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in the interpreter
def test_what_is_not_a_number_stays_so(dtype: torch.dtype, value: float) -> None:
    head, x = narrow_head(300, 16, torch.float16 if dtype == torch.float16 else torch.bfloat16), random_rows(2, 4, 16)
    x[0, 1, 3] = value  # 3e38 times a weight is more than float32 holds
    x = x.to(dtype)
    found, exact = both(x, head, targets=torch.tensor([7, 250]), reference=x[1])
    bad = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    bad[0, 1] = True
    _assert_bad(found, exact, bad)
    fine = [s.map(lambda v: v[~bad].unsqueeze(0)) for s in (found, exact)]
    assert_same(fine[0], fine[1], tolerance=2e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["linear", "cap"])
def test_one_column_that_is_not_a_number(options: dict[str, Any]) -> None:
    bias = torch.zeros(300)
    bias[130] = torch.nan
    x, allowed = random_rows(2, 4, 16), torch.arange(300, device=DEVICE) != 130
    for filtered in ({}, {"allowed": allowed}):
        head = narrow_head(300, 16, bias=bias, **options)
        found, exact = both(x, head, targets=torch.tensor([7, 130]), reference=x[1], **filtered)
        _assert_bad(found, exact, torch.ones(2, 4, dtype=torch.bool, device=DEVICE))


def test_a_reference_that_is_not_a_number() -> None:
    head, x = narrow_head(300, 16), random_rows(2, 4, 16)
    against = x[1].clone()
    against[2, 0] = torch.nan
    found = statistics(x, head, reference=against, backend="triton")
    assert found.kl is not None
    assert found.kl.isnan().nonzero().tolist() == [[0, 2], [1, 2]]
    assert not bool(found.logsumexp.isnan().any())


def _assert_bad(found: Statistics, exact: Statistics, bad: torch.Tensor) -> None:
    """Numbers of these rows are NaN, and no others; ids and ranks are those of the reference everywhere."""
    for name in common.NAMES:
        value = getattr(found, name)
        expected = bad if value.ndim == 2 else bad.unsqueeze(2).expand_as(value)
        assert torch.equal(value.isnan(), expected), name
    assert torch.equal(found.top_ids, exact.top_ids)
    assert found.target_rank is not None
    assert exact.target_rank is not None
    assert torch.equal(found.target_rank, exact.target_rank)


# -- where it runs -----------------------------------------------------------------------------


def _given(capability: tuple[int, int], device: torch.device) -> tuple[int, int]:
    return capability


class Failing:
    """A kernel that does not fit."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*given: Any, **constants: Any) -> None:
            raise OutOfResources(200_000, 101_376, "shared memory")

        return run


def test_it_is_launched_on_the_heads_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    @contextmanager
    def guard(device: torch.device) -> Generator[None]:
        asked.append(device)
        yield
        asked.append("left")

    class Noted:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def run(*given: Any, **constants: Any) -> None:
                asked.append("launched")

            return run

    with monkeypatch.context() as patched:  # PyTorch itself asks for that class
        patched.setattr(torch.cuda, "device", guard)
        with gpu._on(torch.device("cuda:1")):
            asked.append("inside")
    assert asked == [torch.device("cuda:1"), "inside", "left"]
    with gpu._on(torch.device("cpu")):
        pass
    asked.clear()
    monkeypatch.setattr(gpu, "_on", guard)
    monkeypatch.setattr(gpu, "scan_kernel", Noted())
    head = narrow_head(300, 16)
    gpu.scan(gpu._Rows(random_rows(3, 16), head), Request(4, 300))
    assert asked == [head.weight.device, "launched", "left"]


SWITCH = """
import importlib, os, sys
import torch
import tests.conftest
for there, given in ((False, None), (True, None), (True, "1"), (False, "0")):
    os.environ.pop("TRITON_INTERPRET", None)
    if given is not None:
        os.environ["TRITON_INTERPRET"] = given
    torch.cuda.is_available = lambda: there
    importlib.reload(tests.conftest)
    print(os.environ.get("TRITON_INTERPRET"))
"""


def test_the_tests_run_on_a_gpu_where_there_is_one() -> None:
    """The interpreter is switched on where there is none, and where it is asked for."""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", SWITCH], capture_output=True, text=True, check=False)
    assert out.stdout.split() == ["1", "None", "1", "0"], out.stderr


def test_what_the_kernel_cannot_take() -> None:
    assert choose.why_not("triton", narrow_head(10, 4)) is None
    wide = narrow_head(10, 4, torch.float32)
    assert choose.why_not("triton", wide) == "its head is in float32; the kernel takes bfloat16 and float16"
    other = Head(narrow_head(10, 4).weight.T.contiguous().T)
    assert choose.why_not("triton", other) == "its head's rows do not lie together"
    # a processor has its own
    assert choose.choose("auto", narrow_head(10, 4)) == ("native" if DEVICE.type == "cpu" else "triton")


@pytest.mark.parametrize(
    ("capability", "dtype", "works"),
    [
        ((7, 0), torch.float16, False),
        ((7, 5), torch.float16, True),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
    ],
)
def test_gpus_that_are_too_old(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, works: bool
) -> None:
    monkeypatch.setattr(gpu, "_capability", functools.partial(_given, capability))
    monkeypatch.setattr(gpu, "_tried", {})
    why = choose.why_not("triton", narrow_head(10, 4, dtype))  # where it may work it is tried
    assert (why is None) == works
    if why is not None:
        assert f"compute capability {capability[0]}.{capability[1]}" in why
    assert len(gpu._tried) == works


def test_it_is_tried_with_all_that_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    kernel = gpu.scan_kernel

    class Noted:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def run(*given: Any, **constants: Any) -> None:
                asked.update(constants)
                kernel[grid](*given, **constants)

            return run

    monkeypatch.setattr(gpu, "scan_kernel", Noted())
    vector = torch.linspace(-1, 1, 700)
    gpu._try(narrow_head(700, 16, bias=vector, offset=vector, softcap=3.0))
    flags = [name for name in ("BIAS", "OFFSET", "CAP", "FILTER", "KL") if asked[name]]
    assert flags == ["BIAS", "OFFSET", "CAP", "FILTER", "KL"]
    assert (asked["TARGETS"], asked["KEEP_PADDED"], asked["RANKED_PADDED"]) == (16, 64, 64)


def test_auto_does_without_a_kernel_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_capability", functools.partial(_given, (8, 6)))
    monkeypatch.setattr(gpu, "_tried", {})
    monkeypatch.setattr(gpu, "scan_kernel", Failing())
    head = Head(torch.empty(300, 16, dtype=torch.bfloat16, device="meta"))  # as on a GPU: not on a processor
    with caplog.at_level(logging.WARNING, logger="logitlab"):
        assert [choose.choose("auto", head) for _ in range(3)] == ["tiled"] * 3
        assert len(caplog.records) == 1
        assert "shared memory" in caplog.text
        with pytest.raises(InputError, match=r"does not run on its GPU .*shared memory.*use backend='auto'"):
            choose.choose("triton", head)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_that_fails_later_says_so_in_one_sentence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_capability", functools.partial(_given, (8, 6)))
    monkeypatch.setattr(gpu, "_tried", {})
    head, x = narrow_head(300, 16), random_rows(1, 3, 16)
    assert choose.why_not("triton", head) is None
    monkeypatch.setattr(gpu, "scan_kernel", Failing())
    if backend == "auto":
        monkeypatch.setattr("logitlab.logits.choose.choose", lambda *_: "triton")
        found = statistics(x, head, backend=backend)
        monkeypatch.undo()
        torch.testing.assert_close(found.logsumexp, statistics(x, head, backend="tiled").logsumexp)
        return
    with pytest.raises(KernelError, match=r"^the Triton kernel does not run on .*shared memory"):
        statistics(x, head, backend="triton")
    assert "does not run on its GPU" in str(choose.why_not("triton", head))  # so auto does without from then on


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from logitlab.logits import gpu
from logitlab.logits.gpu_scan import scan_kernel

architecture, dtype, pieces, extras = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "all"
TILE = getattr(gpu, sys.argv[5])
lean = TILE is not gpu.TILE
keep = 32 if lean else 64 if extras else 16
constants = dict(
    PIECES=pieces, BIAS=extras, OFFSET=extras, CAP=extras, FILTER=extras and not lean, KL=extras and not lean,
    TARGETS=16 if extras and TILE is not gpu.HOPPER else 0, KEEP=keep, KEEP_PADDED=keep,
    RANKED=64 if extras and not lean else 0, RANKED_PADDED=64 if extras and not lean else 1,
    ROWS=TILE.rows, COLUMNS=TILE.columns, DEPTH=TILE.depth, WIDEN=False,
)
types = dict.fromkeys(scan_kernel.arg_names, "i32")
types |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(["xs", "w"], "*" + dtype)
floats = ["factor", "bias", "offset", "low", "high", "ref_z", "ref_w", "out_max", "out_best_z", "out_ranked_z"]
types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(["out_sum", "out_moment", "out_cross"], "*fp64")
types |= dict.fromkeys(["place", "out_best_id", "out_ranked_id", "out_above", "out_near"], "*i32")
types |= dict.fromkeys(["targets", "out_close"], "*i32")
types |= {"allowed": "*i8"} | dict.fromkeys(["slope", "cap", "step"], "fp32")
even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(scan_kernel.arg_names)
        if types[name].startswith("*") or name in ("d", "size", "width", "stride")}
made = triton.compile(
    ASTSource(fn=scan_kernel, signature=types, constexprs=constants, attrs=even),
    target=GPUTarget("cuda", architecture, 32),
    options=dict(num_warps=TILE.warps, num_stages=TILE.stages, enable_fp_fusion=True),
)
text = made.asm["ptx"]
found = "wgmma" if "wgmma.mma_async" in text else "mma" if "mma.sync" in text else "nothing"
print(found, made.metadata.shared)
"""


@pytest.mark.parametrize(
    ("architecture", "dtype", "pieces", "extras", "tile", "instruction", "kib"),
    [
        (75, "fp16", 3, "all", "TILE", "nothing", 64),  # Triton makes no tensor core instructions for Turing
        (80, "bf16", 1, "none", "TILE", "mma", 99),
        (80, "fp16", 3, "all", "TILE", "mma", 99),
        (86, "bf16", 3, "all", "TILE", "mma", 99),
        (89, "fp16", 3, "all", "TILE", "mma", 99),
        (90, "bf16", 1, "none", "TILE", "wgmma", 99),
        (90, "fp16", 3, "all", "TILE", "wgmma", 99),
        (90, "bf16", 1, "none", "HOPPER", "wgmma", 227),
        (90, "bf16", 3, "all", "HOPPER", "wgmma", 227),
        (90, "bf16", 1, "none", "HOPPER_TARGETS", "wgmma", 227),
        (90, "fp16", 3, "all", "HOPPER_TARGETS", "wgmma", 227),
        (120, "bf16", 3, "all", "TILE", "mma", 99),
    ],
)
def test_it_compiles_for_gpus(
    architecture: int, dtype: str, pieces: int, extras: str, tile: str, instruction: str, kib: int
) -> None:
    """Without a GPU: to machine code that multiplies on tensor cores and whose tiles fit into KiB of shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(architecture), dtype, str(pieces), extras, tile],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    found, shared = out.stdout.split()[-2:]
    assert found == instruction
    assert int(shared) <= kib * 1024
