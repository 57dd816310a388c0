"""Faults that are planted in every task family, and that verification has to catch."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import logitlab as ll
from logitlab import zoo
from logitlab.models.stack import Found
from logitlab.models.tail import Tail
from logitlab.models.trace import Run

FAMILIES = [
    ("causal-lm", "llama"),
    ("masked-lm", "bert"),
    ("seq2seq-lm", "t5"),
    ("sequence-classification", "roberta"),
    ("token-classification", "distilbert"),
    ("image-classification", "vit"),
    ("image-classification", "swin"),
    ("image-classification", "resnet"),
    ("image-text-to-text", "llava"),
    ("speech-to-text", "whisper"),
    ("ctc", "wav2vec2"),
    ("audio-classification", "hubert"),
    ("object-detection", "detr"),
    ("object-detection", "rt_detr"),
    ("object-detection", "yolos"),
    ("zero-shot-image-classification", "clip"),
    ("zero-shot-image-classification", "siglip"),
]
every_family = pytest.mark.parametrize(("task", "kind"), FAMILIES)


@cache
def model_of(task: str, kind: str) -> Any:
    return zoo.build(task, kind)


@every_family
def test_the_family_verifies_without_a_fault(task: str, kind: str) -> None:
    record = ll.wrap(model_of(task, kind)).verification
    assert record.tail.holds
    assert record.max_abs_difference < 1e-5


@every_family
def test_a_second_norm(task: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tail._replay

    def twice(self: Tail, taps: Any, hidden: torch.Tensor, run: Any = None) -> Any:
        rows = hidden if run is None else self.stack.layout.rows(hidden)
        gain = torch.linspace(0.5, 1.5, rows.shape[1])  # as a trained norm's, other for every feature
        normed = torch.nn.functional.layer_norm(rows, rows.shape[1:]) * gain
        return original(self, taps, normed if run is None else self.stack.layout.state(normed, hidden.shape), run)

    monkeypatch.setattr(Tail, "_replay", twice)
    with pytest.raises(ll.VerificationError, match="does not give the model's own logits"):
        ll.wrap(model_of(task, kind))


@every_family
def test_a_dropped_scale(task: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tail.output

    def scaled(self: Tail, *args: Any) -> Any:
        output = original(self, *args)
        return dataclasses.replace(output, logits=output.logits * 0.9)

    monkeypatch.setattr(Tail, "output", scaled)
    with pytest.raises(ll.VerificationError, match="does not give the model's own logits"):
        ll.wrap(model_of(task, kind))


@every_family
def test_a_dropped_scale_of_rows(task: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong way of decoding single rows is not used, whatever it is."""
    sound = ll.wrap(model_of(task, kind))
    rows = torch.randn(3, sound.width, generator=torch.Generator().manual_seed(0))
    expected = sound.tail.logits(rows) if sound.tail.by is not None else None
    original = Tail._logits_chunk
    monkeypatch.setattr(Tail, "_logits_chunk", lambda self, hidden: original(self, hidden) * 0.9)
    model = ll.wrap(model_of(task, kind))
    assert model.tail.by != "tokens"
    assert model.tail.head is None
    if expected is not None and model.tail.by is not None:
        torch.testing.assert_close(model.tail.logits(rows), expected, atol=1e-5, rtol=1e-5)


@every_family
def test_the_state_of_another_layer(task: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one: what is taken for the last state is the one before."""
    original = Found.run

    def shifted(self: Found, stack: Any) -> Run:
        run = original(self, stack)
        return dataclasses.replace(run, blocks=(*run.blocks[1:], run.blocks[0]))

    stack = ll.wrap(model_of(task, kind)).stack
    if len(stack) == 1:
        pytest.skip("a stack of one block has no other layer")
    monkeypatch.setattr(Found, "run", shifted)
    with pytest.raises(ll.VerificationError, match="does not give the model's own logits"):
        ll.wrap(model_of(task, kind), stack=stack.name)


@every_family
def test_the_wrong_stack(task: str, kind: str) -> None:
    """Blocks that run in the same pass and lead nowhere are refused."""
    module = zoo.build(task, kind)
    decoy = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
    module.add_module("decoy", decoy)

    def run_it(owner: nn.Module, args: Any, output: Any) -> None:
        x = torch.ones(1, 7, 8)
        for block in decoy:
            x = block(x)

    module.register_forward_hook(run_it)
    with pytest.raises(ll.VerificationError, match="does not depend on the last state of decoy"):
        ll.wrap(module, stack="decoy")
    assert ll.wrap(module).stack.name != "decoy"
