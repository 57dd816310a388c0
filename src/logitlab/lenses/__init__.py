"""Lenses: maps from a hidden state to the space that the tail reads."""

from logitlab.lenses.base import Lens
from logitlab.lenses.logit import LogitLens

__all__ = ["Lens", "LogitLens"]
