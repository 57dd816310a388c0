"""Fitting: the loss falls, a fit that was broken off ends with the same bits, bad input is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses.fit import fit
from logitlab.lenses.fitted import FittedLens
from logitlab.lenses.maps import FAMILIES
from logitlab.lenses.material import Windowed, material
from logitlab.lenses.recipe import Progress, Recipe
from logitlab.sweeps import sweep
from tests import zoo
from tests.words import texts

SMALL = Recipe(
    steps=12, windows_per_step=2, length=16, share=0.5, validate_every=4, validation_windows=3, patience=9, rate=3e-3
)


def windowed(model: ll.Model, texts: list[str], recipe: Recipe) -> Windowed:
    needed = recipe.validation_windows + recipe.steps * recipe.windows_per_step
    found = material(model, texts, wanted=needed, least=1, length=recipe.length, column="text", decoder_column=None)
    assert isinstance(found, Windowed)
    return found


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k != "jacobian"])
def test_the_divergence_falls(model: ll.Model, kind: str) -> None:
    rank = 4 if kind == "low-rank" else None
    lens = fit(model, texts(), recipe=SMALL, kind=kind, rank=rank, steps=40)
    table = lens.metrics["validation KL, nats"]
    assert list(table) == ["0.resid_pre", "0.resid_post", "1.resid_post"]
    for row in table.values():
        assert row["fitted"] < row["logit lens"]
    held_out = sweep(model, texts(160)[60:], lens={"plain": ll.LogitLens(), "fitted": lens}, length=16)
    for site in held_out.sites[:-1]:
        assert held_out.measure("kl", "fitted", site).mean < held_out.measure("kl", "plain", site).mean
    assert held_out.measure("kl", "fitted").mean == held_out.measure("kl", "plain").mean


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_the_gradient_is_that_of_plain_code(model: ll.Model, optimiser: str) -> None:
    """Three steps of a plain loop over all logits, in float64 where it can be, give the same maps."""
    recipe = Recipe(
        steps=3, windows_per_step=2, length=16, share=1.0, validation_windows=1, optimiser=optimiser, clip=None,
        rate=1e-2, validate_every=1, patience=9, products="float32",
    )  # fmt: skip
    seen: list[Any] = []
    lens = fit(model, texts(), recipe=recipe, kind="diagonal", progress=seen.append)
    from logitlab.lenses import fit as module

    data = windowed(model, texts(), recipe)
    run = module._Fit(model, module.identity(model, "diagonal"), recipe, data)
    delta = torch.zeros(3, model.width, requires_grad=True)
    bias = torch.zeros(3, model.width, requires_grad=True)
    options = {"lr": 1e-2, "weight_decay": recipe.decay}
    make: Any = torch.optim.AdamW if optimiser == "adam" else torch.optim.SGD
    more = {} if optimiser == "adam" else {"momentum": 0.9, "nesterov": True}
    descent = make([delta, bias], **options, **more)
    losses: list[float] = []
    for step in range(3):
        descent.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        ids = torch.tensor(data.ids[run._chosen(step)].astype(np.int64))
        with torch.no_grad():
            out = model.module(ids, output_hidden_states=True)
        hidden = torch.stack(out.hidden_states[:-1])
        moved = hidden * (1 + delta[:, None, None]) + bias[:, None, None]
        log_p = model.module.lm_head(model.module.model.norm(moved))[:, :, data.used].log_softmax(-1)
        log_r = out.logits[:, data.used].log_softmax(-1)
        kl = (log_r.exp() * (log_r - log_p)).sum(-1).mean((1, 2))
        descent.zero_grad()
        kl.sum().backward()
        descent.step()
        losses.append(float(kl.detach().mean()))
    np.testing.assert_allclose([p.loss for p in seen], losses, rtol=1e-4)
    if lens.metrics["steps"] == 3:
        for i in range(3):
            table = list(lens.metrics["validation KL, nats"].values())[i]
            assert table["fitted"] <= table["logit lens"]


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_fit_that_was_broken_off_ends_with_the_same_bits(
    model: ll.Model, tmp_path: Path, stop: int, optimiser: str
) -> None:
    whole = fit(model, texts(), recipe=SMALL, optimiser=optimiser)

    def breaks(p: Progress) -> None:
        if p.step == stop:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"recipe": SMALL, "optimiser": optimiser, "folder": tmp_path / "x", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(model, texts(), progress=breaks, **options)
    steps: list[int] = []
    found = fit(model, texts(), progress=lambda p: steps.append(p.step), **options)
    assert steps[0] == 2 * ((stop - 1) // 2) + 1
    assert found.digest == whole.digest
    assert found.metrics == whole.metrics
    assert FittedLens.load(tmp_path / "x").digest == whole.digest
    assert len(list((tmp_path / "x").iterdir())) == 2


def test_products_in_bfloat16_come_to_the_same(model: ll.Model) -> None:
    """They are only used for the gradient: what was validated is exact, and ends within noise of float32's."""
    recipe = replace(SMALL, steps=40, kind="affine")
    found = {products: fit(model, texts(), recipe=recipe, products=products) for products in ("bfloat16", "float32")}
    for site, row in found["bfloat16"].metrics["validation KL, nats"].items():
        other = found["float32"].metrics["validation KL, nats"][site]
        assert row["logit lens"] == other["logit lens"]
        assert row["fitted"] == pytest.approx(other["fitted"], rel=2e-3)


def test_there_are_no_other_products(model: ll.Model) -> None:
    with pytest.raises(InputError, match="products is 'int8'; it is bfloat16 or float32"):
        fit(model, texts(), recipe=SMALL, products="int8")


