from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from logitlab.models.hooks import StopForward, Taps, first_tensor, hidden_input, with_hidden


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_nothing_is_left_after_an_exception() -> None:
    module = layer()
    before = dict(module.__dict__)

    def body() -> None:
        with Taps() as taps:
            taps.before(module, lambda m, a, k: None)
            taps.after(module, lambda m, a, k, o: None)
            taps.replace(module, lambda x: x)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        body()
    assert module.__dict__.keys() == before.keys()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert not torch.equal(module(torch.ones(1, 3)), torch.ones(1, 3))


def test_replace_nests_and_unwinds() -> None:
    module, x = layer(), torch.ones(1, 3)
    plain = module(x)
    with Taps() as outer:
        outer.replace(module, lambda x: x * 2)
        with Taps() as inner:
            inner.replace(module, lambda x: x * 3)
            assert torch.equal(module(x), x * 3)
        assert torch.equal(module(x), x * 2)
    assert torch.equal(module(x), plain)


def test_replace_skips_other_peoples_hooks() -> None:
    module, x = layer(), torch.ones(1, 3)
    module.register_forward_hook(lambda m, a, o: o + 100)
    with Taps() as taps:
        taps.replace(module, lambda x: x)
        assert torch.equal(module(x), x)


def test_watching_sees_what_other_hooks_have_edited() -> None:
    module, x = layer(), torch.ones(1, 3)
    module.register_forward_hook(lambda m, a, o: o * 0 + 7)
    module.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    seen: list[torch.Tensor] = []
    with Taps() as taps:
        taps.before(module, lambda m, a, k: seen.append(a[0]))
        taps.after(module, lambda m, a, k, o: seen.append(o))
        module(x)
    assert torch.equal(seen[0], x + 1)
    assert torch.equal(seen[1], x * 0 + 7)


def test_compiled_modules_are_replaced_too() -> None:
    module, x = layer(), torch.ones(1, 3)
    module._compiled_call_impl = lambda *a, **k: torch.zeros(1)
    with Taps() as taps:
        taps.replace(module, lambda x: x)
        assert torch.equal(module(x), x)
    assert torch.equal(module(x), torch.zeros(1))


def test_stop_is_not_caught_by_except_exception() -> None:
    assert not issubclass(StopForward, Exception)


def test_first_tensor_and_with_hidden() -> None:
    mask, hidden, new = torch.tensor([1, 0]), torch.rand(2), torch.rand(2)
    named = collections.namedtuple("Named", "state cache")
    outputs: list[Any] = [
        hidden,
        (mask, hidden, None),
        [hidden, "x"],
        {"m": mask, "h": hidden},
        named(hidden, None),
        BaseModelOutput(last_hidden_state=hidden),
    ]
    for output in outputs:
        assert first_tensor(output) is hidden
        changed = with_hidden(output, new)
        assert first_tensor(changed) is new
        assert type(changed) is type(output)
        assert first_tensor(output) is hidden
    assert first_tensor((mask, None)) is None
    assert first_tensor(None) is None


def test_hidden_input_prefers_its_name() -> None:
    a, b = torch.rand(1), torch.rand(1)
    assert hidden_input((), {"other": b, "hidden_states": a}) is a
    assert hidden_input((torch.tensor([1]), a), {}) is a
    assert hidden_input((), {"x": b}) is b
