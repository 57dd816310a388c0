"""Probes are what scikit-learn and closed forms say, in the units of the original states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from logitlab.errors import InputError
from logitlab.probes import KINDS, LinearProbe, fit_probe, fit_regression
from logitlab.probes.mlp import MLPProbe, schedule
from tests.probes import planted

LINEAR = tuple(kind for kind in KINDS if kind != "mlp")


def two(classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States and labels to fit on, and other states of the same distribution."""
    x, y = planted.linear(250, classes=classes)
    return x[:200], y[:200], x[200:]


def centred(scores: Any) -> np.ndarray:
    """Scores up to what is the same for all classes."""
    return np.asarray(scores) - np.asarray(scores).mean(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_ridge_is_scikit_learns(classes: int) -> None:
    x, y, new = two(classes)
    probe = fit_probe("ridge", x, y, penalty=3.0)
    theirs = make_pipeline(StandardScaler(), Ridge(alpha=3.0)).fit(x, np.eye(classes)[y])
    np.testing.assert_allclose(probe.scores(new), theirs.predict(new), atol=1e-6)
    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=3.0)).fit(x, y)
    assert probe.predict(new) == classifier.predict(new).tolist()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_lda_is_scikit_learns(classes: int, shrinkage: float) -> None:
    x, y, new = two(classes)
    scaled = StandardScaler().fit(x)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(scaled.transform(x), y)
    probe = fit_probe("lda", x, y, shrinkage=shrinkage)
    expected = np.asarray(theirs.decision_function(scaled.transform(new)))
    if classes == 2:  # scikit-learn gives the difference of the two
        expected = np.stack([-expected, expected], axis=1) / 2
    np.testing.assert_allclose(centred(probe.scores(new)), centred(expected), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_is_scikit_learns_in_log_odds(classes: int) -> None:
    x, y, new = two(classes)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / 2.0, max_iter=1000)).fit(x, y)
    scores = torch.from_numpy(fit_probe("logistic", x, y, penalty=2.0).scores(new))
    np.testing.assert_allclose(scores.softmax(-1).numpy(), theirs.predict_proba(new), atol=1e-6)


def test_mean_difference_has_its_threshold_half_way() -> None:
    x, y, _ = two(3)
    probe = fit_probe("mean-difference", x, y)
    for label in range(3):
        own, rest = x[y == label].mean(0), x[y != label].mean(0)
        np.testing.assert_allclose(probe.direction(label), own - rest, atol=1e-9)
        middle = probe.scores(((own + rest) / 2)[None])[0, label]
        assert middle == pytest.approx(0, abs=1e-8)
        gap = ((own - rest) ** 2).sum()
        assert probe.scores(own[None])[0, label] == pytest.approx(gap / 2, rel=1e-6)


@pytest.mark.parametrize("kind", LINEAR)
def test_directions_are_in_the_units_of_the_states_and_raise_the_score(kind: str) -> None:
    x, y = planted.linear(200, classes=3)
    x[:, 5] *= 1000  # as one coordinate of many models is
    names = np.array(["low", "mid", "top"])[y]
    probe = fit_probe(kind, x, names)
    assert probe.classes == ("low", "mid", "top")
    assert probe.directions.shape == (3, 16)
    np.testing.assert_allclose(np.diff(probe.scores(x[:2]), axis=0)[0], probe.directions @ (x[1] - x[0]), rtol=1e-6)
    for i, label in enumerate(probe.classes):
        moved = x[:20] + probe.direction(label) / np.linalg.norm(probe.direction(label))
        assert (probe.scores(moved)[:, i] > probe.scores(x[:20])[:, i]).all()
    step = probe.direction("top") - probe.direction("low")
    far = x[y == 0][:5] + 100 * step / np.linalg.norm(step) * np.linalg.norm(x.std(0))
    assert "low" not in probe.predict(far)


@pytest.mark.parametrize("kind", LINEAR)
def test_units_and_origin_of_a_coordinate_do_not_matter(kind: str) -> None:
    """Nor do constant ones. But the mean difference is not standardised, and LDA shrinks toward the mean variance."""
    x, y = planted.linear(150)
    scale, shift = np.geomspace(0.01, 100, 16), np.linspace(-300, 300, 16)
    if kind == "mean-difference":
        scale = np.ones(16)
    one = fit_probe(kind, x, y).scores(x)
    wide = x * scale + shift
    if kind != "lda":
        wide = np.concatenate([wide, np.full((150, 1), 0.1)], axis=1)
    np.testing.assert_allclose(fit_probe(kind, wide, y).scores(wide), one, atol=1e-3 if kind == "logistic" else 1e-6)


