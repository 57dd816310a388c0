from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from logitlab.views.page import SCALE, embedded, page, page_data
from logitlab.views.tokens import visible
from tests.views.conftest import screened, without


def held(text):
    """The JSON that a browser would find in the page."""
    start = text.index('<script type="application/json" id="data">')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script", start)])


@pytest.mark.parametrize("ragged", [False, True])
def test_the_numbers_come_back(make_reading, ragged):
    reading = make_reading(n_prompts=3, targets=(" Paris", " the"), ragged=ragged)
    data = held(page(reading))
    k, m, sites = data["k"], len(data["targets"]), len(data["sites"])
    assert (k, m, sites) == (5, 2, 7)
    for n, prompt in enumerate(data["prompts"]):
        length = len(reading.prompts[n].positions)
        assert prompt["positions"] == list(reading.prompts[n].positions)
        assert len(prompt["entropy"]) == sites * length
        for s in range(sites):
            for p in range(length):
                c, cell = s * length + p, reading.cell(n, s, p)
                top = prompt["top"][c * k : c * k + k]
                assert tuple(data["ids"][i] for i in top) == cell.ids
                assert tuple(data["labels"][i] for i in top) == tuple(visible(t) for t in cell.tokens)
                found = np.exp(-np.array(prompt["logprob"][c * k : c * k + k]) / SCALE)
                np.testing.assert_allclose(found, cell.probabilities, rtol=1e-4)
                assert abs(prompt["entropy"][c] / SCALE - cell.entropy) <= 1e-4
                assert abs(prompt["kl"][c] / SCALE - cell.kl) <= 1e-4
                assert tuple(prompt["targetRank"][c * m : c * m + m]) == cell.target_ranks
                found = np.exp(-np.array(prompt["targetLogprob"][c * m : c * m + m]) / SCALE)
                np.testing.assert_allclose(found, cell.target_probabilities, rtol=1e-4)


def test_hostile_labels_stay_inside_the_data(make_reading, hostile):
    reading = make_reading(n_prompts=2, n_positions=20, tokens=hostile, targets=hostile)
    reading = replace(reading, provenance={"model": hostile[0], "lens": {"name": hostile[1]}, hostile[0]: hostile[1]})
    text = page(reading)
    data = text[text.index('id="data">') + len('id="data">') :]
    data = data[: data.index("</script")]
    assert not re.search(r"[<>&\u2028\u2029]", data)
    assert text.count("</script") == 2
    assert text.count("<script") == 2
    assert hostile[0] not in text
    back = held(text)
    assert set(back["labels"]) <= {visible(token) for token in hostile}
    assert back["model"] == visible(hostile[0], space=" ")
    text.encode("utf-8")


def test_nothing_is_loaded(make_reading):
    text = page(make_reading())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]  # a name, never an address
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|import|innerHTML|insertAdjacentHTML|eval)\b", text)
    assert not re.findall(r"\b(?:src|href)=(?!\"data:,)", text)


