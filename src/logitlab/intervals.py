"""95 % intervals of means by the percentile bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from logitlab.errors import InputError


class Mean(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        value: the mean.
        low: lower end.
        high: upper end.
        n: of how many units (prompts, groups) it is.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(successes: int, n: int) -> Mean:
    """A share with its exact interval (Clopper and Pearson 1934), which has a width also where all or none are.

    Args:
        successes: how many.
        n: of how many, each by itself.

    Raises:
        InputError: there are more successes than units.

    Example:
        ``proportion(3, 3).low`` is 0.292: three of three are no proof of all.
    """
    if not 0 <= successes <= n:
        raise InputError(f"there are {successes} successes of {n}: give at most as many")
    if n == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise InputError("an exact interval needs SciPy: pip install 'logitlab[probes]'") from error
    found = binomtest(successes, n).proportion_ci(method="exact")
    return Mean(successes / n, float(found.low), float(found.high), n)


def bootstrap(values: ArrayLike, *, groups: ArrayLike | None = None, resamples: int = 2000, seed: int = 0) -> Mean:
    """The mean of some numbers, with the percentile bootstrap's interval (Efron 1979).

    Differences of pairs are given as such, so that the interval is a paired one. With few units the interval is too
    narrow (of ten units it holds the mean in about nine of ten cases, of three in three of four); one unit has none:
    its ends are NaN. Where all units are equal it has no width; shares of few have `proportion`.

    Args:
        values: [n]; NaN are left out.
        groups: [n] names of what is drawn together (all values of one task, say); by default each value by itself.
        resamples: how many samples are drawn.
        seed: of the draws.

    Raises:
        InputError: lengths differ, a value is infinite or no number, or an option cannot be used.

    Example:
        ``bootstrap(steered - plain).low > 0``
    """
    if resamples < 1 or seed < 0:
        raise InputError(f"resamples is {resamples} and seed {seed}; they must be at least 1 and 0")
    try:
        given = np.asarray(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError(f"the values are not all numbers ({error})") from error
    if np.isinf(given).any():
        raise InputError("a value is infinite: there is no mean")
    names = np.arange(len(given)) if groups is None else np.asarray(groups).reshape(-1)
    if len(names) != len(given):
        raise InputError(f"there are {len(given)} values and {len(names)} groups: give one for each")
    kept = ~np.isnan(given)
    given, names = given[kept], names[kept]
    if not len(given):
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    _, which = np.unique(names, return_inverse=True)
    n = int(which.max()) + 1
    if n == 1:
        return Mean(float(given.mean()), float("nan"), float("nan"), 1)
    sums, counts = np.bincount(which, given, n), np.bincount(which, minlength=n)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = min(256, max(1, (1 << 22) // n))  # 32 MB of numbers
    for start in range(0, resamples, step):
        drawn = rng.integers(n, size=(min(step, resamples - start), n))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(float(given.mean()), float(low), float(high), n)
