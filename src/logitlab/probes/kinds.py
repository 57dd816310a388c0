"""The kinds of probes, their options, and fitting one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from logitlab.errors import InputError
from logitlab.models.inputs import whole_number
from logitlab.probes.labels import Codes, Matrix, label_codes, matrix
from logitlab.probes.linear import LinearProbe, lda, logistic, mean_difference, ridge
from logitlab.probes.mlp import mlp
from logitlab.probes.moments import Moments
from logitlab.probes.probe import Probe

OPTIONS: dict[str, dict[str, Any]] = {
    "logistic": {"penalty": 1.0, "iterations": 1000},
    "ridge": {"penalty": 1.0},
    "lda": {"shrinkage": 0.1},
    "mean-difference": {},
    "mlp": {"hidden": 1024, "epochs": 30, "rate": 1e-3, "decay": 1e-4, "dropout": 0.1, "batch": None},
}
"""The options of each kind and their defaults."""

KINDS = tuple(OPTIONS)

CLOSED: dict[str, Callable[..., LinearProbe]] = {"ridge": ridge, "lda": lda, "mean-difference": mean_difference}
"""Those that follow from sums."""

_WHOLE = ("iterations", "hidden", "epochs", "batch")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "penalty": (lambda v: v > 0, "above 0"),
    "rate": (lambda v: v > 0, "above 0"),
    "decay": (lambda v: v >= 0, "at least 0"),
    "shrinkage": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
}


def options_of(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a kind with their defaults, checked.

    Raises:
        InputError: there is no such kind or option, or a value cannot be used.
    """
    if kind not in OPTIONS:
        raise InputError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
    known = OPTIONS[kind]
    strange = next((name for name in options if name not in known), None)
    if strange is not None:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"a probe of kind {kind!r} has no option {strange!r}; {has}")
    found = known | options
    for name, value in found.items():
        if name in _WHOLE:
            if value is None and name == "batch":
                continue
            if whole_number(value, name) < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
            continue
        fits, words = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise InputError(f"{name} is {value!r}; it must be a number {words}")
        if not fits(float(value)):
            raise InputError(f"{name} is {value}; it must be {words}")
    return found


def fit_probe(
    kind: str, states: Any, labels: Any, *, classes: Sequence[Any] | None = None, seed: int = 0, **options: Any
) -> Probe:
    """Fit one probe on all of some states.

    How well it does on others is what `probe` and `probe_states` measure; this is for using it.

    Args:
        kind: ``logistic``, ``ridge``, ``lda``, ``mean-difference`` or ``mlp``.
        states: [rows, width], an array or a tensor.
        labels: one a row.
        classes: the order of the classes; by default sorted.
        seed: of ``mlp``; the other kinds draw nothing.
        options: ``penalty`` (1; the squared norm of the standardised weights is added ``penalty`` times for ridge, and
            ``penalty / 2`` times for logistic), ``iterations`` (logistic: at most, 1000), ``shrinkage`` (lda: from 0 to
            1, 0.1); for mlp ``hidden`` (1024), ``epochs`` (30), ``rate`` (1e-3), ``decay`` (1e-4), ``dropout`` (0.1),
            ``batch`` (all rows).

    Raises:
        InputError: an unknown kind or option, labels of another number, one class only, states that are NaN, or
            scikit-learn is missing.

    Example:
        >>> import numpy as np
        >>> fitted = fit_probe("lda", np.array([[0.0], [1.0], [4.0], [5.0]]), ["low", "low", "high", "high"])
        >>> fitted.predict(np.array([[0.5], [6.0]]))
        ['low', 'high']
    """
    chosen = options_of(kind, options)
    given = matrix(states)
    names, codes = label_codes(labels, len(given), classes)
    return fitted(kind, given, codes, names, chosen, whole_number(seed, "seed"))


def fitted(
    kind: str, states: Matrix, codes: Codes, classes: tuple[Any, ...], options: dict[str, Any], seed: int
) -> Probe:
    """`fit_probe` for what is checked already; every class has rows."""
    if kind in CLOSED:
        sums = Moments.empty(classes, states.shape[1])
        sums.add(states, codes)
        return CLOSED[kind](sums, **options)
    if kind == "mlp":
        return mlp(states, codes, classes, seed=seed, **options)
    return logistic(states, codes, classes, **options)
