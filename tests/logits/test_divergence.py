"""KL and its gradient, against float64 autograd over all logits."""

from __future__ import annotations

import pytest
import torch

from logitlab.logits import Head, LogitSource
from logitlab.logits.divergence import divergence

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
