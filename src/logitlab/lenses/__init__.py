"""Lenses: maps from a hidden state to the space that the tail reads."""

from logitlab.lenses.base import Lens, OwnColumns
from logitlab.lenses.concept import ConceptLens
from logitlab.lenses.fitted import FittedLens, identity
from logitlab.lenses.load import load_lens
from logitlab.lenses.logit import LogitLens
from logitlab.lenses.maps import FAMILIES
from logitlab.lenses.patchscope import PatchscopeLens

__all__ = [
    "FAMILIES",
    "ConceptLens",
    "FittedLens",
    "Lens",
    "LogitLens",
    "OwnColumns",
    "PatchscopeLens",
    "identity",
    "load_lens",
]
