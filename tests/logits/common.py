"""What the tests of several backends share."""

from __future__ import annotations

from typing import Any

import torch

from logitlab.logits import Head, LogitSource, Statistics, statistics

NAMES = ("top_logprob", "logsumexp", "entropy", "target_logprob", "kl", "cross_entropy")


def random_head(vocabulary: int, width: int, seed: int = 0, **options: Any) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return Head(torch.randn(vocabulary, width, generator=generator), **options)


def random_rows(*shape: int, seed: int = 1, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def assert_same(fast: Statistics, exact: Statistics, tolerance: float = 1e-5, *, equal_nan: bool = False) -> None:
    """Ids and ranks are equal, everything else agrees to ``tolerance`` nats; NaN with NaN only if that is said."""
    assert torch.equal(fast.top_ids, exact.top_ids)
    assert (fast.target_rank is None) == (exact.target_rank is None)
    if exact.target_rank is not None:
        assert fast.target_rank is not None
        assert torch.equal(fast.target_rank, exact.target_rank)
    for name in NAMES:
        a, b = getattr(fast, name), getattr(exact, name)
        assert (a is None) == (b is None), name
        if b is not None:
            torch.testing.assert_close(
                a, b, atol=tolerance, rtol=0, equal_nan=equal_nan, msg=lambda m, name=name: f"{name}: {m}"
            )


def both(backend: str, x: torch.Tensor, source: Head | LogitSource, **options: Any) -> tuple[Statistics, Statistics]:
    """What a backend gives, and what the reference gives."""
    exact = {name: value for name, value in options.items() if name not in ("precision", "max_error")}
    return statistics(x, source, backend=backend, **options), statistics(x, source, backend="reference", **exact)
