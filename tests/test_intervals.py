"""Bootstrap intervals against scipy, closed cases and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap as reference

from logitlab.errors import InputError
from logitlab.intervals import Mean, bootstrap, proportion


def test_it_is_the_percentile_bootstrap_of_scipy() -> None:
    rng = np.random.default_rng(1)
    for values in (rng.normal(2.0, 3.0, 40), rng.exponential(1.0, 25), rng.lognormal(0.0, 1.0, 60)):
        found = bootstrap(values, resamples=20000)
        truth = reference((values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(2))
        low, high = truth.confidence_interval
        width = high - low
        assert found.value == pytest.approx(values.mean(), abs=1e-12)
        assert found.low == pytest.approx(low, abs=0.04 * width)
        assert found.high == pytest.approx(high, abs=0.04 * width)
        assert found.n == len(values)


def test_closed_cases() -> None:
    assert bootstrap([0.25] * 7) == Mean(0.25, 0.25, 0.25, 7)
    one = bootstrap([3.0])  # nothing says how another one would be
    assert (one.value, one.n) == (3.0, 1)
    assert np.isnan([one.low, one.high]).all()
    assert bootstrap([True, True]) == Mean(1.0, 1.0, 1.0, 2)
    assert bootstrap([np.nan, 2.0, np.nan, 2.0]) == Mean(2.0, 2.0, 2.0, 2)
    for none in ([], [np.nan, np.nan]):
        found = bootstrap(none)
        assert found.n == 0
        assert np.isnan([found.value, found.low, found.high]).all()
    two = bootstrap([0.0, 1.0], resamples=4000)  # means are 0, 1/2, 1/2, 1 alike
    assert (two.value, two.low, two.high) == (0.5, 0.0, 1.0)
    assert str(Mean(0.5, 0.25, 0.75, 4)) == "0.500 [0.250, 0.750]"


def test_a_seed_is_a_result() -> None:
    values = np.random.default_rng(0).normal(size=30)
    before = np.random.get_state()[1].copy()
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)
    assert bootstrap(values.reshape(5, 6)) == bootstrap(list(values))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_groups_are_drawn_together() -> None:
    rng = np.random.default_rng(3)
    sizes = [2, 5, 1, 4, 3, 6]
    names = np.repeat(["f", "b", "a", "d", "c", "e"], sizes)
    values = rng.normal(size=21) + np.repeat(rng.normal(size=6) * 3, sizes)
    found = bootstrap(values, groups=names, resamples=4000)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 6
    # by hand: whole groups are drawn, and all their values count
    draws = np.random.default_rng(9)
    parts = [values[names == name] for name in sorted(set(names))]
    means = [np.concatenate([parts[i] for i in draws.integers(6, size=6)]).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))
    alone = bootstrap(values)
    assert found.high - found.low > 1.3 * (alone.high - alone.low)
    kept = bootstrap([1.0, np.nan, 3.0], groups=["a", "b", "a"])
    assert (kept.value, kept.n) == (2.0, 1)  # a group that has only NaN is none
    assert np.isnan(kept.low)


def test_ninety_five_of_a_hundred_intervals_hold_the_mean() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for n in range(300):
        found = bootstrap(rng.normal(1.0, 2.0, 50), resamples=400, seed=n)
        held += found.low <= 1.0 <= found.high
    assert 0.905 <= held / 300 <= 0.98  # 0.95 less what the percentile interval is too short by; sd 0.0126


def test_many_values() -> None:
    """They are drawn in smaller pieces; the interval is that of the normal distribution."""
    values = np.random.default_rng(5).normal(size=40000)
    found = bootstrap(values, resamples=300)
    half = 1.96 * values.std() / 200
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="there are 3 values and 2 groups: give one for each"):
        bootstrap([1, 2, 3], groups=[0, 1])
    with pytest.raises(InputError, match="a value is infinite: there is no mean"):
        bootstrap([1, np.inf])
    with pytest.raises(InputError, match="the values are not all numbers"):
        bootstrap(["a", "b"])
    for options in ({"resamples": 0}, {"seed": -1}):
        with pytest.raises(InputError, match="they must be at least 1 and 0"):
            bootstrap([1.0], **options)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (3, 7), (1, 100)])
def test_exact_intervals_of_shares_are_where_the_binomial_tails_are_2_5_percent(k: int, n: int) -> None:
    from math import comb

    def tail(p: float, ks: range) -> float:
        return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in ks)

    found = proportion(k, n)
    assert found.value == k / n
    assert found.low == 0 if k == 0 else tail(found.low, range(k, n + 1)) == pytest.approx(0.025, abs=1e-6)
    assert found.high == 1 if k == n else tail(found.high, range(k + 1)) == pytest.approx(0.025, abs=1e-6)


def test_a_share_of_nothing_is_not_a_number() -> None:
    assert np.isnan(proportion(0, 0).value)
    with pytest.raises(InputError, match="4 successes of 3"):
        proportion(4, 3)
