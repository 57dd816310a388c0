"""The diagonal tuned lens of the paper: fitted to the state of the last block, by squared error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from logitlab.errors import InputError
from logitlab.lenses.fitted import FittedLens, identity
from logitlab.models.handle import Model
from logitlab.models.sites import Site


def fit_diagonal(
    model: Model,
    states: torch.Tensor,
    final: torch.Tensor,
    sites: Sequence[Site],
    *,
    seed: int,
    epochs: int = 200,
    patience: int = 15,
    rate: float = 1e-3,
    decay: float = 0.01,
    held_out: float = 0.2,
) -> FittedLens:
    """``(1 + δ) ⊙ h + b`` for each site, by AdamW on all examples at once; the identity where that does not help.

    Args:
        model: the model.
        states: [sites, examples, width].
        final: [examples, width], what the last block gives for the same examples.
        sites: the sites.
        seed: of the split.
        epochs: steps, at most.
        patience: steps without a smaller error on the held-out examples after which a site stops.
        rate: learning rate.
        decay: weight decay.
        held_out: share of the examples that are held out.

    Raises:
        InputError: no site is below the last one, or there are fewer than five examples.
    """
    below = [i for i, site in enumerate(sites) if site != model.last_site]
    if not below or final.shape[0] < 5:
        raise InputError(f"a tuned lens needs a site below {model.last_site}, and at least 5 examples")
    lens = identity(model, "diagonal", [sites[i] for i in below])
    order = np.random.default_rng(seed).permutation(len(final))
    cut = max(1, round(held_out * len(order)))
    out, in_ = torch.from_numpy(order[:cut]), torch.from_numpy(order[cut:])
    x, y = states[below].float().cpu(), final.float().cpu()
    lens.maps.requires_grad_(True)
    optimiser = torch.optim.AdamW(lens.maps.parameters(), lr=rate, weight_decay=decay)
    best, kept, since = _error(lens, x[:, out], y[out]), _copied(lens), torch.zeros(len(below), dtype=torch.long)
    start = best.clone()
    for _ in range(epochs):
        optimiser.zero_grad()
        # Each site has parameters of its own, so that the gradient of the sum is that of each.
        ((lens.maps(x[:, in_]) - y[in_]) ** 2).mean((1, 2)).sum().backward()
        optimiser.step()
        error = _error(lens, x[:, out], y[out])
        better = (error < best) & (since < patience)
        for name, p in lens.maps.named_parameters():
            kept[name][better] = p.detach()[better]
        best = torch.where(better, error, best)
        since = torch.where(better, torch.zeros_like(since), since + 1)
        if bool((since >= patience).all()):
            break
    with torch.no_grad():
        for name, p in lens.maps.named_parameters():
            p.copy_(kept[name])
    lens.maps.requires_grad_(False)
    lens.recipe = {"loss": "squared error to the last block's state", "epochs": epochs, "rate": rate, "decay": decay}
    names = [str(sites[i]) for i in below]
    lens.metrics = {
        "validation squared error": {
            name: {"logit lens": float(a), "fitted": float(b)} for name, a, b in zip(names, start, best, strict=True)
        }
    }
    return lens


def _error(lens: FittedLens, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ((lens.maps(x) - y) ** 2).mean((1, 2))


def _copied(lens: FittedLens) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lens.maps.named_parameters()}
