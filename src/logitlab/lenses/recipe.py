"""How a lens is fitted, and where a fit stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from logitlab.errors import InputError
from logitlab.models.inputs import whole_number


@dataclass(frozen=True)
class Recipe:
    """How a lens is fitted.

    Attributes:
        kind: family of maps.
        steps: optimiser steps.
        windows_per_step: windows of one step.
        length: tokens of a window.
        share: part of the positions of a window that are used, drawn anew for each step.
        optimiser: ``adam`` or ``sgd`` (with Nesterov momentum 0.9).
        rate: learning rate at the start; it falls linearly to zero.
        decay: weight decay, towards the identity (decoupled from the gradient with ``adam``).
        clip: largest norm of the gradient of one site's map; None for no limit.
        clip_together: whether ``clip`` is for the gradient of all maps together, as in tuned-lens; then what becomes
            of a site depends on the others.
        validate_every: steps between two looks at the validation windows.
        validation_windows: windows that are set aside for stopping, before those that are fitted on.
        patience: looks without an improvement at any site after which fitting stops.
        products: ``bfloat16`` rounds what is multiplied with the head for the gradient, where the machine is quicker at
            that; sums, maps and the optimiser are float32, and so is all that is validated. ``float32`` does not.
        seed: of the order of windows and the choice of positions.
    """

    kind: str = "affine"
    steps: int = 250
    windows_per_step: int = 4
    length: int = 256
    share: float = 0.25
    optimiser: str = "adam"
    rate: float = 1e-3
    decay: float = 1e-3
    clip: float | None = 1.0
    clip_together: bool = False
    validate_every: int = 25
    validation_windows: int = 8
    patience: int = 4
    products: str = "bfloat16"
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` if a number is out of range."""
        whole = ("steps", "windows_per_step", "length", "validate_every", "validation_windows", "patience")
        bad = next((name for name in whole if whole_number(getattr(self, name), name) < 1), None)
        if bad is not None:
            raise InputError(f"{bad} is {getattr(self, bad)}; it must be at least 1")
        if whole_number(self.seed, "seed") < 0:
            raise InputError(f"seed is {self.seed}; it must be at least 0")
        for name in ("share", "rate", "decay", "clip"):
            value: Any = getattr(self, name)
            is_number = not isinstance(value, bool) and isinstance(value, Real)
            if not is_number and not (name == "clip" and value is None):
                raise InputError(f"{name} is {value!r}; it must be a number")
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}; it is a part of the positions, above 0 and at most 1")
        if not self.rate > 0 or not math.isfinite(self.rate):
            raise InputError(f"rate is {self.rate}; it must be above 0")
        if not self.decay >= 0 or (self.clip is not None and not self.clip > 0):
            raise InputError(f"decay is {self.decay} and clip {self.clip}; neither may be negative, nor clip 0")
        if self.optimiser not in ("adam", "sgd"):
            raise InputError(f"there is no optimiser {self.optimiser!r}; there are adam and sgd")
        if self.products not in ("bfloat16", "float32"):
            raise InputError(f"products is {self.products!r}; it is bfloat16 or float32")


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step: steps done.
        steps: steps in all.
        tokens: tokens that went through the model in this run.
        loss: mean of the sites' KL in the last step, nats.
        validation: mean of the sites' best KL on the validation windows so far, nats.
        seconds: how long this run has taken.
        left: seconds that are left at this rate.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    validation: float
    seconds: float
    left: float

    @property
    def words(self) -> str:
        """Rate and loss in words."""
        rate = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        return rate if math.isnan(self.loss) else f"{rate}, KL {self.loss:.4f} (validation {self.validation:.4f})"
