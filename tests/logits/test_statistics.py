"""The tiled backend against float64 closed forms and against the reference backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.errors import InputError
from logitlab.logits import Head, LogitSource, Statistics, statistics
from logitlab.logits import tiled as tiled_module

NAMES = ("top_logprob", "logsumexp", "entropy", "target_logprob", "kl")


def random_head(vocabulary: int, width: int, seed: int = 0, **options: object) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(torch.randn(vocabulary, width, generator=generator), **options)  # type: ignore[arg-type]


def random_rows(*shape: int, seed: int = 1, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def assert_same(fast: Statistics, exact: Statistics, tolerance: float = 1e-5) -> None:
    assert torch.equal(fast.top_ids, exact.top_ids)
    if exact.target_rank is not None:
        assert fast.target_rank is not None
        assert torch.equal(fast.target_rank, exact.target_rank)
    for name in NAMES:
        a, b = getattr(fast, name), getattr(exact, name)
        assert (a is None) == (b is None), name
        if b is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def both(x: torch.Tensor, source: Head | LogitSource, **options: object) -> tuple[Statistics, Statistics]:
    fast = statistics(x, source, backend="tiled", **options)  # type: ignore[arg-type]
    return fast, statistics(x, source, backend="reference", **options)  # type: ignore[arg-type]


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
def test_tiled_equals_reference(vocabulary: int, size: float) -> None:
    head = random_head(vocabulary, 48)
    x = random_rows(3, 5, 48, size=size)
    targets = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    assert_same(*both(x, head, top_k=7, targets=targets, reference=x[-1]))


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
def test_everything_after_the_head(options: dict[str, object]) -> None:
    head = random_head(3000, 40, **options)
    x = random_rows(2, 4, 40, size=3)
    assert_same(*both(x, head, top_k=5, targets=torch.tensor([7, 2999]), reference=x[0]))


def test_a_dropped_cap_is_seen() -> None:
    x = random_rows(1, 4, 40, size=3)
    capped = statistics(x, random_head(500, 40, softcap=5.0))
    free = statistics(x, random_head(500, 40), backend="reference")
    assert (capped.entropy - free.entropy).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_heads_are_decoded_exactly(dtype: torch.dtype) -> None:
    head = Head(random_head(3000, 64).weight.to(dtype))
    x = random_rows(2, 3, 64).to(dtype)
    fast, exact = both(x.float(), head, top_k=5, targets=torch.tensor([3]), reference=x[-1].float())
    assert_same(fast, exact)


def test_ties_are_ranked_by_id() -> None:
    weight = torch.zeros(5000, 8)
    weight[[7, 30, 4999], 0] = 1.0
    s, exact = both(torch.ones(1, 2, 8), Head(weight), top_k=6, targets=torch.tensor([30, 4999, 0, 4998]))
    assert s.top_ids[0, 0].tolist() == [7, 30, 4999, 0, 1, 2]
    assert s.target_rank is not None
    assert s.target_rank[0, 0].tolist() == [2, 3, 4, 5000]
    assert_same(s, exact)


def test_many_equal_rows_of_a_head() -> None:
    """Unused tokens often share one embedding; their logits tie exactly and float32 tiles may not."""
    weight = random_head(4000, 57).weight
    weight[100:300] = weight[100]
    weight[3900:] = weight[100]
    x = weight[100].expand(1, 3, 57) + random_rows(1, 3, 57, size=0.1)
    assert_same(*both(x, Head(weight), top_k=20, targets=torch.tensor([100, 250, 3999])))


def test_rows_of_zeros_tie_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
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
    s = statistics(x, head, targets=torch.tensor([7, 19_999]), reference=x[0])
    assert pairs < 303 * 200
    assert s.top_ids[0, 0].tolist() == [0, 1, 2, 3, 4]
    assert s.target_rank is not None
    assert s.target_rank[0, 299].tolist() == [8, 20_000]
    exact = statistics(x[:, -4:], head, targets=torch.tensor([7, 19_999]), reference=x[0, -4:], backend="reference")
    for name in ("top_ids", "target_rank"):
        assert torch.equal(getattr(s, name)[:, -4:], getattr(exact, name))


@pytest.mark.parametrize("z", ["equal", "one-hot", "huge", "minus infinity"])
def test_extreme_logits(z: str) -> None:
    n = 3000
    rows = {
        "equal": torch.zeros(1, n),
        "one-hot": torch.full((1, n), -1e4).index_fill(1, torch.tensor([5]), 1e4),
        "huge": torch.linspace(-1e4, 1e4, n)[None],
        "minus infinity": torch.zeros(1, n).index_fill(1, torch.arange(100, n), -torch.inf),
    }[z]
    source = LogitSource(lambda x: rows.expand(x.shape[0], n), n)
    s = statistics(torch.zeros(1, 2, 4), source, targets=torch.tensor([5]), reference=torch.zeros(2, 4))
    expected = {"equal": math.log(n), "one-hot": 0.0, "huge": None, "minus infinity": math.log(100)}[z]
    assert bool(torch.isfinite(s.entropy).all())
    if expected is not None:
        assert s.entropy[0, 0].item() == pytest.approx(expected, abs=1e-6)
    else:
        p = torch.softmax(rows.double(), -1)
        assert s.entropy[0, 0].item() == pytest.approx(float(-(p * p.clamp_min(1e-300).log()).sum()), abs=1e-6)
    assert s.kl is not None
    assert s.kl.abs().max() < 1e-6


def test_kl_of_a_row_from_itself_is_zero_and_never_negative() -> None:
    head = random_head(6000, 32)
    x = random_rows(6, 9, 32, size=5)
    s = statistics(x, head, reference=x[2])
    assert s.kl is not None
    assert s.kl[2].max() < 1e-6
    assert s.kl.min() >= 0


def test_filter_restricts_ranking_but_not_normalisation() -> None:
    head = random_head(3000, 16)
    x = random_rows(2, 3, 16)
    allowed = torch.zeros(3000, dtype=torch.bool)
    allowed[1::7] = True
    filtered, exact = both(x, head, top_k=5, targets=torch.tensor([8]), allowed=allowed)
    plain = statistics(x, head, top_k=5, targets=torch.tensor([8]))
    assert_same(filtered, exact)
    assert bool(allowed[filtered.top_ids].all())
    torch.testing.assert_close(filtered.logsumexp, plain.logsumexp)
    torch.testing.assert_close(filtered.target_logprob, plain.target_logprob)
    assert filtered.target_rank is not None
    assert plain.target_rank is not None
    assert bool((filtered.target_rank < plain.target_rank).all())


def test_a_filter_smaller_than_top_k_gives_fewer_columns() -> None:
    allowed = torch.zeros(100, dtype=torch.bool)
    allowed[[3, 99]] = True
    s, exact = both(random_rows(1, 2, 8), random_head(100, 8), top_k=5, allowed=allowed)
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
def test_any_tiling_and_any_split_gives_the_same(tile: int, rows: int, groups: int, positions: int, seed: int) -> None:
    head = random_head(601, 24, seed)
    x = random_rows(groups, positions, 24, seed=seed + 1, size=4)
    targets = torch.tensor([0, 300, 600])
    whole = statistics(x, head, top_k=4, targets=targets, reference=x[0], backend="reference")
    before = tiled_module.TILE, tiled_module.ROWS
    tiled_module.TILE, tiled_module.ROWS = tile, rows
    try:
        split = statistics(x, head, top_k=4, targets=targets, reference=x[0])
    finally:
        tiled_module.TILE, tiled_module.ROWS = before
    assert_same(split, whole, tolerance=1e-6)


def test_rows_do_not_depend_on_their_company() -> None:
    head = random_head(3000, 32)
    x = random_rows(3, 7, 32)
    together = statistics(x, head, targets=torch.tensor([1]), reference=x[-1])
    alone = statistics(x[:, 3:4], head, targets=torch.tensor([1]), reference=x[-1, 3:4])
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
    statistics(random_rows(1, n, 8), head, targets=torch.tensor([5]))
    assert 0 < largest <= tiled_module.ROWS * tiled_module.TILE
    assert largest < n * vocabulary / 20


def test_autocast_does_not_touch_the_numbers() -> None:
    head, x = random_head(3000, 64), random_rows(1, 4, 64)
    plain = statistics(x, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistics(x, head)
    assert torch.equal(plain.logsumexp, inside.logsumexp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"backend": "fast"}, "the backends are tiled, reference"),
        ({"targets": torch.tensor([10])}, "target id 10 is not in the vocabulary (0 to 9)"),
        ({"targets": torch.tensor([-1])}, "target id -1"),
        ({"allowed": torch.zeros(10, dtype=torch.bool)}, "leaves no token"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, "the vocabulary has 10 entries"),
    ],
)
def test_bad_requests(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        statistics(torch.zeros(1, 1, 4), random_head(10, 4), **options)  # type: ignore[arg-type]


def test_real_rows_of_the_default_model(default_model: object) -> None:
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
    assert_same(*both(x, source, top_k=10, targets=torch.tensor([7042, 0, 49151]), reference=last))
