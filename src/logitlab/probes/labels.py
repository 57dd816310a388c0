"""What callers give, as arrays: labels, groups and types as numbers, states as finite matrices."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError

Codes = NDArray[np.int64]
"""Numbers of classes, groups or types, one a row."""

Matrix = NDArray[Any]
"""Rows of float32 or float64, [rows, width]."""


def label_codes(labels: Any, rows: int, classes: Sequence[Any] | None = None) -> tuple[tuple[Any, ...], Codes]:
    """The classes, and the number of its class for each row.

    Args:
        labels: one label a row: texts, whole numbers, truth values, anything that can be compared.
        rows: how many there have to be.
        classes: all classes, in their order; by default the labels that there are, sorted.

    Raises:
        InputError: as many labels as rows are not given, they are of one class, a label is missing or a real number,
            or ``classes`` is not what the labels are of.
    """
    given = _values(labels, rows, "label", "labels")
    real = next((v for v in given if isinstance(v, float) and not v.is_integer()), None)
    if real is not None:
        raise InputError(f"label {real} is a real number: cut it into classes, or use probes.fit_regression()")
    names = _sorted(set(given)) if classes is None else _listed(classes)
    if len(set(names)) < len(names):
        raise InputError("classes= names a class twice")
    number = {name: i for i, name in enumerate(names)}
    strange = next((v for v in given if v not in number), None)
    if strange is not None:
        raise InputError(f"label {strange!r} is not among classes=")
    codes = np.array([number[v] for v in given], dtype=np.int64)
    empty = [name for i, name in enumerate(names) if not (codes == i).any()] if classes is not None else []
    if empty:
        raise InputError(f"no row has the label {empty[0]!r}, which classes= names: leave it out")
    if len(names) < 2:
        raise InputError(f"all labels are {next(iter(names), None)!r}: a probe needs at least two classes")
    return names, codes


def set_codes(values: Any, rows: int, name: str) -> Codes:
    """Numbers from 0 for what rows have in common, in order of appearance; ``name`` is that of the argument.

    Raises:
        InputError: there are not as many as rows.
    """
    given = _values(values, rows, f"entry of {name}=", f"{name}=")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(v, len(number)) for v in given], dtype=np.int64)


def matrix(states: Any, where: str = "the states") -> Matrix:
    """States [rows, width] as float32 or float64; half precision becomes float32.

    Raises:
        InputError: they are no matrix of numbers, there are none, or one is NaN or infinite.
    """
    if isinstance(states, torch.Tensor):
        kept = states.detach().cpu()
        states = (kept if kept.dtype in (torch.float32, torch.float64) else kept.float()).numpy()
    try:
        array = np.asarray(states)
        if array.dtype.name not in ("float32", "float64"):
            array = array.astype(np.float32 if array.dtype.name == "float16" else np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} are no matrix of numbers [rows, width]") from error
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{where} have the shape {list(array.shape)}; give a matrix [rows, width]")
    for start in range(0, len(array), BATCH):
        bad = ~np.isfinite(array[start : start + BATCH]).all(axis=1)
        if bad.any():
            row = start + int(bad.argmax())
            raise InputError(f"{where} are NaN or infinite in row {row}: leave that row out, or load in float32")
    return array


BATCH = 4096
"""Rows that are turned into float64 at a time."""


def _values(values: Any, rows: int, one: str, many: str) -> list[Hashable]:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise InputError(f"{many} are no list: give one for each of the {rows} rows")
    if getattr(values, "ndim", 1) != 1:
        raise InputError(f"{many} have the shape {list(values.shape)}; give one for each of the {rows} rows")
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(listed) != rows:
        raise InputError(f"there are {len(listed)} {many} for {rows} rows: give one for each")
    found = [_plain(v) for v in listed]
    for n, value in enumerate(found):
        if not _hashable(value):
            raise InputError(f"{one} {n} is a {type(value).__name__}: give texts or whole numbers")
        if _missing(value):
            raise InputError(f"{one} {n} is missing ({value}): leave that row out")
    return found


def _listed(classes: Any) -> tuple[Hashable, ...]:
    if isinstance(classes, str) or not hasattr(classes, "__len__"):
        raise InputError(f"classes= is {classes!r}: give a list of all labels")
    return tuple(_values(classes, len(classes), "entry of classes=", "classes="))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return getattr(value, "ndim", 0) == 0  # tensors have a hash, but by what they are, not by what is in them


def _missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA does not know whether it is itself
        return True


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _sorted(names: set[Any]) -> tuple[Any, ...]:
    try:
        return tuple(sorted(names))
    except TypeError:  # of kinds that have no common order
        return tuple(sorted(names, key=lambda v: (type(v).__name__, repr(v))))
