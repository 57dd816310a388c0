from __future__ import annotations

import sys
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest

from logitlab.errors import InputError
from logitlab.views.figure import figure, save_figure
from logitlab.views.tokens import visible
from tests.views.conftest import screened, without


def test_cells_hold_the_top_tokens(make_reading):
    reading = make_reading(n_sites=5, n_positions=4)
    axes = figure(reading).axes[0]
    found = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert found == {(s, p): visible(reading.cell(0, s, p).tokens[0]) for s in range(5) for p in range(4)}
    shades = axes.collections[0].get_array().reshape(5, 4)
    np.testing.assert_allclose(shades, np.exp(reading.arrays["top_logprob"][0, :, :, 0]))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["in", "0", "1", "2", "3"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["·Paris", "·France", "·the", "·a"]
    assert axes.get_ylim() == (-0.5, 4.5)  # the last layer is at the top


def test_targets_have_their_ranks_beside(make_reading):
    reading = make_reading(n_sites=5, targets=(" Paris", " the"))
    drawn = figure(reading)
    (axes,) = [a for a in drawn.axes if a.get_xlabel() == "rank at the last position"]
    for t, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), reading.arrays["target_rank"][0, :, -1, t])
        np.testing.assert_array_equal(line.get_ydata(), range(5))
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["·Paris", "·the"]


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_formats_and_hostile_tokens(make_reading, hostile, tmp_path, ending, magic):
    reading = make_reading(n_sites=4, n_positions=20, tokens=hostile, targets=("$x$", "_hidden", ""))
    path = tmp_path / f"figure{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_figure(reading, path) == path
        first = path.read_bytes()
        save_figure(reading, path)
    assert first.startswith(magic)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_svg_keeps_its_text(make_reading, hostile, tmp_path):
    path = save_figure(make_reading(n_sites=3, n_positions=20, tokens=hostile), tmp_path / "a.svg")
    texts = {"".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")}
    assert {"$x$", "∅", "\\x1b[31m", "[bold]", "probability of the top token"} <= texts


def test_many_cells_have_no_text(make_reading, tmp_path):
    wide = figure(make_reading(n_sites=3, n_positions=100)).axes[0]
    assert not wide.texts
    assert [t.get_text() for t in wide.get_xticklabels()][-1] == "99"
    assert len(wide.get_xticks()) <= 12
    high = figure(make_reading(n_sites=90, n_positions=3, targets=(" Paris",))).axes[0]
    assert not high.texts
    assert [t.get_text() for t in high.get_yticklabels()][-1] == "88"
    assert len(high.get_yticks()) <= 60
    save_figure(make_reading(n_sites=31, n_positions=1024), tmp_path / "long.svg")
    assert (tmp_path / "long.svg").stat().st_size < 1_000_000


def test_other_statistics_change_nothing(make_reading, make_seen, make_detected, tmp_path):
    for reading in (make_reading(n_sites=4, targets=(" Paris",)), make_seen(targets=(1,)), make_detected()):
        first = save_figure(reading, tmp_path / "a.svg").read_text()
        assert save_figure(without(reading, "entropy", "kl"), tmp_path / "b.svg").read_text() == first
        assert save_figure(screened(reading), tmp_path / "c.svg").read_text() == first


def test_one_cell(make_reading, tmp_path):
    save_figure(make_reading(n_sites=1, n_positions=1), tmp_path / "one.png")


def test_refusals(make_reading, tmp_path, monkeypatch):
    reading = make_reading(n_prompts=2)
    with pytest.raises(InputError, match=r"\.png, \.svg or \.pdf"):
        save_figure(reading, tmp_path / "a.gif")
    with pytest.raises(InputError, match="prompt 2 is not"):
        save_figure(reading, tmp_path / "a.png", prompt=2)
    with pytest.raises(InputError, match="nothing to draw"):
        figure(reading.at(position=[]))
    with pytest.raises(InputError, match="does not exist"):
        save_figure(reading, tmp_path / "missing" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"a figure needs matplotlib: pip install 'logitlab\[figures\]'"):
        figure(reading)
    assert not list(tmp_path.iterdir())


def test_pyplot_is_not_touched(make_reading, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure(make_reading(), prompt=-1)
