"""How alike two sets of states of the same inputs are: centred kernel alignment with linear kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.models.capture import Activations, capture
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number
from logitlab.probes.labels import matrix
from logitlab.probes.states import Held

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]


def cka(x: Any, y: Any) -> float:
    """Linear CKA of two sets of states of the same rows, from 0 to 1.

    With columns centred, ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414,
    equations 3 and 4), in float64. It does not change with rotations, reflections, one scale for all coordinates, or
    shifts; it does with other linear maps. With few rows it is too high: unrelated states of more coordinates than
    rows are near 1 (`StreamedCKA` is not).

    Args:
        x: [rows, width].
        y: [rows, its width].

    Raises:
        InputError: there are other numbers of rows, or all rows of one are the same.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(cka(x, 3 * x[:, ::-1] + 1), 6)
        1.0
    """
    one, other = _pair(x, y)
    return _cka(_Side(one), _Side(other))


class StreamedCKA:
    """CKA from minibatches, with an unbiased estimate of each term.

    Each batch gives HSIC_1 (Song et al. 2012, equation 5) of x and y, of x with itself and of y with itself; they are
    averaged over batches, then divided (Nguyen, Raghu and Kornblith 2021, arXiv 2010.15327, equations 2 and 3). For
    unrelated states it is 0 on average, however few rows there are, and so may fall below 0.

    Attributes:
        batches: how many there were.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(64, 3))
        >>> stream = StreamedCKA()
        >>> for rows in np.split(x, 4):
        ...     stream.update(rows, -rows)
        >>> round(stream.value, 6)
        1.0
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums = np.zeros(3)

    def update(self, x: Any, y: Any) -> None:
        """Add one batch of states of the same rows.

        Raises:
            InputError: there are other numbers of rows, or fewer than four.
        """
        one, other = (_Side(side) for side in _pair(x, y))
        self._sums += hsic(one, other), hsic(one, one), hsic(other, other)
        self.batches += 1

    @property
    def value(self) -> float:
        """The estimate so far.

        Raises:
            InputError: there was no batch, or the states do not vary.
        """
        if not self.batches:
            raise InputError("no batch was given: call update() first")
        both, one, other = self._sums
        if one <= 0 or other <= 0:
            raise InputError("the states do not vary within batches, so they are like nothing: give other rows")
        return float(both / math.sqrt(one * other))


def similarity(
    one: Any,
    other: Any = None,
    *,
    inputs: Any = None,
    sites: Any = None,
    positions: Any = None,
    batch: int | None = None,
) -> xr.DataArray:
    """CKA of every site with every site.

    Args:
        one: `Activations` of `logitlab.capture`, states [rows, width] by the name of their site, or a model.
        other: the same for what it is compared with, of the same rows; by default ``one`` itself.
        inputs: prompts, where a model is given.
        sites: which sites, where a model is given.
        positions: which positions, where a model is given, as in `logitlab.capture`.
        batch: rows in a minibatch of `StreamedCKA`, at least 4; by default plain `cka` of all rows. Rows that do not
            fill the last batch are left out.

    Returns:
        CKA by ``site`` and ``other_site``.

    Raises:
        InputError: there are other numbers of rows, states do not vary, or an argument cannot be used.

    Example:
        ``similarity(ll.capture(model, texts, positions=-1)).sel(site="0.resid_pre")``
    """
    import xarray as xr

    if not isinstance(one, Model) and not isinstance(other, Model):
        given = {"inputs": inputs, "sites": sites, "positions": positions}
        needless = next((name for name, value in given.items() if value is not None), None)
        if needless is not None:
            raise InputError(f"{needless}= goes with a model; these are states already")
    mine = _held(one, inputs, sites, positions)
    theirs = mine if other is None else _held(other, inputs, sites, positions)
    if mine.rows != theirs.rows:
        raise InputError(f"there are {mine.rows} rows and {theirs.rows}: CKA is of the same rows twice")
    if batch is None:
        values = _grid(mine, theirs)
    else:
        size = whole_number(batch, "batch")
        if not 4 <= size <= mine.rows:
            raise InputError(f"batch is {batch}; it must be from 4 to the number of rows, {mine.rows}")
        values = _batched(mine, theirs, size)
    return xr.DataArray(
        values,
        dims=("site", "other_site"),
        coords={"site": list(mine.sites), "other_site": list(theirs.sites)},
        name="cka",
        attrs={"estimator": "CKA" if batch is None else "HSIC_1 over minibatches", "rows": mine.rows, "batch": batch},
    )


