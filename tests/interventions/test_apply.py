"""Interventions against passes that are edited by hand, in batches, with padding, with and without a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from tests import zoo

Edit = Callable[[torch.Tensor], torch.Tensor]


def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)


def vector(model: ll.Model, seed: int = 0) -> torch.Tensor:
    return torch.randn(model.width, generator=torch.Generator().manual_seed(seed))


def logits(model: ll.Model, ids: list[int]) -> torch.Tensor:
    encoder = zoo.ids(5, seed=9) if model.encoder_decoder else None
    return zoo.forward(model.module, ids, encoder)


def by_hand(model: ll.Model, layer: int, edit: Edit, ids: list[int]) -> torch.Tensor:
    """Logits with a plain hook on a block."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = model.stack.blocks[layer].module.register_forward_hook(hook)
    try:
        return logits(model, ids)
    finally:
        handle.remove()


def changed(state: torch.Tensor, position: int, edit: Edit) -> torch.Tensor:
    out = state.clone()
    out[:, position] = edit(state[:, position])
    return out


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_states_are_edited_as_by_hand(name: str) -> None:
    model, ids = wrapped(name), zoo.ids(7)
    v = vector(model)
    layer = 0
    site = f"{layer}.resid_post"
    unit = (v.double() / v.double().norm()).float()
    cases: list[tuple[iv.Intervention, Edit]] = [
        (iv.add(site, v, strength=1.5, positions=3), lambda h: h + 1.5 * v),
        (iv.replace(site, v, positions=3), lambda h: v.expand_as(h)),
        (iv.scale(site, 0.25, positions=3), lambda h: 0.25 * h),
        (iv.ablate(site, positions=3), torch.zeros_like),
        (iv.project_out(site, 3 * v, positions=3), lambda h: h - (h @ unit).unsqueeze(-1) * unit),
        (iv.clamp(site, v, low=2.0, high=2.0, positions=3), lambda h: h + (2.0 - h @ unit).unsqueeze(-1) * unit),
    ]
    plain = logits(model, ids)
    for intervention, edit in cases:
        with iv.intervene(model, intervention):
            found = logits(model, ids)
        expected = by_hand(model, layer, lambda h, edit=edit: changed(h, 3, edit), ids)
        gap = float((found - expected).abs().max())
        assert gap <= 1e-6 * max(1.0, float(expected.abs().max())), intervention
        assert float((found - plain).abs().max()) > 1e-6, intervention
    torch.testing.assert_close(logits(model, ids), plain, atol=0, rtol=0)
    assert zoo.hooks(model.module) == 0


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_components_heads_and_neurons(name: str) -> None:
    """Zeroed where the block itself would add them; heads and neurons by their part of the projection's input."""
    model, ids = wrapped(name), zoo.ids(6)
    parts = model.parts[1]
    for kind, component in parts.components.items():
        handle = component.module.register_forward_hook(
            lambda module, args, output: (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
        )
        expected = logits(model, ids)
        handle.remove()
        with iv.intervene(model, iv.ablate(f"1.{kind}")):
            torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-5)
    for kind, part, index in (("head_out", parts.heads, 1), ("neuron", parts.neurons, 5)):
        if part is None:
            continue

        def without(module: Any, args: Any, part: Any = part, index: int = index) -> Any:
            given = args[0].clone()
            size = given.shape[-1] // part.parts
            given[..., index * size : (index + 1) * size] = 0
            return (given, *args[1:])

        handle = part.module.register_forward_pre_hook(without)
        expected = logits(model, ids)
        handle.remove()
        scale = max(1.0, float(expected.abs().max()))  # T5's logits go up to 15, and float32 is off by 7e-5 there
        with iv.intervene(model, iv.ablate(f"1.{kind}.{index}")):
            torch.testing.assert_close(logits(model, ids), expected, atol=1e-6 * scale, rtol=1e-5)


