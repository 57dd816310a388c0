from __future__ import annotations

import warnings
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from logitlab.errors import InputError
from logitlab.reading import Picture
from logitlab.views import colour
from logitlab.views.figure import figure, save_figure


def panels(drawn):
    """The axes that show the picture, by the site in their title."""
    return {axes.get_title().split(":")[0]: axes for axes in drawn.axes if axes.get_title()}


def legend(drawn):
    """Colours and labels of every legend."""
    found = []
    for part in drawn.subfigs:
        for key in part.legends:
            shades = [handle.get_facecolor()[:3] for handle in key.legend_handles]
            found.append(dict(zip((t.get_text() for t in key.get_texts()), shades, strict=True)))
    return found


def texts(path):
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def test_patches_are_coloured_by_label_and_probability(make_seen):
    reading = make_seen()
    drawn = figure(reading)
    (key,) = legend(drawn)
    found = panels(drawn)
    assert list(found) == ["0.resid_post", "1.resid_post", "2.resid_post"]
    for s, axes in enumerate(found.values()):
        over = axes.images[1].get_array()
        assert over.shape == (4, 4, 4)
        for position, row, column in reading.prompts[0].pictures[0].patches:
            cell = reading.cell(0, s, position)
            shade = key.get(cell.tokens[0], to_rgb(colour.OTHERS))
            np.testing.assert_allclose(over[row, column], (*shade, 0.2 + 0.6 * cell.probabilities[0]), atol=1e-6)
        answer = reading.cell(0, s, 17)
        title = axes.get_title().replace("\n", " ")
        assert title == f"{s}.resid_post: {answer.tokens[0]} {answer.probabilities[0]:.2f}"
    assert next(iter(key)) == reading.cell(0, 2, 17).tokens[0]  # the answer always has a colour
    assert len(key) == len(colour.CATEGORIES) + 1
    tops = {reading.cell(0, s, p).tokens[0] for s in range(3) for p in range(1, 17)}
    assert f"{len(tops - key.keys())} others" in key


def test_the_picture_is_without_colours_under_the_patches(make_seen):
    for axes in panels(figure(make_seen())).values():
        image, over = axes.images
        assert image.get_array().shape == (48, 64)
        assert image.get_extent() == over.get_extent() == [0, 1, 1, 0]
        assert axes.get_aspect() == 48 / 64


def test_targets_have_a_scale(make_seen):
    reading = make_seen(targets=(1, 0))
    drawn = figure(reading)
    blocks = list(drawn.subfigs)
    assert [part._suptitle.get_text() for part in blocks] == ["probability of dog", "probability of tabby, tabby cat"]
    for t, part in enumerate(blocks):
        chances = np.exp(reading.arrays["target_logprob"][0, :, 1:17, t])
        shown = [axes for axes in part.axes if axes.get_title()]
        (bar,) = [axes for axes in part.axes if not axes.get_title()]
        assert bar.get_xlim() == pytest.approx((0, chances.max()))
        for s, axes in enumerate(shown):
            cell = reading.cell(0, s, 17)
            assert axes.get_title().endswith(f"rank {cell.target_ranks[t]}")
            over = axes.images[1].get_array().reshape(16, 4)
            assert set(over[:, 3]) == {0.65}
            # The scale is ordered by lightness: the more probable, the darker.
            light = [colour.luminance(tuple(255 * rgb[:3])) for rgb in over]
            order = np.argsort(chances[s])
            assert (np.diff(np.array(light)[order]) <= 1e-9).all()


def test_many_sites_are_thinned(make_seen):
    found = list(panels(figure(make_seen(n_sites=40))))
    assert len(found) == 12
    assert (found[0], found[-1]) == ("0.resid_post", "39.resid_post")


def test_two_pictures(make_seen):
    reading = make_seen("vocabulary", n_pictures=2)
    drawn = figure(reading)
    assert [part._suptitle.get_text() for part in drawn.subfigs] == ["picture 1", "picture 2"]
    for part, picture in zip(drawn.subfigs, reading.prompts[0].pictures, strict=True):
        last = [axes for axes in part.axes if axes.get_title()][-1]
        assert "2.resid_post" in last.get_title()
        assert reading.cell(0, 2, 36).tokens[0].replace(" ", "·") in last.get_title()
        alphas = last.images[1].get_array()[..., 3]
        for position, row, column in picture.patches:
            assert alphas[row, column] == pytest.approx(0.2 + 0.6 * reading.cell(0, 2, position).probabilities[0])


def test_patches_that_were_not_read_stay_clear(make_seen):
    axes = panels(figure(make_seen().at(position=[1, 6, 17])))["2.resid_post"]
    assert (axes.images[1].get_array()[..., 3] > 0).sum() == 2


