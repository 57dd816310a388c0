"""What a probe's accuracy is held against: control tasks, permuted labels, the most frequent class; and intervals."""

from __future__ import annotations

from collections.abc import Sequence

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


def permuted_codes(groups: Codes, codes: Codes, part: Codes, count: int, seed: int) -> list[Codes]:
    """``count`` permutations of labels: among groups where each group has one label, else among rows.

    Labels stay in their part of the split, so that a permutation is spread over the parts as the labels are; otherwise
    the real labels would be told by that alone.
    """
    draw = np.random.default_rng([seed, 2])
    first = _drawn(groups, codes, draw)
    units = groups if (first[groups] == codes).all() else np.arange(len(codes))
    names, firsts = np.unique(units, return_index=True)
    place = np.searchsorted(names, units)
    own, home = codes[firsts], part[firsts]
    members = [np.flatnonzero(home == p) for p in np.unique(home)]
    found: list[Codes] = []
    for _ in range(count):
        moved = own.copy()
        for some in members:
            moved[some] = own[draw.permutation(some)]
        found.append(moved[place])
    return found


def majority(codes: Codes, split: Split, classes: int, top_k: int) -> tuple[float, float]:
    """Accuracy of always naming the most frequent labels; and the share of held-out rows whose label was trained on."""
    right = seen = total = 0
    for fold in split.held:
        held = split.part == fold
        counts = np.bincount(codes[~held], minlength=classes)
        top = np.argsort(-counts, kind="stable")[:top_k]
        right += int(np.isin(codes[held], top).sum())
        seen += int((counts[codes[held]] > 0).sum())
        total += int(held.sum())
    return right / total, seen / total


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
