"""Vectors: what they keep, their file, their control, and what add() does with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from logitlab.interventions import Vectors
from tests import zoo

SITES = ["0.resid_post", "1.resid_post", "2.resid_pre"]


def made(model: ll.Model, sites: list[str] = SITES, seed: int = 0) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    values = {site: torch.randn(model.width, generator=generator) * (i + 1) for i, site in enumerate(sites)}
    return Vectors(values, "by hand", model.about, {"of": "nothing", "n": 3})


# -- the file ----------------------------------------------------------------------------------


def test_a_file_gives_back_every_bit(llama: ll.Model, tmp_path: Path) -> None:
    vectors = made(llama)
    vectors.values["0.resid_post"][:3] = torch.tensor([-0.0, 1e-42, 3.4e38])
    place = vectors.save(tmp_path / "some.safetensors")
    found = Vectors.load(str(place))
    assert found.sites == SITES  # in their order
    for site in SITES:
        assert found[site].numpy().tobytes() == vectors[site].numpy().tobytes()
    assert (found.kind, dict(found.recipe), dict(found.model)) == ("by hand", {"of": "nothing", "n": 3}, llama.about)
    assert found.digest == vectors.digest
    found.check(llama)
    assert list(tmp_path.iterdir()) == [place]


def test_one_tensor_for_several_sites(llama: ll.Model, tmp_path: Path) -> None:
    """Each site has numbers of its own: nothing that is done to what was given changes them."""
    one = torch.ones(llama.width)
    vectors = Vectors(dict.fromkeys(SITES, one), "by hand", llama.about)
    one.zero_()
    vectors["0.resid_post"].mul_(2)
    assert [float(vectors[s][0]) for s in SITES] == [2, 1, 1]
    found = Vectors.load(vectors.save(tmp_path / "v.safetensors"))
    assert [float(found[s][0]) for s in SITES] == [2, 1, 1]
    parameter = torch.nn.Parameter(torch.ones(llama.width, dtype=torch.bfloat16))
    assert Vectors({"0.resid_post": parameter}, "by hand", llama.about)["0.resid_post"].requires_grad is False
    array: Any = np.arange(32.0)
    assert Vectors({"0.resid_post": array}, "by hand", llama.about)["0.resid_post"].tolist() == list(range(32))


def test_files_that_are_none(llama: ll.Model, tmp_path: Path) -> None:
    place = made(llama).save(tmp_path / "good.safetensors")
    data = place.read_bytes()
    with pytest.raises(InputError, match=r"the name of a file of vectors ends in \.safetensors"):
        made(llama).save(tmp_path / "v.pt")
    with pytest.raises(InputError, match="does not exist"):
        made(llama).save(tmp_path / "nowhere" / "v.safetensors")
    with pytest.raises(InputError, match=r"there are no vectors at .*none\.safetensors: no such file"):
        Vectors.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no such file"):
        Vectors.load(tmp_path)
    bad = tmp_path / "bad.safetensors"
    for content in (b"", data[:5], data[:40], data[:-1], data + b"x", b"hello " * 20, b"\xff" * 64):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="is no safetensors file, or damaged") as caught:
            Vectors.load(bad)
        assert "\n" not in str(caught.value)
    for at in (-1, -380):  # one bit of the numbers
        flipped = bytearray(data)
        flipped[at] ^= 1
        bad.write_bytes(flipped)
        with pytest.raises(InputError, match="is damaged: its numbers are not those that were written"):
            Vectors.load(bad)
    save_file({"0.resid_post": torch.ones(32)}, bad)
    with pytest.raises(InputError, match="is a safetensors file, and not one of vectors"):
        Vectors.load(bad)


def test_headers_that_do_not_fit(llama: ll.Model, tmp_path: Path) -> None:
    vectors, bad = made(llama), tmp_path / "bad.safetensors"
    record: dict[str, Any] = {
        "format": 1,
        "kind": "by hand",
        "sites": SITES,
        "digest": vectors.digest,
        "model": llama.about,
        "recipe": {},
    }

    def written(header: str) -> Path:
        save_file(dict(vectors.values), bad, {"logitlab.vectors": header})
        return bad

    assert Vectors.load(written(json.dumps(record))).digest == vectors.digest
    for key in record:
        with pytest.raises(InputError, match=r"is damaged .*write it again"):
            Vectors.load(written(json.dumps({k: v for k, v in record.items() if k != key})))
    for header in (
        "{",
        "[]",
        "3",
        "null",
        json.dumps(record | {"sites": ["9.resid_post"]}),
        json.dumps(record | {"model": []}),
    ):
        with pytest.raises(InputError, match="is damaged"):
            Vectors.load(written(header))
    with pytest.raises(InputError, match="is of format 2; this version reads 1: update logitlab"):
        Vectors.load(written(json.dumps(record | {"format": 2})))
    with pytest.raises(InputError, match="states of tiny-llama have width 16"):
        Vectors.load(written(json.dumps(record | {"model": llama.about | {"width": 16}})))
    with pytest.raises(InputError, match="its numbers are not those that were written"):
        Vectors.load(written(json.dumps(record | {"sites": SITES[::-1]})))
    before = bad.read_bytes()
    strange = dataclasses.replace(vectors, recipe={"n": np.float32(1)})
    with pytest.raises(InputError, match="the recipe is not made of plain values"):
        strange.save(bad)
    assert bad.read_bytes() == before
    assert list(tmp_path.iterdir()) == [bad]


# -- what they are -----------------------------------------------------------------------------


def test_numbers_that_are_no_vectors(llama: ll.Model) -> None:
    about = llama.about
    cases: list[tuple[Any, str]] = [
        (torch.ones(31), r"the vector for 0.resid_post has shape \[31\]; states of tiny-llama have width 32"),
        (torch.ones(1, 32), r"has shape \[1, 32\]"),
        (torch.full((32,), float("nan")), "the vector for 0.resid_post has numbers that are NaN or infinite"),
        (torch.tensor([float("inf")] * 32), "NaN or infinite"),
        ("no", "must be a vector of numbers"),
        (torch.tensor(1.0), "has shape"),
    ]
    for value, message in cases:
        with pytest.raises(InputError, match=message):
            Vectors({"0.resid_post": value}, "by hand", about)
    with pytest.raises(InputError, match="there is no site: vectors need at least one"):
        Vectors({}, "by hand", about)
    vectors = made(llama)
    with pytest.raises(
        InputError,
        match=r"there is no vector \(by hand\) for 1.mlp_out; there are vectors for 0.resid_post, 1.resid_post",
    ):
        _ = vectors["1.mlp_out"]
    with pytest.raises(InputError, match="there is no vector"):
        vectors.alone("1.mlp_out")
    one = vectors.alone(ll.Site(1, "resid_post"))
    assert one.sites == ["1.resid_post"]
    assert one["1.resid_post"].tolist() == vectors["1.resid_post"].tolist()
    truth = float(np.linalg.norm(vectors["1.resid_post"].numpy().astype(np.float64)))
    assert vectors.norm("1.resid_post") == pytest.approx(truth, rel=1e-12)
    assert repr(vectors) == "Vectors(by hand, tiny-llama: 0.resid_post, 1.resid_post, 2.resid_pre)"


def test_they_belong_to_a_model(llama: ll.Model) -> None:
    vectors = made(llama)
    narrow = ll.wrap(zoo.build("llama", hidden_size=16), name="narrow")
    with pytest.raises(InputError, match=r"for tiny-llama \(3 layers of width 32\); narrow has 3 layers of width 16"):
        vectors.check(narrow)
    low = ll.wrap(zoo.build("llama", num_hidden_layers=2), name="low")
    with pytest.raises(InputError, match="low has 2 layers of width 32: make them on it"):
        vectors.check(low)
    gpt = ll.wrap(zoo.shared("gpt2"), name="gpt")
    with pytest.raises(InputError, match="these vectors are for the stack"):
        vectors.check(gpt)
    other = ll.wrap(zoo.build("llama", seed=1), name="other")
    with pytest.raises(InputError, match=r"other weights \(or another dtype\)\. Make them on this model"):
        vectors.check(other)
    with pytest.raises(InputError, match="other weights"), iv.intervene(other, iv.add("0.resid_post", vectors)):
        pass
    free = vectors.for_any_weights()
    free.check(other)
    assert free.digest == vectors.digest
    with pytest.raises(InputError, match="make them on it"):
        free.check(low)
    ids = torch.tensor([zoo.ids(5)])
    with torch.no_grad():
        with iv.intervene(other, iv.add("0.resid_post", free)):
            found = other.module(ids).logits
        with iv.intervene(other, iv.add("0.resid_post", vectors["0.resid_post"])):
            torch.testing.assert_close(found, other.module(ids).logits, atol=0, rtol=0)


def test_a_random_twin(llama: ll.Model) -> None:
    vectors = made(llama)
    twin = vectors.random_twin(3)
    assert twin.sites == vectors.sites
    for site in SITES:
        assert twin.norm(site) == pytest.approx(vectors.norm(site), rel=1e-6)
        cosine = float(twin[site] @ vectors[site]) / twin.norm(site) ** 2
        assert abs(cosine) < 0.7  # sd 0.18
    assert vectors.random_twin(3).digest == twin.digest != vectors.random_twin(4).digest
    apart = made(llama, ["1.resid_post"], seed=7).random_twin(3)
    unit = apart["1.resid_post"] / apart.norm("1.resid_post")
    torch.testing.assert_close(unit, twin["1.resid_post"] / twin.norm("1.resid_post"), atol=1e-6, rtol=1e-5)
    between = float(twin["0.resid_post"] @ twin["1.resid_post"]) / twin.norm("0.resid_post") / twin.norm("1.resid_post")
    assert abs(between) < 0.7
    assert twin.recipe["seed"] == 3
    assert twin.recipe["of"] == {"kind": "by hand", "digest": vectors.digest[:16], "of": "nothing", "n": 3}
    twin.check(llama)
    state = torch.get_rng_state()
    vectors.random_twin(5)
    assert torch.equal(torch.get_rng_state(), state)
    for bad in (-1, 0.5, True):
        with pytest.raises(InputError, match="seed"):
            vectors.random_twin(bad)


def test_random_directions_are_uniform(llama: ll.Model) -> None:
    """Coordinates have mean 0 and variance 1/width."""
    one = Vectors({"0.resid_post": torch.eye(32)[0]}, "by hand", llama.about)
    drawn = np.stack([one.random_twin(seed)["0.resid_post"].numpy() for seed in range(400)])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    assert np.abs(drawn.mean(0)).max() < 4.5 / np.sqrt(32 * 400)
    assert np.abs(drawn.var(0) * 32 - 1).max() < 4.5 * np.sqrt(2 / 400)


# -- add() -------------------------------------------------------------------------------------


def test_each_site_is_given_its_own(llama: ll.Model) -> None:
    vectors = made(llama)
    ids = torch.tensor([zoo.ids(6)])
    blocks = [b.module for b in llama.stack.blocks]

    def by_hand(layer: int, value: torch.Tensor, before: bool = False) -> Any:
        def after(module: Any, args: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            state[:, -1] += 1.5 * value
            return output

        def enter(module: Any, args: Any) -> Any:
            args[0][:, -1] += 1.5 * value

        return blocks[layer].register_forward_pre_hook(enter) if before else blocks[layer].register_forward_hook(after)

    with torch.no_grad():
        handles = [
            by_hand(0, vectors["0.resid_post"]),
            by_hand(1, vectors["1.resid_post"]),
            by_hand(2, vectors["2.resid_pre"], before=True),
        ]
        expected = llama.module(ids).logits
        for handle in handles:
            handle.remove()
        with iv.intervene(llama, iv.add(SITES, vectors, strength=1.5, positions="last")):
            found = llama.module(ids).logits
        plain = llama.module(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - plain).abs().max()) > 0.1


def test_a_site_without_a_vector(llama: ll.Model) -> None:
    message = r"there is no vector \(by hand\) for 2.resid_post; there are vectors for 0.resid_post, 1.resid_post"
    with pytest.raises(InputError, match=message), iv.intervene(llama, iv.add("resid_post", made(llama))):
        pass
    with pytest.raises(InputError, match="strength is nan"):
        iv.add("0.resid_post", made(llama), strength=float("nan"))


def test_a_reading_says_what_it_was_steered_with(llama: ll.Model) -> None:
    vectors = made(llama)
    with iv.intervene(llama, iv.add("0.resid_post", vectors, strength=2, positions="last")):
        reading = ll.read(llama, zoo.ids(5))
    (said,) = reading.provenance["interventions"]
    assert said["sites"] == "0.resid_post"
    assert (said["positions"], said["change"], said["strength"]) == ("last", "add", 2.0)
    assert (said["vectors"], said["digest"]) == ("by hand", vectors.digest[:16])
    json.dumps(said)