def test_a_picture_without_patches_is_a_heat_map(make_reading, make_seen):
    reading = make_reading(n_sites=3, n_positions=4)
    plain = Picture(make_seen().prompts[0].pictures[0].png)
    reading = replace(reading, prompts=(replace(reading.prompts[0], pictures=(plain,)),))
    assert figure(reading).axes[0].get_ylabel() == "layer"
    assert len(figure(reading).axes[0].texts) == 12


def test_independent_questions_are_said_to_be(make_seen, make_detected, make_reading, tmp_path):
    said = "sigmoid: each probability is a question of its own, they do not sum to 1"
    plain = make_reading()
    plain = replace(plain, provenance={**plain.provenance, "space": {"name": "classes", "activation": "sigmoid"}})
    readings = [make_seen("concepts", "sigmoid"), make_detected(activation="sigmoid"), plain]
    for i, reading in enumerate([*readings, make_seen(), make_detected()]):
        found = texts(save_figure(reading, tmp_path / f"{i}.svg"))
        assert any(said in text for text in found) == (i < 3)


def test_boxes(make_detected):
    reading = make_detected()
    found = panels(figure(reading))
    for s, (site, axes) in enumerate(found.items()):
        best = {}
        for slot in range(4):
            cell = reading.cell(0, s, slot)
            i = next(i for i, t in enumerate(cell.tokens) if t != "no object")
            best[slot] = (cell.probabilities[i], cell.tokens[i], cell.box)
        above = {slot: d for slot, d in best.items() if d[0] > 0.5}
        drawn = [r for r in axes.patches if isinstance(r, Rectangle)]
        wanted = sorted((x - w / 2, y - h / 2, w, h) for _, _, (x, y, w, h) in (above or best).values())
        np.testing.assert_allclose(sorted((*r.get_xy(), r.get_width(), r.get_height()) for r in drawn), wanted)
        assert {r.get_linestyle() for r in drawn} == ({"-"} if above else {"--"})
        labels = {t.get_text() for t in axes.texts}
        assert labels == {f"{label} {p:.2f}" for p, label, _ in (above or best).values()}
        assert axes.get_title() == f"{site}: {len(above) or 'none'} above 0.5"
    assert "cat 1.00" in labels
    assert not any("no object" in label for label in labels)


def test_the_boxes_of_a_target(make_detected):
    reading = make_detected(targets=(2,))
    axes = panels(figure(reading))["2.resid_post"]
    chances = [reading.cell(0, 2, slot).target_probabilities[0] for slot in range(4)]
    assert {t.get_text() for t in axes.texts} == {f"remote {p:.2f}" for p in chances if p > 0.5}


def test_a_detector_without_its_picture(make_detected):
    axes = panels(figure(make_detected(pictured=False)))["2.resid_post"]
    assert len(axes.images) == 1
    assert "cat 1.00" in {t.get_text() for t in axes.texts}


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_hostile_labels(make_seen, make_detected, hostile, tmp_path, ending):
    names = ("_hidden", *hostile)
    readings = {
        "patches": make_seen(labels=names, targets=(1, 5)),
        "labels": make_seen("vocabulary", labels=names, grid=(8, 8)),
        "boxes": make_detected(labels=names, n_queries=20),
    }
    for name, reading in readings.items():
        path = tmp_path / f"{name}{ending}"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_figure(reading, path)
            first = path.read_bytes()
            save_figure(reading, path)
        assert path.read_bytes() == first
        assert len(first) < 2_000_000
    if ending == ".svg":
        found = " ".join(texts(tmp_path / "labels.svg"))
        assert "_hidden" in found
        assert not any(character in found for character in "\x1b\u202e\u2028")


def test_long_labels_stay_inside_their_panel(make_seen):
    reading = make_seen(labels=["a" * 300, *"bcdefghij"], n_sites=12)
    drawn = figure(reading)
    drawn.draw_without_rendering()
    for axes in panels(drawn).values():
        frame, title = axes.get_window_extent(), axes.title.get_window_extent()
        assert title.width <= frame.width * 1.02
    for part in drawn.subfigs:
        for key in part.legends:
            box = key.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= drawn.bbox.width


def test_a_picture_that_is_none_is_refused(make_seen):
    reading = make_seen()
    broken = replace(reading.prompts[0].pictures[0], png=b"GIF89a")
    reading = replace(reading, prompts=(replace(reading.prompts[0], pictures=(broken,)),))
    with pytest.raises(InputError, match="the picture of prompt 0 cannot be drawn: it is not a PNG"):
        figure(reading)
