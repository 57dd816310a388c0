"""A recorded pass played again is the same pass, and nothing of it stays on the model."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from logitlab.models.hooks import Taps
from logitlab.models.trace import Call, Trace, answer_from, copied, play, rebuilt
from tests import zoo

Pair = namedtuple("Pair", ["state", "weights"])


def record(module: nn.Module, *args: Any, within: str | None = None, **kwargs: Any) -> tuple[Trace, Any]:
    trace = Trace(module, within)
    with Taps() as taps, torch.no_grad():
        trace.attach(taps)
        output = module(*args, **kwargs)
    return trace, output


def untouched(module: nn.Module) -> bool:
    """Whether no hook and no answer is left on any part."""
    return all(
        # transformers leaves hooks of its own on a model whose hidden states were once asked for
        all(getattr(h, "__module__", "") == "transformers.utils.output_capturing" for h in m._forward_hooks.values())
        and not m._forward_pre_hooks
        and "_call_impl" not in vars(m)
        and not m._forward_hooks_with_kwargs
        and not m._forward_pre_hooks_with_kwargs
        for m in module.modules()
    )


class Block(nn.Module):
    """x + tanh(Wx), in place if asked."""

    def __init__(self, width: int, *, in_place: bool = False) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = torch.tanh(self.mix(x))
        return x.add_(step) if self.in_place else x + step


class Tied(nn.Module):
    """The embedding is called as a module at the front, and its norm is called again at the end."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.layers = nn.ModuleList([Block(6, in_place=in_place) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.calls = 0
        self.norm.register_forward_pre_hook(self.count)
        with torch.no_grad():
            self.norm.weight.add_(torch.randn(6))

    def count(self, *args: Any) -> None:
        self.calls += 1

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.tensor([[1, 4, 9, 2]])


def replay(module: nn.Module, trace: Trace, blocks: list[Call], ids: torch.Tensor = IDS) -> torch.Tensor:
    """The pass again with everything before the blocks, and the blocks, answered from the record."""
    with Taps() as taps, torch.no_grad():
        play(taps, trace.upstream(blocks[0].start))
        for block in blocks:
            taps.replace(block.module, answer_from([block.output], block.module))
        return module(ids)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_replay_is_the_same_bit_by_bit(in_place: bool) -> None:
    model = Tied(in_place=in_place)
    trace, output = record(model, IDS)
    blocks = [c for c in trace.calls if c.container == "layers"]
    assert [c.path for c in blocks] == ["layers.0", "layers.1", "layers.2"]
    other = torch.tensor([[3, 3, 3, 3]])  # not looked at: the embedding answers from the record
    for ids in (IDS, other, IDS):
        assert torch.equal(replay(model, trace, blocks, ids), output)
    assert not torch.equal(model(other), output)


def test_the_record_is_not_changed_by_what_comes_later() -> None:
    """Blocks that write into their input, twice played; each state is the one of its own layer."""
    model = Tied(in_place=True)
    trace, _ = record(model, IDS)
    states = [c.output.clone() for c in trace.calls if c.container == "layers"]
    x = model.norm(model.embed(IDS)).detach()
    entering = [c.entering for c in trace.calls if c.container == "layers"]
    for layer, state, given in zip(model.layers, states, entering, strict=True):
        assert torch.equal(given, x)
        x = (x + torch.tanh(layer.mix(x))).detach()
        assert torch.equal(state, x)
    blocks = [c for c in trace.calls if c.container == "layers"]
    with Taps() as taps, torch.no_grad():
        taps.replace(model.layers[0], answer_from([blocks[0].output], model.layers[0]))
        model(IDS)  # the second block adds to what the first one is said to have returned
    assert torch.equal(blocks[0].output, states[0])


def test_a_module_used_before_and_after_is_answered_once_and_then_computed() -> None:
    model = Tied()
    trace, output = record(model, IDS)
    blocks = [c for c in trace.calls if c.container == "layers"]
    upstream = trace.upstream(blocks[0].start)
    assert [path for path, _, _ in upstream] == ["embed", "norm"]
    model.calls = 0
    changed = blocks[-1].output + torch.linspace(-1, 1, 6)
    with Taps() as taps, torch.no_grad():
        play(taps, upstream)
        for block in blocks[:-1]:
            taps.replace(block.module, answer_from([block.output], block.module))
        taps.replace(blocks[-1].module, answer_from([changed], blocks[-1].module))
        found = model(IDS)
    assert model.calls == 1  # the second time it ran, with its own hooks
    with torch.no_grad():
        assert torch.equal(found, model.head(model.norm(changed)))
    assert not torch.allclose(found, output)


def test_answers_come_in_the_order_of_the_calls() -> None:
    layer = nn.Linear(2, 2)
    with Taps() as taps, torch.no_grad():
        taps.replace(layer, answer_from([torch.zeros(1), torch.ones(1)], layer))
        x = torch.ones(1, 2)
        assert [float(layer(x)), float(layer(x))] == [0.0, 1.0]
        computed = layer(x)
    assert torch.equal(computed, layer(x))


def test_an_answer_is_a_copy() -> None:
    layer, kept = nn.Linear(2, 2), torch.zeros(2)
    with Taps() as taps:
        taps.replace(layer, answer_from([kept], layer))
        layer(torch.ones(2)).add_(5)
    assert torch.equal(kept, torch.zeros(2))


