"""Groups are whole, labels are spread, and a split is a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlab.errors import InputError
from logitlab.probes import chance
from logitlab.probes.splits import split


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_groups_are_on_one_side(seed: int, folds: int) -> None:
    draw = np.random.default_rng(seed)
    groups = np.unique(draw.integers(0, 30, 200), return_inverse=True)[1]
    found = split(groups, draw.integers(0, 3, 200), folds, seed)
    assert found.held == tuple(range(folds))
    assert sorted(set(found.part)) == list(range(folds))
    for group in range(groups.max() + 1):
        assert len(set(found.part[groups == group])) == 1
    assert (found.rows == np.arange(200)).all()


@pytest.mark.parametrize("folds", [2, 5])
def test_labels_are_spread_to_one_row_where_rows_are_groups(folds: int) -> None:
    draw = np.random.default_rng(0)
    codes = draw.choice(4, size=203, p=[0.5, 0.3, 0.15, 0.05])
    found = split(np.arange(203), codes, folds, 0)
    for label in range(4):
        tally = np.bincount(found.part[codes == label], minlength=folds)
        assert tally.max() - tally.min() <= 1, label
    assert np.ptp(np.bincount(found.part)) <= 4  # one for each label


def test_labels_are_spread_where_groups_have_many_rows() -> None:
    draw = np.random.default_rng(1)
    own = draw.choice(3, size=60, p=[0.6, 0.3, 0.1])
    groups = np.repeat(draw.permutation(60), 4)
    codes = own[groups]
    found = split(groups, codes, 5, 0)
    for label in range(3):
        assert np.ptp(np.bincount(found.part[codes == label], minlength=5)) <= 4, label  # one group


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8])
def test_a_share_is_held_out(share: float) -> None:
    codes = np.arange(300) % 3
    found = split(np.arange(300), codes, share, 0)
    assert found.held == (1,)
    assert len(found.rows) == pytest.approx(300 * share, abs=3)
    assert np.ptp(np.bincount(codes[found.rows])) <= 1


def test_seeds() -> None:
    groups, codes = np.arange(60), np.arange(60) % 2
    parts = [split(groups, codes, 5, seed).part.tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_bad_input() -> None:
    groups, codes = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    for folds, match in [
        (3, "there are 2 groups for 3 folds"),
        (1, "folds is 1; it is a whole number from 2 on, or a held-out share"),
        (1.0, "folds is 1.0; it is a whole number from 2 on, or a held-out share"),
        (0.0, "folds is 0.0"),
        ("five", "folds 'five' is not a whole number"),
        (True, "folds True is not a whole number"),
    ]:
        with pytest.raises(InputError, match=match):
            split(groups, codes, folds, 0)  # type: ignore[arg-type]


# -- what chance is ------------------------------------------------------------------------------


def test_a_control_is_one_label_a_type_with_the_same_frequencies() -> None:
    types = np.repeat(np.arange(40), 5)
    codes = np.repeat(np.random.default_rng(0).choice(3, size=40, p=[0.6, 0.3, 0.1]), 5)
    found = chance.control_codes(types, codes, 0)
    assert all(len(set(found[types == t])) == 1 for t in range(40))
    assert (np.bincount(found) == np.bincount(codes)).all()
    assert (found != codes).any()
    assert (found == chance.control_codes(types, codes, 0)).all()
    assert (found != chance.control_codes(types, codes, 1)).any()
    mixed = chance.control_codes(types, np.arange(200) % 5, 0)  # types of several labels: one is drawn
    assert all(len(set(mixed[types == t])) == 1 for t in range(40))
    assert len(set(mixed)) > 2


def test_permutations_keep_groups_and_parts() -> None:
    groups = np.repeat(np.arange(30), 4)
    codes = np.repeat(np.arange(30) % 3, 4)
    part = np.repeat(np.arange(30) % 5, 4)
    for found in chance.permuted_codes(groups, codes, part, 5, 0):
        assert all(len(set(found[groups == g])) == 1 for g in range(30))
        for p in range(5):
            assert (np.bincount(found[part == p]) == np.bincount(codes[part == p])).all()
        assert (found != codes).any()
    rows = np.arange(120) % 2  # not constant in a group: rows are exchanged
    assert any(len(set(chance.permuted_codes(groups, rows, part, 1, 0)[0][groups == g])) > 1 for g in range(30))


def test_ranks_by_hand() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    assert chance.ranks(scores, np.array([2, 5, 7]), np.array([2, 5, 7])).tolist() == [1, 2, 2]
    unknown = chance.ranks(scores, np.array([3, 9, 0]), np.array([2, 5, 7]))
    assert (unknown > 1000).all()


def test_the_interval_is_that_of_resampled_groups() -> None:
    """Against a loop, and wider than that of rows where groups are of one mind."""
    groups = np.repeat(np.arange(40), 10)
    right = np.repeat(np.random.default_rng(1).integers(0, 2, 40), 10).astype(float)
    low, high = chance.bootstrap(right[None], groups, 2000, 0)
    draw = np.random.default_rng(9)
    means = [right.reshape(40, 10)[draw.integers(0, 40, 40)].mean() for _ in range(4000)]
    np.testing.assert_allclose([low[0], high[0]], np.quantile(means, [0.025, 0.975]), atol=0.03)
    narrow = chance.bootstrap(right[None], np.arange(400), 2000, 0)
    assert narrow[1][0] - narrow[0][0] < 0.5 * (high[0] - low[0])


def test_majority_and_overlap_by_hand() -> None:
    codes = np.array([0, 0, 0, 1, 1, 2])
    found = split(np.arange(6), codes, 2, 0)
    right = seen = 0
    for fold in (0, 1):
        train = codes[found.part != fold].tolist()
        top = max(range(3), key=lambda c: (train.count(c), -c))
        right += sum(c == top for c in codes[found.part == fold])
        seen += sum(c in train for c in codes[found.part == fold])
    assert chance.majority(codes, found, 3, 1) == (right / 6, seen / 6)
    assert seen == 5  # the one row of class 2 is never trained on when it is held out
