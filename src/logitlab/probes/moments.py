"""Sums over states from which linear probes are fitted exactly: a stream needs no more memory than its sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.probes.labels import BATCH, Codes, matrix

if TYPE_CHECKING:
    from logitlab.probes.linear import LinearProbe

Array = NDArray[np.float64]


@dataclass
class Moments:
    """Sums over labelled states: how many, their sum by class, and the sum of their outer products, in float64.

    Sums are taken about a fixed point (the mean of the first batch), so that states far from 0 lose no digits. Sums of
    parts can be added and taken away: a fit without one fold is the fit of the whole without the fold's sums.

    Attributes:
        classes: the labels, in the order in which a probe's scores have them.
        shift: [width], the point about which sums are taken.
        counts: [classes], rows by class.
        sums: [classes, width], sums of ``state - shift`` by class.
        scatter: [width, width], sum of the outer products of ``state - shift``.

    Example:
        >>> import numpy as np
        >>> moments = Moments.empty(["a", "b"], width=2)
        >>> moments.update(np.array([[0.0, 1.0], [2.0, 1.0]]), ["a", "b"])
        >>> moments.update(np.array([[0.0, 3.0], [2.0, 3.0]]), ["a", "b"])
        >>> moments.fit("mean-difference").direction("b").tolist()
        [2.0, 0.0]
    """

    classes: tuple[Any, ...]
    shift: Array
    counts: Array
    sums: Array
    scatter: Array

    @staticmethod
    def empty(classes: Sequence[Any], width: int) -> Moments:
        """Sums over no state yet.

        Raises:
            InputError: there are fewer than two classes, or one is named twice.
        """
        names = tuple(classes)
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"{list(names)} are no classes: give at least two, each once")
        return Moments(
            names, np.zeros(width), np.zeros(len(names)), np.zeros((len(names), width)), np.zeros((width, width))
        )

    @property
    def width(self) -> int:
        """Of the states."""
        return len(self.shift)

    def update(self, states: Any, labels: Any) -> None:
        """Add some states [rows, width] with one label each.

        Raises:
            InputError: the states are of another width or NaN, or a label is not among the classes.
        """
        given = matrix(states)
        if given.shape[1] != self.width:
            raise InputError(f"the states are of width {given.shape[1]}, and these sums of {self.width}")
        listed: list[Any] = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        if len(listed) != len(given):
            raise InputError(f"there are {len(listed)} labels for {len(given)} rows: give one for each")
        number = {name: i for i, name in enumerate(self.classes)}
        strange = next((v for v in listed if v not in number), None)
        if strange is not None:
            raise InputError(f"label {strange!r} is not among the classes of these sums")
        self.add(given, np.array([number[v] for v in listed], dtype=np.int64))

    def add(self, states: NDArray[Any], codes: Codes, *, scatter: bool = True) -> None:
        """`update` with numbers of classes, and states that were checked; perhaps without the outer products."""
        if len(states) and not self.counts.any() and not self.shift.any():
            self.shift = states[:BATCH].mean(axis=0, dtype=np.float64)
        for start in range(0, len(states), BATCH):
            rows = states[start : start + BATCH] - self.shift
            some = codes[start : start + BATCH]
            order = np.argsort(some, kind="stable")
            found, starts, counts = np.unique(some[order], return_index=True, return_counts=True)
            self.counts[found] += counts
            self.sums[found] += np.add.reduceat(rows[order], starts, axis=0)
            if scatter:
                self.scatter += rows.T @ rows

    def merge(self, other: Moments) -> Moments:
        """The sums of both.

        Raises:
            InputError: they are of other classes or another width.
        """
        return self._with(other, 1.0)

    def without(self, other: Moments) -> Moments:
        """These sums less those of a part of the same states.

        Raises:
            InputError: they are of other classes or another width, or of more states than these.
        """
        if (other.counts > self.counts).any():
            raise InputError("sums of more states cannot be taken away from sums of fewer")
        return self._with(other, -1.0)

    def relabelled(self, batches: Iterable[tuple[NDArray[Any], Codes]]) -> Moments:
        """The same states with other labels: outer products stay, only sums by class are taken anew."""
        found = replace(
            self,
            counts=np.zeros_like(self.counts),
            sums=np.zeros_like(self.sums),
            scatter=self.scatter.copy(),  # these are added to in place
        )
        for states, codes in batches:
            found.add(states, codes, scatter=False)
        return found

    def present(self) -> tuple[Moments, Codes]:
        """The sums of those classes that have rows, and their numbers."""
        (which,) = self.counts.nonzero()
        names = tuple(self.classes[i] for i in which)
        found = replace(
            self, classes=names, counts=self.counts[which], sums=self.sums[which], scatter=self.scatter.copy()
        )
        return found, which

    def fit(self, kind: str, **options: Any) -> LinearProbe:
        """A probe of kind ``ridge``, ``lda`` or ``mean-difference``; the same as from the states themselves.

        Raises:
            InputError: another kind, an option that it does not have, or a class without states.
        """
        from logitlab.probes.kinds import CLOSED, options_of

        chosen = options_of(kind, options)
        if kind not in CLOSED:
            raise InputError(f"kind {kind!r} cannot be fitted from sums; {', '.join(CLOSED)} can")
        empty = [name for name, count in zip(self.classes, self.counts, strict=True) if not count]
        if empty:
            raise InputError(f"there are no states of class {empty[0]!r}: add some, or leave it out")
        return CLOSED[kind](self, **chosen)

    # -- what follows from the sums, in float64 ------------------------------------------------------

    @property
    def mean(self) -> Array:
        """[width]: the mean of ``state - shift``."""
        return self.sums.sum(axis=0) / self.counts.sum()

    @property
    def means(self) -> Array:
        """[classes, width]: by class."""
        return self.sums / self.counts[:, None]

    @property
    def total(self) -> Array:
        """[width, width]: scatter about the mean."""
        return self.scatter - self.counts.sum() * np.outer(self.mean, self.mean)

    @property
    def within(self) -> Array:
        """[width, width]: scatter about the means of the classes."""
        return self.scatter - self.sums.T @ self.means

    @property
    def between(self) -> Array:
        """[width, width]: scatter of the means of the classes about the mean, each as often as it has rows."""
        away = self.means - self.mean
        return (away * self.counts[:, None]).T @ away

    @property
    def deviation(self) -> Array:
        """[width]: standard deviation of each coordinate; 1 where it does not vary."""
        found = np.sqrt(np.maximum(np.diag(self.total), 0) / self.counts.sum())
        # A constant's deviation is what is left of rounding, or of taking sums away.
        size = np.abs(self.mean + self.shift) + np.sqrt(np.diag(self.scatter) / self.counts.sum())
        return np.where(found > 1e-7 * size, found, 1.0)

    def _with(self, other: Moments, sign: float) -> Moments:
        if other.classes != self.classes or other.width != self.width:
            raise InputError("these sums are of other classes or of another width, and cannot be put together")
        if not self.counts.any():
            return replace(other, counts=sign * other.counts, sums=sign * other.sums, scatter=sign * other.scatter)
        moved = other._about(self.shift)
        return Moments(
            self.classes,
            self.shift,
            self.counts + sign * moved.counts,
            self.sums + sign * moved.sums,
            self.scatter + sign * moved.scatter,
        )

    def _about(self, point: Array) -> Moments:
        """The same sums about another point."""
        step = self.shift - point
        if not step.any():
            return self
        cross = np.outer(self.sums.sum(axis=0), step)
        scatter = self.scatter + cross + cross.T + self.counts.sum() * np.outer(step, step)
        return replace(self, shift=point, sums=self.sums + self.counts[:, None] * step, scatter=scatter)
