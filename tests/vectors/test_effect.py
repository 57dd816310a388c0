"""The bookkeeping of effect() against loops of Transformers' generate, and its choices and lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from logitlab.interventions import Vectors
from logitlab.interventions.trials import Trials
from logitlab.vectors import Effect, Match, effect
from logitlab.vectors.effect import nats
from tests import zoo

PROMPTS = [f"The capital of {x}" for x in ("France is", "Japan is", "Italy is", "the sea", "a girl", "time", "wind")]
PROMPTS += ["Once upon", "the stars", "Rome"]
SITES = ["0.resid_post", "2.resid_post"]
STRENGTHS = (0.5, 2.0, 4.0)
NEUTRAL = ["Once upon a time there was a little girl", "the sea and the wind"]
ANSWERS = [["a", "e"], ["T"], ["o", "x"], ["i"], ["|"], ["n"], ["th", "g"], ["s"], ["F"], ["l", "r"]]


def made(model: ll.Model, seed: int = 0, sites: Sequence[str] = SITES) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    return Vectors({s: torch.randn(model.width, generator=generator) for s in sites}, "by hand", model.about)


def written(model: ll.Model, text: str, site: str, vector: torch.Tensor | None, new: int = 4) -> str:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if vector is None:
        out = model.module.generate(ids, **options)
    else:
        with iv.intervene(model, iv.add(site, vector, positions="each")):
            out = model.module.generate(ids, **options)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def right(text: str, answers: Sequence[str]) -> float:
    return float(any(a.lower() in text.lower() for a in answers))


def perplexity(model: ll.Model, site: str, vector: torch.Tensor | None) -> list[float]:
    """Mean cross-entropy of each neutral text by a plain pass with a hook that adds to every token."""
    found: list[float] = []
    for text in NEUTRAL:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])

        def hook(module: Any, args: Any, output: Any) -> Any:
            if vector is None:
                return None
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        handle = model.stack.blocks[int(site[0])].module.register_forward_hook(hook)
        logits = zoo.forward(model.module, ids.tolist()).double()
        handle.remove()
        found.append(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])))
    return found


def test_everything_is_what_a_loop_gives(llama: ll.Model) -> None:
    vectors, other = made(llama), made(llama, seed=5)
    seen: list[tuple[int, int]] = []
    found = effect(
        llama, vectors, PROMPTS, ANSWERS, strengths=STRENGTHS, other=other, neutral=NEUTRAL, randoms=2, new_tokens=4,
        seed=3, rows=5, progress=lambda a, b: seen.append((a, b)),
    )  # fmt: skip
    # the parts
    assert len(found.choosing) == 4
    assert len(found.testing) == 6
    assert sorted(found.choosing + found.testing) == list(range(10))
    # the grid
    grid = np.zeros((2, 3))
    for i, site in enumerate(SITES):
        for j, strength in enumerate(STRENGTHS):
            texts = [written(llama, PROMPTS[n], site, strength * vectors[site]) for n in found.choosing]
            grid[i, j] = np.mean([right(t, ANSWERS[n]) for t, n in zip(texts, found.choosing, strict=True)])
    np.testing.assert_array_equal(found.grid, grid)
    assert len(np.unique(grid)) > 1
    best = sorted((-grid[i, j], STRENGTHS[j], i, j) for i in range(2) for j in range(3))[0]
    assert found.chosen == best[2:]
    site, strength = SITES[best[2]], best[1]
    assert (found.site, found.strength) == (site, strength)
    # the controls
    size = vectors.norm(site)
    twins = [vectors.random_twin(seed)[site] for seed in (3, 4)]
    alike = other[site] * (size / other.norm(site))
    for one in (*twins, alike):
        assert float(one.double().norm()) == pytest.approx(size, rel=1e-6)
    changes = {"plain": None, "steered": vectors[site], "other": alike, "random 0": twins[0], "random 1": twins[1]}
    correct: dict[str, Any] = {}
    nll: dict[str, Any] = {}
    for what, vector in changes.items():
        moved = None if vector is None else strength * vector
        texts = [written(llama, PROMPTS[n], site, moved) for n in found.testing]
        correct[what] = np.array([right(t, ANSWERS[n]) for t, n in zip(texts, found.testing, strict=True)])
        nll[what] = np.array(perplexity(llama, site, moved))
        if what == "steered":  # its texts, held against the answers of each other prompt
            others = [
                [right(t, ANSWERS[m]) for m in found.testing if m != n]
                for t, n in zip(texts, found.testing, strict=True)
            ]
            correct["permuted"] = np.array([np.mean(row) for row in others])
    for table in (correct, nll):
        table["random"] = (table.pop("random 0") + table.pop("random 1")) / 2
    assert set(found.nll) == {"plain", "steered", "other", "random"}
    assert set(found.correct) == set(found.nll) | {"permuted"}
    for what in correct:
        np.testing.assert_allclose(found.correct[what], correct[what], atol=1e-12, err_msg=what)
        if what in nll:
            np.testing.assert_allclose(found.nll[what], nll[what], atol=1e-5, err_msg=what)
            assert found.perplexity(what) == pytest.approx(math.exp(nll[what].mean()), rel=1e-5)
        assert found.rate(what).value == pytest.approx(correct[what].mean())
        assert found.gain(what).value == pytest.approx((correct["steered"] - correct[what]).mean())
        assert found.gain(what).n == 6
    assert (found.gain("steered").low, found.gain("steered").high) == (0, 0)  # paired
    assert seen[-1] == (6 * 4 + 5 * 6, 6 * 4 + 5 * 6)
    assert [a for a, _ in seen] == sorted({a for a, _ in seen})
    # what it says of itself
    rows = {row["what"]: row for row in found.rows()}
    assert rows["random"]["gain"] == found.gain("random").value
    assert "gain" not in rows["steered"]
    assert rows["plain"]["perplexity"] == found.perplexity("plain")
    assert f"Effect at {site}, strength {strength:g} (chosen on 4 prompts):" in repr(found)
    assert found.data().sel(site="2.resid_post", strength=2.0) == grid[1, 1]
    assert found.about["vectors"] == vectors.describe()
    again = effect(llama, vectors, PROMPTS, ANSWERS, strengths=STRENGTHS, randoms=2, new_tokens=4, seed=3)
    np.testing.assert_array_equal(again.grid, found.grid)
    np.testing.assert_array_equal(again.correct["random"], found.correct["random"])
    assert set(again.correct) == {"plain", "steered", "random", "permuted"}


def told(monkeypatch: pytest.MonkeyPatch, rate: Any) -> None:
    """Let trials write what a rule says: ``yes`` to the first so many prompts."""

    def write(self: Trials, trials: Any, new_tokens: int, *, progress: Any = None) -> list[list[str]]:
        found: list[list[str]] = []
        for trial in trials:
            share = rate(str(trial[0].sites), trial[0].change.strength) if trial else 0.0
            count = round(share * len(self))
            found.append(["yes"] * count + ["no"] * (len(self) - count))
        return found

    monkeypatch.setattr(Trials, "write", write)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], (0, 0)),  # all alike: the smallest strength, the earliest site
        ([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5]], (1, 1)),  # a smaller strength before an earlier site
        ([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], (0, 1)),  # of one strength the earlier site
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], (1, 2)),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], (0, 0)),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_what_is_chosen(
    llama: ll.Model, monkeypatch: pytest.MonkeyPatch, table: Any, expected: tuple[int, int], order: tuple[int, ...]
) -> None:
    """Also where strengths are not given in order."""
    told(monkeypatch, lambda site, strength: table[SITES.index(site)][STRENGTHS.index(strength)])
    given = [STRENGTHS[i] for i in order]
    found = effect(llama, made(llama), PROMPTS, [["yes"]] * 10, strengths=given, choose=[9, 0, 4, 2])
    assert (found.site, found.strength) == (SITES[expected[0]], STRENGTHS[expected[1]])
    assert found.choosing == (0, 2, 4, 9)
    assert found.testing == (1, 3, 5, 6, 7, 8)
    np.testing.assert_array_equal(found.grid, np.array(table)[:, order])


def test_parts_of_all_sizes(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda site, strength: 1.0)
    for count, choose, size in ((2, 0.01, 1), (2, 0.99, 1), (10, 0.5, 5), (10, 0.99, 9), (5, 0.4, 2)):
        found = effect(llama, made(llama), PROMPTS[:count], [["yes"]] * count, choose=choose)
        assert len(found.choosing) == size
        assert sorted(found.choosing + found.testing) == list(range(count))
    one, two = (effect(llama, made(llama), PROMPTS, [["yes"]] * 10, seed=s).choosing for s in (0, 1))
    assert one != two


def test_when_a_text_is_right() -> None:
    assert Match()("He said COLD.", ["cold"])
    assert Match()("the scolding", ["cold"])  # anywhere: this is lenient
    assert not Match()("warm", ["cold", "chilly"])
    assert Match()("STRASSE", ["straße"])
    assert not Match(case=True)("COLD", ["cold"])
    assert Match(case=True)("so cold", ["cold"])
    assert Match(begins=True)("\n  Cold and", ["cold"])
    assert not Match(begins=True)("so cold", ["cold"])
    assert not Match(begins=True, case=True)(" Cold", ["cold"])
    assert Match(begins=True)(' "cold"', ["cold"])
    assert Match(words=True)("It is (safe).", ["safe"])
    assert not Match(words=True)("It is unsafe, safely", ["safe"])
    assert Match(words=True)("C++ it is", ["C++"])
    assert not Match(begins=True, words=True)("a bee", ["b"])
    assert Match(words=True)("el niño", ["niño"])
    assert not Match()("", ["cold"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "bloom", "mamba"])
def test_nats_are_cross_entropies(name: str) -> None:
    model = ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)
    vector = made(model)["0.resid_post"]
    np.testing.assert_allclose(nats(model, NEUTRAL), perplexity(model, "0", None), atol=2e-5)
    found = nats(model, NEUTRAL, [iv.add("0.resid_post", vector)])
    truth = perplexity(model, "0", vector)
    np.testing.assert_allclose(found, truth, atol=2e-5)
    last = nats(model, NEUTRAL, [iv.add(model.last_site, vector)])  # where it is read as well
    np.testing.assert_allclose(last, perplexity(model, str(model.last_site.layer), vector), atol=2e-5)


def test_an_answer_may_be_given_as_one_text(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a list of letters."""
    told(monkeypatch, lambda site, strength: 1.0)
    answers: Any = ["yesterday"] * 10
    assert effect(llama, made(llama), PROMPTS, answers).rate().value == 0.0
    answers = ["yes"] * 10
    assert effect(llama, made(llama), PROMPTS, answers).rate().value == 1.0


