"""What verification on load costs, counted in calls of the model's own layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import logitlab as ll
from logitlab import zoo


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("causal-lm", "llama"),
        ("masked-lm", "bert"),
        ("seq2seq-lm", "t5"),
        ("image-classification", "vit"),
        ("object-detection", "detr"),
        ("speech-to-text", "whisper"),
        ("zero-shot-image-classification", "clip"),
    ],
)
def test_loading_runs_each_block_once(task: str, kind: str) -> None:
    """One forward pass on a few tokens; all others are short-circuited, so no block computes again."""
    module: Any = zoo.build(task, kind)
    stack = ll.wrap(module).stack
    calls: Counter[str] = Counter()
    hooks: list[Any] = []
    for block in stack.blocks:
        leaf = next(m for m in block.module.modules() if isinstance(m, nn.Linear))

        def count(owner: nn.Module, args: Any, output: torch.Tensor, path: str = block.path) -> None:
            calls[path] += 1

        hooks.append(leaf.register_forward_hook(count))
    model = ll.wrap(module)
    assert set(calls.values()) == {1}
    assert len(calls) == len(stack)
    assert model.verification.offered  # taking the blocks apart is a second pass, on request
    assert min(calls.values()) > 1
    for hook in hooks:
        hook.remove()


def test_a_tower_beside_the_one_that_is_read_runs_twice_at_most() -> None:
    """Once in the pass, and once to see that it does not depend on the other."""
    module: Any = zoo.build("zero-shot-image-classification", "clip")
    calls: list[int] = []
    leaf = next(m for m in module.text_model.modules() if isinstance(m, nn.Linear))
    leaf.register_forward_hook(lambda *_: calls.append(1))
    ll.wrap(module)
    assert len(calls) == 2
