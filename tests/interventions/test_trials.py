"""Many trials in one batch against single prompts: Transformers' own generate, and plain forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from logitlab.interventions.trials import Trials
from tests import zoo

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "opt", "bloom", "mamba", "t5", "bart"]
TEXTS = [
    "The capital of France is",
    "Once",
    "The capital of Japan",
    "Once upon a time there",
    "the",
    "The capital of Italy",
]


def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)


def vector(model: ll.Model, seed: int) -> torch.Tensor:
    return 3 * torch.randn(model.width, generator=torch.Generator().manual_seed(seed))


def several(model: ll.Model) -> list[list[iv.Intervention]]:
    """Nothing; one site; two sites; another change; heads where there are some."""
    v, w = vector(model, 1), vector(model, 2)
    found = [
        [],
        [iv.add("0.resid_post", v, positions="each")],
        [iv.add("0.resid_post", w, positions="last"), iv.scale("1.resid_post", 0.5, positions="generated")],
        [iv.replace("1.resid_post", w, positions="last")],
        [iv.add("1.resid_post", v, strength=-2, positions="generated")],
    ]
    if model.parts[1].heads is not None:
        found.append([iv.replace("1.head_out.2", w, positions="each")])
    return found


def ids_of(model: ll.Model, n: int, trials: Trials) -> dict[str, Any]:
    prompt = trials.prompts[n]
    if model.encoder_decoder:
        return {
            "input_ids": torch.tensor([prompt.encoder_ids]),
            "decoder_input_ids": torch.tensor([prompt.ids]),
        }
    return {"input_ids": torch.tensor([prompt.ids])}


def alone(model: ll.Model, inputs: dict[str, Any], trial: list[iv.Intervention], new: int) -> str:
    """The most likely token each time, by whole passes over one prompt: no cache, no generate, no batch."""
    own = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    start, ids = inputs[own].shape[1], inputs[own]
    stops = model.module.generation_config.eos_token_id
    for step in range(new):
        # positions are those of the prompt, so what they name is put into numbers
        numbered: list[iv.Intervention] = []
        for item in trial:
            last, made = [start - 1], list(range(start, start + step))
            where = {"last": last, "generated": made, "each": last + made}[str(item.positions)]
            if where:
                numbered.append(iv.Intervention(item.sites, item.change, tuple(where)))
        with torch.no_grad():
            if numbered:
                with iv.intervene(model, numbered):
                    logits = model.module(**{**inputs, own: ids}).logits
            else:
                logits = model.module(**{**inputs, own: ids}).logits
        token = int(logits[0, -1].argmax())
        if token == stops:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return str(model.tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_each_prompt_alone(name: str) -> None:
    model = wrapped(name)
    trials = several(model)
    many = Trials(model, TEXTS)
    found = many.write(trials, 3)
    assert Trials(model, TEXTS, rows=2).write(trials, 3) == found
    some = (0, 1, 3)  # of three lengths, one of them a single token
    expected = [[alone(model, ids_of(model, n, many), trial, 3) for n in some] for trial in trials]
    assert [[texts[n] for n in some] for texts in found] == expected
    assert len({tuple(texts) for texts in found}) > 2  # the trials differ
    if not model.encoder_decoder:  # and so does Transformers' own way of writing
        for trial, texts in zip(trials[1:], found[1:], strict=True):
            for n in (2, 5):
                inputs = ids_of(model, n, many)
                with iv.intervene(model, trial):
                    out = model.module.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
                text = model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                assert text == texts[n]
    assert zoo.hooks(model.module) == 0
    assert "generate" not in model.module.__dict__


@pytest.mark.parametrize("name", FAMILIES)
def test_next_tokens_are_those_of_a_plain_pass(name: str) -> None:
    model = wrapped(name)
    trials = [t for t in several(model) if all(i.positions != "generated" for i in t)]
    many = Trials(model, TEXTS, rows=5)
    targets = [[10 + n, 40 + n] for n in range(len(TEXTS))]
    logprob, top = many.next_tokens(trials, targets)
    assert logprob.shape == top.shape == (len(trials), len(TEXTS))
    for t, trial in enumerate(trials):
        for n in range(len(TEXTS)):
            with torch.no_grad():
                if trial:
                    with iv.intervene(model, trial):
                        logits = model.module(**ids_of(model, n, many)).logits[0, -1].double()
                else:
                    logits = model.module(**ids_of(model, n, many)).logits[0, -1].double()
            assert logprob[t, n] == pytest.approx(float(logits.log_softmax(-1)[targets[n]].max()), abs=1e-4)
            assert top[t, n] == int(logits.argmax())
    assert np.abs(logprob[1:] - logprob[0]).max() > 0.01


def test_what_comes_before_the_last_token_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that goes on from its cache sees one token of each prompt; also after a prompt too short to tell."""
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer())
    assert Trials(model, ["Once"]).write([[]], 1) != [[]]
    many = Trials(model, [zoo.ids(9), zoo.ids(9, seed=1)])
    (plain,), _ = many.next_tokens([[]], [[5], [6]])
    seen: list[torch.Size] = []
    handle = model.module.model.embed_tokens.register_forward_hook(lambda m, a, o: seen.append(a[0].shape))
    with_hook = Trials(model, [zoo.ids(9), zoo.ids(9, seed=1)])
    _ = with_hook.next_tokens([[]], [[5], [6]])
    seen.clear()
    (again,), _ = with_hook.next_tokens([[]], [[5], [6]])
    handle.remove()
    assert seen == [torch.Size([2, 1])]
    np.testing.assert_allclose(again, plain, atol=1e-6)


