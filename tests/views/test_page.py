from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from logitlab.views.page import SCALE, embedded, page, page_data
from logitlab.views.tokens import visible


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
