"""Which rows are held out when: whole groups, with the labels spread as evenly as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.models.inputs import whole_number
from logitlab.probes.labels import Codes


@dataclass(frozen=True)
class Split:
    """Parts of the rows; those that are held out are held out one after the other.

    Attributes:
        part: [rows], the number of each row's part.
        held: the parts that are held out.
    """

    part: Codes
    held: tuple[int, ...]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return int(self.part.max()) + 1

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows that are held out at some time, in their order."""
        return np.flatnonzero(np.isin(self.part, self.held))


def split(groups: Codes, codes: Codes, folds: int | float, seed: int) -> Split:
    """Put groups into parts.

    Groups go, the largest first and equal ones in random order, where their labels are scarcest: to the part f with
    the smallest ``sum over labels c of g_c n_fc / (N_c w_f)``, in which g are the group's rows, n those that the part
    has, N all, and w the share that the part is to get. All rows count as four more labels, with ``n + g / 2`` for n,
    so that parts get their shares; a label by itself does not ask for half of its group, or one of a single group
    would always go to the largest part.

    Args:
        groups: [rows], numbers of groups.
        codes: [rows], numbers of classes.
        folds: a whole number of parts of about the same size, each of which is held out once; or the share of the
            rows in the one part that is held out.
        seed: of the order.

    Raises:
        InputError: there are fewer groups than folds, or ``folds`` is neither of the two.
    """
    shares = _shares(folds)
    count, names = int(groups.max()) + 1, int(codes.max()) + 1
    if count < len(shares):
        raise InputError(f"there are {count} groups for {len(shares)} folds: give more groups, or fewer folds")
    tallies = np.zeros((count, names + 1))
    np.add.at(tallies, (groups, codes), 1)
    tallies[:, names] = tallies[:, :names].sum(axis=1)
    shuffled = np.random.default_rng([seed, 0]).permutation(count)
    order = shuffled[np.argsort(-tallies[shuffled, names], kind="stable")]
    total = np.maximum(tallies.sum(axis=0), 1)
    filled = np.zeros((len(shares), names + 1))
    where = np.zeros(count, dtype=np.int64)
    for group in order:
        (own,) = tallies[group].nonzero()
        given = tallies[group, own]
        all_rows = own == names
        cost = (given * (filled[:, own] + given * all_rows / 2) * (1 + 3 * all_rows) / total[own]).sum(axis=1) / shares
        where[group] = int(cost.argmin())
        filled[where[group], own] += given
    empty = np.flatnonzero(filled[:, names] == 0)
    if len(empty):
        raise InputError(f"{count} groups of such sizes and labels cannot be put into {len(shares)} parts: give more")
    return Split(where[groups], (1,) if isinstance(folds, float | np.floating) else tuple(range(len(shares))))


def _shares(folds: Any) -> NDArray[np.float64]:
    """The share of each part."""
    if isinstance(folds, float | np.floating):
        if not 0 < folds < 1:
            raise InputError(f"folds is {folds}; it is a whole number from 2 on, or a held-out share between 0 and 1")
        return np.array([1 - float(folds), float(folds)])
    count = whole_number(folds, "folds")
    if count < 2:
        raise InputError(f"folds is {folds}; it is a whole number from 2 on, or a held-out share between 0 and 1")
    return np.full(count, 1 / count)
