"""KL and its gradient, against float64 autograd over all logits."""

from __future__ import annotations

import pytest
import torch

from logitlab.logits import Head, LogitSource
from logitlab.logits.compiled import library
from logitlab.logits.divergence import divergence
from logitlab.logits.native import NativeRows
from logitlab.logits.rows import HeadRows

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "offset": {"offset": True},
    "cap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 1.7, "offset": True, "softcap": 8.0},
}


def head_of(case: str, size: int = 301, width: int = 19) -> Head:
    options = dict(CASES[case])
    generator = torch.Generator().manual_seed(3)
    for name in ("bias", "offset"):
        if options.get(name):
            options[name] = torch.randn(size, generator=generator)
    return Head(torch.randn(size, width, generator=generator), **options)  # type: ignore[arg-type]


def by_autograd(x: torch.Tensor, final: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.double().clone().requires_grad_(True)
    log_p = head.logits(rows.reshape(-1, x.shape[-1]), dtype=torch.float64).reshape(*x.shape[:2], -1).log_softmax(-1)
    log_r = head.logits(final, dtype=torch.float64).log_softmax(-1)
    kl = torch.where(log_r > -torch.inf, log_r.exp() * (log_r - log_p), 0.0).sum(-1)
    (gradient,) = torch.autograd.grad(kl.sum(), rows)
    return kl.detach(), gradient


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_autograd_gives(case: str, backend: str) -> None:
    head = head_of(case)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 37, 19, generator=generator)
    final = torch.randn(37, 19, generator=generator)
    found = divergence(x, final, head, backend)
    kl, gradient = by_autograd(x, final, head)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.gradient, gradient.float(), atol=1e-5, rtol=1e-5)


def test_where_a_model_itself_decodes() -> None:
    head = head_of("cap")
    source = LogitSource(lambda rows: head.logits(rows), head.vocab_size)
    generator = torch.Generator().manual_seed(5)
    x, final = torch.randn(2, 7, 19, generator=generator), torch.randn(7, 19, generator=generator)
    found = divergence(x, final, source)
    kl, gradient = by_autograd(x, final, head)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.gradient, gradient.float(), atol=1e-5, rtol=1e-5)


def test_the_reference_itself_has_no_slope() -> None:
    head = head_of("bias")
    final = torch.randn(5, 19, generator=torch.Generator().manual_seed(6))
    found = divergence(final.unsqueeze(0), final, head)
    assert float(found.kl.max()) < 1e-9
    assert float(found.gradient.abs().max()) < 1e-5


