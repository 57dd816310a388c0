"""Interventions: temporary changes of what happens at some sites of a model."""

from logitlab.interventions.apply import Steering, intervene
from logitlab.interventions.attention import Cut, cut
from logitlab.interventions.intervention import (
    Intervention,
    ablate,
    add,
    clamp,
    project_out,
    replace,
    resample,
    scale,
    swap,
)
from logitlab.interventions.patching import Patching, patch
from logitlab.interventions.paths import Paths, patch_paths
from logitlab.interventions.vectors import Vectors

__all__ = [
    "Cut",
    "Intervention",
    "Patching",
    "Paths",
    "Steering",
    "Vectors",
    "ablate",
    "add",
    "clamp",
    "cut",
    "intervene",
    "patch",
    "patch_paths",
    "project_out",
    "replace",
    "resample",
    "scale",
    "swap",
]
