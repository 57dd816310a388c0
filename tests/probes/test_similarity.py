"""CKA and separability: invariances, by-hand values, unbiasedness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.metrics import silhouette_score

import logitlab as ll
from logitlab.errors import InputError
from logitlab.probes import StreamedCKA, cka, separability, similarity
from tests import zoo
from tests.probes import planted


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """With Gram matrices and the centring matrix."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def hsic_1(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, equation 5, from whole matrices."""
    n, one = len(x), np.ones(len(x))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    ends = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + ends - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


@pytest.mark.parametrize(("rows", "width", "other"), [(40, 5, 7), (8, 30, 20), (20, 5, 60)])
def test_values_on_both_sides(rows: int, width: int, other: int) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, width)) + 3
    y = np.concatenate([x[:, :3], draw.normal(size=(rows, other - 3))], axis=1)
    assert cka(x, y) == pytest.approx(by_hand(x, y), abs=1e-12)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)
    stream = StreamedCKA()
    stream.update(x, y)
    expected = hsic_1(x, y) / np.sqrt(hsic_1(x, x) * hsic_1(y, y))
    assert stream.value == pytest.approx(expected, abs=1e-10)


def test_invariances() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(50, 12)), draw.normal(size=(50, 12))
    y[:, :4] += 2 * x[:, :4]
    turn = np.asarray(ortho_group.rvs(12, random_state=0))
    general = draw.normal(size=(12, 12))

    def streamed(a: np.ndarray, b: np.ndarray) -> float:
        stream = StreamedCKA()
        for rows in np.array_split(np.arange(50), 5):
            stream.update(a[rows], b[rows])
        return stream.value

    for measure in (cka, streamed):
        plain = measure(x, y)
        assert 0.1 < plain < 0.9
        assert measure(x, x) == pytest.approx(1, abs=1e-12)
        for same in (x @ turn, 7 * x, -0.01 * x, x + 100 * draw.normal(size=12)):
            assert measure(same, y) == pytest.approx(plain, abs=1e-6)
        assert abs(measure(x @ general, y) - plain) > 0.01


def test_the_streamed_estimate_is_unbiased_and_plain_cka_is_not() -> None:
    draw = np.random.default_rng(0)
    plain: list[float] = []
    stream = StreamedCKA()
    for _ in range(400):
        x, y = draw.normal(size=(16, 20)), draw.normal(size=(16, 20))
        stream.update(x, y)
        plain.append(cka(x, y))
    assert stream.batches == 400
    assert abs(stream.value) < 0.02
    assert np.mean(plain) > 0.4


def test_hsic_is_unbiased_where_states_depend() -> None:
    """The mean over small batches is that of large ones: HSIC of x and 2x of one Gaussian coordinate is 4."""
    draw = np.random.default_rng(0)
    small = [hsic_1(x, 2 * x) for x in draw.normal(size=(20000, 4, 1))]
    assert np.mean(small) == pytest.approx(4, abs=5 * np.std(small) / np.sqrt(20000))


def test_a_grid_of_sites(llama: ll.Model) -> None:
    prompts = [zoo.ids(6, seed=s) for s in range(8)]
    kept = ll.capture(llama, prompts)
    found = similarity(kept)
    names = [str(s) for s in kept.sites]
    assert found.dims == ("site", "other_site")
    assert found.coords["site"].values.tolist() == names
    for one in names:
        assert float(found.sel(site=one, other_site=one)) == pytest.approx(1)
        for other in names:
            expected = by_hand(kept[one].double().numpy(), kept[other].double().numpy())
            assert float(found.sel(site=one, other_site=other)) == pytest.approx(expected, abs=1e-9)
    of_model = similarity(llama, inputs=prompts)
    np.testing.assert_allclose(of_model.values, found.values, atol=1e-9)
    other = {name: kept[name].numpy()[:, :5] for name in names[:2]}
    across = similarity(kept, other)
    assert across.shape == (len(names), 2)
    assert float(across[3, 1]) == pytest.approx(by_hand(kept[names[3]].double().numpy(), other[names[1]]), abs=1e-6)
    stream = StreamedCKA()
    for start in (0, 20):
        stream.update(kept[names[0]][start : start + 20], kept[names[2]][start : start + 20])
    batched = similarity(kept, batch=20)  # 48 rows: the last 8 are left out
    assert float(batched[0, 2]) == pytest.approx(stream.value, abs=1e-10)
    assert batched.attrs["estimator"] == "HSIC_1 over minibatches"


