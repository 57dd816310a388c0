"""Vectors from what reads states: lenses, and probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from logitlab.errors import InputError
from logitlab.interventions.vectors import Vectors
from logitlab.lenses import Lens, LogitLens
from logitlab.models.capture import capture
from logitlab.models.handle import Model
from logitlab.models.sites import Site
from logitlab.targets import resolve_targets

if TYPE_CHECKING:
    from logitlab.probes import Probe

ROWS = 256
"""States that are decoded together, at most."""


def lens_directions(
    model: Model,
    token: str | int,
    inputs: Any,
    sites: Any = None,
    *,
    lens: Lens | None = None,
    position: Any = -1,
) -> Vectors:
    """For each site the direction in which a token becomes more likely, as a lens reads it.

    It is the gradient, by the state, of the token's log-probability, through the lens and the model's own final norm
    and head; a mean over the states of some prompts, with length 1. With a Jacobian lens it is the token's row of the
    unembedding brought back through the rest of the model: the direction that, on average and to first order, makes the
    model itself say it.

    Args:
        model: the model.
        token: which token, as text or id.
        inputs: prompts whose states gradients are taken at, in any form that `logitlab.read` takes.
        sites: which sites, as in `logitlab.read`; by default the output of each block.
        lens: a lens; by default the logit lens.
        position: at which token of each prompt, as in `logitlab.capture`; of several, all count.

    Raises:
        InputError: an argument cannot be used, the lens has no gradient, or it is zero at a site.

    Example:
        ``lens_directions(model, " Paris", ["The capital is"], "12.resid_post", lens=load_lens("jacobian"))``
    """
    targets = resolve_targets(model, token)
    if len(targets) != 1:
        raise InputError(f"{len(targets)} tokens are named: a direction is for one")
    chosen = model.select_sites("resid_post" if sites is None else sites)
    through: Lens = LogitLens() if lens is None else lens
    through.check(model, chosen)
    kept = capture(model, inputs, chosen, position)
    values: dict[str, torch.Tensor] = {}
    for site in chosen:
        rows = kept[site].split(ROWS)
        gradient = torch.cat([_gradient(model, through, site, some, targets[0].id) for some in rows]).double().mean(0)
        size = float(gradient.norm())
        if not size > 0:
            raise InputError(f"nothing at {site} changes how likely {targets[0].token!r} is: the gradient is {size}")
        values[str(site)] = gradient / size
    recipe = {"token": targets[0].token, "id": targets[0].id, "lens": through.describe(), "prompts": len(kept.prompts)}
    return Vectors(values, "lens direction", model.about, recipe)


def _gradient(model: Model, lens: Lens, site: Site, hidden: torch.Tensor, token: int) -> torch.Tensor:
    """Gradient of a token's log-probability by states, [rows, width]."""
    with model.exclusive(), torch.enable_grad():
        state = hidden.detach().clone().requires_grad_(True)
        logits = model.tail.logits(lens.transport(state, site))
        said = logits.log_softmax(-1)[:, token].sum()
        found = torch.autograd.grad(said, state, allow_unused=True)[0] if said.requires_grad else None
    if found is None:
        raise InputError(f"{lens.name} has no gradient by the states at {site}: use a lens that is a map of them")
    return found


def from_probe(model: Model, probes: Mapping[Any, Probe], label: Any) -> Vectors:
    """The directions along which linear probes score a label, with length 1.

    Args:
        model: the model whose states they were trained on.
        probes: a linear probe by site, or its name.
        label: one of its classes.

    Raises:
        InputError: a probe is not linear, has no such class, or is for another width, or there is no such site.

    Example:
        ``from_probe(model, {"12.resid_post": fit_probe("logistic", states, labels)}, "positive")``
    """
    if not probes:
        raise InputError("there are no probes: give one by site")
    values: dict[str, torch.Tensor] = {}
    for name, one in probes.items():
        found = model.select_sites(name)
        if len(found) != 1:
            raise InputError(f"{name} is {len(found)} sites: name one for each probe")
        site = found[0]
        along = torch.as_tensor(one.direction(label)).double()
        size = float(along.norm())
        if not size > 0:
            raise InputError(f"the probe at {site} does not look at anything for {label!r}: its direction is zero")
        values[str(site)] = along / size
    kinds = sorted({one.kind for one in probes.values()})
    return Vectors(values, "probe direction", model.about, {"probes": kinds, "label": str(label)})