class Broken(Tied):
    """Fails in the middle of its layers."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](self.norm(self.embed(input_ids)))
        raise RuntimeError(f"broken on purpose at {tuple(x.shape)}")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    model = Broken()
    model.norm._forward_pre_hooks.clear()
    assert untouched(model)
    before = [dict(vars(m)) for m in model.modules()]

    def run() -> None:
        with Taps() as taps:
            Trace(model).attach(taps)
            play(taps, [("embed", model.embed, torch.zeros(1, 4, 6))])
            assert not untouched(model)
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            model(IDS)

    with pytest.raises(error):
        run()
    assert untouched(model)
    assert [vars(m).keys() for m in model.modules()] == [b.keys() for b in before]


class Stages(nn.Module):
    """Lists inside lists, as in pictures' backbones, beside a part with a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.front = nn.Sequential(nn.Linear(4, 6), nn.GELU())
        self.stages = nn.ModuleList([nn.ModuleList([Block(6), Block(6)]), nn.ModuleList([Block(6)])])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x)


def test_nested_containers() -> None:
    model, x = Stages(), torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    trace, output = record(model, x)
    inside = [(c.path, c.container) for c in trace.calls if c.container is not None]
    assert inside == [
        ("front.0", "front"),
        ("front.1", "front"),
        ("stages.0.0", "stages.0"),
        ("stages.0.1", "stages.0"),
        ("stages.1.0", "stages.1"),
    ]
    last = next(c for c in trace.calls if c.path == "stages.1.0")
    assert [path for path, _, _ in trace.upstream(last.start)] == ["front", "stages.0.0", "stages.0.1"]
    assert torch.equal(replay(model, trace, [last], x), output)
    # with one stack in view, what does not hold it is one call
    narrow, again = record(model, x, within="stages.1")
    assert torch.equal(again, output)
    assert [c.path for c in narrow.calls if c.path.startswith("front")] == ["front"]
    last = next(c for c in narrow.calls if c.path == "stages.1.0")
    assert [path for path, _, _ in narrow.upstream(last.start)] == ["front", "stages.0.0", "stages.0.1"]
    assert torch.equal(replay(model, narrow, [last], x), output)


def test_calls_say_when_they_began_and_ended() -> None:
    trace, _ = record(Stages(), torch.randn(1, 5, 4))
    times = [t for c in trace.calls for t in (c.start, c.end)]
    assert len(set(times)) == len(times)
    assert all(c.start < c.end for c in trace.calls)
    front, part = (next(c for c in trace.calls if c.path == p) for p in ("front", "front.0"))
    assert front.start < part.start < part.end < front.end


@pytest.mark.parametrize("name", ["gpt2", "t5", "albert", "bart"])
def test_real_models(name: str) -> None:
    """A shared block, an encoder, tied embeddings: the whole record played again, with other tokens put in."""
    model = zoo.shared(name)
    ids = torch.tensor([zoo.ids()])
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if zoo.encoder_decoder(name) else {"input_ids": ids}
    trace, output = record(model, **inputs)
    calls = [c for c in trace.calls if c.container is not None]
    calls = [c for c in calls if not any(o.start < c.start and c.end < o.end for o in calls)]
    last = max(calls, key=lambda c: c.start)
    same = [c for c in calls if c.module is last.module]
    again = {key: value.flip(1) for key, value in inputs.items()}
    with Taps() as taps, torch.no_grad():
        play(taps, [item for item in trace.upstream(last.start) if item[1] is not last.module])
        taps.replace(last.module, answer_from([c.output for c in same], last.module))
        found = model(**again)
    assert torch.equal(found.logits, output.logits)
    with torch.no_grad():
        assert not torch.equal(model(**again).logits, output.logits)
    assert untouched(model)


def test_copies_share_nothing_and_keep_their_types() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    value = {
        "tuple": (a, None, 3),
        "list": [a, [b]],
        "named": Pair(a, b),
        "output": BaseModelOutput(last_hidden_state=a, hidden_states=(a, b)),
    }
    made = copied(value)
    assert isinstance(made["named"], Pair)
    assert isinstance(made["output"], BaseModelOutput)
    assert made["tuple"][1:] == (None, 3)
    a.fill_(9)
    b.fill_(9)
    for tensor in (made["tuple"][0], made["list"][0], made["named"].state, made["output"].last_hidden_state):
        assert torch.equal(tensor, torch.ones(2))
    for tensor in (made["list"][1][0], made["named"].weights, made["output"].hidden_states[1]):
        assert torch.equal(tensor, torch.zeros(3))


def test_rebuilt_leaves_what_it_does_not_know() -> None:
    odd = OrderedDict(a=1)
    assert rebuilt(odd, lambda _: 0) is odd
    assert rebuilt("text", lambda _: 0) == "text"
    assert rebuilt((1, 2), lambda x: x + 1) == (2, 3)
    assert rebuilt({"a": 1}, lambda x: x + 1) == {"a": 2}
    assert rebuilt(Pair(1, 2), lambda x: x + 1) == Pair(2, 3)
    assert copied(torch.ones(2, requires_grad=True)).requires_grad is False
