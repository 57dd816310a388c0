"""Effects of heads against a loop that replaces one head in one prompt at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.vectors import Examples, head_effects
from logitlab.vectors.heads import first_tokens
from tests import zoo

PAIRS = (("the", "sea"), ("France", "Paris"), ("Japan", "Tokyo"), ("girl", "Rome"), ("time", "wind"))
TASK = Examples(PAIRS, "{X}:", separator=";")
QUERIES = ["the", "Japan", "time"]


def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)


def passed(
    model: ll.Model, text: str, part: Any, own: slice, value: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities after a text, and what went into a head's part of the projection there; perhaps another value."""
    seen: list[torch.Tensor] = []

    def before(module: Any, args: Any) -> Any:
        seen.append(args[0][0, -1, own].double())
        if value is None:
            return None
        given = args[0].clone()
        given[0, -1, own] = value.float()
        return (given, *args[1:])

    handle = part.module.register_forward_pre_hook(before)
    logits = zoo.forward(model.module, list(model.encode(text)[0].ids))[-1]
    handle.remove()
    return logits.double().softmax(-1), seen[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_effects_are_those_of_a_loop(name: str) -> None:
    model = wrapped(name)
    done: list[tuple[int, int]] = []
    found = head_effects(
        model, TASK, QUERIES, shots=2, seed=1, prompts=2, rows=7, progress=lambda a, b: done.append((a, b))
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert found.sites == tuple(f"{layer}.head_out.{head}" for layer in range(3) for head in range(4))
    assert found.effects.shape == (12, 2)
    answers = dict(PAIRS)
    shown, spoilt = (TASK.prompts(QUERIES, shots=2, seed=1, shuffled=s) for s in (False, True))

    for i in range(12):
        layer, head = divmod(i, 4)
        part = model.parts[layer].heads
        assert part is not None
        own = slice(8 * head, 8 * head + 8)
        # the projection is linear: the mean of what goes in is put in
        mean = torch.stack([passed(model, text, part, own)[1] for text in shown]).mean(0)
        np.testing.assert_allclose(found.means[i].numpy(), mean @ part.matrix()[own].double(), atol=1e-5, rtol=1e-4)
        for n, query in enumerate(QUERIES[:2]):
            ids = first_tokens(model, " ", (answers[query],))
            plain, changed = (passed(model, spoilt[n], part, own, value)[0] for value in (None, mean))
            truth = float(changed[ids].max()) - float(plain[ids].max())
            assert found.effects[i, n] == pytest.approx(truth, abs=2e-6)
    assert np.abs(found.effects).max() > 1e-4
    np.testing.assert_allclose(found.average, found.effects.mean(1))
    assert found.recipe["prompts"] == 2
    assert found.recipe["queries"] == 3


def test_the_vector_is_the_sum_of_the_largest() -> None:
    model = wrapped("llama")
    found = head_effects(model, TASK, QUERIES, shots=2)
    order = sorted(range(12), key=lambda i: (-found.effects[i].mean(), i))
    assert found.largest(5) == order[:5]
    vectors = found.vectors(["1.resid_post", "0.resid_post"], heads=5)
    assert vectors.sites == ["1.resid_post", "0.resid_post"]
    truth = sum(found.means[i].double() for i in order[:5]).float()
    for site in vectors.sites:
        torch.testing.assert_close(vectors[site], truth, atol=1e-6, rtol=1e-6)
    assert vectors.recipe["heads"] == [found.sites[i] for i in order[:5]]
    vectors.check(model)
    # of all heads of a layer: what its attention writes, on average (this model adds no bias to it)
    whole = found.means[4:8].double().sum(0)
    attention = ll.capture(model, TASK.prompts(QUERIES, shots=2), "1.attn_out", positions=-1)["1.attn_out"]
    torch.testing.assert_close(whole.float(), attention.mean(0), atol=2e-5, rtol=1e-4)
    alike = dataclasses.replace(found, effects=np.zeros((12, 3)))
    assert alike.largest(3) == [0, 1, 2]
    for bad in (0, 13, -1):
        with pytest.raises(InputError, match=f"heads is {bad}; there are 12: give 1 to 12"):
            found.vectors(["1.resid_post"], heads=bad)


def test_some_heads() -> None:
    model = wrapped("llama")
    every = head_effects(model, TASK, QUERIES, shots=2)
    some = head_effects(model, TASK, QUERIES, shots=2, heads=["2.head_out.3", "0.head_out"])
    assert some.sites == ("0.head_out.0", "0.head_out.1", "0.head_out.2", "0.head_out.3", "2.head_out.3")
    np.testing.assert_allclose(some.effects, every.effects[[0, 1, 2, 3, 11]], atol=1e-6)
    np.testing.assert_allclose(some.means, every.means[[0, 1, 2, 3, 11]], atol=1e-6)


def test_what_answers_begin_with() -> None:
    model = wrapped("llama")

    def label(text: str) -> int:
        return int(model.tokenizer(text, add_special_tokens=False)["input_ids"][0])

    assert first_tokens(model, " ", ("the",)) == [label(" the"), label("the")]
    assert first_tokens(model, "", ("the",)) == [label("the")]
    assert first_tokens(model, " ", ("the", "the")) == [label(" the"), label("the")]
    assert label("the") != label(" the")
    with pytest.raises(InputError, match="has no tokenizer"):
        first_tokens(ll.wrap(zoo.shared("llama")), " ", ("the",))


def test_bad_input() -> None:
    model = wrapped("llama")
    with pytest.raises(InputError, match="query 'Italy' is the input of no pair: its answer is not known"):
        head_effects(model, TASK, ["Italy"])
    with pytest.raises(InputError, match="there are no queries"):
        head_effects(model, TASK, [])
    for prompts in (0, -1):
        with pytest.raises(InputError, match=f"prompts is {prompts}; it must be at least 1"):
            head_effects(model, TASK, QUERIES, prompts=prompts)
    with pytest.raises(InputError, match="names no attention head"):
        head_effects(model, TASK, QUERIES, heads="resid_post")
    with pytest.raises(InputError, match="joint ': ' is not blank: put it into the template"):
        head_effects(model, Examples(PAIRS, "{X}", joint=": "), QUERIES)
    with pytest.raises(InputError) as caught:
        head_effects(wrapped("mamba"), TASK, QUERIES)
    assert "head_out" in str(caught.value)
    assert "\n" not in str(caught.value)
