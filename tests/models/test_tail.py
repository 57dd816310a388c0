"""The tail of every family against the model's own logits, in value; and faults that must be caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import logitlab as ll
from logitlab.models import tail as tail_module
from logitlab.models.capture import capture
from logitlab.models.tail import Tail
from tests import zoo

NORMS = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "qwen3": "model.norm",
    "gemma2": "model.norm",
    "gemma3": "model.norm",
    "cohere": "model.norm",
    "granite": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "mamba": "backbone.norm_f",
    "bert": "bert.encoder.layer.2.output.LayerNorm",
    "t5": "decoder.final_layer_norm",
    "bart": "model.decoder.layers.1.final_layer_norm",
}
"""The norm that stands last before each family's head: what a double norm would apply again."""


def model_of(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), name=name)


def inputs_of(name: str) -> tuple[Any, torch.Tensor]:
    """Inputs for `capture`, and the model's own logits [tokens, V] by a plain call."""
    tokens, encoder = zoo.ids(7), zoo.ids(5, seed=6)
    if not zoo.encoder_decoder(name):
        return tokens, zoo.forward(zoo.shared(name), tokens)
    mapping = {"input_ids": torch.tensor([encoder]), "decoder_input_ids": torch.tensor([tokens])}
    return mapping, zoo.forward(zoo.shared(name), tokens, encoder)


def last_hidden(model: ll.Model, inputs: Any) -> torch.Tensor:
    return capture(model, inputs, str(model.last_site))[model.last_site]


@pytest.mark.parametrize("name", zoo.ALL)
def test_last_site_is_the_models_logits(name: str) -> None:
    model = model_of(name)
    inputs, truth = inputs_of(name)
    hidden = last_hidden(model, inputs)
    torch.testing.assert_close(model.tail.logits(hidden), truth, atol=1e-5, rtol=0)
    assert model.tail.head is not None
    fast = model.tail.head.logits(model.tail.head_input(hidden))
    torch.testing.assert_close(fast, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_second_norm_would_be_seen(name: str) -> None:
    """The same comparison fails by far when the last norm is applied twice."""
    model = model_of(name)
    inputs, truth = inputs_of(name)
    norm = zoo.shared(name).get_submodule(NORMS[name])
    with torch.no_grad():
        wrong = model.tail.logits(norm(last_hidden(model, inputs)))
    assert (wrong - truth).abs().max() > 1e-2


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_verification_refuses_a_second_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.shared(name)
    norm = module.get_submodule(NORMS[name])
    original = Tail._replay

    def twice(self: Tail, taps: Any, hidden: torch.Tensor, run: Any = None) -> Any:
        with torch.no_grad():
            return original(self, taps, norm(hidden), run)

    monkeypatch.setattr(Tail, "_replay", twice)
    with pytest.raises(ll.VerificationError, match="does not give the model's own logits"):
        ll.wrap(module)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "bart"])
