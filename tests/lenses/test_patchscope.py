"""Patchscopes against plain hooks, and the cases in which they are the logit lens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses.fitted import FittedLens
from tests import zoo
from tests.lenses.test_fitted import changed

TARGET = [7, 30, 8, 30, 9]


def plain(model: ll.Model, row: torch.Tensor, into: int, position: int, *, pre: bool = False) -> torch.Tensor:
    """The last block's output at a position of the target prompt, with a state replaced by a hook of our own."""
    blocks: list[Any] = [b.module for b in model.stack.blocks]
    seen: list[torch.Tensor] = []

    def put(module: Any, args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[0, position] = row
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def put_before(module: Any, args: Any, kwargs: Any) -> Any:
        value = args[0].clone()
        value[0, position] = row
        return (value, *args[1:]), kwargs

    hooks = [blocks[into].register_forward_pre_hook(put_before, with_kwargs=True)] if pre else []
    if not pre:
        hooks.append(blocks[into].register_forward_hook(put))
    hooks.append(blocks[-1].register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)))
    with torch.no_grad():
        model.module(torch.tensor([TARGET]))
    for hook in hooks:
        hook.remove()
    return seen[0][0, position]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mamba", "gpt_neox"])
@pytest.mark.parametrize(("layer", "position"), [(None, -1), (1, -1), (0, 2)])
def test_it_is_what_plain_hooks_give(name: str, layer: int | None, position: int) -> None:
    model = ll.wrap(zoo.build(name).double(), name=name)
    lens = ll.PatchscopeLens(model, TARGET, layer=layer, position=position, batch=2)
    rows = torch.randn(3, model.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for site in model.select_sites():
        found = lens.transport(rows, site)
        into = site.layer if layer is None else layer
        if into == model.n_layers - 1:
            assert torch.equal(found, rows)
            continue
        for row, one in zip(rows, found, strict=True):
            truth = plain(model, row, into, position, pre=layer is None and site.kind == "resid_pre")
            torch.testing.assert_close(one, truth, atol=1e-10, rtol=1e-10)


def test_into_the_last_layer_it_is_the_logit_lens(llama: ll.Model) -> None:
    plain_reading = ll.read(llama, zoo.ids(5))
    found = ll.read(llama, zoo.ids(5), lens=ll.PatchscopeLens(llama, layer=-1))
    for key, values in plain_reading.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], values)
    assert found.provenance["lens"]["name"] == "patchscope"


def test_a_state_put_back_where_it_was_gives_what_the_model_gives(llama: ll.Model) -> None:
    """Source and target prompt the same: nothing is changed, so every layer says what the last one says."""
    ids = zoo.ids(6)
    reading = ll.read(llama, ids, positions=-1, lens=ll.PatchscopeLens(llama, ids))
    np.testing.assert_allclose(reading.arrays["kl"], 0.0, atol=1e-5)


def test_behind_a_fitted_lens(llama: ll.Model) -> None:
    first = changed(llama, "bias")
    assert isinstance(first, FittedLens)
    rows = torch.randn(2, llama.width)
    site = ll.Site(0, "resid_post")
    both = ll.PatchscopeLens(llama, TARGET, lens=first).transport(rows, site)
    alone = ll.PatchscopeLens(llama, TARGET).transport(first.transport(rows, site), site)
    torch.testing.assert_close(both, alone)


def test_nothing_is_left_on_the_model(llama: ll.Model) -> None:
    lens = ll.PatchscopeLens(llama, TARGET)
    site = ll.Site(0, "resid_post")
    with pytest.raises(InputError, match="the states have width 33; those of tiny-llama have 32"):
        lens.transport(torch.randn(2, llama.width + 1), site)
    block: Any = llama.stack.blocks[1].module

    def fails(*args: Any) -> None:
        raise RuntimeError("no")

    hook = block.register_forward_pre_hook(fails)
    with pytest.raises(InputError, match="RuntimeError: no"):
        lens.transport(torch.randn(2, llama.width), site)
    hook.remove()
    assert zoo.hooks(llama.module) == 0


def test_bad_requests(llama: ll.Model) -> None:
    for options, match in (
        ({"prompt": TARGET, "position": 9}, "position 9 is not in the target prompt, which has 5 tokens"),
        ({"prompt": TARGET, "layer": 5}, "layer 5 does not exist"),
        ({"prompt": TARGET, "batch": 0}, "batch is 0"),
    ):
        with pytest.raises(InputError, match=match):
            ll.PatchscopeLens(llama, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a patchscope needs that"):
        ll.PatchscopeLens(ll.wrap(zoo.build("t5")), TARGET)
    with pytest.raises(InputError, match=r"0\.mlp_out is no state of the residual stream"):
        ll.read(llama, zoo.ids(3), sites="mlp_out", lens=ll.PatchscopeLens(llama, TARGET))
    other = ll.wrap(zoo.build("llama"), name="another")
    with pytest.raises(InputError, match="this patchscope runs tiny-llama; make one for another"):
        ll.read(other, zoo.ids(3), lens=ll.PatchscopeLens(llama, TARGET))
