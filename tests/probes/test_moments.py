"""A fit from sums is the fit from the states, however they came."""

from __future__ import annotations

import numpy as np
import pytest

from logitlab.errors import InputError
from logitlab.probes import Moments, fit_probe
from tests.probes import planted

KINDS = ("ridge", "lda", "mean-difference")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_stream_is_whole(kind: str, far: float) -> None:
    x, y = planted.linear(301)
    x += far
    moments = Moments.empty((0, 1, 2), 16)
    for start in range(0, 301, 7):
        moments.update(x[start : start + 7], y[start : start + 7])
    whole, stream = fit_probe(kind, x, y), moments.fit(kind)
    np.testing.assert_allclose(stream.scores(x), whole.scores(x), atol=1e-6)
    np.testing.assert_allclose(stream.directions, whole.directions, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_and_take_away(kind: str) -> None:
    x, y = planted.linear(300)
    parts: list[Moments] = []
    for i in range(3):
        parts.append(Moments.empty((0, 1, 2), 16))
        parts[i].update(x[i::3], y[i::3])
    whole = parts[2].merge(parts[0]).merge(parts[1])
    np.testing.assert_allclose(whole.fit(kind).scores(x), fit_probe(kind, x, y).scores(x), atol=1e-6)
    rest = whole.without(parts[1])
    kept = np.arange(300) % 3 != 1
    np.testing.assert_allclose(rest.fit(kind).scores(x), fit_probe(kind, x[kept], y[kept]).scores(x), atol=1e-6)
    nothing = Moments.empty((0, 1, 2), 16)
    for same in (nothing.merge(whole), whole.merge(nothing), whole.without(nothing)):
        np.testing.assert_allclose(same.fit(kind).scores(x), whole.fit(kind).scores(x), atol=1e-9)


def test_the_scatters_are_those_of_the_states() -> None:
    x, y = planted.linear(120)
    moments = Moments.empty((0, 1, 2), 16)
    moments.update(x, y)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    within = (x - means[y]).T @ (x - means[y])
    away = means[y] - x.mean(0)
    np.testing.assert_allclose(moments.within, within, atol=1e-8)
    np.testing.assert_allclose(moments.between, away.T @ away, atol=1e-8)
    np.testing.assert_allclose(moments.total, within + away.T @ away, atol=1e-8)
    np.testing.assert_allclose(moments.deviation, x.std(0), atol=1e-10)


def test_relabelled_is_another_labelling_of_the_same_states() -> None:
    x, y = planted.linear(120)
    other = np.roll(y, 1)
    moments = Moments.empty((0, 1, 2), 16)
    moments.update(x, y)
    again = moments.relabelled([(x[:50], other[:50]), (x[50:], other[50:])])
    np.testing.assert_allclose(again.fit("lda").scores(x), fit_probe("lda", x, other).scores(x), atol=1e-6)
    before = moments.scatter.copy()
    again.update(x, other)  # neither shares what is added to
    moments.present()[0].update(x, y)
    np.testing.assert_array_equal(moments.scatter, before)


def test_bad_input() -> None:
    x, y = planted.linear(20)
    moments = Moments.empty((0, 1, 2), 16)
    for call, match in [
        (lambda: moments.update(x[:, :4], y), "of width 4, and these sums of 16"),
        (lambda: moments.update(x, y[:3]), "there are 3 labels for 20 rows"),
        (lambda: moments.update(x, y + 5), "is not among the classes of these sums"),
        (lambda: moments.update(x * np.nan, y), "NaN or infinite in row 0"),
        (lambda: moments.fit("ridge"), "there are no states of class 0"),
        (lambda: moments.fit("mlp"), "kind 'mlp' cannot be fitted from sums"),
        (lambda: moments.fit("svm"), "kind is 'svm'"),
        (lambda: moments.fit("lda", shrinkage=-1), "shrinkage is -1"),
        (lambda: moments.merge(Moments.empty((0, 1), 16)), "of other classes"),
        (lambda: Moments.empty([1], 4), "are no classes"),
    ]:
        with pytest.raises(InputError, match=match):
            call()
    more = Moments.empty((0, 1, 2), 16)
    more.update(x, y)
    with pytest.raises(InputError, match="cannot be taken away"):
        moments.without(more)