def test_swapped_coordinates() -> None:
    model = wrapped("llama")
    a, b = vector(model, 1), vector(model, 2) + 0.5 * vector(model, 1)
    change = iv.swap("0.resid_post", a, b).change
    assert isinstance(change, iv.changes.Change)
    h = torch.randn(5, model.width)
    rows = iv.changes.Rows(torch.zeros(5).long(), torch.arange(5), torch.zeros(5).long())
    found = change(h, rows)
    plane = torch.stack([a / a.norm(), b / b.norm()])
    before, after = (torch.linalg.lstsq(plane.T, x.T).solution for x in (h, found))
    torch.testing.assert_close(after, before.flip(0), atol=1e-5, rtol=1e-4)
    outside = h - before.T @ plane
    torch.testing.assert_close(found - after.T @ plane, outside, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(change(found, rows), h, atol=1e-5, rtol=1e-4)


EVERY = ["add", "replace", "scale", "project_out", "ablate", "clamp", "swap", "resample", "cut"]


def intervention(model: ll.Model, what: str, positions: Any) -> Any:
    v, w = vector(model, 3), vector(model, 4)
    site = "0.resid_post"
    if what == "resample":
        return iv.resample(site, ll.capture(model, [zoo.ids(6, seed=1)], site), seed=2, positions=positions)
    if what == "cut":
        return iv.cut(positions, "first", layers=1)
    return {
        "add": lambda: iv.add(site, v, strength=2, positions=positions),
        "replace": lambda: iv.replace(site, v, positions=positions),
        "scale": lambda: iv.scale(site, 1.5, positions=positions),
        "project_out": lambda: iv.project_out(site, torch.stack([v, w]), positions=positions),
        "ablate": lambda: iv.ablate(site, positions=positions),
        "clamp": lambda: iv.clamp(site, v, low=1.0, positions=positions),
        "swap": lambda: iv.swap(site, v, w, positions=positions),
    }[what]()


def written(model: ll.Model, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits that every new token comes from, [sequences, tokens, V]."""
    out = model.module.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("what", EVERY)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("positions", ["last", "each", 2])
def test_writing_with_a_cache_is_writing_without(name: str, what: str, positions: Any) -> None:
    model = wrapped(name)
    ids = torch.tensor([zoo.ids(6)])
    plain = written(model, ids)
    with iv.intervene(model, intervention(model, what, positions)):
        cached, whole = written(model, ids), written(model, ids, use_cache=False)
    torch.testing.assert_close(cached, whole, atol=2e-5, rtol=1e-4)
    assert float((cached - plain).abs().max()) > 1e-5
    assert "generate" not in model.module.__dict__


@pytest.mark.parametrize("what", EVERY)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("positions", ["last", "all", 1, -2, slice(1, 3)])
def test_a_batch_is_its_prompts_and_padding_may_be_on_either_side(name: str, what: str, positions: Any) -> None:
    if what == "cut" and positions == "all":
        positions = slice(1, None)  # the first token has only itself to look at
    model = wrapped(name)
    rows = [zoo.ids(7, seed=1), zoo.ids(4, seed=2), zoo.ids(5, seed=3)]
    with iv.intervene(model, intervention(model, what, positions)):
        single = [model.module(torch.tensor([row])).logits[0] for row in rows]
        for left in (False, True):
            width = 7
            ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
            places = [slice(width - len(r), width) if left else slice(0, len(r)) for r in rows]
            for i, (row, place) in enumerate(zip(rows, places, strict=True)):
                ids[i, place], mask[i, place] = torch.tensor(row), 1
            numbers = (mask.cumsum(1) - 1).clamp_min(0)
            found = model.module(input_ids=ids, attention_mask=mask, position_ids=numbers).logits
            for i, place in enumerate(places):
                torch.testing.assert_close(found[i, place], single[i], atol=2e-5, rtol=1e-4)


def test_a_batch_that_writes() -> None:
    """Padding on the left, as it has to be: each text is what it would be alone."""
    model = wrapped("llama")
    rows = [zoo.ids(6, seed=1), zoo.ids(3, seed=2)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 6 - len(row) :], mask[i, 6 - len(row) :] = torch.tensor(row), 1
    for positions in ("last", "each", "generated", 1, -2):
        with iv.intervene(model, intervention(model, "add", positions)):
            together = written(model, ids, attention_mask=mask)
            for i, row in enumerate(rows):
                alone = written(model, torch.tensor([row]))
                torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_changed_reading_is_a_reading() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    with iv.intervene(model, iv.add("1.resid_post", vector(model), positions=2)):
        reading = ll.read(model, ids)
        steps = [step.token_id for step in ll.generate(model, ids, max_new_tokens=3, do_sample=False)]
        out = model.module.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert steps == out[0, 6:].tolist()
    assert reading.provenance["interventions"] == [
        {"sites": "1.resid_post", "positions": [2], "change": "add", "strength": 1.0, "norm": pytest.approx(5.0, abs=2)}
    ]
    plain = ll.read(model, ids)
    assert "interventions" not in plain.provenance
    i = reading.sites.index("1.resid_post")
    before = plain.arrays["top_logprob"][0, :i] - reading.arrays["top_logprob"][0, :i]
    assert float(abs(before).max()) < 1e-12
    assert float(abs(plain.arrays["top_logprob"] - reading.arrays["top_logprob"])[0, i, 2].max()) > 1e-3


def test_long_prompts_are_not_cut_while_a_model_is_changed() -> None:
    """The last token of a prompt is not the last one of a part of it."""
    model = wrapped("llama")
    prompts = [[*zoo.ids(30, seed=1), n] for n in (5, 6)]  # they begin alike
    with iv.intervene(model, iv.add("0.resid_post", 3 * vector(model), positions="last")):
        both = ll.read(model, prompts)
        for n, prompt in enumerate(prompts):
            alone = ll.read(model, prompt, share_prefixes=False)
            gap = abs(both.arrays["top_logprob"][n] - alone.arrays["top_logprob"][0])
            assert float(gap.max()) < 1e-9


def test_they_work_in_order_and_inside_of_each_other() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    v = vector(model)
    first, second = iv.add("0.resid_post", v, positions=1), iv.scale("0.resid_post", 2.0, positions=1)
    with iv.intervene(model, first, second):
        one = logits(model, ids)
    with iv.intervene(model, first), iv.intervene(model, [second]):
        nested = logits(model, ids)
    expected = by_hand(model, 0, lambda h: changed(h, 1, lambda x: 2 * (x + v)), ids)
    torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(nested, expected, atol=1e-6, rtol=1e-5)
    expected = by_hand(model, 0, lambda h: changed(h, 1, lambda x: x + v), ids)
    handle = iv.Steering(model, first)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-5)
    handle.remove()
    handle.remove()
    assert zoo.hooks(model.module) == 0


def test_one_block_that_stands_for_several_layers() -> None:
    """ALBERT calls the same module for each layer: only the call that is meant is changed, in every pass."""
    model, ids = wrapped("albert"), zoo.ids(5)
    v = vector(model)
    calls = [0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 != model.stack.blocks[1].call:
            return None
        return (output[0] + v, *output[1:]) if isinstance(output, tuple) else output + v

    handle = model.stack.blocks[1].module.register_forward_hook(hook)
    expected = logits(model, ids)
    handle.remove()
    with iv.intervene(model, iv.add("1.resid_post", v)):
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-5)


def test_nothing_leaks() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    plain = logits(model, ids)
    seen: list[torch.Tensor] = []

    def breaks() -> None:
        with iv.intervene(model, iv.ablate("0.resid_post"), iv.cut("last", 1)):
            thread = threading.Thread(target=lambda: seen.append(logits(model, ids)))
            thread.start()
            thread.join()
            assert not torch.equal(logits(model, ids), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert torch.equal(seen[0], plain)
    assert torch.equal(logits(model, ids), plain)
    assert zoo.hooks(model.module) == 0
    assert all("forward" not in block.module.__dict__ for block in model.stack.blocks)
    with iv.intervene(model, iv.add("0.resid_post", vector(model), positions=99)):  # noqa: SIM117
        with pytest.raises(InputError, match="position 99 is beyond the prompt, which has 6 tokens"):
            logits(model, ids)
    assert torch.equal(logits(model, ids), plain)


def test_heads_are_changed_one_change_after_the_other() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    site, v = "1.head_out.1", vector(model)
    with iv.intervene(model, iv.add(site, v), iv.ablate(site)):
        both = logits(model, ids)
    with iv.intervene(model, iv.ablate(site)):
        torch.testing.assert_close(both, logits(model, ids), atol=1e-5, rtol=1e-5)
        with pytest.raises(InputError, match="head_out of layer 1 is changed by another block"):
            iv.Steering(model, iv.scale("1.head_out.2", 2.0))
        with pytest.raises(InputError, match="head_out of layer 1 is being changed"):
            ll.read(model, ids, sites="1.head_out")
        ll.read(model, ids, sites="1.attn_out")
    with iv.intervene(model, iv.scale(site, 2.0), iv.scale(site, 2.0)):
        twice = logits(model, ids)
    with iv.intervene(model, iv.scale(site, 4.0)):
        torch.testing.assert_close(twice, logits(model, ids), atol=1e-5, rtol=1e-4)


def test_seeds_draw_others() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    pool = ll.capture(model, [zoo.ids(9, seed=n) for n in range(4)], "0.resid_post")
    found = []
    for seed in range(3):
        with iv.intervene(model, iv.resample("0.resid_post", pool, seed=seed)):
            found.append(logits(model, ids))
            assert torch.equal(logits(model, ids), found[-1])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("positions", ["first", "last", "each", "generated", 1, -2])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_caches_of_other_kinds(options: dict[str, Any], positions: Any) -> None:
    """Padding is on the left; a static cache is given masks of another form, pieces of a prompt are no prompts."""
    model = wrapped("llama")
    rows = [zoo.ids(9, seed=1), zoo.ids(5, seed=2)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = torch.tensor(row), 1
    with iv.intervene(model, intervention(model, "add", positions)):
        expected = written(model, ids, attention_mask=mask)
        found = written(model, ids, attention_mask=mask, **options)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("positions", ["last", "each", "generated"])
def test_a_cache_that_tells_no_length(length: int, positions: str) -> None:
    model = wrapped("mamba")
    ids = torch.tensor([zoo.ids(length)])
    with iv.intervene(model, intervention(model, "add", positions)):
        cached, whole = written(model, ids), written(model, ids, use_cache=False)
    torch.testing.assert_close(cached, whole, atol=1e-3, rtol=1e-3)


def test_they_may_end_in_any_order() -> None:
    model, ids = wrapped("llama"), zoo.ids(6)
    plain = logits(model, ids)
    cut = iv.cut("last", [1, 2])
    with iv.intervene(model, cut):
        expected = logits(model, ids)
    one, two = iv.Steering(model, iv.cut("last", [3])), iv.Steering(model, cut)
    one.remove()
    torch.testing.assert_close(logits(model, ids), expected, atol=0, rtol=0)
    two.remove()
    assert torch.equal(logits(model, ids), plain)
    assert all("forward" not in block.module.__dict__ for block in model.stack.blocks)
    assert "generate" not in model.module.__dict__


def test_a_model_is_taken_apart_as_it_is() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    with iv.intervene(model, iv.add("1.resid_post", vector(model), positions=30)):
        assert all("mlp_out" in part.components for part in model.parts)
    assert "1.mlp_out" in ll.read(model, "a b", sites="mlp_out").sites


def test_tokens_that_are_asked_for_after_the_block() -> None:
    model, ids = wrapped("llama"), zoo.ids(5)
    with iv.intervene(model, iv.ablate("0.resid_post")):
        steps = ll.generate(model, ids, max_new_tokens=3, do_sample=False)
        next(steps)
    with pytest.raises(InputError, match="begun with other interventions"):
        next(steps)


def test_rows_of_values_need_positions_with_numbers() -> None:
    rows = torch.zeros(3, 32)
    with pytest.raises(InputError, match="name their positions by numbers"):
        iv.replace("0.resid_post", rows)
    with pytest.raises(InputError, match="there are 3 rows of values for 1 positions"):
        iv.add("0.resid_post", rows, positions=[2])


def test_a_part_that_is_called_by_itself() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    with iv.intervene(model, iv.ablate("0.resid_post")), pytest.raises(ll.ModelError, match="called by itself"):
        model.module.model(torch.tensor([zoo.ids(3)]))


def test_a_vector_can_be_learnt() -> None:
    model, ids = wrapped("llama"), zoo.ids(5)
    v = torch.zeros(model.width, requires_grad=True)
    with iv.intervene(model, iv.add("1.resid_post", v, positions="last")):
        loss = -model.module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[7]
    (slope,) = torch.autograd.grad(loss, v)
    with torch.no_grad(), iv.intervene(model, iv.add("1.resid_post", -0.01 * slope, positions="last")):
        better = -model.module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[7]
    assert float(better.detach()) < float(loss.detach())


def test_bad_input() -> None:
    model = wrapped("llama")
    v = vector(model)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: iv.add("1.resid_post", torch.randn(7)), "has width 7, and states of llama have 32"),
        (lambda: iv.add("9.resid_post", v), "layer 9 is out of range"),
        (lambda: iv.add("1.cross_attn_out", v), "cross_attn_out"),
        (lambda: iv.add("1.head_out.99", v), "99"),
        (lambda: iv.add("1.resid_post", v * torch.nan), "NaN or infinite"),
        (lambda: iv.add("1.resid_post", "x"), "must be a vector"),
        (lambda: iv.add("1.resid_post", v, strength="2"), "strength is '2'"),
        (lambda: iv.add("1.resid_post", v, positions="middle"), "no positions 'middle'"),
        (lambda: iv.add("1.resid_post", v, positions=[]), "no position is named"),
        (lambda: iv.add("1.resid_post", v, positions=[1.5]), "is not a whole number"),
        (lambda: iv.scale("1.resid_post", float("inf")), "factor is inf"),
        (lambda: iv.project_out("1.resid_post", torch.zeros(32)), "nothing to project out"),
        (lambda: iv.ablate("1.resid_post", to="mean"), "give 'zero', or activations"),
        (lambda: iv.swap("1.resid_post", v, 2 * v), "both directions are the same"),
        (lambda: iv.clamp("1.resid_post", v), "needs low=, high=, or both"),
        (lambda: iv.clamp("1.resid_post", v, low=2, high=1), "give them in order"),
        (lambda: iv.clamp("1.resid_post", 0 * v, low=2), "it has no direction"),
        (lambda: iv.cut("last", 0, layers=7), "layer 7 is out of range"),
        (lambda: iv.resample("2.resid_post", ll.capture(model, "a b", "1.resid_post")), "nothing is given for 2.resid"),
        (lambda: "1.resid_post", "is no intervention"),
    ]
    for make, match in cases:
        with pytest.raises(InputError, match=match), iv.intervene(model, make()):
            pass
    with pytest.raises(InputError, match="no intervention is given"), iv.intervene(model):
        pass
    mamba = wrapped("mamba")
    with (
        pytest.raises(ll.ModelError, match="has no attention that could be cut"),
        iv.intervene(mamba, iv.cut("last", 0)),
    ):
        logits(mamba, zoo.ids(4))
