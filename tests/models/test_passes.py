"""Passes that hand on a cache, and prompts that begin alike: held against a pass of each prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import logitlab as ll
from logitlab.models import passes
from logitlab.models.capture import capture
from tests import zoo

CACHED = (
    "gpt2",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "cohere",
    "granite",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "phi",
)
"""Families that go on from a cache."""


def forward_tokens(model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the passes that are run from now on, proofs included."""
    seen: list[int] = []
    original = passes._forward

    def watched(given: ll.Model, prompts: Any, *args: Any, **options: Any) -> Any:
        seen.append(sum(len(p.ids) for p in prompts))
        return original(given, prompts, *args, **options)

    monkeypatch.setattr(passes, "_forward", watched)
    return seen


def fresh(name: str, **changes: Any) -> ll.Model:
    return ll.wrap(zoo.build(name, **changes), name=name)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of at most 10 tokens, and 6 common tokens are worth sharing."""
    monkeypatch.setattr(passes, "PASS_TOKENS", 10)
    monkeypatch.setattr(passes, "SHARED_TOKENS", 6)


# -- long prompts ------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", CACHED)
def test_a_prompt_in_pieces_is_the_whole_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    ids = zoo.ids(37)
    seen = forward_tokens(model, monkeypatch)
    cut = ll.read(model, ids, sites="resid", target=[5])
    assert model.continues, f"{name} was not proved to go on from its cache"
    assert seen[-4:] == [10, 10, 10, 7]
    monkeypatch.setattr(passes, "PASS_TOKENS", 1000)
    whole = ll.read(model, ids, sites="resid", target=[5])
    assert seen[-1] == 37
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(cut.arrays[key], values, atol=2e-5, err_msg=key)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mamba", "bert", "t5", "bart", "albert"])
def test_models_that_cannot_are_run_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    seen = forward_tokens(model, monkeypatch)
    ids = zoo.ids(37)
    inputs: dict[str, Any] = {"decoder": ids} if model.encoder_decoder else {}
    reading = ll.read(model, ids, **inputs)
    assert seen[-1] == len(reading.prompts[0].ids)
    assert not model.continues
    np.testing.assert_allclose(reading.arrays["kl"][0, -1], 0, atol=1e-6)


@pytest.mark.usefixtures("short")
def test_heads_neurons_and_chosen_positions_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ids = zoo.ids(33)
    where = [31, 0, 12, -1]
    cut = capture(model, ids, "resid,head_out,neuron,mlp_out", where)
    monkeypatch.setattr(passes, "PASS_TOKENS", 1000)
    whole = capture(model, ids, "resid,head_out,neuron,mlp_out", where)
    assert cut.positions == whole.positions == ((31, 0, 12, 32),)
    for site in whole.sites:
        torch.testing.assert_close(cut[site], whole[site], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("short")
def test_tokens_behind_the_last_wanted_one_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ll.read(model, zoo.ids(37))
    seen = forward_tokens(model, monkeypatch)
    reading = ll.read(model, zoo.ids(37), positions=[3, 14])
    assert seen == [10, 10]
    assert reading.prompts[0].positions == (3, 14)


@pytest.mark.usefixtures("short")
def test_it_is_proved_once_for_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    assert model.continues is None
    seen = forward_tokens(model, monkeypatch)
    ll.read(model, zoo.ids(8))
    assert model.continues is None  # nothing had to be proved
    assert seen == [8]
    seen.clear()
    ll.read(model, zoo.ids(37))
    assert seen[0] == model.continues == 18  # the proof: whole, then in three pieces
    assert seen[1:4] == [8, 8, 2]
    seen.clear()
    ll.read(model, zoo.ids(37, seed=9))
    assert seen == [10, 10, 10, 7]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_a_window_is_part_of_the_proof(name: str) -> None:
    """Beyond its window a model attends differently, so the proof has to reach beyond it."""
    model = fresh(name, sliding_window=16)
    ll.read(model, zoo.ids(50))
    assert model.continues == 16 + passes.SHARED_TOKENS


@pytest.mark.usefixtures("short")
def test_progress_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab import reader

    monkeypatch.setattr(reader, "GROUP_POSITIONS", 10)
    model = fresh("llama")
    told: list[tuple[int, int]] = []
    ll.read(model, zoo.ids(33), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (33 * 4, 33 * 4)
    assert [d for d, _ in told] == sorted({d for d, _ in told})
    assert len(told) == 4


@pytest.mark.usefixtures("short")
def test_states_that_are_not_finite_are_found_in_their_piece() -> None:
    model = fresh("gpt2")
    with torch.no_grad():
        model.module.transformer.wpe.weight[25] = torch.nan
    with pytest.raises(ll.ModelError, match=r"from site 0\.resid_pre on \(prompt 0, position 25\)"):
        ll.read(model, zoo.ids(33))


# -- faults in what is handed on ---------------------------------------------------------------


def broken(model: ll.Model, how: str) -> None:
    """Make the model's cache lie."""
    module = model.module
    original = module.forward

    def forward(*args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and how == "positions":
            past = cache.get_seq_length()
            length = options["input_ids"].shape[1]
            options["position_ids"] = torch.arange(past + 1, past + 1 + length).unsqueeze(0)
        if cache is not None and how == "values":
            cache.layers[1].values = cache.layers[1].values * 1.05
        if cache is not None and how == "forgets":
            options["past_key_values"] = None
            options["attention_mask"] = options["attention_mask"][:, -options["input_ids"].shape[1] :]
        if cache is not None and how == "raises":
            raise RuntimeError("no cache today")
        output = original(*args, **options)
        if how == "keeps it to itself":
            output["past_key_values"] = None
        return output

    module.forward = forward


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("how", ["positions", "values", "forgets", "raises", "keeps it to itself"])
def test_a_cache_that_lies_is_not_used(how: str) -> None:
    ids = zoo.ids(37)
    truth = ll.read(fresh("llama"), ids, target=[5])
    passes_whole = fresh("llama")
    broken(passes_whole, how)
    found = ll.read(passes_whole, ids, target=[5])
    assert passes_whole.continues is False
    for key in ("top_id", "target_rank"):
        np.testing.assert_array_equal(found.arrays[key], ll.read(passes_whole, ids, target=[5]).arrays[key])
    assert truth.arrays["top_id"].shape == found.arrays["top_id"].shape
    np.testing.assert_allclose(found.arrays["kl"][0, -1], 0, atol=1e-6)


@pytest.mark.usefixtures("short")
def test_a_model_whose_buffers_change_on_the_way_is_run_again() -> None:
    """Rotary tables that depend on the length: earlier passes had others than one pass over all would have."""
    model, plain = fresh("llama"), fresh("llama")
    ids = zoo.ids(37)
    rotary = model.module.model.rotary_emb
    original = rotary.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if int(position_ids.max()) >= 25:
            rotary.register_buffer("inv_freq", rotary.inv_freq / 2, persistent=False)
        result = original(x, position_ids)
        if int(position_ids.max()) >= 25:
            rotary.register_buffer("inv_freq", rotary.inv_freq * 2, persistent=False)
        return result

    rotary.forward = forward
    found = ll.read(model, ids)
    assert model.continues is False
    again = ll.read(model, ids)  # now without trying
    for key, values in again.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], values, err_msg=key)
    assert np.abs(found.arrays["kl"] - ll.read(plain, ids).arrays["kl"]).max() > 1e-3  # the tables did matter


