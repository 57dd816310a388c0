"""What verification says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import logitlab as ll
from logitlab.logits.head import Head
from logitlab.models.tail import Tail
from logitlab.models.verify import finite_size, max_difference, tolerance
from tests import zoo


def test_all_decompositions_of_a_llama_hold() -> None:
    record = ll.wrap(zoo.shared("llama")).verification
    assert record.tail.holds
    assert record.fast_form.holds
    assert [check.holds for check in record.decompositions] == [True, True, True]
    assert all(check.error is not None and check.error < 1e-6 for check in record.decompositions)
    assert record.offered == dict.fromkeys(("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out", "neuron"), 3)
    assert record.refused == {}
    text = "\n".join(record.lines())
    assert "resid_post = resid_pre + attn_out + mlp_out holds" in text
    assert "3 of 3 layers" in text


def test_the_default_model(default_model: ll.Model) -> None:
    record = default_model.verification
    assert record.max_abs_difference < 1e-4
    assert all(check.holds for check in record.decompositions)
    assert set(record.offered.values()) == {30}


def test_what_does_not_hold_is_not_offered_and_says_why() -> None:
    model = ll.wrap(zoo.shared("bert"))
    assert set(model.verification.offered) == {"resid_pre", "resid_post"}
    assert "norm after the sum" in model.verification.refused["attn_out"]
    with pytest.raises(ll.InputError, match=r"'attn_out' is not offered at layer 0 .* norm after the sum"):
        ll.read(model, zoo.ids(), sites="attn_out")


def test_tolerance_grows_with_the_dtype_only() -> None:
    assert tolerance(torch.float32, 30) == pytest.approx(30 * 32 * 2**-23)
    assert tolerance(torch.float64, 30) == tolerance(torch.float32, 30)
    assert tolerance(torch.bfloat16, 30) == pytest.approx(30 * (32 * 2**-23 + 2 * 2**-7))
    assert tolerance(torch.float32, 0.1) == pytest.approx(32 * 2**-23)
    assert tolerance(torch.float16, 0.1) == pytest.approx(32 * 2**-23 + 0.1 * 2 * 2**-10)


HALVES = [torch.bfloat16, torch.float16]


def half_logits(head: Head, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits as models compute them, rounded after each step; as the fast form does; and in float64."""
    z = torch.nn.functional.linear(x, head.weight, head.bias)
    if head.softcap is not None:
        z = torch.tanh(z * head.scale / head.softcap) * head.softcap
    elif head.scale != 1.0:
        z = z * head.scale
    if head.offset is not None:
        z = z + head.offset
    return z.float(), head.logits(x), head.logits(x, dtype=torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [8, 64, 576, 4096])
def test_rounding_stays_below_the_tolerance(dtype: torch.dtype, width: int) -> None:
    """Heads with every kind of post-map, states with outliers and along rows, logits from 0.1 to 1000."""
    generator = torch.Generator().manual_seed(width)
    worst = 0.0
    for size in (0.1, 1.0, 30.0, 1000.0):
        for shape in ("random", "outlier", "along"):
            x, w = torch.randn(24, width, generator=generator), torch.randn(300, width, generator=generator)
            if shape == "outlier":
                x[:, 0] *= 100
                w[:, 0] *= 0.1
            if shape == "along":
                x[:8] = 3 * w[:8]
            w, x = (w * size / (x @ w.T).abs().max()).to(dtype), x.to(dtype)
            vector = (0.3 * size * torch.randn(300, generator=generator)).to(dtype)
            for head in (
                Head(w),
                Head(w, vector),
                Head(w, scale=0.0625),
                Head(w, softcap=0.6 * size),
                Head(w, vector, scale=0.25),
                Head(w, offset=vector),
            ):
                own, fast, exact = half_logits(head, x)
                added = max((float(t.abs().max()) for t in (head.bias, head.offset) if t is not None), default=0.0)
                allowed = tolerance(dtype, max(added, finite_size(own)))
                assert max_difference(fast, own) <= allowed, (size, shape, head.scale, head.softcap)
                assert max_difference(fast, exact) <= tolerance(torch.float32, max(1.0, finite_size(own)))
                worst = max(worst, max_difference(fast, own) / allowed)
    assert worst > 0.2  # four roundings are allowed, and one or two of them happen


