"""Vectors from two sets of prompts, against NumPy in float64 on states that hooks have caught."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import logitlab as ll
from logitlab.errors import InputError
from logitlab.vectors import mean_difference, principal
from tests import zoo

HIGH = [zoo.ids(5, seed=1), zoo.ids(7, seed=2), zoo.ids(5, seed=3), zoo.ids(2, seed=4)]
LOW = [zoo.ids(6, seed=5), zoo.ids(4, seed=6), zoo.ids(7, seed=7), zoo.ids(3, seed=8)]


def states(model: ll.Model, prompts: Sequence[list[int]], layer: int, where: Any = -1) -> NDArray[np.float64]:
    """What a block gives, by a plain hook: [rows, width]."""
    kept: list[NDArray[np.float64]] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        found = (output[0] if isinstance(output, tuple) else output)[0].double().numpy()
        kept.append(np.atleast_2d(found[where]))

    handle = model.stack.blocks[layer].module.register_forward_hook(hook)
    for ids in prompts:
        zoo.forward(model.module, ids)
    handle.remove()
    return np.concatenate(kept)


@pytest.mark.parametrize(("where", "said"), [(-1, -1), ([0, -1], [0, -1]), (slice(1, None), "1::")])
def test_a_mean_difference(llama: ll.Model, where: Any, said: Any) -> None:
    seen: list[tuple[int, int]] = []
    found = mean_difference(llama, HIGH, LOW[:3], position=where, progress=lambda a, b: seen.append((a, b)))
    assert found.sites == [f"{n}.resid_post" for n in range(3)]
    for layer in range(3):
        truth = states(llama, HIGH, layer, where).mean(0) - states(llama, LOW[:3], layer, where).mean(0)
        np.testing.assert_allclose(found[f"{layer}.resid_post"].numpy(), truth, atol=2e-6, rtol=1e-5)
    assert found.recipe == {"positive": 4, "negative": 3, "position": said}
    assert found.model == llama.about
    assert found.kind == "mean difference"
    assert (4, 4) in seen
    assert (3, 3) in seen
    found.check(llama)


def test_what_was_captured_before(llama: ll.Model) -> None:
    """Also of a part of the sites; and that it was captured elsewhere is recorded."""
    high = ll.capture(llama, HIGH, ["0.resid_post", "1.mlp_out", "2.head_out.1"], positions=-2)
    low = ll.capture(llama, LOW, ["0.resid_post", "1.mlp_out", "2.head_out.1"], positions=-2)
    found = mean_difference(llama, high, low, ["1.mlp_out", "2.head_out.1"])
    assert found.sites == ["1.mlp_out", "2.head_out.1"]
    for site in found.sites:
        truth = high[site].double().mean(0) - low[site].double().mean(0)
        torch.testing.assert_close(found[site], truth.float(), atol=1e-6, rtol=1e-6)
    assert found.recipe["position"] == "as captured"
    mixed = mean_difference(llama, high, LOW, "0.resid_post", position=-2)
    torch.testing.assert_close(
        mixed["0.resid_post"], mean_difference(llama, HIGH, LOW, "0.resid_post", position=-2)["0.resid_post"]
    )
    with pytest.raises(InputError, match=r"the positive activations have no site 0\.resid_pre: name the sites"):
        mean_difference(llama, high, low, "resid_pre")
    with pytest.raises(InputError, match=r"the negative activations have no site 1\.resid_post"):
        mean_difference(llama, HIGH, low)


@pytest.mark.parametrize("component", [0, 1, 3])
def test_a_principal_component(llama: ll.Model, component: int) -> None:
    """An eigenvector of the second moments, whose eigenvalue is the squared length."""
    found = principal(llama, HIGH, LOW, component=component)
    for layer in range(3):
        differences = states(llama, HIGH, layer) - states(llama, LOW, layer)
        values, vectors = np.linalg.eigh(differences.T @ differences / 4)
        along, size = vectors[:, -1 - component], np.sqrt(values[-1 - component])
        vector = found[f"{layer}.resid_post"].numpy().astype(np.float64)
        assert np.linalg.norm(vector) == pytest.approx(size, rel=1e-4)
        assert abs(vector @ along) == pytest.approx(size, rel=1e-4)
        assert (differences @ vector).sum() > 0
        assert np.sqrt(((differences @ vector / size) ** 2).mean()) == pytest.approx(size, rel=1e-4)
    assert found.recipe == {"pairs": 4, "component": component, "position": -1}


def test_it_points_from_the_negative_to_the_positive(llama: ll.Model) -> None:
    one, other = principal(llama, HIGH, LOW), principal(llama, LOW, HIGH)
    for site in one.sites:
        torch.testing.assert_close(one[site], -other[site], atol=1e-6, rtol=1e-6)
    single = principal(llama, HIGH[:1], LOW[:1])  # of one pair it is the difference
    difference = mean_difference(llama, HIGH[:1], LOW[:1])
    for site in single.sites:
        torch.testing.assert_close(single[site], difference[site], atol=1e-5, rtol=1e-5)


def test_prompts_that_say_nothing(llama: ll.Model) -> None:
    """Equal but for rounding is equal: a sum of the same states in another order, or the first token."""
    flat = r"both sets of prompts have the same mean state at 0\.resid_post: their difference says nothing"
    with pytest.raises(InputError, match=flat):
        mean_difference(llama, HIGH, HIGH)
    with pytest.raises(InputError, match=flat):
        mean_difference(llama, HIGH, HIGH[::-1])
    same = [[5, *ids] for ids in HIGH], [[5, *ids] for ids in LOW]
    with pytest.raises(InputError, match=flat):
        mean_difference(llama, *same, position=0)
    zero = r"the 4 differences at 0\.resid_post span 0 dimensions \(they are all zero\)"
    for pairs in ((HIGH, HIGH), same):
        with pytest.raises(InputError, match=zero):
            principal(llama, *pairs, position=0)
    with pytest.raises(InputError, match=r"component is 2; the 2 differences at .* span 2 dimensions \(0 to 1\)"):
        principal(llama, HIGH[:2], LOW[:2], component=2)
    with pytest.raises(InputError, match=r"component is 1; the 2 differences .* span 1 dimensions \(0 to 0\)"):
        principal(llama, HIGH[:1] * 2, LOW[:1] * 2, component=1)
    with pytest.raises(InputError, match="component is -1"):
        principal(llama, HIGH, LOW, component=-1)


def test_bad_pairs(llama: ll.Model) -> None:
    with pytest.raises(InputError, match=r"4 positive and 3 negative prompts: principal\(\) needs pairs"):
        principal(llama, HIGH, LOW[:3])
    whole = [ll.capture(llama, prompts, "0.resid_post") for prompts in (HIGH, LOW)]
    with pytest.raises(InputError, match="other numbers of positions for both prompts of a pair"):
        principal(llama, *whole, "0.resid_post")
    with pytest.raises(InputError, match="position"):
        mean_difference(llama, HIGH, LOW, position=6)
    with pytest.raises(InputError):
        mean_difference(llama, [], LOW)
    with pytest.raises(InputError, match="layer 7 is out of range"):
        mean_difference(llama, HIGH, LOW, "7.resid_post")


def test_states_that_are_nan() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer())
    with torch.no_grad():
        model.module.model.embed_tokens.weight[17] = float("nan")
    with pytest.raises(InputError, match=r"the negative states at 0\.resid_post are NaN or infinite: there is no mean"):
        mean_difference(model, [[5, 6]], [[5, 17]], "resid_post")
    with pytest.raises(InputError, match=r"the positive states at 1\.resid_post are NaN or infinite"):
        principal(model, [[5, 17]], [[5, 6]], "1.resid_post")


def test_half_precision() -> None:
    """Means are formed in float64 of the states as they are."""
    model = ll.wrap(zoo.build("llama").to(torch.bfloat16), zoo.tokenizer())
    kept = [ll.capture(model, prompts, "1.resid_post", positions=-1)["1.resid_post"] for prompts in (HIGH, LOW)]
    assert kept[0].dtype == torch.bfloat16
    truth = kept[0].double().mean(0) - kept[1].double().mean(0)
    found = mean_difference(model, HIGH, LOW, "1.resid_post")["1.resid_post"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth.float(), atol=1e-6, rtol=1e-6)
