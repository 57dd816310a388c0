"""The Jacobian lens against finite differences, closed forms, and plain backward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses.jacobian import Jacobians, fit_jacobian, jacobians
from logitlab.models.inputs import Encoded
from tests import zoo


def plain(model: ll.Model, ids: list[int], layer: int, skip: int, **inputs: Any) -> torch.Tensor:
    """One backward pass for each coordinate of the last state at each valid position."""
    seen: dict[str, torch.Tensor] = {}
    blocks = [b.module for b in model.stack.blocks]

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[name] = value

        return hook

    hooks = [blocks[layer].register_forward_hook(note("site")), blocks[-1].register_forward_hook(note("final"))]
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    model.module(**{name: torch.tensor([ids])}, **inputs)
    for h in hooks:
        h.remove()
    valid = list(range(skip, len(ids) - 1))
    total = torch.zeros(model.width, model.width, dtype=torch.float64)
    for i in range(model.width):
        for t in valid:
            (g,) = torch.autograd.grad(seen["final"][0, t, i], seen["site"], retain_graph=True)
            total[i] += g[0, valid].double().sum(0) / len(valid)
    return total


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert", "mamba"])
def test_it_is_what_single_backward_passes_give(name: str) -> None:
    model = ll.wrap(zoo.build(name), name=name)
    prompts = [zoo.ids(9), zoo.ids(7, seed=2)]
    lens = fit_jacobian(model, prompts, skip_first=2, coordinates=5)
    for i, site in enumerate(lens.sites):
        if site.kind != "resid_post":
            continue
        truth = sum(plain(model, p, site.layer, 2) for p in prompts) / 2
        torch.testing.assert_close(lens.maps.state_dict()["weight"][i].double(), truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["xlnet", "gemma3n_text"])
def test_states_of_other_layouts(name: str) -> None:
    """[tokens, batch, width], and several residual streams: a whole row of states is differentiated."""
    from logitlab import zoo as tiny

    model = ll.wrap(tiny.build("causal-lm", name), name=name)
    ids, site, skip = zoo.ids(7), ll.Site(0, "resid_post"), 1
    sums = jacobians(model, [Encoded(None, tuple(ids))], [site], skip_first=skip, coordinates=4)
    valid = list(range(skip, len(ids) - 1))
    layout = model.stack.layout
    seen: list[torch.Tensor] = []
    blocks: list[Any] = [b.module for b in model.stack.blocks]

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_hook(note), blocks[-1].register_forward_hook(note)]
    model.module(torch.tensor([ids]))
    for h in hooks:
        h.remove()
    final = layout.rows(seen[-1])
    truth = torch.zeros(model.width, model.width, dtype=torch.float64)
    for i in range(model.width):
        (g,) = torch.autograd.grad(final[valid, i].sum(), seen[0], retain_graph=True)
        truth[i] = layout.rows(g)[valid].double().mean(0)
    assert float((sums.total[0] - truth).norm() / truth.norm()) < 1e-4


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder(name: str) -> None:
    model = ll.wrap(zoo.build(name).double(), name=name)
    lens = fit_jacobian(model, [zoo.ids(6)], decoder=zoo.ids(7, seed=3), skip_first=1)
    (prompt,) = model.encode([zoo.ids(6)], decoder=zoo.ids(7, seed=3))
    where = next(i for i, s in enumerate(lens.sites) if str(s) == "0.resid_post")
    truth = plain(model, list(prompt.ids), 0, 1, input_ids=torch.tensor([prompt.encoder_ids]))
    found = lens.maps.state_dict()["weight"][where].double()
    assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())


def test_finite_differences() -> None:
    module = zoo.build("gpt2").double()  # its norms compute in float64 then, as Llama's do not
    model = ll.wrap(module, name="gpt2")
    ids, skip, layer, size = zoo.ids(8), 2, 1, 1e-5
    sums = jacobians(model, [Encoded(None, tuple(ids))], [ll.Site(layer, "resid_post")], skip_first=skip, coordinates=8)
    valid = range(skip, len(ids) - 1)
    block, last = module.transformer.h[layer], module.transformer.h[-1]
    direction = torch.randn(model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def final(t: int, step: float) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def push(m: Any, args: Any, output: Any) -> Any:
            value = (output[0] if isinstance(output, tuple) else output).clone()
            value[0, t] += step * direction
            return (value, *output[1:]) if isinstance(output, tuple) else value

        hooks = [
            block.register_forward_hook(push),
            last.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)),
        ]
        with torch.no_grad():
            module(torch.tensor([ids]))
        for h in hooks:
            h.remove()
        return seen[0][0]

    moved = torch.zeros(model.width, dtype=torch.float64)
    for t in valid:
        moved += ((final(t, size) - final(t, -size)) / (2 * size))[list(valid)].sum(0) / len(valid)
    torch.testing.assert_close(sums.total[0] @ direction, moved, atol=1e-7, rtol=1e-6)


class Linear(torch.nn.Module):
    """A stack whose blocks are linear, token by token: the Jacobian is the product of what they add."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Embedding(300, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.head = torch.nn.Linear(8, 300, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.5

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return {"logits": self.head(h)}