def test_standardisation_of_float32_far_from_zero() -> None:
    x, y = planted.linear(300)
    far = (x + 3000).astype(np.float32)
    for kind in ("ridge", "lda", "mean-difference"):
        one, other = fit_probe(kind, far, y), fit_probe(kind, far.astype(np.float64), y)
        np.testing.assert_allclose(one.scores(far), other.scores(far), atol=1e-6)


def test_classes_that_do_not_vary() -> None:
    x = np.repeat(np.array([[0.0, 0.0], [1.0, 5.0], [4.0, 1.0]]), 3, axis=0)
    y = np.repeat(["a", "b", "c"], 3)
    for kind in LINEAR:
        assert fit_probe(kind, x, y).predict(x) == y.tolist(), kind


def test_only_an_mlp_tells_xor() -> None:
    x, y = planted.xor(400)
    new, right = planted.xor(200, seed=1)
    for kind in LINEAR:
        accuracy = np.mean(np.array(fit_probe(kind, x, y).predict(new)) == right)
        assert abs(accuracy - 0.5) < 0.18, kind
    accuracy = np.mean(np.array(fit_probe("mlp", x, y, hidden=64, epochs=60, rate=0.01).predict(new)) == right)
    assert accuracy > 0.97


def test_mlp_is_a_function_of_its_seed_alone() -> None:
    x, y = planted.xor(100)
    before = torch.random.get_rng_state()
    options: dict[str, Any] = {"hidden": 32, "epochs": 5, "dropout": 0.5}
    one, same, other = (fit_probe("mlp", x, y, seed=seed, **options).scores(x) for seed in (0, 0, 1))
    assert (one == same).all()
    assert np.abs(one - other).max() > 1e-3
    assert (torch.random.get_rng_state() == before).all()
    batches = [fit_probe("mlp", x, y, batch=size, **options).scores(x) for size in (16, 100, 1000)]
    assert np.abs(batches[0] - batches[1]).max() > 1e-3
    assert (batches[1] == batches[2]).all()


def test_mlp_steps_are_those_of_pytorchs_own_modules() -> None:
    """The same network from torch.nn, trained by hand from the same weights."""
    x, y = planted.xor(64)
    states, codes = torch.from_numpy(x).float(), torch.from_numpy(y)
    fresh = fit_probe("mlp", x, y, hidden=8, epochs=1, rate=1e-30, decay=0.0, dropout=0.0)
    trained = fit_probe("mlp", x, y, hidden=8, epochs=20, rate=0.01, decay=0.1, dropout=0.0)
    assert isinstance(fresh, MLPProbe)
    net = torch.nn.Sequential(
        torch.nn.LayerNorm(16), torch.nn.Linear(16, 8), torch.nn.GELU(), torch.nn.Dropout(0.0), torch.nn.Linear(8, 2)
    )
    with torch.no_grad():
        for own, given in zip(net.parameters(), fresh.parameters, strict=True):
            own.copy_(given)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1 / 2, end_factor=1.0, total_iters=1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=18)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, cosine], milestones=[2])
    rates: list[float] = []
    for _ in range(20):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(states), codes).backward()
        optimiser.step()
        scheduler.step()
    np.testing.assert_allclose(rates, [0.01 * schedule(i, 20, 2) for i in range(20)], atol=1e-9)
    np.testing.assert_allclose(trained.scores(x), net(states).detach().numpy(), atol=1e-4)


def test_tensors_half_precision_and_labels_of_every_sort() -> None:
    x, y = planted.linear(90)
    plain = fit_probe("ridge", x.astype(np.float32), y).scores(x)
    given: list[Any] = [torch.from_numpy(y), y.tolist(), tuple(y), y.astype(np.int8), y.astype(float)]
    for labels in given:
        np.testing.assert_array_equal(fit_probe("ridge", torch.from_numpy(x).float(), labels).scores(x), plain)
    half = torch.from_numpy(x).bfloat16()
    expected = fit_probe("ridge", half.float(), y).scores(x)
    np.testing.assert_array_equal(fit_probe("ridge", half, y).scores(x), expected)
    assert fit_probe("lda", x, y > 0).classes == (False, True)
    assert fit_probe("lda", x, np.where(y > 0, "a", "b"), classes=["b", "a"]).classes == ("b", "a")
    mixed: list[Any] = [("x", 1) if v else 7 for v in y]
    assert set(fit_probe("lda", x, mixed).predict(x)) == {("x", 1), 7}


