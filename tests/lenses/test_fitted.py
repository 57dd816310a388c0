"""Fitted lenses: where they start, and how they are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses.fitted import FittedLens, identity
from logitlab.lenses.maps import FAMILIES
from tests import zoo


def changed(model: ll.Model, kind: str = "affine", seed: int = 0, **options: int) -> FittedLens:
    """A lens whose parameters are away from the identity."""
    lens = identity(model, kind, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lens.maps.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return lens


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", zoo.ALL)
def test_every_family_starts_as_the_logit_lens(name: str, kind: str) -> None:
    model = ll.wrap(zoo.build(name), name=name)
    options: dict[str, Any] = {"decoder": zoo.ids(5)} if model.encoder_decoder else {}
    rank = {"rank": 4} if kind == "low-rank" else {}
    plain = ll.read(model, zoo.ids(7), target=[5], **options)
    read = ll.read(model, zoo.ids(7), target=[5], lens=identity(model, kind, **rank), **options)
    for key, values in plain.arrays.items():
        np.testing.assert_allclose(read.arrays[key], values, atol=1e-6, err_msg=f"{name} {key}")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_map_does_what_its_formula_says(llama: ll.Model, kind: str) -> None:
    lens = changed(llama, kind, **({"rank": 3} if kind == "low-rank" else {}))
    site = lens.sites[1]
    h = torch.randn(2, 3, llama.width, generator=torch.Generator().manual_seed(1))
    p = {name: value[1].double() for name, value in lens.maps.state_dict().items()}
    x = h.double()
    truth = {
        "bias": lambda: x + p["bias"],
        "diagonal": lambda: (1 + p["delta"]) * x + p["bias"],
        "low-rank": lambda: x + x @ (p["up"] @ p["down"]).T + p["bias"],
        "affine": lambda: x + x @ p["weight"].T + p["bias"],
        "jacobian": lambda: x @ p["weight"].T,
    }[kind]()
    torch.testing.assert_close(lens.transport(h, site), truth.float(), atol=1e-5, rtol=1e-5)


def test_what_enters_a_block_is_what_the_one_before_gave(llama: ll.Model) -> None:
    lens = changed(llama)
    h = torch.randn(4, llama.width)
    assert torch.equal(lens.transport(h, ll.Site(1, "resid_pre")), lens.transport(h, ll.Site(0, "resid_post")))
    assert torch.equal(lens.transport(h, llama.last_site), h)


def test_half_precision_states_stay_so(llama: ll.Model) -> None:
    h = torch.randn(4, llama.width).bfloat16()
    assert changed(llama).transport(h, ll.Site(0, "resid_post")).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_identity_changes_no_bit_in_float64(kind: str) -> None:
    model = ll.wrap(zoo.build("gpt2").double(), name="gpt2")
    lens = identity(model, kind, **({"rank": 3} if kind == "low-rank" else {}))
    h = torch.randn(4, model.width, dtype=torch.float64)
    torch.testing.assert_close(lens.transport(h, lens.sites[0]), h, atol=1e-15, rtol=1e-15)


def test_it_comes_back_from_disk(llama: ll.Model, tmp_path: Path) -> None:
    for kind in FAMILIES:
        lens = changed(llama, kind, **({"rank": 3} if kind == "low-rank" else {}))
        lens.recipe, lens.corpus, lens.metrics = {"steps": 3}, {"name": "x"}, {"kl": [1.0]}
        folder = lens.save(tmp_path / kind)
        back = FittedLens.load(folder)
        assert (back.kind, back.sites, back.model) == (lens.kind, list(lens.sites), lens.model)
        assert (back.recipe, back.corpus, back.metrics) == (lens.recipe, lens.corpus, lens.metrics)
        assert back.describe() == lens.describe()
        one, other = (ll.read(llama, zoo.ids(6), lens=some) for some in (lens, back))
        for key, values in one.arrays.items():
            np.testing.assert_array_equal(other.arrays[key], values)
        assert other.provenance["lens"]["kind"] == kind


def test_another_lens_takes_its_place(llama: ll.Model, tmp_path: Path) -> None:
    changed(llama, seed=1).save(tmp_path / "lens")
    second = changed(llama, seed=2)
    second.save(tmp_path / "lens")
    assert FittedLens.load(tmp_path / "lens").digest == second.digest
    assert len(list((tmp_path / "lens").iterdir())) == 2


def test_a_lens_of_another_model_is_refused(llama: ll.Model, tmp_path: Path) -> None:
    folder = changed(llama).save(tmp_path / "lens")
    other = ll.wrap(zoo.build("gpt2"))
    with pytest.raises(InputError, match="is for"):
        ll.read(other, zoo.ids(4), lens=FittedLens.load(folder))
    module = zoo.build("llama")
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    tuned = ll.wrap(module, name="tuned")
    with pytest.raises(InputError, match="these are other weights"):
        ll.read(tuned, zoo.ids(4), lens=FittedLens.load(folder))
    ll.read(tuned, zoo.ids(4), lens=ll.load_lens(folder, any_weights=True))


def test_a_site_without_a_map_is_refused(llama: ll.Model) -> None:
    lens = identity(llama, "bias", "0.resid_post")
    ll.read(llama, zoo.ids(4), sites="0.resid_post", lens=lens)
    with pytest.raises(InputError, match=r"has no map for 1\.resid_post; it has 0\.resid_post"):
        ll.read(llama, zoo.ids(4), sites="1.resid_post", lens=lens)


def test_what_is_damaged_is_said(llama: ll.Model, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return changed(llama).save(tmp_path / name)

    def edited(folder: Path, **changes: Any) -> Path:
        record = json.loads((folder / "lens.json").read_text()) | changes
        (folder / "lens.json").write_text(json.dumps(record))
        return folder

    def maps(folder: Path) -> Path:
        return next(folder.glob("maps-*.safetensors"))

    with pytest.raises(InputError, match=r"lens\.json is missing"):
        FittedLens.load(tmp_path)
    folder = fresh("a")
    maps(folder).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        FittedLens.load(folder)
    folder = fresh("b")
    maps(folder).unlink()
    with pytest.raises(InputError, match="damaged"):
        FittedLens.load(folder)
    with pytest.raises(InputError, match="of format 9"):
        FittedLens.load(edited(fresh("c"), format=9))
    with pytest.raises(InputError, match="no lens of kind 'cubic'"):
        FittedLens.load(edited(fresh("d"), kind="cubic"))
    with pytest.raises(InputError, match="damaged"):
        FittedLens.load(edited(fresh("e"), sites=["0.resid_post"]))
    with pytest.raises(InputError, match="not the file that was written"):
        FittedLens.load(edited(fresh("f"), digest="0" * 64))
    for name in ("model", "recipe", "corpus", "metrics", "digest"):
        folder = fresh(f"no-{name}")
        record = json.loads((folder / "lens.json").read_text())
        del record[name]
        (folder / "lens.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="damaged"):
            FittedLens.load(folder)
    with pytest.raises(InputError, match="damaged"):
        FittedLens.load(edited(fresh("h"), recipe=3))
    folder = fresh("g")
    (folder / "lens.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        FittedLens.load(folder)


def test_bad_requests(llama: ll.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no lens of kind 'cubic'; the kinds are bias"):
        identity(llama, "cubic")
    with pytest.raises(InputError, match="rank is 0"):
        identity(llama, "low-rank", rank=0)
    with pytest.raises(InputError, match="takes no rank"):
        identity(llama, "affine", rank=3)
    with pytest.raises(InputError, match="which the model itself decodes"):
        identity(llama, "affine", llama.last_site)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="it is a file"):
        identity(llama, "bias").save(tmp_path / "file")
    with pytest.raises(InputError, match="it holds something else"):
        identity(llama, "bias").save(tmp_path)
