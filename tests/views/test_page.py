from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace

import numpy as np

from logitlab.views.grid_data import grid_data
from logitlab.views.page import embedded, lens_grid_path, module_text, page
from logitlab.views.tokens import visible

SCRIPT = '<script type="module">'


def held(text):
    """The JSON that a browser would find in the page."""
    start = text.index('<script type="application/json" id="data">')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script", start)])


def test_the_page_holds_the_data_and_the_module(make_reading):
    reading = make_reading(n_prompts=2, targets=(" Paris",))
    text = page(reading)
    assert held(text) == json.loads(json.dumps(grid_data(reading)))
    (script,) = re.findall(f"{SCRIPT}(.*?)</script>", text, re.DOTALL)
    source = lens_grid_path().read_bytes()
    assert module_text().encode() == source
    assert script.encode().startswith(source)
    rest = script[len(module_text()) :].strip().splitlines()
    assert len(rest) == 1
    assert rest[0].startswith("mount(")
    assert "<title>SmolLM2-135M-Instruct: logitlab</title>" in text


def test_the_policy_allows_this_script_and_style_and_nothing_else(make_reading):
    text = page(make_reading())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    allowed = {name: values.split() for name, _, values in (part.strip().partition(" ") for part in policy.split(";"))}
    for name, tag in (("style-src", "<style>(.*?)</style>"), ("script-src", f"{SCRIPT}(.*?)</script>")):
        (inline,) = re.findall(tag, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert allowed.pop(name) == [f"'sha256-{digest}'"]
    assert allowed.pop("img-src") == ["data:"]
    assert set(allowed) == {"default-src", "base-uri", "form-action"}
    assert all(values == ["'none'"] for values in allowed.values())


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
    assert f"<title>{html.escape(visible(hostile[0], space=' '))}: logitlab</title>" in text
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
    assert not re.search(r"\bstyle=|setAttribute\(\"style|cssText", text)  # which a strict policy would block


def test_the_frame_holds_the_page(make_reading):
    reading = make_reading()
    frame = embedded(reading)
    (source,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == page(reading)
    assert 'sandbox="allow-scripts allow-downloads"' in frame
    assert reading._repr_html_() == frame


def test_a_long_reading_stays_small(make_reading):
    words = [f" word{i}" for i in range(64)]
    reading = make_reading(n_sites=31, n_positions=2048, tokens=words, targets=(" word0",))
    random = np.random.default_rng(0)  # as many different tokens as a real vocabulary has
    ids = random.zipf(1.3, reading.arrays["top_id"].shape) % 49_152
    reading.arrays["top_id"][:] = ids
    reading = replace(reading, labels={int(i): f" token{i}" for i in np.unique(ids)})
    assert len(page(reading)) < 5_000_000


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
