"""States in which it is known what can be told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(
    rows: int = 400, width: int = 16, classes: int = 3, gap: float = 4.0, seed: int = 0
) -> tuple[Array, NDArray[np.int64]]:
    """Gaussian classes with one skew covariance, whose means are ``gap`` deviations apart, far from 0."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, classes, rows)
    skew = np.eye(width) + 0.3 * draw.normal(size=(width, width)) / np.sqrt(width)
    means = gap / np.sqrt(2) * np.eye(classes, width)
    return (means[codes] + draw.normal(size=(rows, width))) @ skew + 50 * draw.normal(size=width), codes


def xor(rows: int = 400, width: int = 16, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """Two signs in two coordinates; the label is whether they are the same."""
    draw = np.random.default_rng(seed)
    signs = draw.choice([-1, 1], size=(rows, 2))
    states = 0.3 * draw.normal(size=(rows, width))
    states[:, :2] += 3 * signs
    return states, (signs[:, 0] == signs[:, 1]).astype(np.int64)


def noise(rows: int = 200, width: int = 16, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """States and labels that have nothing to do with each other."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, width)), draw.permutation(np.arange(rows) % 2)
