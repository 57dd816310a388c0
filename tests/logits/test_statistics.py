"""Every backend against float64 closed forms and against the reference backend.

`native` is the compiled scan, `tiled` PyTorch alone. The Triton kernel has the same tests in test_gpu.py, on heads
that it takes.
"""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.errors import InputError
from logitlab.logits import Head, LogitSource, statistics
from logitlab.logits import tiled as tiled_module
from tests.logits.common import NAMES, assert_same, both, random_head, random_rows


@pytest.fixture(params=["native", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backend under test."""
    return str(request.param)


def test_reference_is_the_closed_form() -> None:
    z = torch.tensor([2.0, 0.0, -1.0, 0.5])
    head = Head(torch.eye(4))
    against = torch.tensor([0.0, 1.0, 0.0, 0.0])
    s = statistics(z[None], head, top_k=2, targets=torch.tensor([2]), reference=against[None], backend="reference")
    p = [math.exp(v) for v in z.tolist()]
    total = sum(p)
    p = [v / total for v in p]
    r = [math.exp(v) for v in against.tolist()]
    r = [v / sum(r) for v in r]
    assert s.top_ids[0, 0].tolist() == [0, 3]
    assert s.logsumexp.item() == pytest.approx(math.log(total), abs=1e-12)
    assert s.entropy.item() == pytest.approx(-sum(v * math.log(v) for v in p), abs=1e-12)
    assert s.target_logprob is not None
    assert s.target_logprob.item() == pytest.approx(math.log(p[2]), abs=1e-12)
    assert s.target_rank is not None
    assert s.target_rank.item() == 4
    assert s.kl is not None
    assert s.kl.item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(r, p, strict=True)), abs=1e-12)


@pytest.mark.parametrize("vocabulary", [3, 31, 32, 33, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("size", [0.05, 1.0, 8.0])
def test_equals_reference(backend: str, vocabulary: int, size: float) -> None:
    head = random_head(vocabulary, 48)
    x = random_rows(3, 5, 48, size=size)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    assert_same(*both(backend, x, head, top_k=7, targets=targets, reference=x[-1]))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0625},
        {"softcap": 5.0},
        {"softcap": 5.0, "scale": 0.5},
        {"scale": -1.0},
        {"bias": torch.linspace(-3, 3, 3000)},
        {"offset": torch.linspace(3, -3, 3000), "softcap": 2.0},
    ],
    ids=["scale", "cap", "cap+scale", "negative", "bias", "offset"],
)
def test_everything_after_the_head(backend: str, options: dict[str, object]) -> None:
    head = random_head(3000, 40, **options)
    x = random_rows(2, 4, 40, size=3)
    assert_same(*both(backend, x, head, top_k=5, targets=torch.tensor([7, 2999]), reference=x[0]))


def test_a_dropped_cap_is_seen() -> None:
    x = random_rows(1, 4, 40, size=3)
    capped = statistics(x, random_head(500, 40, softcap=5.0))
    free = statistics(x, random_head(500, 40), backend="reference")
    assert (capped.entropy - free.entropy).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_of_other_precision_are_decoded_exactly(backend: str, dtype: torch.dtype) -> None:
    head = Head(random_head(3000, 64).weight.to(dtype))
    x = random_rows(2, 3, 64).to(dtype)
    fast, exact = both(
        "auto" if dtype == torch.float64 else backend,
        x.float(),
        head,
        top_k=5,
        targets=torch.tensor([3]),
        reference=x[-1].float(),
    )
    assert_same(fast, exact)


def test_ties_are_ranked_by_id(backend: str) -> None:
    weight = torch.zeros(5000, 8)
    weight[[7, 30, 4999], 0] = 1.0
    s, exact = both(backend, torch.ones(1, 2, 8), Head(weight), top_k=6, targets=torch.tensor([30, 4999, 0, 4998]))
    assert s.top_ids[0, 0].tolist() == [7, 30, 4999, 0, 1, 2]
    assert s.target_rank is not None
    assert s.target_rank[0, 0].tolist() == [2, 3, 4, 5000]
    assert_same(s, exact)


def test_many_equal_rows_of_a_head(backend: str) -> None:
    """Unused tokens often share one embedding; their logits tie exactly and float32 tiles may not."""
    weight = random_head(4000, 57).weight
    weight[100:300] = weight[100]
    weight[3900:] = weight[100]
    x = (weight[100].expand(1, 3, 57) + random_rows(1, 3, 57, size=0.1)) / 2  # logits of 32: what float32 holds to 4e-6
    assert_same(*both(backend, x, Head(weight), top_k=20, targets=torch.tensor([100, 250, 3999])))


def test_rows_of_zeros_tie_every_column(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead neuron's value is a zero row: all ties, which must cost neither memory nor hours."""
    head = random_head(20_000, 16)
    x = torch.cat([torch.zeros(1, 300, 16), random_rows(1, 3, 16)], dim=1)
    pairs = 0
    original = Head.logits_at

    def watched(self: Head, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        nonlocal pairs
        pairs += ids.numel()
        return original(self, rows, ids)

    monkeypatch.setattr(Head, "logits_at", watched)
    s = statistics(x, head, targets=torch.tensor([7, 19_999]), reference=x[0], backend=backend)
    assert pairs < 303 * 200
    assert s.top_ids[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert s.target_rank is not None
    assert s.target_rank[0, 299].tolist() == [8, 20_000]
    exact = statistics(x[:, -4:], head, targets=torch.tensor([7, 19_999]), reference=x[0, -4:], backend="reference")
    for name in ("top_ids", "target_rank"):
        assert torch.equal(getattr(s, name)[:, -4:], getattr(exact, name))


EXTREMES = {
    "equal": (torch.zeros(3000), math.log(3000)),
    "all 1e4": (torch.full((3000,), 1e4), math.log(3000)),
    "all -1e4": (torch.full((3000,), -1e4), math.log(3000)),
    "one-hot": (torch.full((3000,), -1e4).index_fill(0, torch.tensor([5]), 1e4), 0.0),
    "two-hot": (torch.full((3000,), -1e4).index_fill(0, torch.tensor([5, 2999]), 1e4), math.log(2)),
    "a slope": (torch.linspace(-1e4, 1e4, 3000), None),
    "minus infinity": (torch.zeros(3000).index_fill(0, torch.arange(100, 3000), -torch.inf), math.log(100)),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("form", ["head", "logits"])
def test_extreme_logits(backend: str, name: str, form: str) -> None:
    """Nothing overflows, and no entropy is lost."""
    z, entropy = EXTREMES[name]
    n = len(z)
    ruled_out = torch.where(torch.isfinite(z), 0.0, -torch.inf)
    if form == "head":
        head = Head(z.nan_to_num(neginf=0.0).unsqueeze(1), offset=ruled_out)
        s = statistics(
            torch.ones(1, 40, 1), head, targets=torch.tensor([5]), reference=torch.ones(40, 1), backend=backend
        )
    else:
        source = LogitSource(lambda x: z.expand(x.shape[0], n), n)
        s = statistics(torch.zeros(1, 40, 4), source, targets=torch.tensor([5]), reference=torch.zeros(40, 4))
    p = torch.softmax(z.double(), -1)
    expected = float(-(p * p.clamp_min(1e-300).log()).sum()) if entropy is None else entropy
    assert s.entropy is not None
    assert s.entropy[0].tolist() == pytest.approx([expected] * 40, abs=1e-6)
    lse = float(torch.logsumexp(z.double(), 0))
    assert s.logsumexp[0].tolist() == pytest.approx([lse] * 40, abs=1e-6, rel=1e-12)
    assert s.target_logprob is not None
    assert s.target_logprob[0, :, 0].tolist() == pytest.approx([float(z[5]) - lse] * 40, abs=1e-6, rel=1e-12)
    assert s.kl is not None
    assert s.kl.abs().max() < 1e-6
    assert s.cross_entropy is not None
    torch.testing.assert_close(s.cross_entropy, s.entropy, atol=1e-6, rtol=0)


def test_kl_between_extremes(backend: str) -> None:
    """From a one-hot distribution to another it is the gap of their logits; to a flat one, the log of the size."""
    n = 3000
    weight = torch.zeros(n, 2)
    weight[5, 0] = weight[9, 1] = 1.0
    x = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]], [[0.0, 0.0]]])
    s = statistics(x, Head(weight), reference=x[0], backend=backend)
    assert s.kl is not None
    assert s.kl[:, 0].tolist() == pytest.approx([0.0, 1e4, math.log(n)], abs=1e-6)


def test_rows_without_any_possible_column(backend: str) -> None:
    """All logits -inf: there is no distribution, and nothing is made up or raised."""
    head = Head(torch.ones(50, 1), offset=torch.full((50,), -torch.inf))
    s = statistics(torch.ones(1, 2, 1), head, backend=backend)
    assert s.logsumexp.tolist() == [[-math.inf, -math.inf]]
    assert s.entropy is not None
    assert s.entropy.tolist() == [[0.0, 0.0]]
    assert not bool(torch.isfinite(s.top_logprob).any())


@pytest.mark.parametrize("per_position", [False, True])
def test_targets_for_each_position(backend: str, per_position: bool) -> None:
    """The label of each position, as a language model's loss has it."""
    head, x = random_head(700, 24), random_rows(3, 6, 24, size=2)
    labels = torch.tensor([[3, 9], [699, 0], [1, 2], [5, 5], [350, 17], [4, 8]])
    targets = labels if per_position else labels[0]
    s, exact = both(backend, x, head, targets=targets, reference=x[-1])
    assert_same(s, exact, 1e-6)
    z = (x.double() @ head.weight.double().T).log_softmax(-1)
    wanted = labels.expand(3, 6, 2) if per_position else labels[:1].expand(3, 6, 2)
    assert s.target_logprob is not None
    torch.testing.assert_close(s.target_logprob, z.gather(-1, wanted), atol=1e-6, rtol=0)


def test_only_what_is_asked_for(backend: str) -> None:
    head, x = random_head(700, 24), random_rows(3, 6, 24, size=2)
    s = statistics(x, head, entropy=False, backend=backend)
    assert (s.entropy, s.kl, s.cross_entropy, s.target_rank, s.target_logprob, s.bound) == (None,) * 6
    whole = statistics(x, head, targets=torch.tensor([3]), reference=x[0], backend=backend)
    assert torch.equal(s.top_ids, whole.top_ids)
    torch.testing.assert_close(s.top_logprob, whole.top_logprob, atol=1e-7, rtol=0)


def test_cross_entropy_is_divergence_and_entropy(backend: str) -> None:
    head, x = random_head(900, 24), random_rows(3, 6, 24, size=2)
    s = statistics(x, head, reference=x[1], backend=backend)
    z = (x.double() @ head.weight.double().T).log_softmax(-1)
    assert s.cross_entropy is not None
    torch.testing.assert_close(s.cross_entropy, -(z[1].exp() * z).sum(-1), atol=1e-6, rtol=0)


def test_kl_of_a_row_from_itself_is_zero_and_never_negative(backend: str) -> None:
    head = random_head(6000, 32)
    x = random_rows(6, 9, 32, size=5)
    s = statistics(x, head, reference=x[2], backend=backend)
    assert s.kl is not None
    assert s.kl[2].max() < 1e-6
    assert s.kl.min() >= 0


def test_filter_restricts_ranking_but_not_normalisation(backend: str) -> None:
    head = random_head(3000, 16)
    x = random_rows(2, 3, 16)
    allowed = torch.zeros(3000, dtype=torch.bool)
    allowed[1::7] = True
    filtered, exact = both(backend, x, head, top_k=5, targets=torch.tensor([8]), allowed=allowed)
    plain = statistics(x, head, top_k=5, targets=torch.tensor([8]), backend=backend)
    assert_same(filtered, exact)
    assert bool(allowed[filtered.top_ids].all())
    torch.testing.assert_close(filtered.logsumexp, plain.logsumexp, atol=1e-7, rtol=0)
    torch.testing.assert_close(filtered.target_logprob, plain.target_logprob, atol=1e-7, rtol=0)
    assert filtered.target_rank is not None
    assert plain.target_rank is not None
    assert bool((filtered.target_rank < plain.target_rank).all())


def test_a_filter_smaller_than_top_k_gives_fewer_columns(backend: str) -> None:
    allowed = torch.zeros(100, dtype=torch.bool)
    allowed[[3, 99]] = True
    s, exact = both(backend, random_rows(1, 2, 8), random_head(100, 8), top_k=5, allowed=allowed)
    assert s.top_ids.shape == (1, 2, 2)
    assert_same(s, exact)


@settings(max_examples=40, deadline=None)
@given(
    tile=st.integers(1, 700),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    positions=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_any_tiling_of_the_tiled_backend_gives_the_same(
    tile: int, rows: int, groups: int, positions: int, seed: int
) -> None:
    head = random_head(601, 24, seed)
    x = random_rows(groups, positions, 24, seed=seed + 1, size=4)
    targets = torch.tensor([0, 300, 600])
    whole = statistics(x, head, top_k=4, targets=targets, reference=x[0], backend="reference")
    before = tiled_module.TILE, tiled_module.ROWS
    tiled_module.TILE, tiled_module.ROWS = tile, rows
    try:
        split = statistics(x, head, top_k=4, targets=targets, reference=x[0], backend="tiled")
    finally:
        tiled_module.TILE, tiled_module.ROWS = before
    assert_same(split, whole, tolerance=1e-6)


def test_rows_do_not_depend_on_their_company(backend: str) -> None:
    head = random_head(3000, 32)
    x = random_rows(3, 7, 32)
    together = statistics(x, head, targets=torch.tensor([1]), reference=x[-1], backend=backend)
    alone = statistics(x[:, 3:4], head, targets=torch.tensor([1]), reference=x[-1, 3:4], backend=backend)
    assert torch.equal(together.top_ids[:, 3:4], alone.top_ids)
    for name in NAMES:
        torch.testing.assert_close(getattr(together, name)[:, 3:4], getattr(alone, name), atol=1e-6, rtol=0)


def test_no_tensor_of_rows_by_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, n = 200_000, 64
    head = random_head(vocabulary, 8)
    largest = 0
    original = Head.logits

    def watched(self: Head, *args: Any) -> torch.Tensor:
        nonlocal largest
        z = original(self, *args)
        largest = max(largest, z.numel())
        return z

    monkeypatch.setattr(Head, "logits", watched)
    statistics(random_rows(1, n, 8), head, targets=torch.tensor([5]), backend="tiled")
    assert 0 < largest <= tiled_module.ROWS * tiled_module.TILE
    assert largest < n * vocabulary / 20


def test_autocast_does_not_touch_the_numbers(backend: str) -> None:
    head, x = random_head(3000, 64), random_rows(1, 4, 64)
    plain = statistics(x, head, reference=x[0] / 2, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistics(x, head, reference=x[0] / 2, backend=backend)
    for name in ("logsumexp", "entropy", "kl", "top_logprob"):
        assert torch.equal(getattr(plain, name), getattr(inside, name)), name


@pytest.mark.parametrize("way", ["for all", "for this backend"])
def test_products_are_full_whatever_the_user_has_set(backend: str, way: str) -> None:
    """Users may let float32 products be computed in TF32 or bfloat16; a reading's are not."""
    head, x = random_head(4096, 576), random_rows(1, 256, 576)
    plain = statistics(x, head, reference=x[0], backend=backend)
    rough = torch.nn.functional.linear(x, head.weight)
    setting: Any = torch.backends.mkldnn.matmul
    try:
        if way == "for all":
            torch.set_float32_matmul_precision("medium")
        else:
            setting.fp32_precision = "bf16"
        if torch.equal(rough, torch.nn.functional.linear(x, head.weight)):
            pytest.skip("this processor computes them in float32 all the same")
        inside = statistics(x, head, reference=x[0], backend=backend)
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    for name in ("top_ids", *NAMES):
        if getattr(plain, name) is not None:
            assert torch.equal(getattr(plain, name), getattr(inside, name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"backend": "fast"}, "the backends are auto, native, triton, tiled, reference"),
        ({"backend": "triton"}, "cannot decode this: its head is not on a GPU; use backend='auto'"),
        ({"precision": "rough"}, "unknown precision 'rough'; it is one of exact, screened, auto"),
        ({"precision": None}, "unknown precision None; it is one of exact, screened, auto"),
        ({"max_error": 0.0}, "max_error is 0.0; it is a number of nats above 0"),
        ({"max_error": math.inf}, "max_error is inf; it is a number of nats above 0, such as 0.001"),
        ({"max_error": math.nan}, "max_error is nan; it is a number"),
        ({"max_error": None}, "max_error is None; it is a number"),
        ({"max_error": "0.1"}, "max_error is '0.1'; it is a number"),
        ({"max_error": True}, "max_error is True; it is a number"),
        (
            {"reference": torch.zeros(2, 4)},
            "the reference has shape (2, 4); the rows have shape (1, 1, 4), so give one",
        ),
        ({"reference": torch.zeros(1, 5)}, "one row for each position, [1, 4]"),
        ({"reference": torch.zeros(4)}, "the reference has shape (4,)"),
        ({"targets": torch.zeros(3, 1, dtype=torch.long)}, "targets have shape (3, 1); give [m], or [positions, m]"),
        ({"targets": torch.tensor([10])}, "target id 10 is not in the vocabulary (0 to 9)"),
        ({"targets": torch.tensor([-1])}, "target id -1"),
        ({"allowed": torch.zeros(10, dtype=torch.bool)}, "leaves no token"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, "the vocabulary has 10 entries"),
    ],
)
def test_bad_requests(options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=re.escape(message)):
        statistics(torch.zeros(1, 1, 4), random_head(10, 4), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["native", "tiled", "reference", "auto"])
@pytest.mark.parametrize("shape", [(1, 3, 8), (3, 17), (16,), (1, 1, 1, 16), ()])
def test_rows_of_a_wrong_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """A compiled kernel would read beyond them."""
    with pytest.raises(InputError, match=r"the rows have shape .*; give \["):
        statistics(torch.zeros(shape), random_head(100, 16), backend=name)


def test_a_reference_of_too_few_rows_is_refused_behind_a_cap() -> None:
    x = random_rows(1, 40, 16)
    with pytest.raises(InputError, match=re.escape("the reference has shape (3, 16)")):
        statistics(x, random_head(100, 16, softcap=4.0), reference=x[0, :3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(9)}, "a head's bias has shape (9,); give one number for each of the 10 rows"),
        ({"bias": torch.zeros(1, 10)}, "a head's bias has shape (1, 10)"),
        ({"offset": torch.zeros(11)}, "a head's offset has shape (11,)"),
        ({"offset": torch.tensor(0.0)}, "a head's offset has shape ()"),
    ],
)
def test_parts_of_a_head_fit_together(options: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Head(torch.zeros(10, 4), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=re.escape("a head's weight has shape (10,); give [vocabulary, width]")):
        Head(torch.zeros(10))


@pytest.mark.parametrize("name", ["native", "tiled", "reference", "auto"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4)])
def test_no_rows_give_empty_statistics(name: str, shape: tuple[int, ...]) -> None:
    groups, positions = shape[:2]
    asked: dict[str, Any] = {"top_k": 2, "targets": torch.tensor([1, 5, 7]), "reference": torch.zeros(positions, 4)}
    s = statistics(torch.zeros(shape), random_head(10, 4), backend=name, precision="screened", **asked)
    asked["reference"] = torch.zeros(1, 4)
    some = statistics(torch.zeros(1, 1, 4), random_head(10, 4), precision="screened", **asked)
    for key, value in vars(some).items():
        assert getattr(s, key).shape == (groups, positions, *value.shape[2:]), key
        assert getattr(s, key).dtype == value.dtype, key
    least = statistics(torch.zeros(shape), random_head(10, 4), entropy=False, backend=name)
    assert (least.entropy, least.kl, least.cross_entropy, least.target_rank, least.bound) == (None,) * 5


