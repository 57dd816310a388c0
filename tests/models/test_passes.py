"""Passes that hand on a cache, and prompts that begin alike: held against a pass of each prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import logitlab as ll
from logitlab import plan, reader
from logitlab.errors import OutOfMemoryError
from logitlab.models import passes
from logitlab.models.capture import capture
from logitlab.zoo import CannotBuild, build, types
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


def proved(model: ll.Model) -> int:
    """Up to how many tokens a model was proved to go on from its cache."""
    return 0 if model.continuation is None else model.continuation.tokens


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of at most 10 tokens, and 6 common tokens are worth sharing."""
    monkeypatch.setattr(passes, "PASS_TOKENS", 10)
    monkeypatch.setattr(reader, "PASS_TOKENS", 10)
    monkeypatch.setattr(passes, "SHARED_TOKENS", 6)


# -- long prompts ------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", CACHED)
def test_a_prompt_in_pieces_is_the_whole_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    ids = zoo.ids(37)
    seen = forward_tokens(model, monkeypatch)
    cut = ll.read(model, ids, sites="resid", target=[5])
    assert proved(model), f"{name} was not proved to go on from its cache"
    assert seen[-4:] == [10, 10, 10, 7]
    monkeypatch.setattr(passes, "PASS_TOKENS", 1000)
    whole = ll.read(model, ids, sites="resid", target=[5])
    assert seen[-1] == 37
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(cut.arrays[key], values, atol=2e-5, err_msg=key)


MIXED = ("deepseek_v3", "falcon_h1", "gpt_oss", "lfm2", "mixtral", "nemotron_h", "qwen3_next", "rwkv")
"""Types with experts, or with layers of several kinds and caches of several kinds."""