def test_the_frame_holds_the_page(make_reading):
    reading = make_reading()
    frame = embedded(reading)
    (source,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == page(reading)
    assert 'sandbox="allow-scripts"' in frame
    assert reading._repr_html_() == frame


def test_same_label_different_tokens(make_reading):
    reading = make_reading(tokens=(" the", " the", " a"), k=3)
    data = page_data(reading)
    assert data["labels"].count("·the") == 2
    assert len(set(data["ids"])) == len(data["ids"])


def test_completions_apply_to_their_own_position(make_reading):
    reading = make_reading(n_prompts=2)
    token = int(reading.arrays["top_id"][1, 3, 2, 0])
    data = page_data(replace(reading, completions={(1, 2): {token: "é"}}))
    length, k = 6, data["k"]
    assert data["labels"][data["prompts"][1]["top"][(3 * length + 2) * k]] == "é"
    assert data["ids"][data["prompts"][1]["top"][(3 * length + 2) * k]] == token
    uses = [i for n, p in enumerate(data["prompts"]) for i, t in enumerate(p["top"]) if data["labels"][t] == "é"]
    assert all((i // k) % length == 2 for i in uses)


def test_missing_and_infinite_values(make_reading):
    reading = make_reading(targets=(" Paris",))
    reading.arrays["top_id"][0, 0, 0] = -1
    reading.arrays["top_logprob"][0, 0, 0] = np.nan
    reading.arrays["top_logprob"][0, 0, 1, 4] = -np.inf
    reading.arrays["kl"][0, 0, 0] = np.inf
    reading.arrays["kl"][0, 0, 1] = -1e-7
    reading.arrays["entropy"][0, 0, 0] = np.nan
    prompt = held(page(replace(reading, provenance={})))["prompts"][0]
    assert prompt["top"][:5] == [-1] * 5
    assert prompt["logprob"][:5] == [-1] * 5
    assert prompt["logprob"][9] == prompt["kl"][0] == 10**8
    assert prompt["kl"][1] == 0
    assert prompt["entropy"][0] == -1


def test_only_what_was_asked_for_is_held(make_reading):
    reading = make_reading(n_prompts=2, targets=(" Paris",))
    for absent in (("entropy",), ("kl",), ("entropy", "kl")):
        for prompt, whole in zip(
            held(page(without(reading, *absent)))["prompts"], held(page(reading))["prompts"], strict=True
        ):
            assert prompt == {name: values for name, values in whole.items() if name not in absent}
            assert "bound" not in prompt


def test_bounds_are_held_and_never_too_small(make_reading):
    reading = screened(make_reading(n_prompts=2, ragged=True), (0, 3.21e-4, 7.04e-9, np.nan, np.inf))
    for n, prompt in enumerate(held(page(reading))["prompts"]):
        bound = reading.arrays["bound"][n, :, : len(prompt["positions"])].ravel()
        assert len(prompt["bound"]) == bound.size
        for found, true in zip(prompt["bound"], bound.tolist(), strict=True):
            if np.isnan(true):
                assert found == -1
            elif np.isinf(true):
                assert found == 10**8
            else:
                assert true * (1 - 1e-6) <= found <= true * 1.1
                assert float(f"{found:.1e}") == found
    assert {0, 3.3e-4, 7.1e-9} <= set(held(page(reading))["prompts"][0]["bound"])


def test_empty_selection(make_reading):
    assert held(page(make_reading().at(position=[])))["prompts"][0]["top"] == []


def test_a_long_reading_stays_small(make_reading):
    words = [f" word{i}" for i in range(64)]
    reading = make_reading(n_sites=31, n_positions=2048, tokens=words)
    random = np.random.default_rng(0)  # as many different tokens as a real vocabulary has
    ids = random.zipf(1.3, reading.arrays["top_id"].shape) % 49_152
    reading.arrays["top_id"][:] = ids
    reading = replace(reading, labels={int(i): f" token{i}" for i in np.unique(ids)})
    assert len(page(reading)) < 5_000_000


def test_pictures_and_patches_are_held(make_seen):
    reading = make_seen("vocabulary", n_pictures=2, grid=(3, 5))
    data = held(page(reading))
    (prompt,) = data["prompts"]
    assert prompt["text"] == "<s>[picture][picture] What is this?"
    assert prompt["answer"] == 34
    for picture, shown in zip(reading.prompts[0].pictures, prompt["pictures"], strict=True):
        assert base64.b64decode(shown["png"]) == picture.png
        assert (shown["size"], shown["grid"]) == ([64, 48], [3, 5])
        assert tuple(map(tuple, shown["patches"])) == picture.patches
        tops = [reading.cell(0, s, p).ids[0] for s in range(3) for p, _, _ in picture.patches]
        assert shown["palette"][0] == reading.cell(0, 2, 34).ids[0]  # the answer
        rest = [tops.count(i) for i in shown["palette"][1:]]
        assert rest == sorted(rest, reverse=True)
        assert len(shown["palette"]) == len(data["categories"]) == 7


def test_slots_of_patches_follow_the_selection(make_seen):
    (prompt,) = held(page(make_seen().at(position=[17, 6, 1])))["prompts"]
    assert prompt["pictures"][0]["patches"] == [[2, 0, 0], [1, 1, 1]]
    assert prompt["answer"] == 0
    assert prompt["tokens"] == ["pooled", "patch 1,1", "patch 0,0"]


def test_boxes_are_held(make_detected):
    reading = make_detected()
    reading.arrays["box"][0, 0, 2] = np.nan
    data = held(page(reading))
    (prompt,) = data["prompts"]
    for s in range(3):
        for slot in range(4):
            box = prompt["boxes"][4 * (4 * s + slot) :][:4]
            if (s, slot) == (0, 2):
                assert box == [None] * 4
            else:
                np.testing.assert_allclose(box, reading.cell(0, s, slot).box, atol=1e-4)
    assert [reading.labels[i] for i in data["none"]] == ["no object"]
    assert prompt["answer"] == 1  # the query that is surest at the last site
    assert data["none"][0] not in prompt["palette"]
    assert (data["threshold"], data["fewest"], data["noun"]) == (0.5, 5, "class")


def test_a_class_called_no_object_is_one_elsewhere(make_seen):
    assert held(page(make_seen(labels=["no object", *"abcd"])))["none"] == []


def test_independent_questions_are_said_to_be(make_seen, make_reading):
    said = "sigmoid: each probability is a question of its own, they do not sum to 1"
    assert held(page(make_seen("concepts", "sigmoid")))["independent"] == said
    assert held(page(make_seen()))["independent"] == held(page(make_reading()))["independent"] == ""


def test_pages_with_pictures_load_nothing_and_hold_no_markup(make_seen, make_detected, hostile):
    for reading in (make_seen(labels=hostile, n_pictures=2), make_detected(labels=hostile, targets=(0,))):
        text = page(reading)
        assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
        assert not re.findall(r"\b(?:src|href)=(?!\"data:,)", re.sub(r'id="data">.*', "", text))
        assert (text.count("<script"), text.count("</script")) == (2, 2)
        assert "img-src data:" in text
        text.encode("utf-8")
    (source,) = re.findall(r'srcdoc="([^"]*)"', embedded(reading))
    assert html.unescape(source) == page(reading)


def test_a_picture_without_patches_is_held(make_reading, make_seen):
    picture = replace(make_seen().prompts[0].pictures[0], grid=(0, 0), patches=())
    reading = make_reading()
    (prompt,) = held(page(replace(reading, prompts=(replace(reading.prompts[0], pictures=(picture,)),))))["prompts"]
    assert prompt["pictures"][0]["patches"] == prompt["pictures"][0]["palette"] == []
    assert held(page(make_seen().at(position=[])))["prompts"][0]["pictures"][0]["patches"] == []
