"""Lenses side by side: what is compared, where it is drawn, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.comparison import Comparison
from logitlab.errors import InputError
from logitlab.lenses.fitted import identity
from logitlab.views.tokens import cell_label
from tests import zoo
from tests.commands import refused, run


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")


def moved(model: ll.Model, sites: object = None) -> ll.FittedLens:
    lens = identity(model, "bias", sites)
    with torch.no_grad():
        next(iter(lens.maps.parameters())).normal_(generator=torch.Generator().manual_seed(0))
    return lens


def test_it_holds_what_read_gives(model: ll.Model) -> None:
    lens = moved(model)
    found = ll.compare(model, "a b c", {"logit": ll.LogitLens(), "mine": lens}, top_k=2)
    for name, one in (("logit", ll.LogitLens()), ("mine", lens)):
        alone = ll.read(model, "a b c", lens=one, top_k=2)
        assert found[name].sites == alone.sites
        np.testing.assert_array_equal(found[name].arrays["top_id"], alone.arrays["top_id"])
        np.testing.assert_allclose(found[name].arrays["kl"], alone.arrays["kl"], atol=1e-12)


def test_sites_are_those_that_every_lens_has(model: ll.Model) -> None:
    found = ll.compare(model, "a b", {"logit": ll.LogitLens(), "one": moved(model, "1.resid_post")})
    assert found["logit"].sites == ("1.resid_post", str(model.last_site))
    with pytest.raises(InputError, match="no site of the residual stream in common: this bias lens has no map for"):
        ll.compare(model, "a", {"a": moved(model, "0.resid_post"), "b": moved(model, "1.resid_post")})


def test_the_grid_says_what_the_readings_say(model: ll.Model) -> None:
    found = ll.compare(model, "a b c", {"logit": ll.LogitLens(), "mine": moved(model)})
    lines = str(found).splitlines()
    assert "logit" in lines[1]
    assert "mine" in lines[1]
    rows = lines[2 : 2 + len(found["logit"].sites)]
    for line, site in zip(rows, range(len(rows) - 1, -1, -1), strict=True):
        for name in ("logit", "mine"):
            reading = found[name]
            kl = float(reading.arrays["kl"][0, site, -1])
            label = cell_label(reading, int(reading.arrays["top_id"][0, site, -1, 0]), 0, 2)
            assert f"{kl:.2f}" in line
            assert label in line
    assert lines[-1].startswith("llama: top token, its probability, KL from the model in nats")


def test_the_figure_has_a_panel_for_each_lens(model: ll.Model, tmp_path: Path) -> None:
    from logitlab.views.compare import figure

    found = ll.compare(model, "a b c d", {"logit": ll.LogitLens(), "mine": moved(model)})
    drawn = figure(found)
    panels = [axes for axes in drawn.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["logit", "mine"]
    for axes, reading in zip(panels, found.readings.values(), strict=True):
        shown = np.asarray(axes.collections[0].get_array())
        count = len(reading.prompts[0].positions)
        expected = np.exp(reading.arrays["top_logprob"][0, :, :count, 0])
        np.testing.assert_allclose(shown.reshape(expected.shape), expected)
    one, two = found.figure(tmp_path / "a.png"), found.figure(tmp_path / "b.png")
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size > 10_000


def test_what_cannot_be_compared(model: ll.Model) -> None:
    lens = ll.LogitLens()
    first = ll.read(model, "a b", lens=lens)
    with pytest.raises(InputError, match="give at least one lens"):
        Comparison({})
    with pytest.raises(InputError, match="'x' and 'y' are of other prompts or positions"):
        Comparison({"x": first, "y": ll.read(model, "a c")})
    with pytest.raises(InputError, match="'x' and 'y' are of other prompts or positions"):
        Comparison({"x": first, "y": ll.read(model, "a b", positions=-1)})
    with pytest.raises(InputError, match="'x' and 'y' are of other sites"):
        Comparison({"x": first, "y": ll.read(model, "a b", sites="1.resid_post")})
    found = Comparison({"x": first})
    with pytest.raises(InputError, match="prompt 1 is not in this comparison"):
        found.grid(prompt=1)
    with pytest.raises(InputError, match="position 9 is not among the 3"):
        found.grid(position=9)


def test_long_names_and_names_like_markup(model: ll.Model) -> None:
    names = ["/home/someone/experiments/2026/lenses/" + x for x in ("runs[affine]/a", "runs[/x]/b", "c")]
    text = str(ll.compare(model, "a b", dict.fromkeys(names, ll.LogitLens())))
    whole = "".join(text.split())
    assert "runs[affine]" in whole.replace("\n", "") or "[affine]" in whole
    assert text.splitlines()[-1].startswith("llama: top token")
    for site in ("in", "0", "1", "2"):
        assert any(line.split()[:1] == [site] for line in text.splitlines())


@pytest.mark.parametrize(
    ("lenses", "match"),
    [
        ([ll.LogitLens()], "give lenses by the name"),
        (None, "give lenses by the name"),
        ({}, "give lenses by the name"),
        ({3: ll.LogitLens()}, "give lenses by the name"),
        ({"x": "logit"}, "'x' is a str, not a lens"),
    ],
)
def test_bad_lenses(model: ll.Model, lenses: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ll.compare(model, "a", lenses)


def test_bad_options(model: ll.Model) -> None:
    with pytest.raises(InputError, match="takes lenses=, not lens="):
        ll.compare(model, "a", {"x": ll.LogitLens()}, lens=ll.LogitLens())
    with pytest.raises(InputError, match="there is no lens 'q' in this comparison; there are x"):
        ll.compare(model, "a", {"x": ll.LogitLens()})["q"]
    other = ll.wrap(zoo.build("gpt2"), zoo.tokenizer(), name="gpt2")
    with pytest.raises(InputError, match="are of other models"):
        Comparison({"x": ll.read(model, "a b"), "y": ll.read(other, "a b")})
    with pytest.raises(InputError, match=r"this bias lens is for the stack model\.layers of llama"):
        ll.compare(other, "a", {"x": moved(model)})


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved(ll.load(checkpoint)).save(tmp_path / "lens")
    arguments = ["compare", "a b c", "--model", checkpoint, "--lens", "logit", "--lens", tmp_path / "lens"]
    code, out, err = run(capsys, *arguments, "--figure", tmp_path / "x.png")
    assert code == 0, err
    assert "KL from the model" in " ".join(out.split())
    assert (tmp_path / "x.png").is_file()
    assert "the lens logit is given twice" in refused(capsys, *arguments, "--lens", "logit")
    assert "compare takes one prompt, not 2" in refused(capsys, "compare", "a", "b", "--model", checkpoint)
