"""Reading while a model writes: the tokens are those of Transformers, the readings those of `read`."""

from __future__ import annotations

import threading
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from tests import zoo

PROMPT = "the sea is calm"


def model_of(name: str) -> ll.Model:
    return ll.wrap(zoo.build(name), zoo.tokenizer(), name=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3", "cohere", "granite", "gpt_neox", "opt", "mamba"])
def test_greedy_tokens_and_readings(name: str) -> None:
    model = model_of(name)
    ids = zoo.ids(6)
    steps = list(ll.generate(model, ids, max_new_tokens=5, do_sample=False))
    truth = model.module.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=5, do_sample=False,
        pad_token_id=0,
    )[0, 6:]  # fmt: skip
    assert [s.token_id for s in steps] == truth.tolist()
    for n, step in enumerate(steps):
        context = [*ids, *truth[:n].tolist()]
        plain = ll.read(model, context, positions=-1, target=[step.token_id])
        assert step.reading.prompts[0].ids == tuple(context)
        assert step.reading.prompts[0].positions == (len(context) - 1,)
        assert step.reading.prompts[0].tokens == plain.prompts[0].tokens
        assert step.reading.sites == plain.sites
        for key in ("entropy", "kl", "top_logprob", "target_logprob"):
            np.testing.assert_allclose(step.reading.arrays[key], plain.arrays[key], atol=2e-4, err_msg=key)
        assert step.logprob == pytest.approx(float(plain.arrays["target_logprob"][0, -1, 0, 0]), abs=2e-4)
    assert zoo.hooks(model.module) == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_writes_too(name: str) -> None:
    model = model_of(name)
    steps = list(ll.generate(model, zoo.ids(6), max_new_tokens=4, do_sample=False))
    written = [s.token_id for s in steps]
    start = list(steps[0].reading.prompts[0].ids)
    for n, step in enumerate(steps):
        plain = ll.read(model, zoo.ids(6), decoder=[*start[1:], *written[:n]], positions=-1, target=[step.token_id])
        assert step.reading.prompts[0].ids == plain.prompts[0].ids
        np.testing.assert_allclose(step.reading.arrays["kl"], plain.arrays["kl"], atol=2e-4)


def test_a_new_token_costs_a_pass_over_one_token(llama: ll.Model) -> None:
    block: Any = llama.stack.blocks[0].module
    sizes: list[int] = []
    hook = block.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True)
    try:
        list(ll.generate(llama, zoo.ids(6), max_new_tokens=4, do_sample=False))
    finally:
        hook.remove()
    assert sizes == [6, 1, 1, 1]


def test_the_last_row_is_the_distribution_that_was_drawn_from(llama: ll.Model) -> None:
    module: Any = llama.module
    ids = zoo.ids(6)
    steps = list(ll.generate(llama, ids, max_new_tokens=6, seed=3, do_sample=True, top_k=300))
    torch.manual_seed(3)
    found = module.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=6, do_sample=True,
        num_beams=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    assert [s.token_id for s in steps] == found.sequences[0, 6:].tolist()
    for step, z in zip(steps, found.logits, strict=True):
        logp = z[0].double().log_softmax(-1)
        top = step.reading.arrays["top_id"][0, -1, 0]
        np.testing.assert_allclose(step.reading.arrays["top_logprob"][0, -1, 0], logp[top], atol=1e-4)
        assert step.logprob == pytest.approx(float(logp[step.token_id]), abs=1e-4)


def test_a_seed_fixes_what_is_drawn_whatever_happens_in_between(llama: ll.Model) -> None:
    def written(disturb: bool) -> list[int]:
        found: list[int] = []
        for step in ll.generate(llama, zoo.ids(5), max_new_tokens=6, seed=1, do_sample=True):
            found.append(step.token_id)
            if disturb:
                torch.rand(3)
        return found

    torch.manual_seed(7)
    first = torch.rand(2)
    torch.manual_seed(7)
    quiet = written(False)
    assert torch.equal(torch.rand(2), first)  # nobody else's numbers were used up
    assert written(True) == quiet
    assert len({tuple(written(False)) for _ in range(2)}) == 1


def test_the_model_is_free_between_tokens(llama: ll.Model) -> None:
    """Readings in between, in this thread and in another, are those of an untouched model."""
    plain = ll.read(llama, zoo.ids(4))
    alone = [s.token_id for s in ll.generate(llama, zoo.ids(6), max_new_tokens=5, do_sample=False)]
    written: list[int] = []
    for step in ll.generate(llama, zoo.ids(6), max_new_tokens=5, do_sample=False):
        written.append(step.token_id)
        assert zoo.hooks(llama.module) == 0
        found: list[ll.Reading] = [ll.read(llama, zoo.ids(4))]
        thread = threading.Thread(target=lambda found=found: found.append(ll.read(llama, zoo.ids(4))))
        thread.start()
        thread.join()
        for one in found:
            np.testing.assert_array_equal(one.arrays["top_logprob"], plain.arrays["top_logprob"])
    assert written == alone