def test_bad_input(llama: ll.Model) -> None:
    vectors = made(llama)

    def refused(
        message: str, *, v: Vectors = vectors, prompts: Any = PROMPTS, answers: Any = ANSWERS, **more: Any
    ) -> None:
        with pytest.raises(InputError, match=message) as caught:
            effect(llama, v, prompts, answers, **more)
        assert "\n" not in str(caught.value)

    refused("there are 10 prompts and 9 lists of answers: give answers for each", answers=ANSWERS[:9])
    refused("give answers for each", answers=[*ANSWERS[:9], []])
    refused("an answer is blank: it would be found in any text", answers=[*ANSWERS[:9], ["a", " "]])
    refused("the prompts are one text, 'abc': give a list", prompts="abc", answers=["x"] * 3)
    refused("the answers are one text", answers="abcdefghij")
    refused("the neutral texts are one text", neutral="Once upon a time")
    refused("there are no strengths", strengths=[])
    refused("strength is nan; it must be a finite number", strengths=[1.0, float("nan")])
    refused("strength is 'a'", strengths=["a"])
    refused("randoms is 0; it must be at least 1", randoms=0)
    refused("seed is -1; it must be at least 0", seed=-1)
    refused("new_tokens is 0", new_tokens=0)
    for choose in (0, 1, 1.5, float("nan")):
        refused(r"choose is .*; it must be above 0 and below 1", choose=choose)
    for numbers in ([], [10], [-1], list(range(10))):
        refused("choose names .* of 10 prompts: give numbers of some, so that others are left", choose=numbers)
    refused("there are 1 prompts: choosing and testing need some each", prompts=PROMPTS[:1], answers=ANSWERS[:1])
    refused("a trial is a list of interventions at positions last, each, generated", positions="all")
    refused("there are no positions 'end'", positions="end")
    refused("layer 9 is out of range", v=made(llama, sites=["9.resid_post"]))
    refused("there are no neutral texts", neutral=[])
    refused("the neutral text 'The' has 1 token for tiny-llama: at least 2 are needed", neutral=["the sea", "The"])
    zero = Vectors(dict.fromkeys(SITES, torch.zeros(32)), "nothing", llama.about)
    refused("the vector of the other task is zero: it is no control", other=zero)
    refused(r"there is no vector \(by hand\) for 2\.resid_post", other=made(llama, sites=SITES[:1]))
    foreign = made(ll.wrap(zoo.build("llama", seed=1), zoo.tokenizer(), name="other"))
    refused("other weights", v=foreign)
    refused("other weights", other=foreign)
    found = Effect(("0.resid_post",), (1.0,), np.ones((1, 1)), (0, 0), {"plain": np.ones(2)}, {}, (0,), (1, 2))
    with pytest.raises(InputError, match="'other' was not measured; there are plain"):
        found.rate("other")
    with pytest.raises(InputError, match="there is no perplexity of 'plain'; neutral= gives it for none"):
        found.perplexity("plain")


def test_bad_controls_are_refused_before_anything_is_written(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: Any, **options: Any) -> Any:
        raise AssertionError("it has begun")

    monkeypatch.setattr(Trials, "write", write)
    for more in ({"neutral": ["The"]}, {"other": made(llama, sites=SITES[:1])}, {"seed": -1}):
        options: Any = more
        with pytest.raises(InputError):
            effect(llama, made(llama), PROMPTS, ANSWERS, **options)
