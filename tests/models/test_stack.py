from __future__ import annotations

import pytest

import logitlab as ll
from tests import zoo

PATHS = {
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "opt": ["model.decoder.layers"],
    "mamba": ["backbone.layers"],
    "bert": ["bert.encoder.layer"],
    "t5": ["decoder.block", "encoder.block"],
    "bart": ["model.decoder.layers", "model.encoder.layers"],
    "mixtral": ["model.layers"],
}


@pytest.mark.parametrize("name", PATHS)
def test_stacks_are_found_by_watching(name: str) -> None:
    model = ll.wrap(zoo.shared(name))
    assert sorted(s.name for s in model.stacks) == sorted(PATHS[name])
    assert model.stack.name == PATHS[name][0]
    assert model.stack.continuous
    assert model.width == 32


def test_a_shared_block_counts_once_a_call() -> None:
    model = ll.wrap(zoo.shared("albert"))
    assert model.n_layers == 3
    assert len({id(b.module) for b in model.stack.blocks}) == 1
    assert [b.call for b in model.stack.blocks] == [0, 1, 2]


def test_experts_are_not_a_stack() -> None:
    assert len(ll.wrap(zoo.shared("mixtral")).stacks) == 1
