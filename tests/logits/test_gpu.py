"""The Triton kernel: in its interpreter against the reference, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton kernel needs the package triton")

from logitlab.logits import Head, choose, gpu, statistics
from logitlab.logits.partial import Partial, conclude
from logitlab.logits.statistics import Request
from tests.logits.common import assert_same, both, random_head, random_rows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the kernel itself is tested, by benchmarks/gpu.py"
)


def narrow_head(
    vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> Head:
    return Head(random_head(vocabulary, width, seed).weight.to(dtype), **options)


# Sizes that no tile divides: tiles are 64 rows, 128 columns, a depth of 64.
@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("width", [1, 63, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_sizes(vocabulary: int, width: int, dtype: torch.dtype) -> None:
    head = narrow_head(vocabulary, width, dtype)
    x = random_rows(3, 23, width, size=4 / width**0.5)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    assert_same(*both("triton", x, head, top_k=7, targets=targets, reference=x[-1]), tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_heads_own_dtype(dtype: torch.dtype) -> None:
    head, x = narrow_head(700, 40, dtype), random_rows(2, 70, 40).to(dtype)
    assert_same(*both("triton", x, head, targets=torch.tensor([3]), reference=x[1]), tolerance=2e-6)


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
    assert_same(*both("triton", x, head, targets=torch.tensor([7, 899]), reference=x[0]), tolerance=3e-6)


def test_columns_that_are_ruled_out() -> None:
    offset = torch.zeros(300)
    offset[5:] = -torch.inf
    head, x = Head(narrow_head(300, 16).weight, offset=offset), random_rows(2, 4, 16)
    found = statistics(x, head, top_k=3, targets=torch.tensor([2]), reference=x[0], backend="triton")
    inside = Head(head.weight[:5])
    exact = statistics(x, inside, top_k=3, targets=torch.tensor([2]), reference=x[0], backend="reference")
    assert_same(found, exact, tolerance=1e-6)
    nothing = Head(head.weight, offset=torch.full((300,), -torch.inf))
    empty = statistics(x, nothing, backend="triton")
    assert bool((empty.logsumexp == -torch.inf).all())


def test_ties_go_by_id() -> None:
    weight = torch.zeros(500, 8, dtype=torch.bfloat16)
    weight[[7, 30, 499], 0] = 1.0
    x = torch.ones(1, 3, 8)
    found, exact = both("triton", x, Head(weight), top_k=6, targets=torch.tensor([30, 499, 0, 498]))
    assert found.top_ids[0, 0].tolist() == [7, 30, 499, 0, 1, 2]
    assert found.target_rank is not None
    assert found.target_rank[0, 0].tolist() == [2, 3, 4, 500]
    assert_same(found, exact)


def test_many_equal_rows_of_a_head() -> None:
    weight = narrow_head(600, 24).weight.clone()
    weight[100:250] = weight[100]
    x = weight[100].float().expand(1, 3, 24) + random_rows(1, 3, 24, size=0.1)
    assert_same(*both("triton", x, Head(weight), top_k=20, targets=torch.tensor([100, 200, 599])))


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_extreme_logits(z: float) -> None:
    weight = torch.ones(300, 1).bfloat16()
    head = Head(weight, offset=torch.zeros(300).index_fill(0, torch.tensor([9]), 1e4))
    found = statistics(torch.full((1, 2, 1), z), Head(weight), reference=torch.full((2, 1), z), backend="triton")
    assert found.entropy is not None
    assert found.entropy.flatten().tolist() == pytest.approx([torch.tensor(300.0).log().item()] * 2, abs=1e-6)
    hot = statistics(torch.full((1, 2, 1), z), head, top_k=1, backend="triton")
    assert hot.top_ids.flatten().tolist() == [9, 9]
    assert hot.entropy is not None
    assert hot.entropy.abs().max() < 1e-6


def test_filter() -> None:
    head, x = narrow_head(700, 24), random_rows(2, 5, 24)
    allowed = torch.arange(700) % 7 == 1
    options = {"top_k": 5, "targets": torch.tensor([8, 5]), "allowed": allowed, "reference": x[1]}
    assert_same(*both("triton", x, head, **options), tolerance=2e-6)


def test_targets_for_each_position() -> None:
    head, x = narrow_head(300, 16), random_rows(2, 4, 16)
    targets = torch.tensor([[1, 2], [299, 0], [7, 7], [5, 6]])
    assert_same(*both("triton", x, head, targets=targets, reference=x[1]), tolerance=2e-6)


def test_more_candidates_than_a_program_holds() -> None:
    head, x = narrow_head(300, 16), random_rows(1, 3, 16)
    assert_same(*both("triton", x, head, top_k=gpu.MOST_CANDIDATES))


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
    request = Request(4, 401, torch.tensor([[0, 200, 400]]).expand(n, 3))
    given_rows = gpu._Rows(x, head)

    def made(**how: Any) -> Partial:
        return gpu.scan(given_rows, request, **how)

    found = conclude(made(block=(rows, columns, depth), splits=splits), given_rows, head, request)
    exact = statistics(x, head, top_k=4, targets=torch.tensor([0, 200, 400]), backend="reference")
    assert_same(found.map(lambda v: v.unsqueeze(0)), exact, tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_hold_every_bit(dtype: torch.dtype) -> None:
    x = random_rows(200, 33) * torch.logspace(-20, 20, 200).unsqueeze(1)
    x[:, 3] *= 1e-3  # small beside its row, where float16 has few bits left
    pieces, factor, step = gpu.pieces_of(x, dtype)
    assert pieces.dtype == dtype
    assert bool(torch.isfinite(pieces).all())
    back = sum(p.double() * step**i for i, p in enumerate(pieces)) * factor.double().unsqueeze(1)
    size = x.double().abs().amax(1, keepdim=True)
    assert float(((back - x.double()).abs() / size).max()) < 2.0**-24
    own, _, _ = gpu.pieces_of(x.clamp(-1e4, 1e4).to(dtype), dtype)
    assert own.shape[0] == 1


def test_what_the_kernel_cannot_take() -> None:
    assert choose.why_not("triton", narrow_head(10, 4)) is None
    assert (
        choose.why_not("triton", random_head(10, 4)) == "its head is in float32; the kernel takes bfloat16 and float16"
    )
    other = Head(narrow_head(10, 4).weight.T.contiguous().T)
    assert choose.why_not("triton", other) == "its head's rows do not lie together"
    assert choose.choose("auto", narrow_head(10, 4)) == "native"  # a processor has its own


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from logitlab.logits.gpu_scan import scan_kernel

architecture, dtype, pieces, extras = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "all"
constants = dict(
    PIECES=pieces, BIAS=extras, OFFSET=extras, CAP=extras, FILTER=extras, KL=extras, TARGETS=3 if extras else 0,
    TARGETS_PADDED=4 if extras else 1, KEEP=16, KEEP_PADDED=16, RANKED=16 if extras else 0, RANKED_PADDED=16,
    ROWS=64, COLUMNS=128, DEPTH=64, WIDEN=False,
)
types = dict.fromkeys(scan_kernel.arg_names, "i32")
types |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(["xs", "w"], "*" + dtype)
floats = ["factor", "bias", "offset", "low", "high", "ref_z", "ref_w", "out_max", "out_best_z", "out_ranked_z"]
types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(["out_sum", "out_moment", "out_cross"], "*fp64")
types |= dict.fromkeys(["place", "out_best_id", "out_ranked_id", "out_above", "out_near"], "*i32")
types |= {"allowed": "*i8"} | dict.fromkeys(["slope", "cap", "step"], "fp32")
even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(scan_kernel.arg_names)
        if types[name].startswith("*") or name in ("d", "size", "width", "stride")}
made = triton.compile(
    ASTSource(fn=scan_kernel, signature=types, constexprs=constants, attrs=even),
    target=GPUTarget("cuda", architecture, 32),
    options=dict(num_warps=8, num_stages=3, enable_fp_fusion=True),
)
text = made.asm["ptx"]
found = "wgmma" if "wgmma.mma_async" in text else "mma" if "mma.sync" in text else "nothing"
print(found, made.metadata.shared)
"""


@pytest.mark.parametrize(("architecture", "instruction"), [(80, "mma"), (90, "wgmma")], ids=["Ampere", "Hopper"])
@pytest.mark.parametrize(("dtype", "pieces", "extras"), [("bf16", 1, "none"), ("fp16", 3, "all")])
def test_it_compiles_for_gpus(architecture: int, instruction: str, dtype: str, pieces: int, extras: str) -> None:
    """Without a GPU: to machine code that multiplies on tensor cores and whose tiles fit into shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(architecture), dtype, str(pieces), extras],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    found, shared = out.stdout.split()[-2:]
    assert found == instruction
    assert int(shared) <= 160 * 1024
