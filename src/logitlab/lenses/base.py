"""What every lens is: a map applied to a hidden state before the model's own tail decodes it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from logitlab.logits import Head
from logitlab.models.handle import Model
from logitlab.models.sites import Site
from logitlab.models.vocabulary import ColumnLabels


@runtime_checkable
class Lens(Protocol):
    """A map from hidden states to hidden states that the tail can decode.

    The identity is the logit lens; fitted lenses start there.
    """

    @property
    def name(self) -> str:
        """What the lens is called in readings."""
        ...

    def check(self, model: Model, sites: list[Site]) -> None:
        """Raise `InputError` if the lens cannot be used on this model at these sites."""
        ...

    def transport(self, hidden: torch.Tensor, site: Site) -> torch.Tensor:
        """Map hidden states of one site, [..., width] to [..., width]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        ...


@runtime_checkable
class OwnColumns(Protocol):
    """A lens that decodes into columns of its own, in place of the model's.

    Attributes:
        columns: what its columns are called.
    """

    columns: ColumnLabels

    def source(self, model: Model) -> Head:
        """The linear head that takes the place of the model's, behind the model's final norm."""
        ...
