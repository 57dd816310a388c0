"""One function from decoded rows to statistics over the vocabulary; backends do the work.

Definitions, for logits ``z`` of one row, ``lse = log sum_v exp z_v`` and ``p = exp(z - lse)``:

* log-probability of ``v``: ``z_v - lse``, in nats;
* entropy: ``lse - sum_v p_v z_v``, in nats;
* KL divergence from a reference distribution ``r``: ``sum_v r_v (log r_v - log p_v)``, in nats;
* rank of ``v``: 1 + the number of columns that come before it. A column comes before another
  when its logit is larger or, in a tie, when its id is smaller. Logits that agree to 2**-30 are tied,
  so ranks do not depend on the device that summed them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from logitlab.errors import InputError
from logitlab.logits.head import Head, LogitSource

TIE = 2.0**-30
"""Logits are compared in steps of this size."""


@dataclass
class Statistics:
    """Statistics of rows shaped [groups, positions]; k and m are the numbers of top ids and targets.

    Attributes:
        top_ids: [groups, positions, k] int64, best first.
        top_logprob: [groups, positions, k] float64, nats.
        logsumexp: [groups, positions] float64.
        entropy: [groups, positions] float64, nats.
        target_logprob: [groups, positions, m] float64, nats; None without targets.
        target_rank: [groups, positions, m] int64, from 1; None without targets.
        kl: [groups, positions] float64, nats, from the reference; None without a reference.
    """

    top_ids: torch.Tensor
    top_logprob: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor
    target_logprob: torch.Tensor | None = None
    target_rank: torch.Tensor | None = None
    kl: torch.Tensor | None = None

    @staticmethod
    def join(parts: list[Statistics], dim: int) -> Statistics:
        """Put the statistics of consecutive rows together again along ``dim``."""
        joined: dict[str, torch.Tensor | None] = {}
        for f in fields(Statistics):
            values = [getattr(part, f.name) for part in parts]
            joined[f.name] = None if values[0] is None else torch.cat(values, dim=dim)
        return Statistics(**joined)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Request:
    """What to compute; shared by all backends.

    Attributes:
        top_k: number of top columns.
        targets: [m] column ids, the same for every row, or None.
        allowed: [V] bool, the columns that are ranked, or None for all; normalisation ignores it.
    """

    top_k: int
    targets: torch.Tensor | None
    allowed: torch.Tensor | None


Backend = Callable[[torch.Tensor, "Head | LogitSource", Request, "torch.Tensor | None"], Statistics]


def _backend(name: str) -> Backend:
    if name == "tiled":
        from logitlab.logits.tiled import tiled

        return tiled
    from logitlab.logits.reference import reference

    return reference


BACKENDS = ("tiled", "reference")
"""Names of the backends: ``tiled`` (the fast one), ``reference`` (float64, plain, for tests)."""


def statistics(
    x: torch.Tensor,
    source: Head | LogitSource,
    *,
    top_k: int = 5,
    targets: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    backend: str = "tiled",
) -> Statistics:
    """Statistics over the vocabulary of decoded rows.

    Args:
        x: rows to decode, [groups, positions, d] (or [positions, d], taken as one group).
        source: what turns rows into logits.
        top_k: number of top columns to keep, at least 1.
        targets: [m] int64 ids whose log-probability and rank are wanted.
        allowed: [V] bool; only these columns compete for the top and count for ranks. Probabilities
            are still normalised over the whole vocabulary.
        reference: rows [positions, d]; ``kl`` is the divergence of every group's distribution from
            the one that these rows give.
        backend: one of `BACKENDS`.

    Raises:
        InputError: a size, id or backend name is out of range.

    Example:
        >>> head = Head(torch.eye(3))
        >>> s = statistics(torch.tensor([[2.0, 0.0, 0.0]]), head, top_k=1, targets=torch.tensor([2]))
        >>> s.top_ids.tolist(), s.target_rank.tolist()
        ([[[0]]], [[[3]]])
    """
    if x.ndim == 2:
        x = x.unsqueeze(0)
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    size = source.vocab_size
    columns = size if allowed is None else int(allowed.sum())
    if allowed is not None and allowed.shape != (size,):
        raise InputError(f"the vocabulary filter has shape {tuple(allowed.shape)}; the vocabulary has {size} entries")
    if columns == 0:
        raise InputError("the vocabulary filter leaves no token to rank")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")
    if targets is not None and targets.numel() and not bool(((targets >= 0) & (targets < size)).all()):
        bad = targets[(targets < 0) | (targets >= size)][0]
        raise InputError(f"target id {int(bad)} is not in the vocabulary (0 to {size - 1})")
    request = Request(min(top_k, columns), targets, allowed)
    device_type = x.device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        return _backend(backend)(x, source, request, reference)


def in_order(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Indices that sort columns [n, c] by logit, ties (to `TIE`) by id: the order of ranks."""
    by_id = torch.argsort(ids, dim=-1, stable=True)
    steps = torch.round(z.double().gather(-1, by_id) / TIE)
    by_logit = torch.argsort(steps, dim=-1, descending=True, stable=True)
    return by_id.gather(-1, by_logit)
