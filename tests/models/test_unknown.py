"""Architectures that no library knows, defined here: they are read like any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import logitlab as ll


class Gain(nn.Module):
    """A norm of its own kind: by the mean absolute value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True) * self.gain


class Mixer(nn.Module):
    """A block of its own kind: a running mean over positions, then a gate."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.gate, self.out = Gain(width), nn.Linear(width, width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        seen = torch.arange(1, x.shape[1] + 1)[:, None]
        mixed = y.cumsum(1) / seen if self.causal else y.mean(1, keepdim=True).expand_as(y)
        return x + 0.7 * self.out(torch.tanh(self.gate(y)) * mixed)


class NewLanguageModel(nn.Module):
    """Three mixers, a norm, a tied head with a scale and a cap."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(70, 16)
        self.steps = nn.ModuleList([Mixer(16, causal=True) for _ in range(3)])
        self.last = Gain(16)
        self.head = nn.Linear(16, 70, bias=False)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for step in self.steps:
            x = step(x)
        return {"logits": 3 * torch.tanh(0.4 * self.head(self.last(x)) / 3)}


class NewClassifier(nn.Module):
    """Patches, three mixers, a norm, the mean over patches, a head with a scale."""

    def __init__(self, pooling: str = "mean") -> None:
        super().__init__()
        self.pooling = pooling
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.steps = nn.ModuleList([Mixer(16, causal=False) for _ in range(3)])
        self.last = Gain(16)
        self.head = nn.Linear(16, 5)

    def forward(self, photo: torch.Tensor) -> Any:
        x = self.patch(photo).flatten(2).transpose(1, 2)
        for step in self.steps:
            x = step(x)
        y = self.last(x)
        pooled = y.mean(1) if self.pooling == "mean" else y[:, 0] if self.pooling == "first" else y.amax(1)
        return {"logits": 2.5 * self.head(pooled)}


def test_a_new_causal_model() -> None:
    torch.manual_seed(0)
    module = NewLanguageModel()
    model = ll.wrap(module)
    assert (model.stack.name, model.n_layers, model.space.name) == ("steps", 3, "vocabulary")
    head = model.tail.head
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(0.4), pytest.approx(3.0))
    ids = [3, 14, 15, 9, 26]
    reading = ll.read(model, ids, target=[7], top_k=70)
    with torch.no_grad():
        truth = torch.log_softmax(module(torch.tensor([ids]))["logits"][0].double(), -1)
        x = module.embedding(torch.tensor([ids]))
        for layer, step in enumerate(module.steps):
            x = step(x)
            y = 3 * torch.tanh(0.4 * module.head(module.last(x)) / 3)
            expected = torch.log_softmax(y[0].double(), -1)
            np.testing.assert_allclose(reading.logprob.values[0, layer + 1, :, 0], expected[:, 7], atol=1e-5)
    np.testing.assert_allclose(reading.top_logprob.values[0, -1, :, 0], truth.max(-1).values, atol=1e-5)
    assert model.verification.decompositions[0].name


@pytest.mark.parametrize("pooling", ["mean", "first", "max"])
def test_a_new_classifier(pooling: str) -> None:
    torch.manual_seed(0)
    module = NewClassifier(pooling)
    photo = torch.randn(1, 3, 12, 16)
    model = ll.wrap(module, example={"photo": torch.randn(1, 3, 12, 16)})
    assert (model.stack.name, model.space.name, model.space.per) == ("steps", "classes", "input")
    reading = ll.read(model, {"photo": photo}, target=[2])
    assert reading.prompts[0].tokens[-1] == "pooled"
    with torch.no_grad():
        truth = torch.log_softmax(module(photo)["logits"][0].double(), -1)
        assert reading.logprob.values[0, -1, -1, 0] == pytest.approx(float(truth[2]), abs=1e-5)
        x = module.patch(photo).flatten(2).transpose(1, 2)
        states = [x]
        for step in module.steps:
            states.append(step(states[-1]))
        for site, state in enumerate(states):
            # a single place is read as a picture that looks the same everywhere: its own norm and head
            by_place = torch.log_softmax(2.5 * module.head(module.last(state[0])).double(), -1)
            np.testing.assert_allclose(reading.logprob.values[0, site, :12, 0], by_place[:, 2], atol=1e-5)


def test_a_head_that_needs_the_whole_state_has_no_single_places() -> None:
    """A pooled answer that weighs places by where they are is read by whole states all the same."""

    class Weighted(NewClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.rand(12))

        def forward(self, photo: torch.Tensor) -> Any:
            x = self.patch(photo).flatten(2).transpose(1, 2)
            for step in self.steps:
                x = step(x)
            return {"logits": self.head((self.last(x) * self.weights[:, None]).sum(1))}

    torch.manual_seed(0)
    module, photo = Weighted(), torch.randn(1, 3, 12, 16)
    model = ll.wrap(module, example={"photo": photo})
    reading = ll.read(model, {"photo": photo}, positions=-1, target=[1])
    with torch.no_grad():
        truth = torch.log_softmax(module(photo)["logits"][0].double(), -1)
    assert reading.logprob.values[0, -1, 0, 0] == pytest.approx(float(truth[1]), abs=1e-5)


def test_inputs_of_unknown_names_need_an_example() -> None:
    with pytest.raises(ll.ModelError, match=r"photo.*example"):
        ll.wrap(NewClassifier())