def faulty(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault in the fast form of every model that is wrapped from now on."""
    derive, given = Tail.derive_head, Tail.head_input

    def derived(tail: Tail) -> str | None:
        why = derive(tail)
        if tail.head is not None:
            changes: dict[str, Any] = {"scale": {"scale": 0.9 * tail.head.scale}, "cap": {"softcap": None}}
            tail.head = replace(tail.head, **changes.get(kind, {}))
        return why

    monkeypatch.setattr(Tail, "derive_head", derived)
    if kind == "norm":

        def twice(tail: Tail, hidden: torch.Tensor) -> torch.Tensor:
            return given(tail, given(tail, hidden))

        monkeypatch.setattr(Tail, "head_input", twice)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("norm", name) for name in ("llama", "gpt2", "gemma2", "cohere", "granite", "qwen3", "gpt_neox")),
        *(("scale", name) for name in ("llama", "gpt2", "gemma2", "cohere", "granite", "t5", "opt", "mamba")),
        ("cap", "gemma2"),
    ],
)
def test_a_planted_fault_is_larger_than_the_tolerance(
    kind: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(kind, monkeypatch)
    module = zoo.build(name).to(dtype)
    check = ll.wrap(module).verification.fast_form
    assert not check.holds
    assert check.error is not None
    assert check.tolerance is not None
    assert check.error > 2 * check.tolerance


def test_a_fault_in_real_states_is_seen_beside_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a norm in the tail, states 100 times as large have logits that would drown a lost bias."""
    torch.manual_seed(0)
    module = Small().to(torch.bfloat16)
    with torch.no_grad():
        module.head.bias.uniform_(-0.1, 0.1)
    assert ll.wrap(module).verification.fast_form.holds
    derive = Tail.derive_head

    def without_bias(tail: Tail) -> str | None:
        why = derive(tail)
        assert tail.head is not None
        tail.head = replace(tail.head, bias=None)
        return why

    monkeypatch.setattr(Tail, "derive_head", without_bias)
    check = ll.wrap(module).verification.fast_form
    assert not check.holds
    assert check.error is not None
    assert 0.05 < check.error < 0.15  # the bias itself


def test_float16_overflow() -> None:
    module = zoo.build("llama").to(torch.float16)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(
        ll.VerificationError,
        match=r"not finite on a few ordinary tokens: hidden states are not, from 1.resid_post .* ends at 65504",
    ):
        ll.wrap(module)
    module = zoo.build("llama").to(torch.float16)
    with torch.no_grad():
        module.lm_head.weight.fill_(6e4)
    with pytest.raises(ll.VerificationError, match=r"not finite on a few ordinary tokens; float16 ends at 65504"):
        ll.wrap(module)


def test_states_that_overflow_are_no_test_of_the_fast_form() -> None:
    """Mamba's norm squares in its own dtype: states 100 times as large are too much for float16."""
    note = ll.wrap(zoo.build("mamba").to(torch.float16)).verification.fast_form
    assert note.holds
    assert "more are beyond what the model can compute" in note.note


def test_eight_bit_floats_are_a_form_of_storage() -> None:
    module = Small()
    module.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    assert ll.wrap(module).dtype == torch.float32


def test_max_difference() -> None:
    inf = torch.inf
    assert max_difference(torch.tensor([1.0, inf, -inf]), torch.tensor([1.5, inf, -inf])) == 0.5
    assert max_difference(torch.tensor([inf]), torch.tensor([1.0])) == inf
    assert not max_difference(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1e9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5"])
def test_half_precision_models_verify(name: str, dtype: torch.dtype) -> None:
    model = ll.wrap(zoo.build(name).to(dtype))
    assert model.verification.fast_form.holds
    assert model.verification.tail.error == 0.0


class Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Small(nn.Module):
    """A minimal language model whose last step can be made unreadable."""

    def __init__(self, kind: str = "plain", layers: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers)])
        self.head = nn.Linear(8, 50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = first = self.embedding(input_ids)
        middle = x
        for layer in self.layers:
            middle, x = x, layer(x)
        if self.kind == "skip":
            x = x + middle  # the tail needs more than the last state
        if self.kind == "position":
            x = x * torch.arange(1, x.shape[1] + 1)[:, None]
        if self.kind == "average":
            x = x + first.mean(1, keepdim=True)
        if self.kind == "nan":
            x = x * torch.nan
        y = self.head(x)
        return y if self.kind == "tensor" else {"no": y} if self.kind == "none" else Logits(y)


@pytest.mark.parametrize(("kind", "alone"), [("skip", False), ("position", True), ("average", False)])
def test_a_tail_that_needs_more_than_its_hidden_state_is_read_in_context(kind: str, alone: bool) -> None:
    """Single rows are refused, whole states are decoded with what else the input left in the model."""
    torch.manual_seed(0)
    module = Small(kind)
    model = ll.wrap(module)
    assert model.tail.by is None
    assert model.tail.alone is alone
    assert "whole states" in model.verification.tail.note
    with pytest.raises(ll.ModelError, match="decoded by whole states only"):
        model.tail.logits(torch.zeros(1, 8))
    truth = torch.log_softmax(module(torch.tensor([[3, 4, 5, 6]])).logits[0], -1).detach()
    reading = ll.read(model, [3, 4, 5, 6], target=17)
    got = torch.from_numpy(reading.arrays["target_logprob"][0, -1, :, 0])
    torch.testing.assert_close(got, truth[:, 17], atol=1e-5, rtol=0)
    # an earlier state in the place of the last one, by hand
    states = [torch.zeros(0)] * 2
    hooks = [
        layer.register_forward_hook(lambda m, a, out, i=i: states.__setitem__(i, out))
        for i, layer in enumerate(module.layers)
    ]
    module(torch.tensor([[3, 4, 5, 6]]))
    for hook in hooks:
        hook.remove()
    x = states[0]
    first = module.embedding(torch.tensor([[3, 4, 5, 6]]))
    x = {
        "skip": x + states[0],
        "position": x * torch.arange(1, 5)[:, None],
        "average": x + first.mean(1, keepdim=True),
    }[kind]
    by_hand = torch.log_softmax(module.head(x)[0], -1).detach()
    got = torch.from_numpy(reading.arrays["target_logprob"][0, 1, :, 0])
    torch.testing.assert_close(got, by_hand[:, 17], atol=1e-5, rtol=0)


def test_a_bare_tensor_of_logits_is_fine() -> None:
    assert ll.wrap(Small("tensor")).n_layers == 2


def test_one_layer_is_a_stack() -> None:
    assert ll.wrap(Small(layers=1)).n_layers == 1


def test_no_logits() -> None:
    with pytest.raises(ll.ModelError, match="returns no logits; load the class that carries the output head"):
        ll.wrap(Small("none"))
    with pytest.raises(ll.ModelError, match="returns no logits"):
        ll.wrap(zoo.shared("llama").model)


def test_no_stack() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: torch.Tensor) -> Logits:
            return Logits(self.head(self.embedding(input_ids)))

    with pytest.raises(ll.ModelError, match="no chain of blocks"):
        ll.wrap(Flat())


