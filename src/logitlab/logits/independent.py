"""Statistics of columns that are questions of their own: multi-label heads, SigLIP, focal-loss detectors.

Each column ``v`` says yes with probability ``p_v = sigmoid(z_v)``, whatever the others say. For one row:

* log-probability of ``v``: ``log sigmoid(z_v)``, in nats;
* entropy: the sum over columns of the entropies of their answers, in nats;
* KL divergence from a reference: the sum over columns of ``KL(Bernoulli(r_v) || Bernoulli(p_v))``, in nats;
* rank: as everywhere, by logit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from logitlab.logits.statistics import TIE, Statistics, in_order


def independent(
    z: torch.Tensor,
    *,
    top_k: int = 5,
    targets: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
) -> Statistics:
    """Statistics of logits [groups, positions, V]; the arguments are those of `logitlab.logits.statistics`.

    Args:
        z: logits.
        top_k: number of top columns to keep (no more than there are).
        targets: [m] column ids, or None.
        allowed: [V] bool; only these columns are ranked.
        reference: logits [positions, V], or None.

    Example:
        >>> s = independent(torch.tensor([[[0.0, 2.0]]]), top_k=1)
        >>> s.top_ids.tolist(), round(float(s.top_logprob.exp()), 3)
        ([[[1]]], 0.881)
    """
    z = z.double()
    yes, no = F.logsigmoid(z), F.logsigmoid(-z)
    ranked = z if allowed is None else z.masked_fill(~allowed.to(z.device), -torch.inf)
    columns = z.shape[-1] if allowed is None else int(allowed.sum())
    flat = ranked.reshape(-1, z.shape[-1])
    order = in_order(flat, torch.arange(z.shape[-1], device=z.device).expand_as(flat))
    top = order[:, : min(top_k, columns)].reshape(*z.shape[:-1], -1)
    entropy = -(_weighted(yes, yes) + _weighted(no, no)).sum(-1)
    kl = None
    if reference is not None:
        r = reference.double()
        r_yes, r_no = F.logsigmoid(r), F.logsigmoid(-r)
        kl = (_weighted(r_yes, r_yes - yes) + _weighted(r_no, r_no - no)).sum(-1).clamp_min(0)
    target_logprob = target_rank = None
    if targets is not None:
        ids = targets.to(z.device)
        target_logprob = yes[..., ids]
        steps = torch.round(ranked / TIE)
        own = torch.round(z[..., ids] / TIE)
        numbers = torch.arange(z.shape[-1], device=z.device)
        before = (steps.unsqueeze(-2) > own.unsqueeze(-1)) | (
            (steps.unsqueeze(-2) == own.unsqueeze(-1)) & (numbers < ids.unsqueeze(-1))
        )
        target_rank = 1 + before.sum(-1)
    return Statistics(top, yes.gather(-1, top), torch.logsumexp(z, -1), entropy, target_logprob, target_rank, kl)


def _weighted(log_p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values times probabilities; what has no probability counts for nothing, also where it is infinite."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * values)
