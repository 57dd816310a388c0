"""Decompositions against independent sums, on families with every known way of adding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab.models.capture import Activations, capture
from tests import zoo

NEURONS = ["gpt2", "llama", "qwen3", "cohere", "granite", "gpt_neox", "opt", "t5", "bloom", "phi"]
HEADS = [*NEURONS, "mixtral"]
SUMS = [*HEADS, "falcon", "gemma2", "gemma3", "olmo2"]


def states(name: str, sites: str) -> Activations:
    inputs: Any = zoo.ids(6)
    if zoo.encoder_decoder(name):
        inputs = {"input_ids": torch.tensor([zoo.ids(5, seed=8)]), "decoder_input_ids": torch.tensor([zoo.ids(6)])}
    return capture(ll.wrap(zoo.shared(name)), inputs, sites)


@pytest.mark.parametrize("name", SUMS)
def test_components_sum_to_the_residual(name: str) -> None:
    kinds = "resid_pre,resid_post,attn_out,mlp_out" + (",cross_attn_out" if name == "t5" else "")
    a = states(name, kinds)
    for layer in range(3):
        total = a[f"{layer}.resid_pre"] + a[f"{layer}.attn_out"] + a[f"{layer}.mlp_out"]
        if name == "t5":
            total = total + a[f"{layer}.cross_attn_out"]
        after = a[f"{layer}.resid_post"]
        torch.testing.assert_close(total, after, atol=2e-6 * max(1.0, float(after.abs().max())), rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_heads_sum_to_attention(name: str) -> None:
    model = ll.wrap(zoo.shared(name))
    a = states(name, "attn_out,head_out")
    for layer in range(3):
        projection = model.parts[layer].heads
        assert projection is not None
        assert projection.parts == 4
        total = sum(a[f"{layer}.head_out.{h}"] for h in range(4))
        bias = getattr(projection.module, "bias", None)
        if bias is not None:
            total = total + bias.detach() * projection.scale
        after = a[f"{layer}.attn_out"]
        torch.testing.assert_close(total, after, atol=2e-6 * max(1.0, float(after.abs().max())), rtol=0)


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_sum_to_the_mlp(name: str) -> None:
    model = ll.wrap(zoo.shared(name))
    a = states(name, "1.mlp_out,1.neuron")
    projection = model.parts[1].neurons
    assert projection is not None
    total = sum(a[f"1.neuron.{i}"] for i in range(projection.parts))
    bias = getattr(projection.module, "bias", None)
    if bias is not None:
        total = total + bias.detach() * projection.scale
    after = a["1.mlp_out"]
    torch.testing.assert_close(total, after, atol=4e-6 * max(1.0, float(after.abs().max())), rtol=0)


def test_a_head_is_the_head_that_the_attention_computed() -> None:
    """Any cut of the projection's input would sum up; the right one is each head's own attention."""
    module = zoo.shared("llama")
    attention = module.model.layers[1].self_attn
    tokens = torch.tensor([zoo.ids(6)])
    seen: dict[str, torch.Tensor] = {}
    hook = attention.o_proj.register_forward_pre_hook(lambda m, args: seen.update(z=args[0].detach()))
    module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = module(tokens, output_attentions=True).attentions[1]  # [1, heads, tokens, tokens]
            hidden = capture(ll.wrap(module), tokens, "1.resid_pre")["1.resid_pre"]
            values = attention.v_proj(module.model.layers[1].input_layernorm(hidden)).reshape(6, 2, 8)
    finally:
        hook.remove()
        module.set_attn_implementation("sdpa")
    a = states("llama", "1.head_out")
    for head in range(4):
        mixed = weights[0, head] @ values[:, head // 2]  # two query heads share a value head
        expected = mixed @ attention.o_proj.weight[:, head * 8 : head * 8 + 8].T
        torch.testing.assert_close(a[f"1.head_out.{head}"], expected.detach(), atol=1e-5, rtol=0)


def test_a_neuron_is_its_activation_times_its_value_vector() -> None:
    model = ll.wrap(zoo.shared("llama"))
    mlp = zoo.shared("llama").model.layers[2].mlp
    module = zoo.shared("llama")
    hidden: dict[str, torch.Tensor] = {}
    hook = mlp.register_forward_pre_hook(lambda m, args: hidden.update(x=args[0].detach()))
    with torch.no_grad():
        module(torch.tensor([zoo.ids(6)]))
        hook.remove()
        x = hidden["x"][0]
        activation = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    value = model.value_vectors(2, [11])
    torch.testing.assert_close(value[0], mlp.down_proj.weight[:, 11].detach())
    expected = activation[:, 11, None] * value
    torch.testing.assert_close(states("llama", "2.neuron.11")["2.neuron.11"], expected, atol=1e-6, rtol=0)


def test_the_mixer_of_a_state_space_model_is_its_attention() -> None:
    model = ll.wrap(zoo.shared("mamba"))
    assert model.verification.offered["attn_out"] == 3
    assert "nothing that the block adds works on each position by itself" in model.verification.refused["mlp_out"]
    a = states("mamba", "resid_pre,attn_out,resid_post")
    total = a["1.resid_pre"] + a["1.attn_out"]
    torch.testing.assert_close(total, a["1.resid_post"], atol=1e-6 * float(total.abs().max()), rtol=0)


def test_residual_multiplier_and_post_norm_are_inside_the_component() -> None:
    granite = ll.wrap(zoo.shared("granite")).parts[0].components
    assert granite["attn_out"].scale == pytest.approx(0.22)
    assert granite["mlp_out"].scale == pytest.approx(0.22)
    gemma = ll.wrap(zoo.shared("gemma2")).parts[0].components
    assert gemma["attn_out"].path == "post_attention_layernorm"


def test_a_norm_between_heads_and_residual_refuses_heads() -> None:
    record = ll.wrap(zoo.shared("gemma2")).verification
    assert "a norm after it" in record.refused["head_out"]
    assert record.offered["attn_out"] == 3


def test_a_component_that_fails_its_sum_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab.models import decompose

    original = decompose._source_of

    def wrong(term: torch.Tensor, record: Any) -> Any:
        source = original(term, record)
        return (
            None if source is None else decompose._Source(source.module, source.path, source.scale * 1.01, source.out)
        )

    monkeypatch.setattr(decompose, "_source_of", wrong)
    record = ll.wrap(zoo.shared("llama")).verification
    assert not record.decompositions[0].holds
    assert set(record.offered) == {"resid_pre", "resid_post"}
    assert "fails by" in record.refused["mlp_out"]