class _Side:
    """Centred states of one site, with what is computed once: the Gram matrix where it is the smaller one."""

    def __init__(self, states: NDArray[Any]) -> None:
        rows = states.astype(np.float64)
        self.rows: Array = rows - rows.mean(axis=0)
        self.narrow = rows.shape[1] <= rows.shape[0]
        self._gram: Array | None = None
        self.norms: Array = (self.rows**2).sum(axis=1)
        self.flat = self.norms.sum() <= 1e-20 * (rows**2).sum()

    @property
    def gram(self) -> Array:
        """[rows, rows]."""
        if self._gram is None:
            self._gram = self.rows @ self.rows.T
        return self._gram


def _inner(one: _Side, other: _Side) -> float:
    """``|Y'X|^2``, over coordinates or over rows."""
    if one.narrow and other.narrow:
        return float(((other.rows.T @ one.rows) ** 2).sum())
    return float((one.gram * other.gram).sum())


def _cka(one: _Side, other: _Side) -> float:
    if one.flat or other.flat:
        raise InputError("all rows of the states are the same, so they are like nothing: give other rows")
    return _inner(one, other) / math.sqrt(_inner(one, one) * _inner(other, other))


def hsic(one: _Side, other: _Side) -> float:
    """HSIC_1 with linear kernels, from Gram matrices K and L whose diagonals are set to 0 (Song et al. 2012, eq. 5).

    ``(tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n (n-3))``. Neither matrix is needed: a row of K sums
    to ``x_i . s - |x_i|^2``, with s the sum of all rows, which is 0 here: the estimate does not change with shifts.
    """
    n = len(one.rows)
    if n < 4:
        raise InputError(f"a batch has {n} rows; the unbiased estimate needs at least 4")
    if one.flat or other.flat:
        return 0.0  # else what is left of rounding
    trace = _inner(one, other) - float(one.norms @ other.norms)
    sums, others = -one.norms, -other.norms
    ends = float(sums.sum() * others.sum()) / ((n - 1) * (n - 2))
    return (trace + ends - 2 * float(sums @ others) / (n - 2)) / (n * (n - 3))


def _grid(mine: Held, theirs: Held) -> Array:
    left = [_Side(mine.read(i)) for i in range(len(mine.sites))]
    right = left if theirs is mine else [_Side(theirs.read(i)) for i in range(len(theirs.sites))]
    return _filled(left, right, _cka)


def _batched(mine: Held, theirs: Held, size: int) -> Array:
    both = np.zeros((len(mine.sites), len(theirs.sites)))
    one, other = np.zeros(len(mine.sites)), np.zeros(len(theirs.sites))
    left = [mine.read(i) for i in range(len(mine.sites))]
    right = left if theirs is mine else [theirs.read(i) for i in range(len(theirs.sites))]
    for start in range(0, mine.rows - size + 1, size):
        some = slice(start, start + size)
        here = [_Side(states[some]) for states in left]
        there = here if theirs is mine else [_Side(states[some]) for states in right]
        both += _filled(here, there, hsic)
        one += [hsic(side, side) for side in here]
        other += [hsic(side, side) for side in there]
    if (one <= 0).any() or (other <= 0).any():
        raise InputError("the states of a site do not vary within batches, so they are like nothing: give other rows")
    return both / np.sqrt(np.outer(one, other))


def _filled(left: Sequence[_Side], right: Sequence[_Side], of: Any) -> Array:
    """A number for each pair; of a set with itself each pair is computed once."""
    found = np.zeros((len(left), len(right)))
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            found[i, j] = found[j, i] if left is right and j < i else of(one, other)
    return found


def _held(given: Any, inputs: Any, sites: Any, positions: Any) -> Held:
    if isinstance(given, Model):
        if inputs is None:
            raise InputError("similarity() of a model needs inputs=")
        return Held(capture(given, inputs, sites, positions))
    if inputs is not None and not isinstance(given, Activations):
        raise InputError("inputs= goes with a model; these are states already")
    return Held(given)


def _pair(x: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    one, other = matrix(x, "the first states"), matrix(y, "the second states")
    if len(one) != len(other):
        raise InputError(f"there are {len(one)} rows and {len(other)}: CKA is of the same rows twice")
    return one, other