# -- numbers that are none ---------------------------------------------------------------------


def nonsense(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[bool]]:
    """Rows [2, 4, 24], a head's weight, an offset; which of the rows, one after the other, have no distribution."""
    x, weight = random_rows(2, 4, 24), random_head(3000, 24).weight.clone()
    offset, broken = None, [False] * 8
    if name == "NaN in a row":
        x[1, 2, 3], broken[6] = torch.nan, True
    elif name == "NaN in rows of the reference":
        x[0, 1, 3], x[0, 3], broken[1], broken[3] = torch.nan, torch.nan, True, True
    elif name == "NaN in a column":
        weight[77, 5], broken = torch.nan, [True] * 8
    elif name == "infinite logit":
        offset, broken = torch.zeros(3000).index_fill(0, torch.tensor([2999]), torch.inf), [True] * 8
    elif name == "NaN first in its tile":
        offset, broken = torch.zeros(3000).index_fill(0, torch.tensor([0]), torch.nan), [True] * 8
    elif name == "infinite row":
        x[1, 2, 0], broken[6] = torch.inf, True
    return x, weight, offset, broken


NONSENSE = [
    "NaN in a row",
    "NaN in rows of the reference",
    "NaN in a column",
    "infinite logit",
    "NaN first in its tile",
    "infinite row",
]