def test_windows_that_are_equal_count_each(model: ll.Model) -> None:
    """A window that is drawn twice in a step is run once and counts twice."""
    from logitlab.lenses import fit as module

    recipe = Recipe(
        steps=1, windows_per_step=3, length=16, share=1.0, validation_windows=1, clip=None, products="float32"
    )
    data = windowed(model, texts(), recipe)
    run = module._Fit(model, module.identity(model, "diagonal"), recipe, data)
    run.lens.maps.requires_grad_(True)

    def gradient(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        run._chosen = lambda step: chosen  # type: ignore[method-assign]
        kl = run._backward(0)
        return kl, next(iter(run.lens.maps.parameters())).grad.clone()  # type: ignore[union-attr]

    (kl_2, g_2), (kl_3, g_3), (kl, g) = gradient([2]), gradient([3]), gradient([2, 2, 3])
    torch.testing.assert_close(kl, (2 * kl_2 + kl_3) / 3)
    torch.testing.assert_close(g, (2 * g_2 + g_3) / 3, atol=1e-6, rtol=1e-4)


def test_half_precision_keeps_small_gradients() -> None:
    half = ll.wrap(zoo.build("llama").half(), zoo.tokenizer(), name="half")
    full = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="full")
    from logitlab.lenses import fit as module

    recipe = Recipe(steps=1, windows_per_step=40, length=16, share=1.0, validation_windows=1, clip=None)
    found = []
    for model in (full, half):
        data = windowed(model, texts(100), recipe)
        run = module._Fit(model, module.identity(model, "bias"), recipe, data)
        run.lens.maps.requires_grad_(True)
        run._backward(0)
        found.append(next(iter(run.lens.maps.parameters())).grad)
    gap = (found[0] - found[1]).norm() / found[0].norm()  # type: ignore[operator, union-attr]
    assert float(gap) < 0.05


def test_nothing_is_kept_but_the_lens(model: ll.Model) -> None:
    lens = fit(model, texts(), recipe=SMALL, steps=2)
    assert all(p.grad is None and not p.requires_grad for p in lens.maps.parameters())


def test_a_kill_during_the_first_checkpoint_does_no_harm(model: ll.Model, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "fit-2.safetensors").write_bytes(b"half")
    assert fit(model, texts(), recipe=SMALL, folder=tmp_path / "x").digest == fit(model, texts(), recipe=SMALL).digest
    with pytest.raises(InputError, match="holds no fit that could go on"):
        fit(model, texts(), recipe=SMALL, folder=tmp_path / "x")


def test_what_becomes_of_a_site_does_not_depend_on_the_others(model: ll.Model) -> None:
    every = fit(model, texts(), recipe=SMALL)
    one = fit(model, texts(), recipe=SMALL, sites="1.resid_post")
    site = ll.Site(1, "resid_post")
    h = torch.randn(5, model.width)
    torch.testing.assert_close(one.transport(h, site), every.transport(h, site), atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    before = model.fingerprint
    fit(model, texts(), recipe=SMALL, steps=2)
    assert model.fingerprint == before
    assert all(p.grad is None for p in model.module.parameters())
    assert zoo.hooks(model.module) == 0


def test_a_cap_a_norm_and_a_masked_model() -> None:
    for name in ("gemma2", "cohere", "bert", "mamba", "opt"):
        other = ll.wrap(zoo.build(name), zoo.tokenizer(), name=name)
        lens = fit(other, texts(), recipe=SMALL, kind="diagonal")
        for row in lens.metrics["validation KL, nats"].values():
            assert row["fitted"] <= row["logit lens"]


def test_bad_input(model: ll.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gives 0 windows|is empty"):
        fit(model, [], recipe=SMALL)
    with pytest.raises(InputError, match=r"gives \d+ windows of 16 tokens; at least 5 are needed"):
        fit(model, ["a b c"], recipe=SMALL)
    with pytest.raises(InputError, match="rate is 0"):
        fit(model, texts(), rate=0)
    with pytest.raises(InputError, match="no optimiser 'lion'"):
        fit(model, texts(), optimiser="lion")
    with pytest.raises(InputError, match="share is 2"):
        fit(model, texts(), share=2)
    with pytest.raises(InputError, match="has no column 'body'; its columns are text"):
        fit(model, [{"text": "x"}], column="body", recipe=SMALL)
    for options, match in (
        ({"seed": -1}, "seed is -1"),
        ({"steps": 2.5}, r"steps 2\.5 is not a whole number"),
        ({"decay": float("nan")}, "decay is nan"),
        ({"prompts": 3}, "prompts is about a Jacobian lens"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"kind": "jacobian", "rank": 0}, "rank means nothing to it"),
        ({"kind": "jacobian", "share": 0.5}, "share means nothing to it"),
        ({"loss": 1}, "takes no 'loss'"),
        ({"rate": "1e-3"}, "rate is '1e-3'; it must be a number"),
        ({"share": None}, "share is None; it must be a number"),
    ):
        with pytest.raises(InputError, match=match):
            fit(model, texts(), **options)  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(InputError, match="needs gradients"):
        fit(model, texts(), recipe=SMALL)
    with pytest.raises(ll.ModelError, match="not finite at"):
        fit(model, texts(), recipe=SMALL, rate=1e30, optimiser="sgd", clip=None)
    fit_options: dict[str, Any] = {"recipe": SMALL, "folder": tmp_path / "x", "checkpoint_every": 1}

    def breaks(p: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, texts(), progress=lambda p: breaks(p) if p.step == 3 else None, **fit_options)
    with pytest.raises(InputError, match=r"differs in its recipe \(rate: 0\.003 there, 0\.1 here"):
        fit(model, texts(), rate=0.1, **fit_options)
    with pytest.raises(InputError, match="differs in its corpus"):
        fit(model, [*texts()[1:], "more"], **fit_options)
