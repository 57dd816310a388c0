"""The logit lens: decode a hidden state as if it were the last one (nostalgebraist, 2020)."""

from __future__ import annotations

from typing import Any

import torch

from logitlab.models.handle import Model
from logitlab.models.sites import Site


class LogitLens:
    """The identity map: logits = tail(hidden).

    At the last block's output it gives the model's own logits; that is checked on every load.
    """

    @property
    def name(self) -> str:
        """What the lens is called in readings."""
        return "logit lens"

    def check(self, model: Model, sites: list[Site]) -> None:
        """Every verified site can be read."""

    def transport(self, hidden: torch.Tensor, site: Site) -> torch.Tensor:
        """Hidden states, unchanged."""
        return hidden

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        return {"name": self.name}