def test_separability_by_hand() -> None:
    x, y = planted.linear(120)
    found = separability(x, y, shrinkage=0, silhouette=True)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    within = (x - means[y]).T @ (x - means[y])
    between = (means[y] - x.mean(0)).T @ (means[y] - x.mean(0))
    assert found.ratio == pytest.approx(np.trace(between) / np.trace(within))
    assert found.fisher == pytest.approx(np.trace(np.linalg.inv(within) @ between))
    assert found.silhouette == pytest.approx(silhouette_score(x, y))
    general = np.random.default_rng(0).normal(size=(16, 16))
    assert separability(x @ general, y, shrinkage=0).fisher == pytest.approx(found.fisher, rel=1e-6)
    shrunk = 0.7 * within + 0.3 * np.trace(within) / 16 * np.eye(16)
    assert separability(x, y, shrinkage=0.3).fisher == pytest.approx(np.trace(np.linalg.inv(shrunk) @ between))
    far, _ = planted.linear(120, gap=12)
    assert separability(far, y).ratio > 3 * found.ratio
    points = separability(np.eye(3)[[0, 1, 2, 0, 1, 2]], [0, 1, 2, 0, 1, 2])
    assert points.ratio == points.fisher == float("inf")


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_separability_does_not_change_with_the_unit(shrinkage: float) -> None:
    x, y = planted.linear(120)
    expected = separability(x, y, shrinkage=shrinkage)
    for unit in (1e-9, 1e9):
        found = separability(unit * x, y, shrinkage=shrinkage)
        assert found.fisher == pytest.approx(expected.fisher, rel=1e-4)
        assert found.ratio == pytest.approx(expected.ratio, rel=1e-4)


def test_bad_input(llama: ll.Model) -> None:
    x, y = planted.linear(20)
    prompts = [zoo.ids(4, seed=s) for s in range(3)]
    kept = ll.capture(llama, prompts, positions=-1)

    def constant() -> StreamedCKA:
        stream = StreamedCKA()
        stream.update(np.full((20, 3), 0.1), x)  # whose mean is not 0.1 to the last digit
        return stream

    cases: list[tuple[Any, str]] = [
        (lambda: cka(x, x[:5]), "there are 20 rows and 5"),
        (lambda: cka(x, np.ones((20, 3))), "all rows of the states are the same"),
        (lambda: cka(x, x * np.inf), "the second states are NaN or infinite in row 0"),
        (lambda: StreamedCKA().update(x[:3], x[:3]), "a batch has 3 rows; the unbiased estimate needs at least 4"),
        (lambda: StreamedCKA().value, "no batch was given"),
        (lambda: similarity({"a": x}, {"b": x[:4]}), "there are 20 rows and 4"),
        (lambda: similarity({"a": x}, batch=3), "batch is 3; it must be from 4 to the number of rows, 20"),
        (lambda: similarity({"a": np.ones((20, 3))}, batch=5), "do not vary within batches"),
        (lambda: constant().value, "do not vary within batches"),
        (lambda: similarity({"a": x}, sites="a"), "sites= goes with a model; these are states already"),
        (lambda: similarity({"a": x}, {"a": x}, positions=-1), "positions= goes with a model"),
        (lambda: similarity(kept, inputs=prompts), "inputs= goes with a model"),
        (lambda: similarity(kept, sites="0.resid_pre"), "sites= goes with a model"),
        (lambda: similarity(llama), "of a model needs inputs="),
        (lambda: similarity(x), "give Activations"),
        (lambda: similarity({"a": x, "b": x[:3]}), r"the states of b have the shape \[3, 16\], those of a \[20, 16\]"),
        (lambda: separability(x, y, shrinkage=2), "shrinkage is 2"),
        (lambda: separability(x[:10], y[:10], shrinkage=0), "the scatter within classes is singular"),
        (lambda: separability(x, np.zeros(20)), "all labels are 0"),
        (lambda: separability(x, range(20), silhouette=True, shrinkage=1.0), "every row is a class of its own"),
    ]
    for call, match in cases:
        with pytest.raises(InputError, match=match):
            call()
