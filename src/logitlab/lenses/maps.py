"""The families of fitted lenses, as maps of hidden states. Every one starts as the identity.

Maps of several sites are kept in one stack of parameters, so that all sites are fitted at once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from logitlab.errors import InputError

EVERY = slice(None)
"""All sites."""


class Maps(nn.Module):
    """One map for each of several sites, in float32.

    Args:
        sites: how many.
        width: size of a hidden state.

    Attributes:
        kind: what the family is called.
        title: what its lens is called in readings.
    """

    kind: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.sites, self.width = sites, width

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """Map states [sites, n, width], of all sites or of those in ``which``; shape and dtype stay."""
        raise NotImplementedError

    def one(self, hidden: torch.Tensor, site: int) -> torch.Tensor:
        """Map states [..., width] of one site; they keep their dtype, and are mapped in float32 or better."""
        flat = hidden.reshape(1, -1, self.width).to(torch.promote_types(hidden.dtype, torch.float32))
        return self(flat, slice(site, site + 1)).reshape(hidden.shape).to(hidden.dtype)

    def options(self) -> dict[str, int]:
        """What it takes to make an empty one, beside the numbers of sites and of a state."""
        return {}


def _picked(parameter: torch.Tensor, which: slice, like: torch.Tensor) -> torch.Tensor:
    return parameter[which].to(like.dtype)


class Bias(Maps):
    """h + b."""

    kind, title = "bias", "bias lens"

    def __init__(self, sites: int, width: int) -> None:
        super().__init__(sites, width)
        self.bias = nn.Parameter(torch.zeros(sites, width))

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """See `Maps`."""
        return hidden + _picked(self.bias, which, hidden).unsqueeze(1)


class Diagonal(Maps):
    """(1 + δ) ⊙ h + b."""

    kind, title = "diagonal", "diagonal lens"

    def __init__(self, sites: int, width: int) -> None:
        super().__init__(sites, width)
        self.delta = nn.Parameter(torch.zeros(sites, width))
        self.bias = nn.Parameter(torch.zeros(sites, width))

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """See `Maps`."""
        delta, bias = _picked(self.delta, which, hidden), _picked(self.bias, which, hidden)
        return hidden + hidden * delta.unsqueeze(1) + bias.unsqueeze(1)


class LowRank(Maps):
    """h + U V h + b, with U [width, rank] and V [rank, width].

    U starts at zero and V does not, so that it is the identity and yet has a gradient. V is random, from the seed 0.

    Raises:
        InputError: the rank is not between 1 and the width.
    """

    kind, title = "low-rank", "low-rank lens"

    def __init__(self, sites: int, width: int, rank: int = 32) -> None:
        super().__init__(sites, width)
        if not 1 <= rank <= width:
            raise InputError(f"rank is {rank}; it must be between 1 and the width of a hidden state, {width}")
        self.rank = rank
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.zeros(sites, width, rank))
        self.down = nn.Parameter(torch.randn(sites, rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(sites, width))

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """See `Maps`."""
        up, down, bias = (_picked(p, which, hidden) for p in (self.up, self.down, self.bias))
        return torch.baddbmm(hidden + bias.unsqueeze(1), hidden @ down.transpose(1, 2), up.transpose(1, 2))

    def options(self) -> dict[str, int]:
        """See `Maps`."""
        return {"rank": self.rank}


class Affine(Maps):
    """h + A h + b: the tuned lens (Belrose et al. 2023, arXiv 2303.08112).

    What is stored is the difference A from the identity, so that weight decay pulls towards the logit lens.
    """

    kind, title = "affine", "tuned lens"

    def __init__(self, sites: int, width: int) -> None:
        super().__init__(sites, width)
        self.weight = nn.Parameter(torch.zeros(sites, width, width))
        self.bias = nn.Parameter(torch.zeros(sites, width))

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """See `Maps`."""
        weight, bias = _picked(self.weight, which, hidden), _picked(self.bias, which, hidden)
        return torch.baddbmm(hidden + bias.unsqueeze(1), hidden, weight.transpose(1, 2))


class Linear(Maps):
    """J h: the Jacobian lens (Gurnee et al. 2026), whose J is not fitted by descent but measured."""

    kind, title = "jacobian", "Jacobian lens"

    def __init__(self, sites: int, width: int) -> None:
        super().__init__(sites, width)
        self.weight = nn.Parameter(torch.eye(width).repeat(sites, 1, 1))

    def forward(self, hidden: torch.Tensor, which: slice = EVERY) -> torch.Tensor:
        """See `Maps`."""
        return hidden @ _picked(self.weight, which, hidden).transpose(1, 2)


FAMILIES: dict[str, type[Maps]] = {m.kind: m for m in (Bias, Diagonal, LowRank, Affine, Linear)}
"""Families of maps by their kind."""


def maps_of(kind: str, sites: int, width: int, **options: int) -> Maps:
    """An identity of one of the `FAMILIES`.

    Raises:
        InputError: there is no such family, or an option does not suit it.
    """
    if kind not in FAMILIES:
        raise InputError(f"there is no lens of kind {kind!r}; the kinds are {', '.join(FAMILIES)}")
    if options and kind != "low-rank":
        raise InputError(f"a {kind} lens takes no {' and '.join(options)}; only a low-rank lens has a rank")
    return FAMILIES[kind](sites, width, **options)
