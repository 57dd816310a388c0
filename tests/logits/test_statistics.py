"""Every backend against float64 closed forms and against the reference backend.

`native` is the compiled scan, `tiled` PyTorch alone. The Triton kernel has the same tests in test_gpu.py, on heads
that it takes.
"""

from __future__ import annotations

import math
import re
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


def test_autocast_does_not_touch_the_numbers() -> None:
    head, x = random_head(3000, 64), random_rows(1, 4, 64)
    plain = statistics(x, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistics(x, head)
    assert torch.equal(plain.logsumexp, inside.logsumexp)


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
        ({"max_error": 0.0}, "max_error is 0.0; it is a number of nats above 0"),
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
