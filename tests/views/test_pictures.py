from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from logitlab.reading import Picture
from logitlab.views import pictures
from logitlab.views.tokens import cell_label


def test_patches_are_those_that_were_read(make_seen):
    prompt = make_seen().at(position=[0, 6, 1, -1]).prompts[0]
    ((i, picture, found),) = pictures.patched(prompt)
    assert (i, picture.grid) == (0, (4, 4))
    assert [(p.slot, p.row, p.column) for p in found] == [(2, 0, 0), (1, 1, 1)]
    assert pictures.others(prompt) == [0, 3]
    assert pictures.patched(make_seen().at(position=-1).prompts[0]) == []


def test_patches_outside_their_grid_are_none(make_seen):
    prompt = make_seen().prompts[0]
    wrong = Picture(prompt.pictures[0].png, (2, 2), ((1, 0, 0), (2, 5, 0), (3, 0, -1), (999, 1, 1)))
    assert [(p.slot, p.row, p.column) for p in pictures.patches(prompt, wrong)] == [(1, 0, 0)]


def test_the_answer(make_seen, make_detected):
    assert pictures.answer(make_seen().prompts[0]) == 17  # pooled
    assert pictures.answer(make_seen().at(position=[17, 0]).prompts[0]) == 0
    assert pictures.answer(make_seen("vocabulary").prompts[0]) == 20  # the last word
    assert pictures.answer(make_seen().at(position=[3, 4]).prompts[0]) == 1
    word = make_seen("vocabulary", words=(" a", "pooled", " b")).prompts[0]
    assert pictures.answer(word) == 19  # a token that only looks like it


def test_detections(make_detected):
    reading = make_detected(targets=(1,))
    for s in range(3):
        found = pictures.detections(reading, 0, s)
        assert [d.probability for d in found] == sorted((d.probability for d in found), reverse=True)
        for d in found:
            cell = reading.cell(0, s, d.slot)
            i = cell.tokens.index(d.label)
            assert d.label != "no object"
            assert d.label == next(t for t in cell.tokens if t != "no object")
            assert (d.column, d.probability, d.box) == (cell.ids[i], cell.probabilities[i], cell.box)
    best = pictures.detections(reading, 0, 2)[0]
    assert (best.slot, best.label) == (1, "cat")
    np.testing.assert_allclose(best.box, (0.6, 0.5, 0.4, 0.5), rtol=1e-6)
    dogs = pictures.detections(reading, 0, 2, target=0)
    assert {d.label for d in dogs} == {"dog"}
    assert sorted(d.probability for d in dogs) == sorted(
        reading.cell(0, 2, slot).target_probabilities[0] for slot in range(4)
    )


def test_queries_without_a_class_or_a_box_are_left_out(make_detected):
    reading = make_detected()
    reading.arrays["top_id"][0, 2, 0] = [3, -1, -1]
    reading.arrays["box"][0, 2, 1, 0] = np.nan
    assert sorted(d.slot for d in pictures.detections(reading, 0, 2)) == [2, 3]


@pytest.mark.parametrize(("count", "most"), [(24, 12), (13, 12), (5, 12), (3, 1), (0, 4)])
def test_thinned(count, most):
    found = pictures.thinned(count, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count:
        assert found[-1] == count - 1
        assert most == 1 or found[0] == 0


def test_frequent():
    assert pictures.frequent([5, 5, 2, -1, -1, -1, 7, 7, 7], 2) == [7, 5]
    assert pictures.frequent([5, 5, 2, 7, 7, 7], 2, first=[2, 9]) == [2, 7]


def test_names(make_seen, make_detected):
    names = pictures.position_names(make_seen("vocabulary").prompts[0])
    assert names[:2] == ["<s>", "patch 0,0"]
    assert names[-4:] == ["·What", "·is", "·this", "?"]
    assert pictures.position_names(make_detected().prompts[0])[3] == "query 3"
    assert pictures.title(make_seen("vocabulary", n_pictures=2).prompts[0]) == "<s>[picture][picture] What is this?"
    assert pictures.title(make_seen().prompts[0]) == "[picture]"
    assert pictures.title(make_detected(pictured=False).prompts[0]) == "[input]"
    assert pictures.title(replace(make_seen().prompts[0], text="a cat")) == "a cat"


def test_spaces_matter_only_in_tokens(make_seen):
    assert cell_label(make_seen(), 0, 0, 0) == "tabby, tabby cat"
    assert cell_label(make_seen("vocabulary"), 0, 0, 0) == "tabby,·tabby·cat"


def test_size(make_seen):
    assert pictures.size(make_seen().prompts[0].pictures[0]) == (64, 48)
    assert pictures.size(Picture(b"")) == pictures.size(Picture(b"\x89PNG\r\n\x1a\n" + bytes(16))) == (1, 1)
