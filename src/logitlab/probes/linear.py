"""Linear probes: one direction and one offset a class.

``ridge``, ``lda`` and ``mean-difference`` follow from sums (`Moments`) in closed form, in float64. States are
standardised with the mean and deviation of what the probe is fitted on, but for ``mean-difference``; directions and
offsets are then written in the units of the original states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.probes.labels import BATCH, Codes, matrix
from logitlab.probes.moments import Moments
from logitlab.probes.probe import Probe

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearProbe(Probe):
    """``scores = states @ directions.T + offsets``.

    Attributes:
        weights: [classes, width], the directions.
        offsets: [classes].
    """

    weights: Array = field(repr=False)
    offsets: Array = field(repr=False)

    @property
    def directions(self) -> Array:
        """[classes, width]: how each score changes with the state, in the units of the original states."""
        return self.weights

    def _scores(self, states: NDArray[Any]) -> Array:
        found = np.empty((len(states), len(self.classes)))
        for start in range(0, len(states), BATCH):
            found[start : start + BATCH] = states[start : start + BATCH].astype(np.float64) @ self.weights.T
        return found + self.offsets


def ridge(moments: Moments, *, penalty: float) -> LinearProbe:
    """Least squares on one-hot labels, plus ``penalty`` times the squared norm of the standardised weights.

    The same as scikit-learn's ``Ridge(alpha=penalty)`` on standardised states; its largest score is the class that
    ``RidgeClassifier`` predicts.
    """
    mean, scale = moments.mean, moments.deviation
    covariance = moments.total / np.outer(scale, scale)
    covariance[np.diag_indices_from(covariance)] += penalty
    toward = (moments.sums - moments.counts[:, None] * mean) / scale  # [classes, width]
    weights = np.linalg.solve(covariance, toward.T).T / scale
    offsets = moments.counts / moments.counts.sum() - weights @ (mean + moments.shift)
    return LinearProbe("ridge", moments.classes, moments.width, weights, offsets)


def lda(moments: Moments, *, shrinkage: float) -> LinearProbe:
    """Linear discriminant analysis: Gaussian classes with one covariance, the share of rows as prior.

    The covariance is ``(1 - s) W + s tr(W) / width I`` with W the covariance within classes of the standardised states
    (Friedman 1989, equation 18); the same as scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)``.
    Where no class varies within itself, it is the identity.
    """
    mean, scale = moments.mean, moments.deviation
    rows = moments.counts.sum()
    within = moments.within / np.outer(scale, scale) / rows
    covariance = shrunk(within, shrinkage)
    means = (moments.means - mean) / scale
    if shrinkage > 0:
        weights = np.linalg.solve(covariance, means.T).T
    else:
        weights = np.linalg.lstsq(covariance, means.T, rcond=None)[0].T
    offsets = -0.5 * (means * weights).sum(axis=1) + np.log(moments.counts / rows)
    weights = weights / scale
    return LinearProbe("lda", moments.classes, moments.width, weights, offsets - weights @ (mean + moments.shift))


def shrunk(within: Array, shrinkage: float) -> Array:
    """``(1 - s) W + s tr(W) / width I``; the identity where W is nothing but rounding."""
    width = len(within)
    trace = float(np.trace(within))
    if trace <= 1e-12 * width:
        return np.eye(width)
    found = (1 - shrinkage) * within
    found[np.diag_indices_from(found)] += shrinkage * trace / width
    return found


def mean_difference(moments: Moments) -> LinearProbe:
    """For each class the mean of its states less that of all others, 0 half-way between the two."""
    own = moments.means
    rest = (moments.sums.sum(axis=0) - moments.sums) / (moments.counts.sum() - moments.counts)[:, None]
    weights = own - rest
    offsets = -(weights * (0.5 * (own + rest) + moments.shift)).sum(axis=1)
    return LinearProbe("mean-difference", moments.classes, moments.width, weights, offsets)


def logistic(
    states: NDArray[Any], codes: Codes, classes: tuple[Any, ...], *, penalty: float, iterations: int
) -> LinearProbe:
    """Multinomial logistic regression, with ``penalty / 2`` times the squared norm of the standardised weights."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise InputError(
            "logistic probes need scikit-learn: pip install 'logitlab[probes]'; or use ridge, lda"
        ) from error
    rows = states.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    scale = rows.std(axis=0)
    scale = np.where(scale > 1e-7 * np.abs(mean), scale, 1.0)
    rows /= scale
    fitted = LogisticRegression(C=1 / penalty, max_iter=iterations).fit(rows, codes)
    weights, offsets = np.asarray(fitted.coef_), np.asarray(fitted.intercept_)
    if len(classes) == 2:  # one row of log-odds: half for the one class, half against the other
        weights, offsets = np.stack([-weights[0], weights[0]]) / 2, np.array([-offsets[0], offsets[0]]) / 2
    weights = weights / scale
    return LinearProbe("logistic", classes, states.shape[1], weights, offsets - weights @ mean)


@dataclass(frozen=True)
class Regression:
    """A linear map from states to a real number: ``states @ direction + offset``.

    Attributes:
        direction: [width], in the units of the original states.
        offset: a number in the units of the values.
    """

    direction: Array = field(repr=False)
    offset: float

    def predict(self, states: Any) -> Array:
        """The number of each row, [rows].

        Raises:
            InputError: the states are of another width, or NaN.
        """
        given = matrix(states)
        if given.shape[1] != len(self.direction):
            raise InputError(
                f"the states are of width {given.shape[1]}, and this map was fitted on {len(self.direction)}"
            )
        return given @ self.direction + self.offset


def fit_regression(states: Any, values: Any, *, penalty: float = 1.0) -> Regression:
    """Ridge regression of a real number on standardised states.

    Args:
        states: [rows, width].
        values: [rows], finite numbers.
        penalty: weight of the squared norm of the standardised weights, above 0.

    Raises:
        InputError: there are not as many numbers as rows, or an argument cannot be used.

    Example:
        ``fit_regression(ll.capture(model, texts, "8.resid_post", positions=-1)["8.resid_post"], lengths)``
    """
    given = matrix(states)
    numbers = matrix(np.asarray(values).reshape(-1, 1), "the values")[:, 0].astype(np.float64)
    if len(numbers) != len(given):
        raise InputError(f"there are {len(numbers)} values for {len(given)} rows: give one for each")
    number: Any = penalty
    if isinstance(number, bool) or not isinstance(number, int | float | np.number) or not math.isfinite(number):
        raise InputError(f"penalty is {number!r}; it must be a number above 0")
    if penalty <= 0:
        raise InputError(f"penalty is {penalty}; it must be above 0")
    rows = given.astype(np.float64)
    # Any two labels will do: only the mean, the deviation and the scatter are used.
    sums = Moments.empty((0, 1), rows.shape[1])
    sums.add(rows, np.zeros(len(rows), dtype=np.int64))
    scale, mean = sums.deviation, sums.mean + sums.shift
    covariance = sums.total / np.outer(scale, scale)
    covariance[np.diag_indices_from(covariance)] += penalty
    middle = float(numbers.mean())
    direction = np.linalg.solve(covariance, ((rows - mean) / scale).T @ (numbers - middle)) / scale
    return Regression(direction, middle - float(direction @ mean))
