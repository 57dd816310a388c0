"""What every probe can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.probes.labels import matrix


@dataclass(frozen=True)
class Probe(ABC):
    """A decoder from states to classes.

    Attributes:
        kind: one of `KINDS`.
        classes: the labels, in the order of the columns of `scores`.
        width: of the states.
    """

    kind: str
    classes: tuple[Any, ...]
    width: int

    def scores(self, states: Any) -> NDArray[np.float64]:
        """A score for each row and class, [rows, classes]; the largest one is the prediction.

        Differences are log-odds in nats for ``logistic``, ``lda`` and ``mlp``; for ``ridge`` a score estimates the
        one-hot label; for ``mean-difference`` it is 0 half-way between the mean of the class and that of the others.

        Args:
            states: [rows, width] in the units of those that the probe was fitted on.

        Raises:
            InputError: the states are of another width, or NaN.
        """
        given = matrix(states)
        if given.shape[1] != self.width:
            raise InputError(f"the states are of width {given.shape[1]}, and this probe was fitted on {self.width}")
        return self._scores(given)

    @abstractmethod
    def _scores(self, states: NDArray[Any]) -> NDArray[np.float64]: ...

    def predict(self, states: Any) -> list[Any]:
        """The label with the largest score, for each row."""
        return [self.classes[i] for i in self.scores(states).argmax(axis=1)]

    @property
    def directions(self) -> NDArray[np.float64]:
        """[classes, width]: how each score changes with the state, in the units of the original states.

        Raises:
            InputError: the probe is not linear.
        """
        raise InputError(f"a probe of kind {self.kind!r} is not linear and has no direction: fit a linear kind")

    def direction(self, label: Any) -> NDArray[np.float64]:
        """The direction [width] of one class; adding it to a state raises the class's score.

        Raises:
            InputError: there is no such class, or the probe is not linear.

        Example:
            ``iv.add("8.resid_post", probe.direction("French"), strength=4)``
        """
        found = self.directions
        if label not in self.classes:
            raise InputError(f"this probe has no class {label!r}; it has {some(self.classes)}")
        return found[self.classes.index(label)]


def some(names: tuple[Any, ...]) -> str:
    """The first few of some labels, for a message."""
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
