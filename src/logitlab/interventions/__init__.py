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

__all__ = [
    "Cut",
    "Intervention",
    "Patching",
    "Steering",
    "ablate",
    "add",
    "clamp",
    "cut",
    "intervene",
    "patch",
    "project_out",
    "replace",
    "resample",
    "scale",
    "swap",
]
