"""The concept lens: a distribution over a user's own vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from tests import zoo
from tests.lenses.test_fitted import changed


def test_with_rows_of_the_unembedding_it_is_the_logit_lens_over_those_tokens(llama: ll.Model) -> None:
    ids = [4, 9, 33]
    module: Any = llama.module
    vectors = module.lm_head.weight[ids].detach()
    reading = ll.read(llama, zoo.ids(6), lens=ll.ConceptLens(vectors, ["a", "b", "c"]), target="b", top_k=3)
    with torch.no_grad():
        out = module(torch.tensor([zoo.ids(6)]), output_hidden_states=True)
        hidden = [*(module.model.norm(h) for h in out.hidden_states[:-1]), out.hidden_states[-1]]
    final = (hidden[-1][0] @ vectors.T).double().log_softmax(-1)
    for i, h in enumerate(hidden):
        logp = (h[0] @ vectors.T).double().log_softmax(-1)
        np.testing.assert_allclose(reading.arrays["target_logprob"][0, i, :, 0], logp[:, 1], atol=1e-4)
        np.testing.assert_allclose(reading.arrays["kl"][0, i], (final.exp() * (final - logp)).sum(-1), atol=1e-4)
        np.testing.assert_allclose(reading.arrays["entropy"][0, i], -(logp.exp() * logp).sum(-1), atol=1e-4)
    assert set(reading.labels.values()) == {"a", "b", "c"}
    assert reading.space == "concepts"


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_scale_and_cap_are_the_models(name: str) -> None:
    model = ll.wrap(zoo.build(name), name=name)
    ids = [3, 4, 5]
    head = model.tail.head
    assert head is not None
    reading = ll.read(model, zoo.ids(6), lens=ll.ConceptLens(head.weight[ids]), target=[0, 1, 2])
    plain = ll.read(model, zoo.ids(6), target=ids)
    truth = torch.tensor(plain.arrays["target_logprob"]).double().log_softmax(-1)
    np.testing.assert_allclose(reading.arrays["target_logprob"], truth, atol=1e-4)


def test_names_come_from_a_mapping_and_a_lens_comes_before(llama: ll.Model) -> None:
    vectors = {"joy": torch.randn(llama.width), "fear": torch.randn(llama.width)}
    first = changed(llama, "bias")
    reading = ll.read(llama, zoo.ids(4), lens=ll.ConceptLens(vectors, lens=first))
    assert reading.provenance["lens"]["concepts"] == ["joy", "fear"]
    assert reading.provenance["lens"]["behind"]["kind"] == "bias"
    plain = ll.read(llama, zoo.ids(4), lens=ll.ConceptLens(vectors))
    assert not np.allclose(plain.arrays["entropy"][:, :-1], reading.arrays["entropy"][:, :-1])
    np.testing.assert_array_equal(plain.arrays["entropy"][:, -1], reading.arrays["entropy"][:, -1])


def test_it_is_shown_and_saved(llama: ll.Model, tmp_path: Any) -> None:
    reading = ll.read(llama, zoo.ids(4), lens=ll.ConceptLens(torch.randn(3, llama.width), ["x", "y", "z"]))
    reading.save(tmp_path / "r.parquet")
    assert ll.Reading.load(tmp_path / "r.parquet").labels == reading.labels
    reading.html(tmp_path / "r.html")
    assert "concept lens" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_bad_requests(llama: ll.Model) -> None:
    for vectors, names, match in (
        (torch.randn(1, 4), None, "at least two"),
        (torch.randn(4), None, "at least two"),
        (torch.randn(2, 4), ["a"], "2 vectors and 1 different names"),
        (torch.randn(2, 4), ["a", "a"], "2 vectors and 1 different names"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), None, "not finite"),
        ({"a": torch.randn(3), "b": torch.randn(4)}, None, "different shapes"),
        ({"a": torch.randn(3), "b": torch.randn(3)}, ["a", "b"], "leave names out"),
        ({}, None, "at least two"),
    ):
        with pytest.raises(InputError, match=match):
            ll.ConceptLens(vectors, names)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the concepts have width 5"):
        ll.read(llama, zoo.ids(3), lens=ll.ConceptLens(torch.randn(2, 5)))