def test_a_linear_stack_in_closed_form() -> None:
    module = Linear()
    model = ll.wrap(module, name="linear")
    lens = fit_jacobian(model, [list(range(6)), [4, 3, 2, 1]], skip_first=1)
    for i, site in enumerate(lens.sites):
        product = torch.eye(8, dtype=torch.float64)
        first = site.layer if site.kind == "resid_pre" else site.layer + 1
        for layer in list(module.layers)[first:]:
            product = layer.weight.double() @ product  # type: ignore[operator]
        torch.testing.assert_close(lens.maps.state_dict()["weight"][i].double(), product, atol=1e-6, rtol=1e-6)


def test_prompts_weigh_the_same_and_sums_merge() -> None:
    model = ll.wrap(zoo.build("gpt2"))
    a, b = zoo.ids(12), zoo.ids(5, seed=2)
    both = fit_jacobian(model, [a, b], skip_first=1)
    sites = list(both.sites)
    one, two = (jacobians(model, [Encoded(None, tuple(p))], sites, skip_first=1, coordinates=7) for p in (a, b))
    merged = one.merge(two).lens(model)
    torch.testing.assert_close(
        merged.maps.state_dict()["weight"], both.maps.state_dict()["weight"], atol=1e-6, rtol=1e-5
    )
    with pytest.raises(InputError, match="other sites"):
        one.merge(Jacobians((sites[0],), torch.zeros(1, model.width, model.width)))


def test_a_fit_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    model = ll.wrap(zoo.build("llama"))
    prompts = [zoo.ids(7, seed=n) for n in range(5)]
    whole = fit_jacobian(model, prompts, skip_first=1)

    def breaks(done: int, total: int, left: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_jacobian(model, prompts, skip_first=1, folder=tmp_path / "x", progress=breaks)
    with pytest.raises(InputError, match="other prompts"):
        fit_jacobian(model, prompts[1:], skip_first=1, folder=tmp_path / "x")
    seen: list[int] = []
    found = fit_jacobian(
        model, prompts, skip_first=1, folder=tmp_path / "x", progress=lambda done, total, left: seen.append(done)
    )
    assert seen == [4, 5]
    assert found.digest == whole.digest


def test_a_folder_is_looked_at_before_the_work(tmp_path: Path) -> None:
    model = ll.wrap(zoo.build("llama"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name, match in (("file", "is a file"), ("full", "is not empty")):
        with pytest.raises(InputError, match=match):
            fit_jacobian(
                model, [zoo.ids(9)], skip_first=1, folder=tmp_path / name, progress=lambda *a: pytest.fail("ran")
            )


def test_short_prompts_are_counted_and_bad_requests_refused() -> None:
    model = ll.wrap(zoo.build("llama"))
    lens = fit_jacobian(model, [zoo.ids(3), zoo.ids(9)], skip_first=4)
    assert lens.recipe["skipped"] == 1
    assert lens.recipe["prompts"] == 1
    assert all(p.requires_grad for p in model.module.parameters())
    with pytest.raises(InputError, match="no prompt had a valid position"):
        fit_jacobian(model, [zoo.ids(5)])
    with pytest.raises(InputError, match="has no Jacobian lens"):
        fit_jacobian(model, [zoo.ids(9)], sites="head_out", skip_first=1)
    with pytest.raises(InputError, match="coordinates at least 1"):
        fit_jacobian(model, [zoo.ids(9)], coordinates=0)
