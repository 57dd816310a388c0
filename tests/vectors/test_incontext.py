"""Prompts with examples, and the function vectors that they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.vectors import Examples, function_vectors

PAIRS = tuple((f"in{i}", f"out{i}") for i in range(9))
TASK = Examples(PAIRS, "f({X}) =")


def parsed(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """The examples of a prompt and its query."""
    *lines, last = prompt.split("\n")
    shown = [line.removeprefix("f(").split(") = ") for line in lines]
    assert last.startswith("f(")
    assert last.endswith(") =")
    return [(x, y) for x, y in shown], last[2:-3]


@pytest.mark.parametrize("shuffled", [False, True])
def test_prompts_show_other_pairs(shuffled: bool) -> None:
    right, seen = dict(PAIRS), set[str]()
    for seed in range(20):
        queries = [x for x, _ in PAIRS] + ["new"]
        prompts = TASK.prompts(queries, shots=4, seed=seed, shuffled=shuffled)
        assert prompts == TASK.prompts(queries, shots=4, seed=seed, shuffled=shuffled)
        for query, prompt in zip(queries, prompts, strict=True):
            shown, asked = parsed(prompt)
            assert asked == query
            inputs = [x for x, _ in shown]
            assert len(shown) == 4 == len(set(inputs))
            assert query not in inputs
            assert set(inputs) <= set(right)
            assert right.get(query) not in [y for _, y in shown]
            for x, y in shown:
                assert (right[x] == y) != shuffled
                assert y in right.values()
            seen.update(inputs)
    assert seen == set(right)  # all are drawn
    assert TASK.prompts(["in0"], seed=1) != TASK.prompts(["in0"], seed=2)
    assert parsed(TASK.prompts(["in0"], shots=8)[0])[1] == "in0"


def test_inputs_with_several_answers() -> None:
    """None of them is shown as a wrong one; equal answers leave no other choice."""
    several = Examples((("big", "small"), ("big", "little"), ("hot", "cold"), ("up", "down")), "f({X}) =")
    for seed in range(40):
        for shown, _ in map(parsed, several.prompts(["up", "new"], shots=3, seed=seed, shuffled=True)):
            assert all(y not in ("small", "little") for x, y in shown if x == "big")
            assert all((x, y) not in (("hot", "cold"), ("up", "down")) for x, y in shown)
    yes = Examples((("a", "yes"), ("b", "yes"), ("c", "yes")), "f({X}) =")
    assert parsed(yes.prompts(["a"], shots=2, shuffled=True)[0])[0] in (
        [("b", "yes"), ("c", "yes")],
        [("c", "yes"), ("b", "yes")],
    )


def test_the_form_of_prompts() -> None:
    task = Examples((("a{X}", "1"), ("b", "2")), "Q: {X}\nA:", joint="  ", separator="\n\n")
    assert task.bare("a{X}") == "Q: a{X}\nA:"
    assert task.shown("c", task.pairs) == "Q: a{X}\nA:  1\n\nQ: b\nA:  2\n\nQ: c\nA:"
    assert task.shown("c", []) == task.bare("c")
    lists: Any = [["a", "1"], ["b", "2"]]
    assert Examples(lists, "{X}").pairs == (("a", "1"), ("b", "2"))


def test_bad_tasks() -> None:
    for template in ("no place", "{x}", "{X} and {X}"):
        with pytest.raises(InputError, match=r"it must have \{X\} once, where the input goes"):
            Examples(PAIRS, template)
    with pytest.raises(InputError, match="there are no pairs"):
        Examples((), "{X}")
    for pair in ("ab", ("a",), ("a", "b", "c"), ("a", 1), 3):
        bad: Any = (("a", "b"), pair)
        with pytest.raises(InputError, match="is not an input and its answer: give two texts"):
            Examples(bad, "{X}")
    with pytest.raises(InputError, match="9 examples are wanted for 'in3', and there are 8 other pairs"):
        TASK.prompts(["in3"], shots=9)
    with pytest.raises(InputError, match="there are 1 other pairs"):
        Examples(PAIRS[:2], "{X}").prompts(["in0"], shots=1, shuffled=True)
    for options, message in (
        ({"shots": 0}, "shots is 0; it must be at least 1"),
        ({"shots": -1}, "shots is -1"),
        ({"shots": 1.5}, "shots"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            TASK.prompts(["in0"], **options)


def test_a_function_vector_is_a_difference_of_means(llama: ll.Model) -> None:
    task, asked = Examples(PAIRS[:6], "f({X}) =", separator=";"), ["in0", "in4", "new"]
    found = function_vectors(llama, task, asked, ["0.resid_post", "2.resid_post"], shots=2, seed=3)
    last: dict[str, list[np.ndarray]] = {"shown": [], "bare": []}
    for kind, texts in (("shown", task.prompts(asked, shots=2, seed=3)), ("bare", [task.bare(x) for x in asked])):
        for text in texts:
            ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                hidden = llama.module.model(ids, output_hidden_states=True).hidden_states
            last[kind].append(hidden[1][0, -1].double().numpy())
    truth = np.mean(last["shown"], 0) - np.mean(last["bare"], 0)
    np.testing.assert_allclose(found["0.resid_post"].numpy(), truth, atol=2e-6, rtol=1e-5)
    assert found.recipe == {
        "template": "f({X}) =",
        "joint": " ",
        "separator": ";",
        "queries": 3,
        "shots": 2,
        "seed": 3,
    }
    assert found.sites == ["0.resid_post", "2.resid_post"]
    every = function_vectors(llama, task, sites="1.resid_post", shots=1)
    assert every.recipe["queries"] == 6
    with pytest.raises(InputError, match="there are no queries"):
        function_vectors(llama, task, [])
    with pytest.raises(InputError, match="9 examples are wanted"):
        function_vectors(llama, task, shots=9)
