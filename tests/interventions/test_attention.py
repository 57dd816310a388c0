"""Cut attention edges against attention that is renormalised by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from tests import zoo

NAMES = ["llama", "gpt2", "gemma2", "qwen3", "gpt_neox", "opt", "cohere", "bert"]


def both(name: str) -> tuple[ll.Model, ll.Model]:
    """The same model with PyTorch's fused attention, where it has it, and with attention step by step."""
    fused, plain = zoo.build(name), zoo.build(name)
    plain.set_attn_implementation("eager")
    return ll.wrap(fused, zoo.tokenizer(), name=name), ll.wrap(plain, zoo.tokenizer(), name=name)


def weights(model: ll.Model, ids: list[int]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model.module(torch.tensor([ids]), output_attentions=True).attentions)


def renormalised(given: torch.Tensor, queries: list[int], keys: list[int], heads: list[int]) -> torch.Tensor:
    out = given.clone()
    for head in heads:
        for query in queries:
            out[0, head, query, keys] = 0
    return out / out.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [None, [1]])
def test_what_is_left_is_renormalised(name: str, heads: list[int] | None) -> None:
    fused, plain = both(name)
    ids = zoo.ids(7)
    before = weights(plain, ids)
    edges = iv.cut([5, 6], [1, 2], layers=[0], heads=heads)
    with iv.intervene(plain, edges):
        after = weights(plain, ids)
        stepwise = zoo.forward(plain.module, ids)
    expected = renormalised(before[0], [5, 6], [1, 2], list(range(4)) if heads is None else heads)
    torch.testing.assert_close(after[0], expected, atol=1e-6, rtol=1e-5)
    assert float((after[0] - before[0]).abs().max()) > 1e-3
    with iv.intervene(fused, edges):
        together = zoo.forward(fused.module, ids)
    torch.testing.assert_close(together, stepwise, atol=2e-5, rtol=1e-4)
    assert float((together - zoo.forward(fused.module, ids)).abs().max()) > 1e-5


def test_several_layers_and_cuts_add_up() -> None:
    _, plain = both("llama")
    ids = zoo.ids(6)
    with iv.intervene(plain, iv.cut("last", [1], layers=[-1]), iv.cut("last", [2], layers=2)):
        after = weights(plain, ids)
    with iv.intervene(plain, iv.cut("last", [1, 2], layers=2)):
        expected = weights(plain, ids)
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert float(after[2][0, :, 5, 1:3].abs().max()) == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_a_decoder_sees_of_an_encoder_stays(name: str) -> None:
    module = zoo.build(name)
    module.set_attn_implementation("eager")
    model = ll.wrap(module, zoo.tokenizer(), name=name)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([zoo.ids(5)]),  # as many as the decoder has
        "decoder_input_ids": torch.tensor([zoo.ids(5, seed=2)]),
        "output_attentions": True,
    }
    with torch.no_grad():
        before = module(**inputs)
        with iv.intervene(model, iv.cut(4, [1, 2], layers=0)):
            after = module(**inputs)
    own = renormalised(before.decoder_attentions[0], [4], [1, 2], list(range(4)))
    torch.testing.assert_close(after.decoder_attentions[0], own, atol=1e-6, rtol=1e-5)
    for one, other in zip(after.encoder_attentions, before.encoder_attentions, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert float(after.cross_attentions[0][0, :, 4].min()) > 0


def test_what_cannot_be_cut() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    ids = zoo.ids(5)
    with pytest.raises(InputError, match="nothing left to look at"), iv.intervene(model, iv.cut(2, "all")):
        zoo.forward(model.module, ids)
    with (
        pytest.raises(InputError, match="head 4 does not exist: layer 0 has 4"),
        iv.intervene(model, iv.cut(2, 1, heads=4)),
    ):
        zoo.forward(model.module, ids)
    albert = ll.wrap(zoo.build("albert"), zoo.tokenizer(), name="albert")
    with pytest.raises(InputError, match="albert"), iv.intervene(albert, iv.cut(2, 1)):
        pass
    assert zoo.hooks(model.module) == 0