# -- prompts that begin alike ------------------------------------------------------------------


def together(model: ll.Model, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[ll.Reading, ll.Reading]:
    options.setdefault("target", [5])
    shared = ll.read(model, [list(p) for p in prompts], share_prefixes=True, **options)
    return shared, ll.read(model, [list(p) for p in prompts], share_prefixes=False, **options)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
def test_shared_prefixes_give_what_single_prompts_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    a, b = zoo.ids(9), zoo.ids(8, seed=3)
    prompts = [
        [*a, 7, 8, 9],  # shares a
        [*a, 7, 8, 9, *b, 4],  # shares the prompt above
        b,  # ends where another goes on
        [*b, 11],
        [*a, 30],
        zoo.ids(5, seed=8),  # shares nothing
        [*a, 30],  # is there twice
        a,
    ]
    seen = forward_tokens(model, monkeypatch)
    shared, alone = together(model, prompts)
    run = seen[: len(seen) - len({tuple(p) for p in prompts})]
    assert sum(run) < sum(map(len, prompts)) + 4 * 18  # with the proof
    for key, values in alone.arrays.items():
        np.testing.assert_allclose(shared.arrays[key], values, atol=2e-5, err_msg=key)
    assert shared.prompts == alone.prompts


@pytest.mark.usefixtures("short")
def test_what_is_shared_is_run_and_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ll.read(model, zoo.ids(37))  # proved
    seen = forward_tokens(model, monkeypatch)
    prefix = zoo.ids(9)
    decoded: list[int] = []
    from logitlab import reader

    original = reader.Asked.of

    def watched(self: Any, x: torch.Tensor, *args: Any) -> Any:
        decoded.append(x.shape[1])
        return original(self, x, *args)

    monkeypatch.setattr(reader.Asked, "of", watched)
    ll.read(model, [[*prefix, 1], [*prefix, 2, 3], [*prefix, 4]])
    assert sorted(seen) == [1, 1, 2, 9]
    assert sum(decoded) == 9 + 1 + 2 + 1


@pytest.mark.usefixtures("short")
def test_equal_prompts_are_run_once_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("bert")
    seen = forward_tokens(model, monkeypatch)
    reading = ll.read(model, [zoo.ids(5), zoo.ids(7), zoo.ids(5)], share_prefixes=False)
    assert sorted(seen) == [5, 7]
    for values in reading.arrays.values():
        np.testing.assert_array_equal(values[0], values[2])


@pytest.mark.usefixtures("short")
def test_positions_of_shared_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    prefix = zoo.ids(9)
    prompts = [[*prefix, 1], [*prefix, 2, 3], [*prefix, 4, 5, 6]]
    for positions in (-1, [0, -1], slice(7, None), [8, 3]):
        shared, alone = together(model, prompts, positions=positions)
        assert [p.positions for p in shared.prompts] == [p.positions for p in alone.prompts]
        for key, values in alone.arrays.items():
            np.testing.assert_allclose(shared.arrays[key], values, atol=2e-5, err_msg=f"{positions} {key}")


@pytest.mark.usefixtures("short")
def test_a_prompts_numbers_do_not_depend_on_a_cache_that_another_filled() -> None:
    """Each branch has a copy: what one prompt adds to the cache, the next does not see."""
    model = fresh("llama")
    prefix = zoo.ids(9)
    first, second = [*prefix, *zoo.ids(8, seed=1)], [*prefix, *zoo.ids(8, seed=2)]
    together_once = ll.read(model, [first, second], share_prefixes=True)
    other_way = ll.read(model, [second, first], share_prefixes=True)
    for key, values in together_once.arrays.items():
        np.testing.assert_allclose(values[::-1], other_way.arrays[key], atol=2e-5, err_msg=key)


def test_sharing_is_the_default_in_float32_only(llama: ll.Model) -> None:
    half = ll.wrap(zoo.build("llama").to(torch.bfloat16))
    prompts = [zoo.ids(4), zoo.ids(6)]
    assert ll.read(llama, prompts).provenance["settings"]["share_prefixes"] is True
    assert ll.read(half, prompts).provenance["settings"]["share_prefixes"] is False
    assert ll.read(half, prompts, share_prefixes=True).provenance["settings"]["share_prefixes"] is True


@pytest.mark.usefixtures("short")
def test_batches_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for padded batches gets them, and nothing is shared."""
    model = fresh("llama")
    seen = forward_tokens(model, monkeypatch)
    ll.read(model, [zoo.ids(9), [*zoo.ids(9), 4]], batch_tokens=64)
    assert seen == [19]


# -- the tree ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=8),
    worth=st.integers(1, 6),
    share=st.booleans(),
)
def test_every_prompt_is_a_path_through_a_tree(prompts: list[tuple[int, ...]], worth: int, share: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "SHARED_TOKENS", worth)
        runs = passes._runs(dict(enumerate(prompts)), share=share)
    paths: dict[int, tuple[int, ...]] = {}

    def walk(run: passes.Run, before: tuple[int, ...]) -> None:
        assert run.ids
        here = before + run.ids
        going_on = {n for after in run.after for n in after.owners}
        assert going_on <= set(run.owners)
        assert [a.owners for a in run.after] == sorted(a.owners for a in run.after)
        if run.after:
            assert len(run.ids) >= worth
            assert len(run.owners) > 1
        for n in set(run.owners) - going_on:
            assert n not in paths
            paths[n] = here
        for after in run.after:
            walk(after, here)

    for run in runs:
        walk(run, ())
    assert paths == dict(enumerate(prompts))
    if not share:
        assert all(not run.after for run in runs)


@pytest.mark.parametrize("step", [1, 40])
def test_a_text_and_all_its_beginnings(step: int) -> None:
    """A tree as deep as there are prompts."""
    text = tuple(range(1000 * step))
    prompts = {n: text[: step * (n + 1)] for n in range(1000)}
    runs = passes._runs(prompts, share=True)
    assert sum(len(run.owners) == 1 for run in passes._all(runs)) >= 1
    owners = {n for run in runs for n in run.owners}
    assert owners == set(prompts)
    longest = max(runs, key=lambda run: len(run.owners))
    assert sum(len(run.ids) for run in passes._all([longest])) >= len(text) - passes.SHARED_TOKENS


@pytest.mark.usefixtures("short")
def test_a_conversation_with_all_its_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ids = zoo.ids(60)
    prompts = [ids[:n] for n in range(3, 61, 3)]
    shared, alone = together(model, prompts, positions=-1)
    for key, values in alone.arrays.items():
        np.testing.assert_allclose(shared.arrays[key], values, atol=2e-5, err_msg=key)


def test_windows_of_a_configuration() -> None:
    text = SimpleNamespace(sliding_window=128, use_sliding_window=True, hidden_size=9)
    config = SimpleNamespace(text_config=text, attention_chunk_size=64, chunk_size_feed_forward=0)
    model: Any = SimpleNamespace(module=SimpleNamespace(config=config))
    assert max(passes._windows(model)) == 128
    assert passes._windows(SimpleNamespace(module=SimpleNamespace())) == [0]  # type: ignore[arg-type]


def test_batch_tokens_must_be_a_number_from_one_on(llama: ll.Model) -> None:
    with pytest.raises(ll.InputError, match="batch_tokens is 0; it must be at least 1"):
        capture(llama, zoo.ids(3), batch_tokens=0)