def test_tokens_that_are_ruled_out_have_no_part() -> None:
    offset = torch.zeros(301)
    offset[7] = -torch.inf
    for options in ({}, {"softcap": 5.0}):
        head = Head(head_of("plain").weight, offset=offset, **options)  # type: ignore[arg-type]
        x = torch.randn(2, 4, 19, generator=torch.Generator().manual_seed(7))
        found = divergence(x, x[0], head)
        kl, gradient = by_autograd(x, x[0], head)
        assert bool(torch.isfinite(found.gradient).all())
        torch.testing.assert_close(found.kl, kl.nan_to_num(0.0), atol=1e-5, rtol=1e-6)
        if bool(torch.isfinite(gradient).all()):
            torch.testing.assert_close(found.gradient, gradient.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_rounded_products_are_near(backend: str) -> None:
    head = head_of("all" if backend == "tiled" else "scale")
    generator = torch.Generator().manual_seed(8)
    x, final = torch.randn(3, 37, 19, generator=generator), torch.randn(37, 19, generator=generator)
    found = divergence(x, final, head, backend, narrow=True)
    kl, gradient = by_autograd(x, final, head)
    assert float((found.kl - kl).abs().max()) < 0.05
    assert float((found.gradient - gradient).norm() / gradient.norm()) < 0.02
    itself = divergence(final.unsqueeze(0), final, head, backend, narrow=True)
    assert float(itself.gradient.abs().max()) < 1e-5  # both sides are rounded alike


@pytest.mark.parametrize("gpu", [False, True])
def test_the_slope_is_zero_where_it_should_be_however_the_work_is_cut(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides are rounded alike, also where one of them has many more rows than the other."""
    if gpu:  # the way that GPUs go, here by float32 products of rounded numbers
        monkeypatch.setattr(HeadRows, "narrows", property(lambda self: True))
    generator = torch.Generator().manual_seed(12)
    head = Head(torch.randn(9000, 64, generator=generator) * 0.4)
    final = torch.randn(11, 64, generator=generator)
    backend = "tiled" if gpu else "auto"
    found = divergence(final.expand(7, -1, -1), final, head, backend, narrow=True)
    assert float(found.gradient.abs().max()) < 2e-5
    assert float(found.kl.max()) < 1e-5
    x = final + 0.3 * torch.randn(7, 11, 64, generator=generator)
    near = divergence(x, final, head, backend, narrow=True)
    kl, gradient = by_autograd(x, final, head)
    assert float((near.gradient - gradient).norm() / gradient.norm()) < 0.02
    assert float((near.kl - kl).abs().max()) < 0.02


def test_no_rows() -> None:
    head = head_of("plain")
    for kind in kinds():
        mean, lse = kind(torch.empty(0, 19), head).expected()
        assert (mean.shape, lse.shape) == ((0, 19), (0,))


def by_hand(x: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    z = head.logits(x.double(), dtype=torch.float64)
    return z.softmax(-1) @ head.weight.double(), z.logsumexp(-1)


def kinds() -> list[type[HeadRows]]:
    return [HeadRows, NativeRows] if library() is not None else [HeadRows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "width", "rows"), [(301, 19, 37), (1, 1, 1), (2500, 33, 70), (170, 64, 2100)])
def test_the_expected_row(size: int, width: int, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    head = Head(torch.randn(size, width, generator=generator).to(dtype), scale=0.7)
    x = torch.randn(rows, width, generator=generator)
    mean, lse = by_hand(x, head)
    for kind in kinds():
        found, normal = kind(x, head).expected()
        torch.testing.assert_close(found.double(), mean, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(normal, lse, atol=1e-5, rtol=1e-6)
        rough, near = kind(x, head).expected(narrow=True)
        assert float((rough - mean).norm() / mean.norm()) < 0.01
        assert float((near - lse).abs().max()) < 0.1


@pytest.mark.parametrize("narrow", [False, True])
def test_logits_that_grow_from_tile_to_tile(narrow: bool) -> None:
    """Each tile's largest exceeds all before it by more than float32 can hold the exponential of."""
    weight = torch.arange(0.0, 6000.0, dtype=torch.float32).div(10).floor().unsqueeze(1)  # exact in bfloat16 below 256
    head = Head(weight.clamp_max(255.0))
    x = torch.tensor([[1.0], [-1.0], [4.0], [0.0]])
    mean, lse = by_hand(x, head)
    for kind in kinds():
        found, normal = kind(x, head).expected(narrow)
        torch.testing.assert_close(found.double(), mean, atol=1e-4, rtol=1e-4 if not narrow else 5e-3)
        torch.testing.assert_close(normal, lse, atol=1e-4, rtol=1e-6)


def test_a_row_without_a_distribution_is_seen() -> None:
    head = head_of("plain")
    x = torch.zeros(3, 19)
    x[1, 0] = torch.nan
    for kind in kinds():
        for narrow in (False, True):
            mean, lse = kind(x, head).expected(narrow)
            assert torch.isnan(lse).tolist() == [False, True, False]
            assert torch.isnan(mean).any(1).tolist() == [False, True, False]
    found = divergence(x.unsqueeze(0), x, head)
    assert torch.isnan(found.kl[0]).tolist() == [False, True, False]