def test_a_model_of_something_else_than_tokens() -> None:
    class Pictures(nn.Module):
        def forward(self, smells: torch.Tensor) -> None: ...

    with pytest.raises(ll.ModelError, match=r"smells.*example"):
        ll.wrap(Pictures())


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(ll.VerificationError, match="not finite"):
        ll.wrap(Small("nan"))


def test_the_stack_can_be_chosen() -> None:
    t5 = zoo.shared("t5")
    assert [s.name for s in ll.wrap(t5).stacks] == ["decoder.block", "encoder.block"]
    assert ll.wrap(t5, stack="decoder").stack.name == "decoder.block"
    encoder = ll.wrap(t5, stack="encoder")
    assert encoder.space.per == "output"
    assert encoder.tail.by is None
    with pytest.raises(ll.ModelError, match=r"stack='vision' names no layer stack .* decoder.block, encoder.block"):
        ll.wrap(t5, stack="vision")
    with pytest.raises(ll.ModelError, match="fits several"):
        ll.wrap(t5, stack="block")


def test_verification_leaves_the_module_as_it_was() -> None:
    module = zoo.build("gemma2")
    before = {name: dict(m.__dict__) for name, m in module.named_modules()}
    logits = zoo.forward(module, zoo.ids())
    ll.wrap(module)
    for name, m in module.named_modules():
        assert m.__dict__.keys() == before[name].keys(), name
        assert not m._forward_hooks, name
        assert not m._forward_pre_hooks, name
    assert torch.equal(zoo.forward(module, zoo.ids()), logits)


def test_the_record_is_plain_data() -> None:
    import json

    record = ll.wrap(zoo.shared("mamba")).verification
    assert json.loads(json.dumps(record.as_dict()))["tail"]["holds"] is True
