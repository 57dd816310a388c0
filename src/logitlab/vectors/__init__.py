"""Vectors: directions that say something, from differences, demonstrations, lenses and probes; and what they do."""

from logitlab.interventions.vectors import Vectors
from logitlab.vectors.differences import mean_difference, principal
from logitlab.vectors.effect import Effect, Match, effect
from logitlab.vectors.heads import HeadEffects, head_effects
from logitlab.vectors.incontext import Examples, function_vectors
from logitlab.vectors.readout import from_probe, lens_directions

__all__ = [
    "Effect",
    "Examples",
    "HeadEffects",
    "Match",
    "Vectors",
    "effect",
    "from_probe",
    "function_vectors",
    "head_effects",
    "lens_directions",
    "mean_difference",
    "principal",
]
