"""The reference backend: float64, one row chunk at a time, every formula as it is written."""

from __future__ import annotations

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import TIE, Request, Statistics

ROWS = 16
COLUMNS = 8192


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
    z = float64_logits(x, source)
    lse = torch.logsumexp(z, dim=-1)
    logp = z - lse.unsqueeze(-1)
    p = logp.exp()
    steps = torch.round(z / TIE)
    if request.allowed is not None:
        steps = steps.masked_fill(~request.allowed, -torch.inf)
    top = torch.argsort(steps, dim=-1, descending=True, stable=True)[:, : request.top_k]
    result = Statistics(top, logp.gather(1, top), lse)
    if request.entropy:
        result.entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    if request.targets is not None:
        ids = request.targets.to(z.device)
        result.target_logprob = logp.gather(1, ids)
        ranks = []
        for column in ids.unbind(1):
            own = torch.round(z.gather(1, column.unsqueeze(1)) / TIE)
            first = (steps > own) | ((steps == own) & (torch.arange(z.shape[1], device=z.device) < column.unsqueeze(1)))
            ranks.append(1 + first.sum(-1))
        result.target_rank = torch.stack(ranks, dim=-1) if ranks else ids
    if against is not None:
        logr = torch.log_softmax(float64_logits(against, source), dim=-1)
        r = logr.exp()
        result.kl = torch.where(r > 0, r * (logr - logp), 0.0).sum(-1).clamp_min(0.0)
        result.cross_entropy = -torch.where(r > 0, r * logp, 0.0).sum(-1)
    return result.map(lambda v: v.unsqueeze(0))
