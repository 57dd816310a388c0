"""Groups are whole, labels are spread, and a split is a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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


def test_folds_of_other_libraries() -> None:
    codes = np.arange(40) % 2
    for folds in (np.int64(4), np.array(4), torch.tensor(4)):
        found = split(np.arange(40), codes, folds, 0)  # type: ignore[arg-type]
        assert found.held == (0, 1, 2, 3)
    assert split(np.arange(40), codes, float(np.float32(0.25)), 0).held == (1,)
    assert split(np.arange(40), codes, np.float32(0.25), 0).held == (1,)  # type: ignore[arg-type]


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


def test_permutations_move_labels_among_groups() -> None:
    groups = np.repeat(np.arange(30), 4)
    codes = np.repeat(np.arange(30) % 3, 4)
    some, how = chance.permuted_codes(groups, codes, 5, 0)
    assert how == "labels among groups"
    for found in some:
        assert all(len(set(found[groups == g])) == 1 for g in range(30))
        assert (np.bincount(found) == np.bincount(codes)).all()
        assert (found != codes).any()
    again, _ = chance.permuted_codes(groups, codes, 5, 0)
    np.testing.assert_array_equal(some, again)


def test_one_row_with_another_label_does_not_free_the_rows() -> None:
    """Labels of whole groups stay together, and stay among groups of as many rows."""
    groups = np.repeat(np.arange(20), np.where(np.arange(20) < 10, 4, 6))
    codes = groups % 2
    codes[3] = 1 - codes[3]
    some, how = chance.permuted_codes(groups, codes, 19, 0)
    assert how == "labels of whole groups among those of equal size"
    blocks = [tuple(codes[groups == g]) for g in range(20)]
    for found in some:
        moved = [tuple(found[groups == g]) for g in range(20)]
        assert sorted(moved[:10]) == sorted(blocks[:10])
        assert sorted(moved[10:]) == sorted(blocks[10:])
    assert len({tuple(found) for found in some}) == 19


def test_pairs_are_permuted_within() -> None:
    """Each group has one row of each label: groups can exchange nothing."""
    groups = np.repeat(np.arange(12), 2)
    codes = np.arange(24) % 2
    some, how = chance.permuted_codes(groups, codes, 19, 0)
    assert how == "labels of rows within groups"
    for found in some:
        assert all(sorted(found[groups == g]) == [0, 1] for g in range(12))
    assert len({tuple(found) for found in some}) > 15


def test_what_cannot_be_permuted_is_refused() -> None:
    groups = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])  # all of another size, one with two labels
    some, why = chance.permuted_codes(groups, np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 0]), 99, 0)
    assert some == []
    assert why.startswith("nothing: groups have several labels each")


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


def test_baseline_and_overlap_by_hand() -> None:
    codes = np.array([0, 0, 0, 1, 1, 2])
    found = split(np.arange(6), codes, 2, 0)
    seen = 0
    for fold in (0, 1):
        train = codes[found.part != fold].tolist()
        seen += sum(c in train for c in codes[found.part == fold])
    assert chance.label_overlap(codes, found) == seen / 6
    assert seen == 5  # the one row of class 2 is never trained on when it is held out
    assert [chance.baseline(codes, found, k) for k in (1, 2, 3)] == [3 / 6, 5 / 6, 1]
    share = split(np.arange(6), codes, 0.5, 0)
    held = codes[share.part == 1]
    assert chance.baseline(codes, share, 1) == np.bincount(held).max() / len(held)


def test_the_baseline_of_balanced_labels_is_not_below_their_share() -> None:
    """Where one row at a time is held out, its label is always the rarer one of the training part."""
    codes = np.arange(20) % 2
    assert chance.baseline(codes, split(np.arange(20), codes, 20, 0), 1) == 0.5