def test_a_model_that_has_changed_is_seen_anew() -> None:
    """What was run before belongs to the weights, and to the block around it, of that time."""
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer())
    prompts, targets = [zoo.ids(8), zoo.ids(8, seed=1)], [[5], [6]]
    many = Trials(model, prompts)
    trial = [iv.add("1.resid_post", vector(model, 1), positions="last")]
    (first,), _ = many.next_tokens([trial], targets)
    outer = iv.add("0.resid_post", vector(model, 3), positions=2)  # before the last token
    with iv.intervene(model, outer):
        (within,), _ = many.next_tokens([trial], targets)
        texts = many.write([trial], 3)
        expected = []
        for ids in prompts:
            with iv.intervene(model, trial), torch.no_grad():
                expected.append(float(model.module(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[5]))
        assert texts == Trials(model, prompts).write([trial], 3)
    assert within[0] == pytest.approx(expected[0], abs=1e-4)
    assert abs(within[0] - first[0]) > 1e-3
    (after,), _ = many.next_tokens([trial], targets)
    np.testing.assert_allclose(after, first, atol=1e-6)
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(-1)
    (other,), _ = many.next_tokens([trial], targets)
    np.testing.assert_allclose(other, Trials(model, prompts).next_tokens([trial], targets)[0][0], atol=1e-6)
    assert np.abs(other - first).max() > 1e-3


def test_settings_of_the_model_itself_do_not_count() -> None:
    """Many models come with sampling, penalties and minimal lengths; the most likely token is the most likely token."""
    module = zoo.build("llama")
    model = ll.wrap(module, zoo.tokenizer())
    trial = [iv.add("0.resid_post", vector(model, 1), positions="each")]
    plain = Trials(model, TEXTS).write([[], trial], 5)
    own = module.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=1)
    own.update(return_dict_in_generate=True, output_scores=True, max_length=3, suppress_tokens=[7])
    own.forced_bos_token_id = own.forced_eos_token_id = 20
    assert Trials(model, TEXTS).write([[], trial], 5) == plain
    assert module.generation_config is own


def test_the_end_of_a_text() -> None:
    """A text ends before the token that ends texts, for each trial by itself."""
    module = zoo.build("llama")
    model = ll.wrap(module, zoo.tokenizer())
    trial = [iv.add("0.resid_post", vector(model, 1), positions="each")]
    many = Trials(model, ["The capital of France is"])
    ids = many.prompts[0].ids
    out = module.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    written = out[0, len(ids) :].tolist()
    with iv.intervene(model, trial):
        out = module.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    steered = out[0, len(ids) :].tolist()
    stop = next(i for i, t in enumerate(steered) if t not in written)
    module.generation_config.eos_token_id = [2, steered[stop]]
    (one,), (two,) = many.write([[], trial], 6)
    assert one == model.tokenizer.decode(written)
    assert two == model.tokenizer.decode(steered[:stop])


def test_a_decoder_that_has_written_something() -> None:
    """What the decoder is given is no part of what is written."""
    model = wrapped("t5")
    inputs = {"input_ids": [zoo.ids(5)], "decoder_input_ids": [[0, 11, 12]]}
    many = Trials(model, inputs)
    assert many.prompts[0].ids == (0, 11, 12)
    trial = [iv.add("0.resid_post", vector(model, 1), positions="each")]
    assert many.write([[], trial], 3) == [[alone(model, ids_of(model, 0, many), t, 3)] for t in ([], trial)]