def test_stopping_early_leaves_nothing(llama: ll.Model) -> None:
    before = threading.active_count()
    for _ in islice(ll.generate(llama, zoo.ids(6), max_new_tokens=50, do_sample=False), 2):
        pass
    steps = ll.generate(llama, zoo.ids(6), max_new_tokens=50, do_sample=False)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    ll.generate(llama, zoo.ids(6))  # nobody asks for the first token
    assert threading.active_count() == before
    assert zoo.hooks(llama.module) == 0
    ll.read(llama, zoo.ids(3))


def test_an_error_in_the_loop_ends_the_generation(llama: ll.Model) -> None:
    def loop() -> None:
        for _ in ll.generate(llama, zoo.ids(6), max_new_tokens=50):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert zoo.hooks(llama.module) == 0
    ll.read(llama, zoo.ids(3))


def test_an_error_before_the_first_pass_is_raised_here(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no hooks today")

    monkeypatch.setattr("logitlab.generation.watch", fails)
    with pytest.raises(RuntimeError, match="no hooks today"):
        list(ll.generate(llama, zoo.ids(4)))
    monkeypatch.undo()
    ll.read(llama, zoo.ids(3))


def test_a_thread_that_holds_the_model_is_told_so(llama: ll.Model) -> None:
    steps = ll.generate(llama, zoo.ids(4))
    with llama.exclusive(), pytest.raises(InputError, match="is at work in this very thread"):
        next(steps)


def test_text_targets_and_lens(llama: ll.Model) -> None:
    steps = list(ll.generate(llama, PROMPT, max_new_tokens=4, do_sample=False, target=[5, 6]))
    text = llama.tokenizer.decode([s.token_id for s in steps], skip_special_tokens=True)
    assert "".join(s.text for s in steps) == text or text.endswith("\N{REPLACEMENT CHARACTER}")
    for step in steps:
        assert [t.id for t in step.reading.targets] == [step.token_id, *(i for i in (5, 6) if i != step.token_id)]
    concepts = ll.ConceptLens(torch.randn(3, llama.width), ["x", "y", "z"])
    found = list(ll.generate(llama, PROMPT, max_new_tokens=4, do_sample=False, lens=concepts))
    assert [s.token_id for s in found] == [s.token_id for s in steps]
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in steps])
    assert set(found[0].reading.labels.values()) == {"x", "y", "z"}


def test_a_shared_block_is_read_in_every_pass() -> None:
    """ALBERT's layers are one module; here a decoder with the same trait."""
    module = zoo.build("llama")
    module.model.layers[1] = module.model.layers[0]
    model = ll.wrap(module, zoo.tokenizer(), name="shared")
    steps = list(ll.generate(model, zoo.ids(5), max_new_tokens=3, do_sample=False, use_cache=False))
    for step in steps:
        plain = ll.read(model, list(step.reading.prompts[0].ids), positions=-1)
        np.testing.assert_allclose(step.reading.arrays["kl"], plain.arrays["kl"], atol=2e-4)


def test_bad_requests(llama: ll.Model) -> None:
    for inputs, options, match in (
        (zoo.ids(4), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (zoo.ids(4), {"num_beams": 3}, "num_beams cannot be used here"),
        (zoo.ids(4), {"streamer": object()}, "streamer cannot be used here"),
        ([zoo.ids(4), zoo.ids(5)], {}, "one text at a time, and 2 prompts"),
        (zoo.ids(4), {"sites": "9.resid_post"}, "layer 9 is out of range"),
        (zoo.ids(4), {"temperature": -1.0, "do_sample": True}, "Transformers does not generate with these options"),
        (zoo.ids(4), {"banana": 3}, "Transformers does not generate with these options"),
        (zoo.ids(4), {"guidance_scale": 2.0}, "guidance_scale cannot be used here"),
        (zoo.ids(4), {"seed": 2**70}, "seed is"),
    ):
        with pytest.raises(InputError, match=match):
            list(ll.generate(llama, inputs, **options))
    with pytest.raises(InputError, match="does not run on this input"):
        list(ll.generate(ll.wrap(zoo.build("gpt2")), zoo.ids(60), max_new_tokens=20))
    assert zoo.hooks(llama.module) == 0

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.build("llama")

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner(input_ids)

    with pytest.raises(InputError, match=r"has no generate\(\)"):
        ll.generate(ll.wrap(Bare()), zoo.ids(4))
