"""Vectors from two sets of prompts: the difference of means, and the first principal component of differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.interventions.vectors import Vectors
from logitlab.models.capture import Activations, capture
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number

ROUNDING = 1e-6
"""A difference that is no larger than this share of the states is taken for their rounding."""


def mean_difference(
    model: Model,
    positive: Any,
    negative: Any,
    sites: Any = None,
    *,
    position: int | Sequence[int] | slice = -1,
    progress: Callable[[int, int], None] | None = None,
) -> Vectors:
    """The mean state of some prompts minus that of others.

    Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681) takes it over pairs that differ in one
    answer; a function vector takes it over prompts with and without demonstrations.

    Args:
        model: the model.
        positive: prompts in any form that `logitlab.read` takes, or what `logitlab.capture` has kept.
        negative: likewise.
        sites: which sites, as in `logitlab.read`; by default the output of each block.
        position: at which token of each prompt, as in `logitlab.capture`; of several, all count.
        progress: called with the numbers of prompts done and in all.

    Raises:
        InputError: an argument cannot be used, or the means are equal at a site (but for rounding).

    Example:
        ``mean_difference(model, ["I love this"], ["I hate this"], "12.resid_post")``
    """
    high, low = _both(model, positive, negative, sites, position, progress)
    values: dict[str, torch.Tensor] = {}
    for site in high.sites:
        one, two = high[site].double().mean(0), low[site].double().mean(0)
        values[str(site)] = one - two
        if float((one - two).norm()) <= ROUNDING * float(one.norm() + two.norm()):
            raise InputError(f"both sets of prompts have the same mean state at {site}: their difference says nothing")
    recipe = {"positive": len(high.prompts), "negative": len(low.prompts)}
    return Vectors(values, "mean difference", model.about, recipe | _where(positive, negative, position))


def principal(
    model: Model,
    positive: Any,
    negative: Any,
    sites: Any = None,
    *,
    component: int = 0,
    position: int = -1,
    progress: Callable[[int, int], None] | None = None,
) -> Vectors:
    """A principal component of the differences of pairs of prompts.

    The differences of the pairs are not centred: what they share is what is wanted (Zou et al. 2023, arXiv 2310.01405,
    who draw signs at random instead). The component points from the negative to the positive ones; its length is the
    root mean square of the differences along it, so that strength 1 is about one difference.

    Args:
        model: the model.
        positive: prompts in any form that `logitlab.read` takes, or what `logitlab.capture` has kept.
        negative: as many; the n-th belongs to the n-th positive one.
        sites: which sites, as in `logitlab.read`; by default the output of each block.
        component: which component, from 0.
        position: at which token of each prompt.
        progress: called with the numbers of prompts done and in all.

    Raises:
        InputError: an argument cannot be used, there are fewer differences than components, or the differences are zero
            (but for rounding).

    Example:
        ``principal(model, ["I love it", "I adore it"], ["I hate it", "I loathe it"], "12.resid_post")``
    """
    high, low = _both(model, positive, negative, sites, position, progress)
    if len(high.prompts) != len(low.prompts):
        raise InputError(
            f"there are {len(high.prompts)} positive and {len(low.prompts)} negative prompts: principal() needs pairs"
        )
    rows = [list(map(len, one.positions)) for one in (high, low)]
    if rows[0] != rows[1]:
        raise InputError("the activations have other numbers of positions for both prompts of a pair: capture one each")
    number = whole_number(component, "component")
    values: dict[str, torch.Tensor] = {}
    for site in high.sites:
        one, two = high[site].double(), low[site].double()
        differences = one - two  # [pairs, width]
        _, sizes, basis = torch.linalg.svd(differences, full_matrices=False)
        rank = int((sizes > ROUNDING * (one.norm() + two.norm())).sum())
        if not 0 <= number < rank:
            raise InputError(
                f"component is {number}; the {len(differences)} differences at {site} span {rank} dimensions "
                f"({f'0 to {rank - 1}' if rank else 'they are all zero'})"
            )
        along = basis[number]
        towards = float((differences @ along).sum())
        size = sizes[number] / len(differences) ** 0.5
        values[str(site)] = along * size * (1.0 if towards >= 0 else -1.0)
    recipe = {"pairs": len(high.prompts), "component": number, **_where(positive, negative, position)}
    return Vectors(values, "principal component of differences", model.about, recipe)


def _both(
    model: Model,
    positive: Any,
    negative: Any,
    sites: Any,
    position: Any,
    progress: Callable[[int, int], None] | None,
) -> tuple[Activations, Activations]:
    chosen = model.select_sites("resid_post" if sites is None else sites)
    found: list[Activations] = []
    for given, what in ((positive, "positive"), (negative, "negative")):
        if isinstance(given, Activations):
            missing = next((s for s in chosen if s not in given.sites), None)
            if missing is not None:
                raise InputError(f"the {what} activations have no site {missing}: name the sites that were captured")
            found.append(given)
        else:
            found.append(capture(model, given, chosen, position, progress=progress))
    for one, what in zip(found, ("positive", "negative"), strict=True):
        bad = next((s for s in chosen if not bool(torch.isfinite(one[s]).all())), None)
        if bad is not None:
            raise InputError(f"the {what} states at {bad} are NaN or infinite: there is no mean")
    return _only(found[0], chosen), _only(found[1], chosen)


def _only(kept: Activations, sites: Sequence[Any]) -> Activations:
    return Activations(tuple(sites), kept.prompts, kept.positions, kept.kept, kept.projections, kept.answers)


def _where(positive: Any, negative: Any, position: Any) -> dict[str, Any]:
    """For the record at which tokens states were taken; of activations that is not known in words."""
    kept = [isinstance(one, Activations) for one in (positive, negative)]
    return {"position": "as captured" if all(kept) else _plain(position)}


def _plain(position: Any) -> Any:
    if isinstance(position, slice):
        return ":".join("" if v is None else str(v) for v in (position.start, position.stop, position.step))
    if isinstance(position, Sequence):
        return [whole_number(p, "position") for p in position]
    return None if position is None else whole_number(position, "position")
