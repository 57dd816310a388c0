"""How far apart classes are, without a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from logitlab.errors import InputError
from logitlab.probes.kinds import options_of
from logitlab.probes.labels import label_codes, matrix
from logitlab.probes.linear import shrunk
from logitlab.probes.moments import Moments


@dataclass(frozen=True)
class Separability:
    """Measures of how far apart classes are; on the states themselves, so that nothing is held out.

    Attributes:
        ratio: ``tr(B) / tr(W)``, with B the scatter of the class means about the mean, each as often as it has rows,
            and W the scatter of the states about the mean of their class; infinite where no class varies.
        fisher: ``tr(W'^-1 B)`` (Fukunaga 1990, criterion J1), with ``W' = (1 - s) W + s tr(W) / width I``. It does not
            change with linear maps where s is 0; infinite where no class varies.
        silhouette: mean over rows of ``(b - a) / max(a, b)``, with a the mean distance to the others of the own class
            and b that to the nearest other class (Rousseeuw 1987), from -1 to 1; NaN if it was not asked for.
    """

    ratio: float
    fisher: float
    silhouette: float


def separability(states: Any, labels: Any, *, shrinkage: float = 0.1, silhouette: bool = False) -> Separability:
    """Measure how far apart classes are.

    Args:
        states: [rows, width].
        labels: one a row.
        shrinkage: s of `Separability.fisher`, from 0 to 1; with 0 there have to be more rows than coordinates.
        silhouette: whether it is computed too: it takes rows times rows distances, and scikit-learn.

    Raises:
        InputError: labels of another number, one class only, NaN, or the scatter within classes is singular.

    Example:
        >>> import numpy as np
        >>> found = separability(np.array([[0.0], [2.0], [10.0], [12.0]]), [0, 0, 1, 1], shrinkage=0)
        >>> found.ratio, found.fisher
        (25.0, 25.0)
    """
    given = matrix(states)
    amount = float(options_of("lda", {"shrinkage": shrinkage})["shrinkage"])
    names, codes = label_codes(labels, len(given))
    sums = Moments.empty(names, given.shape[1])
    sums.add(given, codes)
    within, between = sums.within, sums.between
    trace = float(np.trace(within))
    if trace <= 1e-12 * float(np.trace(sums.total)):
        ratio = fisher = float("inf")
    else:
        ratio = float(np.trace(between)) / trace
        # Over the trace: what counts as rounding there does not depend on the unit of the states.
        used = trace * shrunk(within / trace, amount) if amount else within
        if np.linalg.cond(used) > 1e12:
            raise InputError("the scatter within classes is singular: give more rows, or a shrinkage above 0")
        fisher = float(np.trace(np.linalg.solve(used, between)))
    return Separability(ratio, fisher, _silhouette(given, codes) if silhouette else float("nan"))


def _silhouette(states: Any, codes: Any) -> float:
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise InputError("the silhouette needs scikit-learn: pip install 'logitlab[probes]'") from error
    if len(np.unique(codes)) >= len(codes):
        raise InputError("every row is a class of its own: there is no silhouette")
    return float(silhouette_score(states, codes))