def test_regression_is_scikit_learns() -> None:
    x, _, new = two(3)
    draw = np.random.default_rng(3)
    values = x @ draw.normal(size=16) + draw.normal(size=200)
    found = fit_regression(x, values, penalty=2.0)
    theirs = make_pipeline(StandardScaler(), Ridge(alpha=2.0)).fit(x, values)
    np.testing.assert_allclose(found.predict(new), theirs.predict(new), atol=1e-6)


def test_bad_input() -> None:
    x, y = planted.linear(30)
    broken = x.copy()
    broken[7, 3] = np.nan
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("svm", x, y), {}, "kind is 'svm'; it is one of logistic, ridge, lda, mean-difference, mlp"),
        (("ridge", x, y[:-1]), {}, "there are 29 labels for 30 rows"),
        (("ridge", x, "words"), {}, "labels are no list"),
        (("ridge", x, y[:, None]), {}, r"labels have the shape \[30, 1\]"),
        (("ridge", x, [0] * 30), {}, "all labels are 0: a probe needs at least two classes"),
        (("ridge", x, y + 0.5), {}, "is a real number: cut it into classes"),
        (("ridge", x, [None, *y[1:]]), {}, "label 0 is missing"),
        (("ridge", x, [float("nan"), *y[1:]]), {}, "label 0 is missing"),
        (("ridge", x, [[1], *y[1:]]), {}, "label 0 is a list"),
        (("ridge", x, y), {"classes": [0, 1, 2, 9]}, "no row has the label 9"),
        (("ridge", x, y), {"classes": [0, 1]}, "label 2 is not among classes="),
        (("ridge", x, y), {"classes": [0, 1, 1, 2]}, "names a class twice"),
        (("ridge", broken, y), {}, "the states are NaN or infinite in row 7"),
        (("ridge", x[0], y), {}, r"the states have the shape \[16\]"),
        (("ridge", x[:0], []), {}, r"the states have the shape \[0, 16\]"),
        (("ridge", [["a"]], [1]), {}, "no matrix of numbers"),
        (("ridge", x, y), {"C": 3}, "'ridge' has no option 'C'; it has penalty"),
        (("mean-difference", x, y), {"penalty": 3}, "has no option 'penalty'; it has none"),
        (("ridge", x, y), {"penalty": 0}, "penalty is 0; it must be above 0"),
        (("ridge", x, y), {"penalty": "much"}, "penalty is 'much'; it must be a number above 0"),
        (("lda", x, y), {"shrinkage": 1.5}, "shrinkage is 1.5; it must be from 0 to 1"),
        (("mlp", x, y), {"hidden": 0}, "hidden is 0; it must be at least 1"),
        (("mlp", x, y), {"dropout": 1.0}, "dropout is 1.0"),
        (("mlp", x, y), {"epochs": 1.5}, "epochs 1.5 is not a whole number"),
    ]
    for arguments, options, match in cases:
        with pytest.raises(InputError, match=match) as caught:
            fit_probe(*arguments, **options)
        assert "\n" not in str(caught.value)
    probe = fit_probe("ridge", x, y)
    assert isinstance(probe, LinearProbe)
    with pytest.raises(InputError, match="the states are of width 3, and this probe was fitted on 16"):
        probe.scores(x[:, :3])
    with pytest.raises(InputError, match="has no class 'x'; it has 0, 1, 2"):
        probe.direction("x")
    mlp = fit_probe("mlp", x, y, hidden=4, epochs=1)
    for ask in (lambda: mlp.directions, lambda: mlp.direction(0)):
        with pytest.raises(InputError, match="'mlp' is not linear and has no direction"):
            ask()
    with pytest.raises(InputError, match="there are 3 values for 30 rows"):
        fit_regression(x, [1.0, 2.0, 3.0])
    strange: list[tuple[Any, str]] = [
        ("1", "penalty is '1'; it must be a number above 0"),
        (None, "penalty is None; it must be a number above 0"),
        (True, "penalty is True; it must be a number above 0"),
        (float("nan"), "penalty is nan; it must be a number above 0"),
        (0, "penalty is 0; it must be above 0"),
    ]
    for penalty, match in strange:
        with pytest.raises(InputError, match=match):
            fit_regression(x, np.arange(float(len(x))), penalty=penalty)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    x, y = planted.linear(30)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install 'logitlab\[probes\]'"):
        fit_probe("logistic", x, y)
    assert fit_probe("ridge", x, y).classes == (0, 1, 2)
