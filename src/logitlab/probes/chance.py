"""What a probe's accuracy is held against: control tasks, permuted labels, the most frequent class; and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import lgamma, log

import numpy as np
from numpy.typing import NDArray

from logitlab.probes.labels import Codes
from logitlab.probes.splits import Split


def control_codes(types: Codes, codes: Codes, seed: int) -> Codes:
    """Labels of a control task: one label a type, at random (Hewitt and Liang 2019, arXiv 1909.03368, section 2.1).

    Each type is given the label of one of its rows, and these labels are permuted among the types. So the labels are
    as frequent as those of the real task, and only a probe that has memorised the types can tell them.
    """
    draw = np.random.default_rng([seed, 1])
    return draw.permutation(_drawn(types, codes, draw))[types]


def permuted_codes(groups: Codes, codes: Codes, count: int, seed: int) -> tuple[list[Codes], str]:
    """``count`` permutations of labels that keep groups together, and in words what is permuted.

    Rows of one group are not independent, so labels never move row by row between groups. The first of these that can
    be done is:

    * each group has one label: labels are permuted among all groups;
    * else the labels of a whole group, in their order, are exchanged with those of other groups of as many rows; a
      group of a size of its own keeps its labels. Both test whether the labels of groups have to do with their states;
    * else labels are permuted among the rows of each group, which tests whether labels have to do with states within
      groups.

    The last two need at least 20 arrangements (or ``count + 1``, if that is fewer) for a p-value to say anything.

    Returns:
        The labellings, and what was done; none, and why, where labels cannot be permuted.
    """
    draw = np.random.default_rng([seed, 2])
    _, firsts, place, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    own = codes[firsts]
    if (own[place] == codes).all():
        return [draw.permutation(own)[place] for _ in range(count)], "labels among groups"
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(sizes)[:-1])  # the rows of each group
    enough = log(min(20, count + 1)) - 1e-9
    by_size: dict[int, list[Codes]] = {}
    for rows in members:
        by_size.setdefault(len(rows), []).append(rows)
    alike = list(by_size.values())
    # Without the order in them, so that neither way of permuting changes which one is chosen.
    blocks = [[tuple(sorted(codes[rows].tolist())) for rows in some] for some in alike]
    if sum(map(_arrangements, blocks)) >= enough:
        how = "labels of whole groups among those of equal size"
        return [_exchanged(alike, codes, draw) for _ in range(count)], how
    if sum(_arrangements(codes[rows].tolist()) for rows in members) >= enough:
        found: list[Codes] = []
        for _ in range(count):
            moved = codes.copy()
            for rows in members:
                moved[rows] = codes[draw.permutation(rows)]
            found.append(moved)
        return found, "labels of rows within groups"
    return [], (
        "nothing: groups have several labels each, and there are too few ways to exchange them between groups of "
        "equal size, or within groups"
    )


def _exchanged(alike: Sequence[Sequence[Codes]], codes: Codes, draw: np.random.Generator) -> Codes:
    """Labels of whole groups exchanged among those of equal size."""
    moved = codes.copy()
    for some in alike:
        for rows, other in zip(some, draw.permutation(len(some)), strict=True):
            moved[rows] = codes[some[other]]
    return moved


def _arrangements(values: Sequence[Hashable]) -> float:
    """Logarithm of the number of different orders of some values."""
    return lgamma(len(values) + 1) - sum(lgamma(times + 1) for times in Counter(values).values())


def baseline(codes: Codes, split: Split, top_k: int) -> float:
    """Accuracy of always naming the ``top_k`` labels that are the most frequent ones among all held-out rows.

    Those of the training part would not do: with labels spread evenly they are the rarer ones of the held-out part.
    """
    counts = np.sort(np.bincount(codes[split.rows]))[::-1]
    return float(counts[:top_k].sum() / counts.sum())


def label_overlap(codes: Codes, split: Split) -> float:
    """Share of held-out rows whose label was trained on."""
    seen = 0
    for fold in split.held:
        held = split.part == fold
        seen += int(np.isin(codes[held], codes[~held]).sum())
    return seen / len(split.rows)


def bootstrap(
    values: NDArray[np.float64], groups: Codes, resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of 95 % percentile intervals of means over rows, resampling groups.

    Args:
        values: [series, rows]; all series share the draws, so that their differences are paired.
        groups: [rows].
        resamples: how many draws.
        seed: of the draws.

    Returns:
        Lower and upper ends, [series] each.
    """
    names, place = np.unique(groups, return_inverse=True)
    sizes = np.bincount(place).astype(np.float64)
    sums = np.stack([np.bincount(place, weights=row, minlength=len(names)) for row in values])
    draw = np.random.default_rng([seed, 3])
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, 64):
        times = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), min(64, resamples - start))
        means.append((times @ sums.T) / (times @ sizes)[:, None])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return low, high


def ranks(scores: NDArray[np.float64], codes: Codes, which: Codes) -> NDArray[np.int64]:
    """The rank of the right class for each row, from 1; of ties the first class is the better.

    Args:
        scores: [rows, present], of the classes that were trained on.
        codes: [rows], the right classes.
        which: [present], numbers of those classes. A row of another class has the rank behind all.
    """
    column = np.searchsorted(which, codes)
    known = (column < len(which)) & (which[np.minimum(column, len(which) - 1)] == codes)
    column = np.where(known, column, 0)
    own = scores[np.arange(len(codes)), column][:, None]
    before = np.arange(len(which)) < column[:, None]
    found = 1 + (scores > own).sum(axis=1) + ((scores == own) & before).sum(axis=1)
    return np.where(known, found, np.iinfo(np.int64).max)


def _drawn(units: Codes, codes: Codes, draw: np.random.Generator) -> Codes:
    """For each unit the label of one of its rows, drawn at random."""
    order = draw.permutation(len(codes))
    _, firsts = np.unique(units[order], return_index=True)
    return codes[order][firsts]


def p_values(accuracy: NDArray[np.float64], permuted: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """``(1 + as good or better) / (1 + permutations)`` (Phipson and Smyth 2010), by site."""
    # Accuracies are counts over a count: equal ones must not differ by rounding.
    better = (np.stack(permuted) >= accuracy - 1e-12).sum(axis=0)
    return (1.0 + better) / (1.0 + len(permuted))
