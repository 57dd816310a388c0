"""Columns that are questions of their own, against closed forms written out in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.logits.independent import independent
from logitlab.logits.statistics import TIE


def log_sigmoid(z: float) -> float:
    """log(1 / (1 + exp(-z))) without overflow."""
    return -math.log1p(math.exp(-z)) if z >= 0 else z - math.log1p(math.exp(z))


def binary_entropy(z: float) -> float:
    if math.isinf(z):
        return 0.0
    return -sum(math.exp(log_sigmoid(s)) * log_sigmoid(s) for s in (z, -z))


def bernoulli_kl(r: float, z: float) -> float:
    return sum(math.exp(log_sigmoid(s * r)) * (log_sigmoid(s * r) - log_sigmoid(s * z)) for s in (1, -1))


def ranks(z: list[float], allowed: list[bool] | None = None) -> list[int]:
    """Rank of every column: 1 + those that are larger, or as large with a smaller id, among the allowed."""
    fine = [i for i in range(len(z)) if allowed is None or allowed[i]]
    return [1 + sum(z[i] > z[v] or (z[i] == z[v] and i < v) for i in fine) for v in range(len(z))]


_LOGIT = st.floats(-100, 100, width=32).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(_LOGIT, min_size=1, max_size=9), st.data())
def test_closed_forms(z: list[float], data: st.DataObject) -> None:
    r = data.draw(st.lists(_LOGIT, min_size=len(z), max_size=len(z)))
    k = data.draw(st.integers(1, 11))
    logits = torch.tensor(z, dtype=torch.float64)
    found = independent(
        logits.reshape(1, 1, -1),
        top_k=k,
        targets=torch.arange(len(z)),
        reference=torch.tensor([r], dtype=torch.float64),
    )
    assert float(found.entropy) == pytest.approx(math.fsum(map(binary_entropy, z)), rel=1e-12, abs=1e-14)
    assert found.kl is not None
    expected = math.fsum(bernoulli_kl(a, b) for a, b in zip(r, z, strict=True))
    assert float(found.kl) == pytest.approx(expected, rel=1e-11, abs=1e-13)
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))[:k]
    assert found.top_ids.flatten().tolist() == order
    assert found.top_logprob.flatten().tolist() == pytest.approx([log_sigmoid(z[i]) for i in order], rel=1e-13)
    assert found.target_logprob is not None
    assert found.target_logprob.flatten().tolist() == pytest.approx([log_sigmoid(x) for x in z], rel=1e-13)
    assert found.target_rank is not None
    assert found.target_rank.flatten().tolist() == ranks(z)


def test_known_numbers() -> None:
    """sigmoid(log 3) = 3/4; a coin has an entropy of log 2."""
    found = independent(
        torch.tensor([[[math.log(3), 0.0]]]), targets=torch.tensor([0, 1]), reference=torch.tensor([[0.0, 0.0]])
    )
    assert found.target_logprob is not None
    assert found.target_logprob.exp().flatten().tolist() == pytest.approx([0.75, 0.5], rel=1e-7)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(found.entropy) == pytest.approx(quarter + math.log(2), rel=1e-7)
    assert found.kl is not None
    assert float(found.kl) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert float(found.logsumexp) == pytest.approx(math.log(3 + 1), rel=1e-7)


def test_columns_do_not_see_each_other() -> None:
    """Unlike a softmax: another column changes no log-probability, and adds its own entropy and divergence."""
    one = independent(torch.tensor([[[1.5]]]), targets=torch.tensor([0]), reference=torch.tensor([[0.5]]))
    two = independent(torch.tensor([[[1.5, 9.0]]]), targets=torch.tensor([0]), reference=torch.tensor([[0.5, 9.0]]))
    assert one.target_logprob is not None
    assert two.target_logprob is not None
    assert torch.equal(one.target_logprob, two.target_logprob)
    assert float(two.entropy - one.entropy) == pytest.approx(binary_entropy(9.0), rel=1e-9)
    assert one.kl is not None
    assert two.kl is not None
    assert float(one.kl) == pytest.approx(float(two.kl), rel=1e-12)


def test_extreme_logits_stay_finite_and_exact() -> None:
    z = [100.0, -100.0, 0.0, 1e4, -1e4]
    found = independent(torch.tensor([[z]]), targets=torch.arange(5), reference=torch.tensor([z]))
    assert found.target_logprob is not None
    expected = [-math.exp(-100.0), -100.0, -math.log(2), 0.0, -1e4]
    assert found.target_logprob.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    assert float(found.entropy) == pytest.approx(math.log(2) + 2 * binary_entropy(100.0), rel=1e-12)
    assert found.kl is not None
    assert float(found.kl) == 0.0
    far = independent(torch.tensor([[[-100.0]]]), reference=torch.tensor([[100.0]]))
    assert far.kl is not None
    assert float(far.kl) == pytest.approx(100.0, rel=1e-12)


def test_a_column_that_is_ruled_out() -> None:
    """A logit of -inf is a sure no: no entropy, no divergence from itself, last in rank."""
    z = torch.tensor([[[0.5, -torch.inf, 2.0]]])
    found = independent(z, targets=torch.tensor([1]), reference=z[0])
    assert float(found.entropy) == pytest.approx(binary_entropy(0.5) + binary_entropy(2.0), rel=1e-12)
    assert found.kl is not None
    assert float(found.kl) == 0.0
    assert found.target_logprob is not None
    assert float(found.target_logprob) == -math.inf
    assert found.target_rank is not None
    assert int(found.target_rank) == 3
    assert found.top_ids.flatten().tolist() == [2, 0, 1]
    sure = independent(torch.tensor([[[torch.inf]]]), reference=torch.tensor([[torch.inf]]))
    assert float(sure.entropy) == 0.0
    against = independent(z, reference=torch.tensor([[0.5, 0.0, 2.0]]))
    assert against.kl is not None
    assert float(against.kl) == math.inf  # it said perhaps, and now never


def test_ties_go_by_id() -> None:
    z = [1.0, 3.0, 3.0, 1.0, 3.0]
    found = independent(torch.tensor([[z]]), top_k=5, targets=torch.arange(5))
    assert found.top_ids.flatten().tolist() == [1, 2, 4, 0, 3]
    assert found.target_rank is not None
    assert found.target_rank.flatten().tolist() == ranks(z) == [4, 1, 2, 5, 3]
    near = torch.tensor([[[2.0, 2.0 + TIE / 8, 2.0 + 2 * TIE]]], dtype=torch.float64)  # the first two are tied
    found = independent(near, top_k=3, targets=torch.arange(3))
    assert found.top_ids.flatten().tolist() == [2, 0, 1]
    assert found.target_rank is not None
    assert found.target_rank.flatten().tolist() == [2, 3, 1]


def test_only_allowed_columns_are_ranked() -> None:
    z = [5.0, 4.0, 3.0, 4.0, -1.0]
    allowed = [False, True, False, True, True]
    found = independent(
        torch.tensor([[z]]),
        top_k=9,
        targets=torch.arange(5),
        allowed=torch.tensor(allowed),
        reference=torch.zeros(1, 5),
    )
    assert found.top_ids.flatten().tolist() == [1, 3, 4]
    assert found.target_rank is not None
    assert found.target_rank.flatten().tolist() == ranks(z, allowed) == [1, 1, 3, 2, 3]
    free = independent(torch.tensor([[z]]), targets=torch.arange(5), reference=torch.zeros(1, 5))
    for name in ("entropy", "kl", "target_logprob", "logsumexp"):
        assert torch.equal(getattr(found, name), getattr(free, name)), name


def test_groups_and_positions_keep_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 6, generator=generator) * 5
    reference = torch.randn(4, 6, generator=generator)
    allowed = torch.tensor([True, False, True, True, True, False])
    targets = torch.tensor([5, 0])
    whole = independent(z, top_k=3, targets=targets, allowed=allowed, reference=reference)
    for g in range(3):
        for p in range(4):
            one = independent(
                z[g : g + 1, p : p + 1], top_k=3, targets=targets, allowed=allowed, reference=reference[p : p + 1]
            )
            for name in ("top_ids", "top_logprob", "entropy", "kl", "target_logprob", "target_rank", "logsumexp"):
                assert torch.equal(getattr(whole, name)[g, p], getattr(one, name)[0, 0]), (name, g, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_widened_first(dtype: torch.dtype) -> None:
    z = (torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    found, exact = independent(z), independent(z.double())
    assert found.entropy.dtype == torch.float64
    assert torch.equal(found.entropy, exact.entropy)
    assert torch.equal(found.top_logprob, exact.top_logprob)


def test_nothing_asked_for_is_none() -> None:
    found = independent(torch.zeros(1, 1, 2))
    assert (found.kl, found.target_rank, found.target_logprob) == (None, None, None)
