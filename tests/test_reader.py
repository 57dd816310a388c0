"""The main job, end to end, against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from tests import zoo


def log_probabilities(module: Any, tokens: list[int]) -> torch.Tensor:
    return torch.log_softmax(zoo.forward(module, tokens).double(), -1)


@pytest.mark.parametrize("name", zoo.ALL)
def test_last_row_is_the_models_distribution(name: str) -> None:
    model = ll.wrap(zoo.shared(name))
    tokens = zoo.ids(6)
    if zoo.encoder_decoder(name):
        inputs: Any = {"input_ids": torch.tensor([zoo.ids(5, seed=6)]), "decoder_input_ids": torch.tensor([tokens])}
        truth = torch.log_softmax(zoo.forward(zoo.shared(name), tokens, zoo.ids(5, seed=6)).double(), -1)
    else:
        inputs, truth = tokens, log_probabilities(zoo.shared(name), tokens)
    reading = ll.read(model, inputs, target=[17, 250], top_k=9)
    best = truth.sort(-1, descending=True)
    last = {key: values[0, -1] for key, values in reading.arrays.items()}
    np.testing.assert_allclose(last["top_logprob"], best.values[:, :9], atol=1e-5)
    np.testing.assert_array_equal(last["top_id"], best.indices[:, :9])
    np.testing.assert_allclose(last["target_logprob"], truth[:, [17, 250]], atol=1e-5)
    ranks = 1 + (truth[:, None, :] > truth[:, [17, 250], None]).sum(-1)
    np.testing.assert_array_equal(last["target_rank"], ranks)
    np.testing.assert_allclose(last["entropy"], -(truth.exp() * truth).sum(-1), atol=1e-5)
    assert last["kl"].max() < 1e-6


def test_every_site_against_a_hand_written_lens(llama: ll.Model) -> None:
    module = llama.module
    tokens = zoo.ids(6)
    with torch.no_grad():
        states = module(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        by_hand = [torch.log_softmax(module.lm_head(module.model.norm(h[0])).double(), -1) for h in states[:-1]]
        by_hand.append(log_probabilities(module, tokens))  # hidden_states[-1] is normed already
    reading = ll.read(llama, tokens, target=40)
    final = by_hand[-1]
    for site, logp in enumerate(by_hand):
        np.testing.assert_allclose(reading.arrays["target_logprob"][0, site, :, 0], logp[:, 40], atol=1e-5)
        np.testing.assert_allclose(reading.arrays["entropy"][0, site], -(logp.exp() * logp).sum(-1), atol=1e-5)
        kl = (final.exp() * (final - logp)).sum(-1)
        np.testing.assert_allclose(reading.arrays["kl"][0, site], kl, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba", "bert", "opt", "t5", "bart"])
@pytest.mark.parametrize("batch_tokens", [None, 512])
def test_a_batch_equals_its_singles(name: str, batch_tokens: int | None) -> None:
    module = zoo.shared(name)
    if name in ("mamba", "t5") and batch_tokens is not None:
        module = zoo.build(name).double()  # their large states make float32 itself uncertain by 4e-5
    model = ll.wrap(module)
    prompts = [zoo.ids(3), zoo.ids(9, seed=6), zoo.ids(5, seed=7), zoo.ids(9, seed=8)]
    together = ll.read(model, prompts, target=[7], batch_tokens=batch_tokens)
    for n, prompt in enumerate(prompts):
        alone = ll.read(model, prompt, target=[7])
        part = together.at(prompt=n)
        for key, values in alone.arrays.items():
            np.testing.assert_allclose(
                part.arrays[key][:, :, : values.shape[2]], values, atol=1e-5, rtol=0, err_msg=key
            )


def test_a_batch_of_the_default_model_equals_its_singles(default_model: ll.Model) -> None:
    prompts = ["The capital of France is", "Hello there", "def f(x):\n    return x ** 2 + 1"]
    together = ll.read(default_model, prompts, target=" Paris")
    for n, prompt in enumerate(prompts):
        alone = ll.read(default_model, prompt, target=" Paris")
        for key, values in alone.arrays.items():
            part = together.at(prompt=n).arrays[key][:, :, : values.shape[2]]
            np.testing.assert_allclose(part, values, atol=1e-5, rtol=0, err_msg=key)


@pytest.mark.slow
def test_a_padded_batch_of_the_default_model_in_float64() -> None:
    model = ll.load("default", dtype="float64")
    prompts = ["The capital of France is", "Hello there", "def f(x):\n    return x ** 2 + 1"]
    for n, prompt in enumerate(prompts):
        alone = ll.read(model, prompt).arrays
        part = ll.read(model, prompts, batch_tokens=4096).at(prompt=n).arrays
        for key in ("entropy", "kl", "top_logprob"):
            np.testing.assert_allclose(part[key][:, :, : alone[key].shape[2]], alone[key], atol=1e-5, rtol=1e-6)


def test_the_capital_of_france(default_model: ll.Model) -> None:
    reading = ll.read(default_model, "The capital of France is", target=" Paris")
    assert reading.prompts[0].tokens == ("The", " capital", " of", " France", " is")
    last = reading.at(position=-1)
    assert last.cell(0, "29.resid_post", 0).tokens[0] == " Paris"
    assert last.rank.values[0, -1, 0, 0] == 1
    assert last.rank.values[0, 0, 0, 0] > 100
    assert len(reading.sites) == 31
    truth = torch.log_softmax(zoo.forward(default_model.module, list(reading.prompts[0].ids))[-1].double(), -1)
    assert last.logprob.values[0, -1, 0, 0] == pytest.approx(float(truth[reading.targets[0].id]), abs=2e-5)


def test_the_last_layer_is_always_there(llama: ll.Model) -> None:
    assert ll.read(llama, zoo.ids(), sites="0.mlp_out").sites == ("0.mlp_out", "2.resid_post")
    assert ll.read(llama, zoo.ids(), sites="::2.resid_post").sites == ("0.resid_post", "2.resid_post")


def test_duplicate_tokens_keep_their_positions(llama: ll.Model) -> None:
    reading = ll.read(llama, [40, 40, 41, 40])
    assert reading.arrays["entropy"].shape == (1, 4, 4)
    assert list(reading.entropy.coords["position"].values) == [0, 1, 2, 3]
    assert len(set(reading.entropy.coords["token"].values[0])) == 2
    values = reading.arrays["entropy"][0, -1]
    assert values[0] != values[3]


def test_every_form_of_input_gives_the_same(llama: ll.Model) -> None:
    text = "The capital of France"
    encoded = zoo.tokenizer()(text, return_tensors="pt")
    ids = encoded["input_ids"][0].tolist()
    expected = ll.read(llama, text).arrays["entropy"]
    for inputs in ([text], ids, [ids], torch.tensor(ids), torch.tensor([ids]), np.array(ids), encoded, dict(encoded)):
        np.testing.assert_array_equal(ll.read(llama, inputs).arrays["entropy"], expected)


def test_chat_goes_through_the_template(default_model: ll.Model) -> None:
    reading = ll.read(default_model, [{"role": "user", "content": "Hi"}], positions=-1, sites="29.resid_post")
    template = default_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert reading.prompts[0].text == template
    assert reading.prompts[0].ids == tuple(default_model.tokenizer(template, add_special_tokens=False)["input_ids"])


def test_an_encoder_decoder_reads_what_the_decoder_has_written() -> None:
    model = ll.wrap(zoo.shared("t5"))
    start = ll.read(model, zoo.ids(5))
    assert start.prompts[0].ids == (0,)
    further = ll.read(model, zoo.ids(5), decoder=[9, 8])
    assert further.prompts[0].ids == (0, 9, 8)
    truth = torch.log_softmax(zoo.forward(zoo.shared("t5"), [0, 9, 8], zoo.ids(5)), -1).max(-1).values
    np.testing.assert_allclose(further.arrays["top_logprob"][0, -1, :, 0], truth, atol=1e-5)
    with pytest.raises(ll.InputError, match="decoder= is for encoder-decoder models"):
        ll.read(ll.wrap(zoo.shared("gpt2")), zoo.ids(), decoder=[1])


def test_a_vocabulary_filter(default_model: ll.Model) -> None:
    words = ll.read(
        default_model,
        "The capital of France is",
        positions=-1,
        vocabulary=lambda label: label.strip().isalpha() and label.strip()[0].isupper(),
        target=" Paris",
    )
    plain = ll.read(default_model, "The capital of France is", positions=-1, target=" Paris")
    for site in words.sites:
        assert all(token.strip()[0].isupper() for token in words.cell(0, site, 0).tokens)
    np.testing.assert_array_equal(words.arrays["target_logprob"], plain.arrays["target_logprob"])
    assert (words.arrays["target_rank"] <= plain.arrays["target_rank"]).all()
    assert words.provenance["settings"]["vocabulary_filter"] is True


def test_targets_are_explained_not_guessed(default_model: ll.Model) -> None:
    from logitlab.targets import resolve_targets, target_notes

    (paris,) = resolve_targets(default_model, " Paris")
    (bare,) = resolve_targets(default_model, "Paris")
    assert paris.id != bare.id
    assert target_notes(default_model, [bare]) == [
        f"target 'Paris' is token {bare.id}; ' Paris' is another token, {paris.id}"
    ]
    with pytest.raises(ll.InputError, match=r"target ' Parisian baker' is \d tokens for this model: ' Paris' \(\d+\)"):
        resolve_targets(default_model, " Parisian baker")
    assert resolve_targets(default_model, [" Paris", paris.id, " Paris"]) == [paris]


def test_any_vectors_can_be_decoded(llama: ll.Model) -> None:
    vectors = llama.value_vectors(1, [0, 5])
    s = ll.decode(llama, vectors, targets=[3])
    z = llama.module.lm_head(llama.module.model.norm(vectors)).double()
    torch.testing.assert_close(s.target_logprob[0, :, 0], torch.log_softmax(z, -1)[:, 3].detach(), atol=1e-5, rtol=0)  # type: ignore[index]
    with pytest.raises(ll.InputError, match="have 32"):
        ll.decode(llama, torch.zeros(1, 5))


def test_a_lens_moves_every_site_but_not_the_reference(llama: ll.Model) -> None:
    class Doubled(ll.LogitLens):
        def transport(self, hidden: torch.Tensor, site: ll.Site) -> torch.Tensor:
            return hidden * 2 if site.layer < 2 else hidden

    lens = Doubled()
    assert isinstance(lens, ll.Lens)
    plain = ll.read(llama, zoo.ids(), sites="1.mlp_out")
    doubled = ll.read(llama, zoo.ids(), sites="1.mlp_out", lens=lens)
    np.testing.assert_allclose(doubled.arrays["entropy"], plain.arrays["entropy"], atol=1e-3)  # the norm undoes it
    np.testing.assert_array_equal(doubled.arrays["entropy"][:, -1], plain.arrays["entropy"][:, -1])


def test_heads_and_neurons_are_read_in_pieces(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab import plan

    whole = ll.read(llama, zoo.ids(), sites="neuron,head_out", target=[5])
    monkeypatch.setattr(plan, "DECODE_ROWS", 7)
    pieces = ll.read(llama, zoo.ids(), sites="neuron,head_out", target=[5])
    assert len(whole.sites) == 3 * 48 + 3 * 4 + 1
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(pieces.arrays[key], values, atol=1e-6, err_msg=key)


def test_progress_is_reported_to_the_end(llama: ll.Model) -> None:
    seen: list[tuple[int, int]] = []
    ll.read(llama, [zoo.ids(4), zoo.ids(6)], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_short_prompts_are_decoded_in_groups(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, so that the head is gone through once for many, but never more than some positions at a time."""
    from logitlab import plan, reader

    prompts = [zoo.ids(n, seed=n) for n in (3, 9, 4, 4, 12, 2)]
    whole = ll.read(llama, prompts, target=[5])
    sizes: list[int] = []
    original = plan.Asked.of

    def watched(self: Any, x: torch.Tensor, *args: Any) -> Any:
        sizes.append(x.shape[1])
        return original(self, x, *args)

    monkeypatch.setattr(plan.Asked, "of", watched)
    monkeypatch.setattr(reader, "GROUP_POSITIONS", 16)
    seen: list[tuple[int, int]] = []
    grouped = ll.read(llama, prompts, target=[5], progress=lambda done, total: seen.append((done, total)))
    assert sizes == [3 + 9 + 4, 12 + 2]  # two prompts are the same, and read once
    assert seen[-1] == (34 * 4, 34 * 4)
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(grouped.arrays[key], values, atol=1e-6, err_msg=key)


