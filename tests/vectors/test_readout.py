"""Directions from lenses against finite differences, and from probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses import LogitLens
from logitlab.lenses.fitted import FittedLens, identity
from logitlab.lenses.jacobian import fit_jacobian
from logitlab.vectors import from_probe, lens_directions, readout
from tests import zoo

PROMPTS = [zoo.ids(5, seed=1), zoo.ids(7, seed=2), zoo.ids(3, seed=3)]
TOKEN = 41


def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.build(name).double(), zoo.tokenizer(), name=name)


def lens_of(model: ll.Model, kind: str) -> Any:
    if kind == "logit":
        return None
    if kind == "jacobian":
        lens = fit_jacobian(model, [zoo.ids(9), zoo.ids(7, seed=2)], skip_first=1)
    else:
        lens = identity(model, kind)
        with torch.no_grad():
            for p in lens.maps.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    lens.maps.double()
    return lens


@pytest.mark.parametrize("kind", ["logit", "affine", "jacobian"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_it_is_a_finite_difference(name: str, kind: str) -> None:
    """Of the log-probability that the lens reads, averaged over prompts; gemma2 caps its logits."""
    model = wrapped(name)
    lens = lens_of(model, kind)
    site = ll.Site(1, "resid_post")
    found = lens_directions(model, TOKEN, PROMPTS, ["1.resid_post"], lens=lens)[site]
    states = ll.capture(model, PROMPTS, site, positions=-1)[site].double()

    def said(h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            moved = h if lens is None else lens.transport(h, site)
            return model.tail.logits(moved).double().log_softmax(-1)[:, TOKEN]

    step, truth = 1e-3, np.zeros(model.width)
    for i in range(model.width):
        along = torch.zeros(model.width, dtype=torch.float64)
        along[i] = step
        truth[i] = float(((said(states + along) - said(states - along)) / (2 * step)).mean())
    truth /= np.linalg.norm(truth)
    np.testing.assert_allclose(found.numpy(), truth, atol=2e-4)
    assert float(found.double().norm()) == pytest.approx(1, abs=1e-6)


def test_the_record_and_several_positions(llama: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    token = llama.vocabulary.label(TOKEN)
    found = lens_directions(llama, TOKEN, PROMPTS)
    assert found.sites == [f"{n}.resid_post" for n in range(3)]
    assert found.recipe == {"token": token, "id": TOKEN, "lens": {"name": "logit lens"}, "prompts": 3}
    assert found.kind == "lens direction"
    found.check(llama)
    whole = lens_directions(llama, TOKEN, PROMPTS, "1.resid_post", position=slice(None))
    kept = ll.capture(llama, PROMPTS, "1.resid_post")["1.resid_post"].clone().requires_grad_(True)
    (slopes,) = torch.autograd.grad(llama.tail.logits(kept).log_softmax(-1)[:, TOKEN].sum(), kept)
    truth = slopes.double().mean(0)
    torch.testing.assert_close(whole["1.resid_post"], (truth / truth.norm()).float(), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(readout, "ROWS", 4)
    again = lens_directions(llama, TOKEN, PROMPTS, "1.resid_post", position=slice(None))
    torch.testing.assert_close(again["1.resid_post"], whole["1.resid_post"], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in llama.module.parameters())


def test_along_it_a_token_becomes_more_likely(llama: ll.Model) -> None:
    """At the last site, where a lens reads what the model says."""
    vectors = lens_directions(llama, TOKEN, PROMPTS, "2.resid_post")
    for ids in PROMPTS:
        plain = zoo.forward(llama.module, ids)[-1].log_softmax(-1)[TOKEN]
        with ll.interventions.intervene(
            llama, ll.interventions.add("2.resid_post", vectors, strength=0.1, positions="last")
        ):
            steered = zoo.forward(llama.module, ids)[-1].log_softmax(-1)[TOKEN]
        assert float(steered - plain) > 0.01


class Fixed(LogitLens):
    """No map of the states at all."""

    def transport(self, hidden: torch.Tensor, site: ll.Site) -> torch.Tensor:
        with torch.no_grad():
            return hidden * 1


class Constant(LogitLens):
    """A map to one place, with parameters of its own."""

    def transport(self, hidden: torch.Tensor, site: ll.Site) -> torch.Tensor:
        return torch.ones_like(hidden).requires_grad_(True)


def test_bad_directions(llama: ll.Model) -> None:
    with pytest.raises(InputError, match="2 tokens are named: a direction is for one"):
        lens_directions(llama, [4, 5], PROMPTS)
    with pytest.raises(InputError, match="target id 300 is not in the vocabulary"):
        lens_directions(llama, 300, PROMPTS)
    for lens in (Fixed(), Constant()):
        with pytest.raises(InputError, match=r"has no gradient by the states at 0\.resid_post"):
            lens_directions(llama, TOKEN, PROMPTS, lens=lens)
    short = identity(llama, "affine", "0.resid_post")
    assert isinstance(short, FittedLens)
    with pytest.raises(InputError, match=r"1\.resid_post"):
        lens_directions(llama, TOKEN, PROMPTS, "1.resid_post", lens=short)

    class Zero(LogitLens):
        def transport(self, hidden: torch.Tensor, site: ll.Site) -> torch.Tensor:
            return hidden * 0

    with pytest.raises(InputError, match=r"nothing at 0\.resid_post changes how likely .* is: the gradient is 0"):
        lens_directions(llama, TOKEN, PROMPTS, lens=Zero())
    assert lens_directions(llama, torch.tensor(TOKEN), PROMPTS, "0.resid_post").recipe["id"] == TOKEN


# -- probes ------------------------------------------------------------------------------------


@dataclass
class StandIn:
    """What a linear probe offers."""

    along: Any
    kind: str = "logistic"

    def direction(self, label: Any) -> Any:
        if label not in ("yes", "no"):
            raise InputError(f"there is no class {label!r}; there are yes, no")
        return self.along if label == "yes" else -np.asarray(self.along)


def test_the_directions_of_probes(llama: ll.Model) -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=32), torch.tensor(rng.normal(size=32), dtype=torch.float32)
    probes: dict[Any, Any] = {"1.resid_post": StandIn(one), ll.Site(2, "resid_post"): StandIn(two, "ridge")}
    found = from_probe(llama, probes, "yes")
    assert found.sites == ["1.resid_post", "2.resid_post"]
    np.testing.assert_allclose(found["1.resid_post"].numpy(), one / np.linalg.norm(one), atol=1e-7)
    np.testing.assert_allclose(found["2.resid_post"].numpy(), (two / two.norm()).numpy(), atol=1e-6)
    assert found.recipe == {"probes": ["logistic", "ridge"], "label": "yes"}
    against = from_probe(llama, {"1.resid_post": StandIn(one)}, "no")
    np.testing.assert_allclose(against["1.resid_post"].numpy(), -one / np.linalg.norm(one), atol=1e-7)
    assert from_probe(llama, {"-1.resid_post": StandIn(one)}, "yes").sites == ["2.resid_post"]


def test_bad_probes(llama: ll.Model) -> None:
    cases: list[tuple[dict[Any, Any], Any, str]] = [
        ({}, "yes", "there are no probes: give one by site"),
        ({"1.resid_post": StandIn(np.ones(32))}, "maybe", "there is no class 'maybe'"),
        (
            {"1.resid_post": StandIn(np.zeros(32))},
            "yes",
            r"the probe at 1\.resid_post does not look at anything for 'yes'",
        ),
        ({"1.resid_post": StandIn(np.full(32, np.nan))}, "yes", "does not look at anything"),
        ({"1.resid_post": StandIn(np.ones(31))}, "yes", r"has shape \[31\]; states of tiny-llama have width 32"),
        ({"9.resid_post": StandIn(np.ones(32))}, "yes", "layer 9 is out of range"),
        ({"resid_post": StandIn(np.ones(32))}, "yes", "resid_post is 3 sites: name one for each probe"),
    ]
    for probes, label, message in cases:
        with pytest.raises(InputError, match=message):
            from_probe(llama, probes, label)


def test_a_real_probe_gives_its_direction(llama: ll.Model) -> None:
    from logitlab.probes import fit_probe

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, llama.width, generator=generator)
    labels = ["up" if row[3] > 0 else "down" for row in states]
    one = fit_probe("logistic", states, labels)
    found = from_probe(llama, {"1.resid_post": one}, "up")
    along = torch.as_tensor(one.direction("up")).float()
    torch.testing.assert_close(found["1.resid_post"], along / along.norm(), atol=1e-6, rtol=0)
    assert int(found["1.resid_post"].abs().argmax()) == 3
    assert found.recipe["probes"] == ["logistic"]