def agrees_with_one_pass(model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> int:
    ids = [5 + 7 * i % 60 for i in range(37)]
    cut = ll.read(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "PASS_TOKENS", 1000)
        whole = ll.read(model, ids)
    np.testing.assert_allclose(cut.arrays["kl"], whole.arrays["kl"], atol=2e-5)
    np.testing.assert_array_equal(cut.arrays["top_id"][..., 0], whole.arrays["top_id"][..., 0])
    return proved(model)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", MIXED)
def test_types_of_many_kinds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees_with_one_pass(ll.wrap(build("causal-lm", name)), monkeypatch)


@pytest.mark.usefixtures("short")
def test_every_type_of_causal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    for name in types("causal-lm"):
        try:
            model = ll.wrap(build("causal-lm", name))
        except (CannotBuild, ll.ModelError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError):
            continue  # the coverage page is about these
        count += agrees_with_one_pass(model, monkeypatch) > 0
    assert count > 150


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["dots3_note", "glm5_next"])
def test_attention_over_chosen_keys_is_not_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie for the last place is broken one way or the other, by rounding."""
    assert agrees_with_one_pass(ll.wrap(build("image-text-to-text", name)), monkeypatch) == 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mamba", "bert", "t5", "bart", "albert"])
def test_models_that_cannot_are_run_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    seen = forward_tokens(model, monkeypatch)
    ids = zoo.ids(37)
    inputs: dict[str, Any] = {"decoder": ids} if model.encoder_decoder else {}
    reading = ll.read(model, ids, **inputs)
    assert seen[-1] == len(reading.prompts[0].ids)
    assert not proved(model)
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
    assert model.continuation is None
    seen = forward_tokens(model, monkeypatch)
    ll.read(model, zoo.ids(8))
    assert model.continuation is None  # nothing had to be proved
    assert seen == [8]
    seen.clear()
    ll.read(model, zoo.ids(37))
    assert seen[0] == proved(model) == 18  # the proof: whole, then in three pieces
    assert seen[1:6] == [8, 8, 8, 2, 2]  # every piece but the first twice: on a copy of the cache too
    seen.clear()
    ll.read(model, zoo.ids(37, seed=9))
    assert seen == [10, 10, 10, 7]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_a_window_is_part_of_the_proof(name: str) -> None:
    """Beyond its window a model attends differently, so the proof has to reach beyond it."""
    model = fresh(name, sliding_window=16)
    ll.read(model, zoo.ids(50))
    assert proved(model) == 16 + passes.SHARED_TOKENS


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("window", [4, 9, 10, 11, 16])
@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_pieces_longer_and_shorter_than_a_window(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name, sliding_window=window)
    cut = ll.read(model, zoo.ids(50), target=[5])
    assert proved(model) > window
    monkeypatch.setattr(passes, "PASS_TOKENS", 1000)
    for key, values in ll.read(model, zoo.ids(50), target=[5]).arrays.items():
        np.testing.assert_allclose(cut.arrays[key], values, atol=2e-5, err_msg=key)


def test_how_many_tokens_are_needed_for_a_proof() -> None:
    needed = passes._tokens_of_proof
    assert needed([], 5000) == 96
    assert needed([], 40) == 40
    assert needed([128], 5000) == 2 * 128 + 32  # each half is longer than the window
    assert needed([512], 5000) == 512 + 32  # no pass is longer than this window
    assert needed([4096], 5000) == 4096 + 32
    assert needed([4096], 4000) == 96  # the window is not reached


# -- a proof holds for the model as it was -----------------------------------------------------


def whole_and_cut(model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> tuple[ll.Reading, ll.Reading]:
    cut = ll.read(model, zoo.ids(37), target=[5])
    with monkeypatch.context() as patch:
        patch.setattr(passes, "PASS_TOKENS", 1000)
        return ll.read(model, zoo.ids(37), target=[5]), cut


@pytest.mark.usefixtures("short")
def test_somebodys_hook_that_counts_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would act in every piece, where in one pass it acts once."""
    model = fresh("llama")
    ll.read(model, zoo.ids(37))
    assert proved(model)

    def edit(module: Any, args: Any, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[:, 3] += 5
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = model.module.model.layers[0].register_forward_hook(edit)
    whole, cut = whole_and_cut(model, monkeypatch)
    assert proved(model) == 0
    for key, values in whole.arrays.items():
        np.testing.assert_array_equal(cut.arrays[key], values, err_msg=key)
    hook.remove()
    ll.read(model, zoo.ids(37))
    assert proved(model)  # it is tried again


@pytest.mark.usefixtures("short")
def test_other_weights_are_proved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    ll.read(model, zoo.ids(37))
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(2)
    seen = forward_tokens(model, monkeypatch)
    ll.read(model, zoo.ids(37))
    assert seen[0] == 18
    seen.clear()
    ll.read(model, zoo.ids(37))
    assert seen == [10, 10, 10, 7]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("left", [0, -3])
def test_what_a_picture_leaves_behind(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL keeps an offset of its positions from one pass to the next."""
    model = ll.wrap(build("image-text-to-text", "qwen2_vl"))
    ids = list(range(5, 42))
    first = ll.read(model, ids, target=[5])
    inner: Any = model.module.model
    inner.rope_deltas = torch.tensor([[left]])
    found = ll.read(model, ids, target=[5])
    for key, values in first.arrays.items():
        np.testing.assert_allclose(found.arrays[key], values, atol=2e-5, err_msg=key)


@pytest.mark.usefixtures("short")
def test_a_piece_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    original = model.module.forward

    def forward(*args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() >= 20:
            raise ValueError("no more than 20")
        return original(*args, **options)

    model.module.forward = forward
    whole, cut = whole_and_cut(model, monkeypatch)
    assert proved(model) == 0
    assert cut.provenance["settings"]["pass_tokens"] is None  # in the end
    for key, values in whole.arrays.items():
        np.testing.assert_array_equal(cut.arrays[key], values, err_msg=key)


@pytest.mark.usefixtures("short")
def test_a_cache_whose_copy_is_none_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "__deepcopy__", lambda self, memo: self, raising=False)
    model = fresh("llama")
    prompts = [[*zoo.ids(9), *zoo.ids(4, seed=n)] for n in range(3)]
    shared, alone = together(model, prompts)
    assert proved(model) == 0
    for key, values in alone.arrays.items():
        np.testing.assert_array_equal(shared.arrays[key], values, err_msg=key)


@pytest.mark.usefixtures("short")
def test_a_lack_of_memory_is_said_and_not_taken_for_an_answer() -> None:
    model = fresh("llama")
    original = model.module.forward

    def forward(*args: Any, **options: Any) -> Any:
        if options.get("past_key_values") is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*args, **options)

    model.module.forward = forward
    with pytest.raises(OutOfMemoryError, match="not enough memory to run llama"):
        ll.read(model, zoo.ids(37))
    model.module.forward = original
    ll.read(model, zoo.ids(37))
    assert proved(model)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("MPS backend out of memory"), MemoryError()]
)
def test_a_lack_of_memory_for_a_copy_of_the_cache(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(cache: Any) -> Any:
        raise error

    model = fresh("llama")
    with monkeypatch.context() as patch:
        patch.setattr(passes, "deepcopy", boom)
        with pytest.raises(OutOfMemoryError, match="for the cache of llama"):
            ll.read(model, [[*zoo.ids(9), 1], [*zoo.ids(9), 2]])
    assert model.continuation is None
    ll.read(model, [[*zoo.ids(9), 1], [*zoo.ids(9), 2]])
    assert proved(model)


@pytest.mark.usefixtures("short")
def test_what_is_remembered_anew_in_every_pass_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL makes a tensor of zeros in each pass."""
    model = ll.wrap(build("image-text-to-text", "qwen2_vl"))
    ll.read(model, list(range(5, 42)))
    seen = forward_tokens(model, monkeypatch)
    for first in (6, 7):
        ll.read(model, list(range(first, first + 37)))
    assert seen == [10, 10, 10, 7] * 2


@pytest.mark.usefixtures("short")
def test_weights_on_disk_are_read_as_seldom_as_possible(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ll.load(checkpoint, device_map={"": "disk"}, offload_folder=str(tmp_path))
    seen = forward_tokens(model, monkeypatch)
    ll.read(model, zoo.ids(37))
    assert seen == [37]


@pytest.mark.usefixtures("short")
def test_progress_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["positions", "values", "forgets", "raises", "keeps it to itself"])
def test_a_cache_that_lies_is_not_used(how: str, dtype: torch.dtype) -> None:
    ids = zoo.ids(37)
    truth = ll.read(fresh("llama"), ids, target=[5])
    passes_whole = ll.wrap(zoo.build("llama").to(dtype))
    broken(passes_whole, how)
    found = ll.read(passes_whole, ids, target=[5])
    assert proved(passes_whole) == 0
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
    assert proved(model) == 0
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
    original = plan.Asked.of

    def watched(self: Any, x: torch.Tensor, *args: Any) -> Any:
        decoded.append(x.shape[1])
        return original(self, x, *args)

    monkeypatch.setattr(plan.Asked, "of", watched)
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
    seen.clear()
    prefix = zoo.ids(9)  # a model that could not go on from it
    ll.read(model, [[*prefix, 1], [*prefix, 2], [*prefix, 1]])
    assert sorted(seen) == [10, 10]
    seen.clear()
    translator = fresh("t5")
    seen = forward_tokens(translator, monkeypatch)
    reading = ll.read(translator, [zoo.ids(5), zoo.ids(5)], decoder=[0, 4, 5])
    assert seen == [4]  # with the token that a decoder starts with
    for values in reading.arrays.values():
        np.testing.assert_array_equal(values[0], values[1])


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


@pytest.mark.usefixtures("short")
def test_sharing_is_the_default_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, half = fresh("llama"), ll.wrap(zoo.build("llama").to(torch.bfloat16))
    prompts = [[*zoo.ids(9), 1], [*zoo.ids(9), 2]]
    assert ll.read(model, prompts).provenance["settings"]["share_prefixes"] is True
    assert ll.read(half, prompts).provenance["settings"]["share_prefixes"] is False
    assert ll.read(half, prompts, share_prefixes=True).provenance["settings"]["share_prefixes"] is True
    seen = forward_tokens(half, monkeypatch)
    capture(half, prompts)
    assert seen == [10, 10]
    seen.clear()
    capture(model, prompts)
    assert seen == [9, 1, 1]
    seen.clear()
    capture(model, prompts, share_prefixes=False)
    assert seen == [10, 10]


@pytest.mark.usefixtures("short")
def test_the_record_says_what_was_done() -> None:
    def record(model: ll.Model, prompts: Any, **options: Any) -> tuple[Any, Any]:
        settings = ll.read(model, prompts, **options).provenance["settings"]
        return settings["pass_tokens"], settings["share_prefixes"]

    alike = [[*zoo.ids(9), 1], [*zoo.ids(9), 2]]
    llama, mamba = fresh("llama"), fresh("mamba")
    assert record(llama, zoo.ids(37)) == (10, False)
    assert record(llama, zoo.ids(8)) == (None, False)  # whatever an earlier call needed
    assert record(llama, alike) == record(llama, alike, positions=-1) == (10, True)
    assert record(llama, alike, share_prefixes=False) == (None, False)
    assert record(llama, [zoo.ids(37), zoo.ids(37)], share_prefixes=False) == (10, False)
    assert record(mamba, alike, share_prefixes=True) == (None, False)


@pytest.mark.usefixtures("short")
def test_padded_passes_share_nothing_and_long_prompts_are_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    prompts = [[*zoo.ids(9), 1], [*zoo.ids(9), 2], zoo.ids(37, seed=4)]
    alone = ll.read(model, prompts, share_prefixes=False)
    seen = forward_tokens(model, monkeypatch)
    found = ll.read(model, prompts, batch_tokens=64)
    assert seen == [10, 10, 10, 7, 20]
    for key, values in alone.arrays.items():
        np.testing.assert_allclose(found.arrays[key], values, atol=2e-5, err_msg=key)
    with pytest.raises(ll.InputError, match="batch_tokens and share_prefixes exclude each other"):
        ll.read(model, prompts, batch_tokens=64, share_prefixes=True)


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
    def part(**fields: Any) -> Any:
        return SimpleNamespace(to_dict=dict, model_type="part", **fields)

    text = part(sliding_window=128, use_sliding_window=True, hidden_size=9)
    inner = part(language_config=part(attention_window=[4, 200]))
    config = part(text_config=text, thinker_config=inner, attention_chunk_size=64, chunk_size_feed_forward=0)
    model: Any = SimpleNamespace(module=SimpleNamespace(config=config))
    assert sorted(passes._numbers(model, ("window", "chunk"))) == [4, 64, 128, 200]
    assert passes._numbers(SimpleNamespace(module=SimpleNamespace()), ("window",)) == []  # type: ignore[arg-type]


def test_batch_tokens_must_be_a_number_from_one_on(llama: ll.Model) -> None:
    with pytest.raises(ll.InputError, match="batch_tokens is 0; it must be at least 1"):
        capture(llama, zoo.ids(3), batch_tokens=0)