@pytest.mark.parametrize("against", [False, True], ids=["alone", "against"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["linear", "cap"])
@pytest.mark.parametrize("name", NONSENSE)
def test_no_number_is_made_of_none(backend: str, name: str, softcap: float | None, against: bool) -> None:
    """NaN stays NaN, in its own row; ids and ranks are in range, and the same with every backend."""
    x, weight, offset, broken = nonsense(name)
    head = Head(weight, softcap=softcap, offset=offset)
    if softcap is not None and name == "infinite row":
        broken = [False] * 8  # a cap is a number whatever is under it
    targets = torch.tensor([0, 7, 2999])
    for allowed in (None, torch.arange(3000) % 3 == 1):
        options: dict[str, Any] = {"top_k": 3, "targets": targets, "allowed": allowed}
        options["reference"] = x[0] if against else None
        s, exact = both(backend, x, head, **options)
        whole = [not b for b in broken]
        for found in (s, exact):
            assert torch.isfinite(found.logsumexp).flatten().tolist() == whole
            assert torch.isnan(found.logsumexp).flatten().tolist() == broken
            for key in ("entropy", "target_logprob", "top_logprob"):
                assert torch.isfinite(getattr(found, key)).reshape(8, -1).all(1).tolist() == whole, key
                assert torch.isnan(getattr(found, key)).reshape(8, -1).all(1).tolist() == broken, key
            if against:
                for key in ("kl", "cross_entropy"):
                    either = [b or broken[i % 4] for i, b in enumerate(broken)]
                    assert torch.isnan(getattr(found, key)).flatten().tolist() == either, key
            for i in range(8):
                if broken[i]:
                    assert found.top_ids.reshape(8, -1)[i].tolist() == ([0, 1, 2] if allowed is None else [1, 4, 7])
                    assert found.target_rank is not None
                    ranks = [1, 8, 3000] if allowed is None else [1, 3, 1001]
                    assert found.target_rank.reshape(8, -1)[i].tolist() == ranks
        assert_same(s, exact, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_number_is_made_of_none_without_a_head(value: float) -> None:
    z = torch.zeros(3000).index_fill(0, torch.tensor([5]), value)
    source = LogitSource(lambda x: z.expand(x.shape[0], 3000), 3000)
    s, exact = both("tiled", torch.zeros(1, 2, 4), source, targets=torch.tensor([5]), reference=torch.zeros(2, 4))
    assert_same(s, exact, equal_nan=True)
    assert bool(torch.isnan(s.logsumexp).all())


def test_logits_of_any_finite_size(backend: str) -> None:
    """Float32 is off by more nats there than exp can take; the float64 logits of the likeliest are not."""
    head, x = random_head(3000, 24), random_rows(1, 3, 24)
    x[0, 1] *= 1e12
    x[0, 2] *= 1e30
    s, exact = both(backend, x, head, targets=torch.tensor([7]))
    for name in ("top_ids", "target_rank"):
        assert torch.equal(getattr(s, name), getattr(exact, name)), name
    for name in ("logsumexp", "entropy", "top_logprob", "target_logprob"):
        torch.testing.assert_close(getattr(s, name), getattr(exact, name), atol=1e-5, rtol=1e-12)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocabulary", [12, 3000])
def test_columns_that_are_ruled_out_are_ranked_last_by_id(backend: str, vocabulary: int, filtered: bool) -> None:
    offset = torch.zeros(vocabulary)
    offset[3:] = -torch.inf
    offset[vocabulary - 2] = 0.0
    head, x = random_head(vocabulary, 16, offset=offset), random_rows(1, 5, 16)
    allowed = torch.arange(vocabulary) % 2 == 0 if filtered else None
    targets = torch.tensor([0, 3, 4, vocabulary - 1])
    s, exact = both(backend, x, head, top_k=6, targets=targets, allowed=allowed)
    assert_same(s, exact)
    assert bool((exact.top_logprob[..., -1] == -torch.inf).all())
    if allowed is not None:
        assert bool(allowed[s.top_ids].all())


def test_the_reference_takes_a_filter_from_another_device() -> None:
    from logitlab.logits.reference import reference
    from logitlab.logits.statistics import Request

    moved: list[object] = []

    class Watched(torch.Tensor):
        def to(self, *args: Any, **options: Any) -> torch.Tensor:
            moved.append(args[0])
            return self.as_subclass(torch.Tensor).to(*args, **options)

    allowed = (torch.arange(30) % 2 == 0).as_subclass(Watched)
    x = random_rows(1, 2, 8)
    s = reference(x, random_head(30, 8), Request(3, 15, torch.tensor([[3]]), allowed), None)
    assert moved
    assert set(moved) == {x.device}
    assert bool((s.top_ids % 2 == 0).all())


# -- how exact a float32 pass is ---------------------------------------------------------------


def test_a_scale_enlarges_what_a_bias_is_off_by(backend: str) -> None:
    weight = torch.full((3000, 1), 9e-5)
    weight[:20] = 7e-5
    head = Head(weight, bias=torch.full((3000,), 1000.0), scale=1000.0)
    assert head.extra_error >= 2.0**-22 * 1e6
    s = statistics(torch.tensor([[1.0]]), head, top_k=5, backend=backend)
    assert s.top_ids.tolist() == [[[20, 21, 22, 23, 24]]]


@pytest.mark.parametrize("options", [{"scale": 0.1}, {"scale": 1 / 3, "softcap": 30.1}])
def test_scale_and_cap_have_all_their_digits(backend: str, options: dict[str, Any]) -> None:
    """0.1 in float32 is off by 1.5e-8 of itself: 1e-4 nats of a logit of 1e4."""
    head, x = random_head(3000, 16, **options), random_rows(1, 3, 16, size=1e4)
    s, exact = both(backend, x, head, targets=torch.tensor([3]))
    torch.testing.assert_close(s.logsumexp, exact.logsumexp, atol=1e-6, rtol=1e-12)
    torch.testing.assert_close(s.target_logprob, exact.target_logprob, atol=1e-6, rtol=1e-12)


@pytest.mark.parametrize("d", [8, 37])
def test_every_number_in_half_precision(backend: str, d: int) -> None:
    """All 65,536 of them: subnormal, infinite and NaN too."""
    bits = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = torch.zeros(65_536, d, dtype=torch.float16)
    weight[:, d - 1] = bits
    finite = torch.isfinite(bits)
    x = torch.zeros(1, 1, d)
    x[..., d - 1] = 1.0
    for threads_flush in (False, True):
        torch.set_flush_denormal(threads_flush)
        try:
            targets = torch.tensor([1, 513, 1023, 1024])
            some = Head(weight[finite])
            s = statistics(x * 2.0**20, some, targets=targets, backend=backend)
        finally:
            torch.set_flush_denormal(False)
        z = bits[finite].double() * 2.0**20
        assert s.target_logprob is not None
        got = s.target_logprob[0, 0] + s.logsumexp[0, 0]
        torch.testing.assert_close(got, z[targets], atol=1e-6, rtol=0)
        assert s.target_rank is not None
        assert s.target_rank[0, 0].tolist() == [int((z > z[t]).sum() + (z[:t] == z[t]).sum()) + 1 for t in targets]
    broken = statistics(x, Head(weight[~finite]), backend=backend)
    assert bool(torch.isnan(broken.logsumexp).all())
    ruled_out = Head(
        torch.where(finite | (bits == -torch.inf), bits, 0.0).half().unsqueeze(1).expand(-1, 1).contiguous()
    )
    assert_same(*both(backend, torch.ones(1, 1, 1), ruled_out))


def test_threads_that_overlap_leave_the_settings_alone() -> None:
    """What was set comes back when the last of them is done, and products are full until then."""
    from logitlab.logits.statistics import _full_products

    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        pytest.skip("this PyTorch has one setting for all")
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        first, second = _full_products(), _full_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert setting.fp32_precision == "bf16"
        head, x = random_head(300, 16), random_rows(2, 40, 16)
        many = [threading.Thread(target=lambda: [statistics(x, head) for _ in range(20)]) for _ in range(4)]
        for thread in many:
            thread.start()
        for thread in many:
            thread.join()
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before


def test_products_are_full_where_there_is_one_setting_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch 2.9."""
    from logitlab.logits.statistics import _full_products

    known = ["medium"]
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", object(), raising=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: known[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", known.append)
    with _full_products(), _full_products():
        assert known[-1] == "highest"
    assert known == ["medium", "highest", "medium"]
    known[:] = ["highest"]
    with _full_products():
        pass
    assert known == ["highest"]


def test_real_rows_of_the_default_model(backend: str, default_model: object) -> None:
    """Every statistic within 1e-5 nats of float64 on residual and component states of real text."""
    from logitlab.models.capture import capture
    from logitlab.models.handle import Model

    assert isinstance(default_model, Model)
    text = 'In 1849 engineers built the first bridge; "we never expected this", said Dr. Moreau. def f(x): return x**2'
    sites = "0.resid_pre,::6.resid_post,29.resid_post,3.attn_out,28.mlp_out,15.head_out.4"
    states = capture(default_model, text, sites)
    x = states.stacked(states.sites)
    x = default_model.tail.prepare(x.reshape(-1, x.shape[-1])).reshape(len(states.sites), -1, default_model.width)
    last = x[[str(s) for s in states.sites].index("29.resid_post")]
    source = default_model.tail.source
    assert_same(*both(backend, x, source, top_k=10, targets=torch.tensor([7042, 0, 49151]), reference=last))


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_columns_that_a_bias_rules_out(backend: str, scale: float) -> None:
    bias = torch.zeros(300)
    bias[[1, 7, 8, 250]] = -torch.inf
    head = Head(torch.ones(300, 4), bias=bias, scale=scale)
    x, targets = torch.ones(1, 2, 4), torch.tensor([0, 1, 8, 250, 299])
    for allowed in (None, torch.arange(300) % 2 == 0):
        options = {"targets": targets, "allowed": allowed, "top_k": 3}
        found, truth = (statistics(x, head, backend=b, **options) for b in (backend, "reference"))  # type: ignore[arg-type]
        assert found.target_rank is not None
        assert truth.target_rank is not None
        assert found.target_rank.tolist() == truth.target_rank.tolist()
        assert found.top_ids.tolist() == truth.top_ids.tolist()
