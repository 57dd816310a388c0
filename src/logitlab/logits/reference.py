"""The reference backend: float64, one row chunk at a time, every formula as it is written."""

from __future__ import annotations

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import TIE, Request, Statistics

ROWS = 16
COLUMNS = 8192
MOST = torch.finfo(torch.float32).max


def reference(
    x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None
) -> Statistics:
    """See `logitlab.logits.statistics`; holds [16, V] float64 at a time."""
    positions = x.shape[1]
    groups = []
    for group in x:
        parts: list[Statistics] = []
        for i in range(0, max(1, positions), ROWS):
            part = slice(i, i + ROWS)
            asked = request.at(part).for_rows(1, len(group[part]))
            parts.append(_rows(group[part], source, asked, None if against is None else against[part]))
        groups.append(Statistics.join(parts, dim=1))
    return Statistics.join(groups, dim=0)


def float64_logits(x: torch.Tensor, source: Head | LogitSource) -> torch.Tensor:
    """Logits [n, V] of rows in float64 (of a `LogitSource`: its own numbers, as float64)."""
    if isinstance(source, Head):
        columns = range(0, source.vocab_size, COLUMNS)  # a float64 copy of a whole head could be gigabytes
        return torch.cat([source.logits(x, slice(c, c + COLUMNS), torch.float64) for c in columns], dim=1)
    return source.compute(x).double()


def _rows(x: torch.Tensor, source: Head | LogitSource, request: Request, against: torch.Tensor | None) -> Statistics:
    z, steps = _without_nonsense(float64_logits(x, source))
    lse = torch.logsumexp(z, dim=-1)
    logp = z - lse.unsqueeze(-1)
    p = logp.exp()
    own_steps = steps
    if request.allowed is not None:
        steps = steps.masked_fill(~request.allowed.to(z.device), -torch.inf)
    top = torch.argsort(steps, dim=-1, descending=True, stable=True)
    if request.allowed is not None:  # a column that is not ranked may tie with one of -inf
        top = top.gather(1, torch.argsort((~request.allowed.to(z.device))[top].int(), dim=-1, stable=True))
    top = top[:, : request.top_k]
    result = Statistics(top, logp.gather(1, top), lse)
    if request.entropy:
        entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
        result.entropy = torch.where(lse == -torch.inf, 0.0, entropy)  # of a row of -inf alone there is none
    if request.targets is not None:
        ids = request.targets.to(z.device)
        result.target_logprob = logp.gather(1, ids)
        ranks = []
        for column in ids.unbind(1):
            own = own_steps.gather(1, column.unsqueeze(1))
            first = (steps > own) | ((steps == own) & (torch.arange(z.shape[1], device=z.device) < column.unsqueeze(1)))
            if request.allowed is not None:
                first &= request.allowed.to(z.device)
            ranks.append(1 + first.sum(-1))
        result.target_rank = torch.stack(ranks, dim=-1) if ranks else ids
    if against is not None:
        logr = torch.log_softmax(_without_nonsense(float64_logits(against, source))[0], dim=-1)
        r = logr.exp()
        broken = torch.isnan(lse)
        result.kl = torch.where(r == 0, 0.0, r * (logr - logp)).sum(-1).clamp_min(0.0)
        result.kl = result.kl.masked_fill(broken, torch.nan)  # also where what is NaN has no weight
        result.cross_entropy = (-torch.where(r == 0, 0.0, r * logp).sum(-1)).masked_fill(broken, torch.nan)
    return result.map(lambda v: v.unsqueeze(0))


def _without_nonsense(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, V] and the steps that they are ranked by; all NaN, and all tied, in rows that have no distribution.

    Those are rows with a NaN or +inf among their logits; what float32 does not hold counts as infinite.
    """
    broken = (torch.isnan(z) | (z > MOST)).any(dim=-1, keepdim=True)
    return z.masked_fill(broken, torch.nan), torch.round(z / TIE).masked_fill(broken, 0.0)