def test_statistics_that_are_not_wanted_are_not_there(llama: ll.Model) -> None:
    whole = ll.read(llama, zoo.ids(), target=[5])
    for names in ((), ("kl",), "entropy", ["kl", "entropy"]):
        reading = ll.read(llama, zoo.ids(), target=[5], statistics=names)
        wanted = {names} if isinstance(names, str) else set(names)
        assert set(reading.arrays) & {"entropy", "kl"} == wanted
        for key, values in reading.arrays.items():
            np.testing.assert_allclose(values, whole.arrays[key], atol=1e-6, err_msg=key)
        assert set(next(reading.rows())) & {"entropy", "kl"} == wanted
        assert (reading.cell(0, 0, 0).entropy is None) == ("entropy" not in wanted)
    with pytest.raises(ll.InputError, match=r"has no kl: it was not asked for; name it in statistics= of read\(\)"):
        _ = ll.read(llama, zoo.ids(), statistics=()).kl
    with pytest.raises(ll.InputError, match="unknown statistic 'rank': there are entropy, kl"):
        ll.read(llama, zoo.ids(), statistics=["rank"])


def test_a_screened_reading_states_its_bound(
    default_model: ll.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitlab.logits import native

    monkeypatch.setattr(native, "SCREENED_ROWS", 1)
    prompt = "The capital of France is"
    exact = ll.read(default_model, prompt, target=" Paris")
    screened = ll.read(default_model, prompt, target=" Paris", precision="screened", max_error=1e-4)
    assert "bound" not in exact.arrays
    with pytest.raises(ll.InputError, match="has no bound: it is exact; only screened readings"):
        _ = exact.bound
    bound = screened.bound
    assert bound.attrs["units"] == "nats"
    assert 0 <= float(bound.min()) <= float(bound.max()) <= 1e-4
    settings = screened.provenance["settings"]
    assert settings["precision"] == "screened"
    assert settings["max_error"] == 1e-4
    assert settings["error_bound"] == float(bound.max())
    for key in ("top_id", "target_rank"):
        np.testing.assert_array_equal(screened.arrays[key], exact.arrays[key])
    for key in ("top_logprob", "entropy", "kl", "target_logprob"):
        gap = np.abs(screened.arrays[key] - exact.arrays[key])
        allowed = bound.values if gap.ndim == 3 else bound.values[..., None]
        assert (gap <= allowed + 1e-5).all(), key
    assert "screened: within" in repr(screened)
    assert ll.Reading.load(screened.save(tmp_path / "screened.parquet")) == screened
    with pytest.raises(ll.InputError, match="max_error is -1; it is a number of nats above 0"):
        ll.read(default_model, prompt, max_error=-1)
    with pytest.raises(ll.InputError, match="unknown precision 'fast'"):
        ll.read(default_model, prompt, precision="fast")


def test_hidden_states_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.build("llama")
    model = ll.wrap(module)
    assert model.verification.offered  # the blocks are taken apart while they are whole
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(ll.ModelError, match=r"NaN or infinite from site 1\.resid_post on \(prompt 0, position 0\)"):
        ll.read(model, [zoo.ids(), zoo.ids()])
    with pytest.raises(ll.ModelError, match=r"from site 1\.mlp_out on"):
        ll.read(model, zoo.ids(), sites="resid,attn_out,mlp_out")


def test_provenance_says_what_was_done(llama: ll.Model) -> None:
    p = ll.read(llama, zoo.ids(), top_k=3).provenance
    assert p["model"] == "tiny-llama"
    assert p["fingerprint"] == llama.fingerprint
    assert p["verification"]["tail"]["holds"] is True
    assert p["lens"] == {"name": "logit lens"}
    assert p["settings"]["top_k"] == 3
    assert set(p["versions"]) == {"logitlab", "torch", "transformers", "numpy", "python"}


def test_the_fingerprint_follows_the_weights() -> None:
    a, b = ll.wrap(zoo.build("llama")), ll.wrap(zoo.build("llama"))
    assert a.fingerprint == b.fingerprint
    assert ll.wrap(zoo.build("llama", seed=1)).fingerprint != a.fingerprint
    assert ll.wrap(zoo.build("llama", rms_norm_eps=1e-3)).fingerprint != a.fingerprint


def test_split_characters_are_repaired(default_model: ll.Model) -> None:
    reading = ll.read(default_model, "I love 🧪", sites="29.resid_post")
    assert reading.prompts[0].tokens[-3:] == (" 🧪(1/3)", " 🧪(2/3)", " 🧪(3/3)")
    begun = list(reading.prompts[0].ids[:-1])
    part = ll.read(default_model, begun, positions=-1, sites="29.resid_post", top_k=50)
    completed = [t for t in part.cell(0, -1, 0).tokens if "<" not in t]
    assert any(len(t.strip()) == 1 and ord(t.strip()) > 0x1F000 for t in completed), completed


def test_blocks_that_put_tokens_before_prompts() -> None:
    """XLNet's hidden states are [tokens, batch, width]; a batch must not scramble them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = ll.wrap(transformers.XLNetLMHeadModel(config))
    prompts = [zoo.ids(4), zoo.ids(4, seed=8), zoo.ids(6, seed=9)]
    together = ll.read(model, prompts, batch_tokens=100)
    for n, prompt in enumerate(prompts):
        alone = ll.read(model, prompt).arrays["entropy"]
        np.testing.assert_allclose(together.arrays["entropy"][n : n + 1, :, : len(prompt)], alone, atol=1e-5)
        truth = log_probabilities(model.module, prompt)
        np.testing.assert_allclose(alone[0, -1], -(truth.exp() * truth).sum(-1), atol=1e-5)


def test_a_model_in_training_is_read_in_evaluation_mode() -> None:
    module = zoo.build("gpt2", embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    model = ll.wrap(module)
    quiet = ll.read(model, zoo.ids()).arrays["entropy"]
    module.train()
    module.transformer.h[1].eval()
    np.testing.assert_array_equal(ll.read(model, zoo.ids()).arrays["entropy"], quiet)
    assert module.training
    assert module.transformer.h[0].attn.training
    assert not module.transformer.h[1].training


def test_two_handles_on_one_module_may_run_in_threads() -> None:
    import threading

    module = zoo.build("gpt2")
    handles = [ll.wrap(module), ll.wrap(module)]
    alone = ll.read(handles[0], zoo.ids()).arrays["entropy"]
    found: list[Any] = []

    def work(handle: ll.Model) -> None:
        for _ in range(10):
            found.append(ll.read(handle, zoo.ids()).arrays["entropy"])

    threads = [threading.Thread(target=work, args=(h,)) for h in handles]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 20
    for values in found:
        np.testing.assert_array_equal(values, alone)


def test_the_fingerprint_follows_a_change_of_weights() -> None:
    module = zoo.build("gpt2")
    model = ll.wrap(module)
    before = ll.read(model, zoo.ids()).provenance["fingerprint"]
    module.transformer.h[0].mlp.c_proj.weight.data.mul_(3)
    assert ll.read(model, zoo.ids()).provenance["fingerprint"] != before


def test_masks_and_numbers_of_other_libraries(llama: ll.Model) -> None:
    mask = torch.zeros(300, dtype=torch.bool)
    mask[50:60] = True
    by_ids = ll.read(llama, zoo.ids(), vocabulary=range(50, 60), target=[np.int64(52)])
    for vocabulary in (mask, mask.numpy()):
        reading = ll.read(llama, zoo.ids(), vocabulary=vocabulary, target=torch.tensor(52), positions=np.arange(7))
        for key, values in by_ids.arrays.items():
            np.testing.assert_array_equal(reading.arrays[key], values)
    assert set(np.unique(by_ids.arrays["top_id"])) <= set(range(50, 60))
    with pytest.raises(ll.InputError, match=r"the vocabulary mask has shape \(3,\)"):
        ll.read(llama, zoo.ids(), vocabulary=mask[:3])
    with pytest.raises(ll.InputError, match="holds fractions"):
        ll.read(llama, zoo.ids(), vocabulary=mask.float())
    tokens = [np.int64(i) for i in zoo.ids()]
    assert ll.read(llama, tokens, positions=np.int64(-1)).prompts[0].positions == (6,)
    for bad in ({"target": 5.0}, {"positions": [True]}, {"top_k": 2.5}):
        with pytest.raises(ll.InputError, match="is not a whole number"):
            ll.read(llama, zoo.ids(), **bad)
    with pytest.raises(ll.InputError, match="neuron 48 does not exist: layer 0 has 48"):
        llama.value_vectors(0, [48])
    with pytest.raises(ll.InputError, match="not finite"):
        ll.decode(llama, torch.full((1, 32), torch.nan))
    with pytest.raises(ll.InputError, match=r"shape \(32,\)"):
        ll.decode(llama, torch.zeros(32))


def test_positions_that_roberta_keeps_for_padding() -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        pad_token_id=1,
    )
    model = ll.wrap(transformers.RobertaForMaskedLM(config))
    assert model.context_length == 64
    ll.read(model, zoo.ids(64), positions=-1)
    with pytest.raises(ll.InputError, match="context holds 64"):
        ll.read(model, zoo.ids(65))


def test_a_reading_of_some_hundred_tokens_is_screened(default_model: ll.Model) -> None:
    """The pieces in which it is decoded have to be large enough for that."""
    from logitlab.logits.choose import can_screen

    if not can_screen("native"):
        pytest.skip("this processor has no bfloat16 products, or there is no compiler")
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
    exact = ll.read(default_model, text)
    found = ll.read(default_model, text, precision="screened")
    assert 0 < float(found.bound.max()) <= 1e-3
    np.testing.assert_array_equal(found.arrays["top_id"], exact.arrays["top_id"])
    np.testing.assert_allclose(found.arrays["entropy"], exact.arrays["entropy"], atol=1e-3)