def test_progress_and_nothing_to_do() -> None:
    model = wrapped("llama")
    seen: list[tuple[int, int]] = []
    many = Trials(model, TEXTS, rows=4)
    many.write([[]] * 3, 1, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (18, 18)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert many.write([], 3) == []
    assert many.next_tokens([], [[5]] * 6)[0].shape == (0, 6)


def test_bad_trials() -> None:
    model = wrapped("llama")
    many, v = Trials(model, TEXTS), vector(model, 1)
    late = "a trial is a list of interventions at positions last, each, generated, of all sequences"
    bad: list[Any] = [
        [iv.add("0.resid_post", v)],
        [iv.add("0.resid_post", v, positions="prompt")],
        [iv.add("0.resid_post", v, positions=-1)],
        [iv.add("0.resid_post", v, positions="last").only(0)],
        [iv.cut("last", "first")],
        iv.add("0.resid_post", v, positions="last"),
        ["0.resid_post"],
    ]
    for trial in bad:
        with pytest.raises(InputError, match=late):
            many.write([[], trial], 2)
        with pytest.raises(InputError, match=late):
            many.next_tokens([[], trial], [[5]] * 6)
    with pytest.raises(InputError, match="rows is 0; it must be at least 1"):
        Trials(model, TEXTS, rows=0)
    with pytest.raises(InputError, match="new_tokens is 0; it must be at least 1"):
        many.write([[]], 0)
    with pytest.raises(InputError, match="6 prompts and 1 lists of targets: give ids for each"):
        many.next_tokens([[]], [[5]])
    with pytest.raises(InputError, match="6 prompts and 6 lists of targets: give ids for each"):
        many.next_tokens([[]], [[5]] * 5 + [[]])
    for beyond in (-1, zoo.VOCABULARY):
        with pytest.raises(InputError, match=f"target id {beyond} is not in the vocabulary"):
            many.next_tokens([[]], [[5]] * 5 + [[5, beyond]])
    with pytest.raises(InputError, match="layer 9 is out of range"):
        many.write([[iv.add("9.resid_post", v, positions="last")]], 2)
    with pytest.raises(InputError):
        Trials(model, [])
    with pytest.raises(InputError, match="cannot write"):
        Trials(ll.wrap(zoo.shared("llama")), [[5, 6]]).write([[]], 2)
    with pytest.raises(InputError, match="does not run on this input"):
        Trials(ll.wrap(zoo.shared("gpt2"), zoo.tokenizer()), [zoo.ids(60)]).write([[]], 20)


def test_nothing_is_left_after_an_exception() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer())
    own = model.module.generation_config
    many = Trials(model, TEXTS)
    plain = many.write([[]], 2)

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("a fault in the model")

    handle = model.module.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(InputError, match="a fault in the model"):
        many.write([[iv.add("0.resid_post", vector(model, 1), positions="each")]], 2)
    handle.remove()

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        many.write([[iv.add("0.resid_post", vector(model, 1), positions="each")]], 2, progress=stop)
    assert zoo.hooks(model.module) == 0
    assert "generate" not in model.module.__dict__
    assert model.module.generation_config is own
    assert many.write([[]], 2) == plain


# -- only() ------------------------------------------------------------------------------------


def test_some_sequences_of_a_batch() -> None:
    model = wrapped("llama")
    ids = torch.tensor([zoo.ids(6, seed=s) for s in range(4)])
    one, two = (iv.add("0.resid_post", vector(model, s), positions=p) for s, p in ((1, "last"), (2, 1)))
    with torch.no_grad():
        with iv.intervene(model, one.only([0, 2]), two.only(np.int64(2)), iv.scale("1.resid_post", 0.5).only(3)):
            found = model.module(ids).logits
        expected = [[one], [], [one, two], [iv.scale("1.resid_post", 0.5)]]
        for n, items in enumerate(expected):
            if items:
                with iv.intervene(model, items):
                    alone = model.module(ids[n : n + 1]).logits[0]
            else:
                alone = model.module(ids[n : n + 1]).logits[0]
            torch.testing.assert_close(found[n], alone, atol=1e-5, rtol=1e-5)


def test_some_sequences_that_are_written() -> None:
    """Padded, of other lengths."""
    model = wrapped("llama")
    rows = [zoo.ids(6, seed=1), zoo.ids(3, seed=2)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 6 - len(row) :], mask[i, 6 - len(row) :] = torch.tensor(row), 1
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    change = iv.add("0.resid_post", vector(model, 1), positions="each")
    plain = [model.module.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    with iv.intervene(model, change):
        steered = [model.module.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    for n in (0, 1):
        with iv.intervene(model, change.only(n)):
            out = model.module.generate(ids, attention_mask=mask, **options)[:, 6:].tolist()
        assert out[n] == steered[n] != plain[n]
        assert out[1 - n] == plain[1 - n]


def test_prompts_that_are_read_are_sequence_0() -> None:
    model = wrapped("llama")
    change = iv.add("0.resid_post", vector(model, 1))
    with iv.intervene(model, change):
        expected = ll.read(model, [zoo.ids(6), zoo.ids(5)])
    with iv.intervene(model, change.only(0)):
        found = ll.read(model, [zoo.ids(6), zoo.ids(5)])
    np.testing.assert_array_equal(found.arrays["entropy"], expected.arrays["entropy"])
    assert found.provenance["interventions"][0]["sequences"] == [0]
    with (
        iv.intervene(model, change.only([0, 1])),
        pytest.raises(InputError, match="sequence 1 is beyond the batch, which has 1: only\\(\\) is for batches"),
    ):
        ll.read(model, zoo.ids(6))
    for bad in ([], -1, [0, -2], [0.5], "0", True):
        with pytest.raises(InputError, match="sequence"):
            change.only(bad)