def test_a_dropped_cap_scale_or_offset_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast form without what follows the head is wrong, and verification throws it away."""
    model = model_of(name)
    inputs, truth = inputs_of(name)
    head = model.tail.head
    assert head is not None
    bare = torch.nn.functional.linear(model.tail.head_input(last_hidden(model, inputs)), head.weight, head.bias)
    assert (bare - truth).abs().max() > 1e-2
    monkeypatch.setattr(Tail, "_measure_postmap", lambda self, head: (1.0, None, None))
    unproved = ll.wrap(zoo.shared(name))
    assert unproved.tail.head is None
    assert not unproved.verification.fast_form.holds
    torch.testing.assert_close(unproved.tail.logits(last_hidden(model, inputs)), truth, atol=1e-5, rtol=0)


def test_what_follows_the_head_is_measured() -> None:
    heads = {name: model_of(name).tail.head for name in ("llama", "gemma2", "cohere", "granite", "bart")}
    for name, head in heads.items():
        assert head is not None, name
        assert head.softcap == {"gemma2": 2.0}.get(name), name
        assert head.scale == {"cohere": 0.25, "granite": 0.125}.get(name, 1.0), name
        assert (head.offset is not None) == (name == "bart"), name
    bart = zoo.shared("bart")
    torch.testing.assert_close(heads["bart"].offset, bart.final_logits_bias[0])  # type: ignore[union-attr]


def test_the_cap_of_the_zoo_is_reached() -> None:
    """Otherwise the comparisons above would prove nothing about caps."""
    _, truth = inputs_of("gemma2")
    assert truth.abs().max() > 0.7 * 2.0


def test_t5_scales_its_tied_decoder() -> None:
    """transformers multiplies by d_model ** -0.5 before a tied head; leaving it out is off by far."""
    model = model_of("t5")
    inputs, truth = inputs_of("t5")
    hidden = last_hidden(model, inputs)
    with torch.no_grad():
        bare = zoo.shared("t5").lm_head(zoo.shared("t5").decoder.final_layer_norm(hidden))
    assert (bare - truth).abs().max() > 1
    torch.testing.assert_close(model.tail.logits(hidden), truth, atol=1e-5, rtol=0)


def test_hidden_states_of_any_layer_go_through_the_whole_tail() -> None:
    model = model_of("llama")
    module = zoo.shared("llama")
    hidden = capture(model, zoo.ids(7), "1.resid_post")["1.resid_post"]
    with torch.no_grad():
        expected = module.lm_head(module.model.norm(hidden))
    torch.testing.assert_close(model.tail.logits(hidden), expected, atol=1e-6, rtol=0)


class Odd(nn.Module):
    """An architecture that no library knows: own blocks, own norm, a cubic after the head."""

    def __init__(self, *, cubic: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 12)
        self.rungs = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)])
        self.gain = nn.Parameter(torch.rand(12) + 0.5)
        self.out = nn.Linear(12, 90)
        self.cubic = cubic

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for rung in self.rungs:
            x = x + 0.0 * x.sum() if False else rung(x)
        x = x / x.abs().mean(-1, keepdim=True) * self.gain
        y = self.out(x) * 0.3
        return type("Output", (), {"logits": y**3 + y if self.cubic else y})()


def test_an_unknown_architecture_is_read() -> None:
    torch.manual_seed(0)
    module = Odd(cubic=False)
    model = ll.wrap(module)
    assert model.tail.head is not None
    assert model.tail.head.scale == pytest.approx(0.3)
    truth = module(torch.tensor([[3, 4, 5]])).logits[0]
    torch.testing.assert_close(model.tail.logits(last_hidden(model, [3, 4, 5])), truth, atol=1e-5, rtol=0)


def test_a_tail_without_a_fast_form_is_used_as_it_is() -> None:
    torch.manual_seed(0)
    module = Odd(cubic=True)
    model = ll.wrap(module)
    assert model.tail.head is None
    assert "neither a scale nor a soft-cap" in model.verification.fast_form.note
    truth = torch.log_softmax(module(torch.tensor([[3, 4, 5]])).logits[0], -1)
    reading = ll.read(model, [3, 4, 5], target=[17])
    got = torch.from_numpy(reading.arrays["target_logprob"][0, -1, :, 0])
    torch.testing.assert_close(got, truth[:, 17].detach(), atol=1e-5, rtol=0)


def test_the_tail_is_streamed_when_it_has_no_fast_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ll.wrap(Odd(cubic=True))
    monkeypatch.setattr(tail_module, "LOGIT_VALUES", 90 * 4)
    sizes: list[int] = []
    original = Tail._logits_chunk

    def watched(self: Tail, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return original(self, hidden)

    monkeypatch.setattr(Tail, "_logits_chunk", watched)
    model.tail.logits(torch.randn(11, 12))
    assert sizes == [4, 4, 3]
