from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from logitlab.views import colour
from logitlab.views.page import embedded, page
from logitlab.views.tokens import visible
from tests.views.conftest import screened, without

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=4000 "
    "--window-size=1280,900 --dump-dom"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture
def opened(tmp_path):
    """The document after Chromium ran its scripts; whatever it says on the console fails the test."""

    def open_page(text: str, state: str = "") -> str:
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"{file.as_uri()}{state}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
        assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
        return result.stdout

    return open_page


def driven(text: str, script: str) -> str:
    """The page with a second script that acts as the reader would and writes what it saw."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    tail = f"""<pre id="seen"></pre><script>
    {{
      const say = (value) => {{ document.getElementById("seen").textContent += JSON.stringify(value) + "\\n"; }};
      {script}
    }}
    </script></body>"""
    return text.replace("</body>", tail)


def seen(document: str) -> list[str]:
    (text,) = re.findall(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    return html.unescape(text).splitlines()


def cells(document: str) -> list[str]:
    found = re.findall(r'<div class="cell(?: now)?"(?: [\w-]+="[^"]*")*>([^<]*)</div>', document)
    return [html.unescape(text) for text in found]


def test_the_grid_is_drawn(make_reading, opened):
    reading = make_reading(n_sites=5, n_positions=4)
    document = opened(page(reading))
    expected = [visible(reading.cell(0, s, p).tokens[0]) for s in range(4, -1, -1) for p in range(4)]
    assert cells(document) == expected
    assert "✓ tail equals the model's logits within 1.9e-05" in document
    assert re.search(r'<div class="side[^>]*>3</div>', document)
    assert "Position 3 " in document  # the last position is pinned at first
    assert document.count("<svg") >= 3


def test_the_address_holds_the_state(make_reading, opened):
    reading = make_reading(n_prompts=2, n_sites=5, n_positions=4, targets=(" Paris",))
    document = opened(page(reading), "#prompt=1&cell=2,1&pin=0&colour=r0&theme=dark")
    cell = reading.cell(1, 2, 1)
    assert 'data-theme="dark"' in document
    assert "<h2>1.resid_post</h2>" in document
    assert f"rank {cell.target_ranks[0]}, " in document
    assert f"{cell.entropy:.3f} nats" in document
    assert 'Position 0 <bdi class="code">·Paris</bdi>' in document
    assert cells(document)[:4] == [visible(reading.cell(1, 4, p).tokens[0]) for p in range(4)]


@pytest.mark.parametrize("state", ["#cell=999,-4&pin=x&prompt=7&colour=constructor&theme=%3Cb%3E", "#%%%", "#cell=,"])
def test_a_bad_address_is_harmless(make_reading, opened, state):
    assert len(cells(opened(page(make_reading(n_sites=3, n_positions=2)), state))) == 6


def test_hostile_labels_are_text(make_reading, hostile, opened):
    reading = make_reading(n_prompts=2, n_sites=8, n_positions=20, tokens=hostile, targets=hostile)
    document = opened(page(reading), "#cell=3,0&pin=0")
    body = document[: document.index('<script type="application/json"')]
    assert "<img" not in body
    shown = cells(document)
    assert set(shown) <= {visible(token) for token in hostile}
    assert {"</script><img·src=x·onerror=alert(1)>", "∅", "\\x1b[31m", "&amp;"} <= set(shown)


def test_nothing_is_requested(make_reading, opened):
    text = driven(page(make_reading()), 'say(performance.getEntriesByType("resource").map((e) => e.name));')
    assert seen(opened(text)) == ["[]"]


def test_reading_with_mouse_and_keyboard(make_reading, opened):
    reading = make_reading(n_sites=6, n_positions=5)
    script = """
      const now = () => [document.activeElement.dataset.s, document.activeElement.dataset.p];
      const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const cell = (s, p) => document.querySelector(`.cell[data-s="${s}"][data-p="${p}"]`);
      cell(3, 1).dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
      say(document.querySelector("#detail h2").textContent);
      cell(2, 1).click();
      say([now(), location.hash, document.querySelectorAll('.cell[tabindex="0"]').length]);
      press("ArrowUp"); press("ArrowRight");
      say([now(), location.hash]);
      press("Enter"); press("End"); press("PageDown");
      say([now(), location.hash, document.getElementById("overTitle").textContent]);
      const choose = document.getElementById("colour");
      choose.value = "kl"; choose.dispatchEvent(new Event("change"));
      document.getElementById("theme").click();
      say([location.hash, document.documentElement.dataset.theme, document.getElementById("low").textContent]);
    """
    assert seen(opened(driven(page(reading), script))) == [
        '"2.resid_post"',
        '[["2","1"],"#cell=2,1&pin=1",1]',
        '[["3","2"],"#cell=3,2&pin=1"]',
        '[["0","4"],"#cell=0,4&pin=2","Position 2 ·the over the sites"]',
        '["#cell=0,4&pin=2&colour=kl&theme=dark","dark","0"]',
    ]


DETAILS = """
  const facts = () => [...document.querySelectorAll("#detail dt")]
    .map((n) => [n.textContent, n.nextSibling.textContent]);
  const over = (s, p) => document.querySelector(`.cell[data-s="${s}"][data-p="${p}"]`)
    .dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  const shades = () => [...document.querySelectorAll("#colour option")].map((n) => n.value);
  const charts = () => [...document.querySelectorAll("#charts h3")].map((n) => n.textContent);
"""


def test_a_page_without_entropy_and_divergence(make_reading, opened):
    reading = make_reading(n_prompts=2, n_sites=4, n_positions=3, targets=(" Paris",))
    for absent in (("entropy", "kl"), ("entropy",), ("kl",)):
        script = f"""{DETAILS}
          say(shades()); say(charts()); over(2, 1); say(facts());
          say(document.getElementById("colour").value);
        """
        document = opened(driven(page(without(reading, *absent)), script), "#prompt=1&colour=" + absent[-1])
        lines = [json.loads(line) for line in seen(document)]
        there = [name for name in ("entropy", "kl") if name not in absent]
        cell = reading.cell(1, 2, 1)
        titles = {"entropy": "entropy", "kl": "KL to the final distribution"}
        assert lines[0] == ["top", *there, "p0", "r0"]
        assert lines[1] == ["probability", "rank", *(["entropy, nats"] if "entropy" in there else [])]
        *facts, (label, rank) = lines[2]
        assert facts == [[titles[name], f"{getattr(cell, name):.3f} nats"] for name in there]
        assert label == "·Paris"
        assert rank.startswith(f"rank {cell.target_ranks[0]}, ")
        assert lines[3] == "top"  # the address asks for a shade that is not there
        assert len(cells(document)) == 12


def test_a_cell_says_how_far_off_screening_can_have_put_it(make_reading, opened):
    reading = screened(make_reading(n_sites=4, n_positions=4), (0, 3.21e-4, 7.04e-9, np.nan))
    script = f"{DETAILS} say(shades()); for (const p of [0, 1, 2, 3]) {{ over(2, p); say(facts().slice(2)); }}"
    lines = [json.loads(line) for line in seen(opened(driven(page(reading), script)))]
    assert lines[0] == ["top", "entropy", "kl"]
    said = ["0 (done in full)", "3.3e-4 nats", "7.1e-9 nats", "–"]
    assert lines[1:] == [[["screening: off by at most", text]] for text in said]
    plain = opened(driven(page(make_reading(n_sites=4, n_positions=4)), f"{DETAILS} say(facts().length);"))
    assert seen(plain) == ["2"]


def test_long_prompts_draw_only_what_is_in_view(make_reading, opened):
    script = """
      const grid = document.getElementById("grid");
      const columns = () => [...document.querySelectorAll(".head .top")].map((c) => Number(c.dataset.p));
      window.requestAnimationFrame = (draw) => draw();  // no frames are drawn while the document is dumped
      const scroll = (left) => { grid.scrollLeft = left; grid.dispatchEvent(new Event("scroll")); };
      const start = columns();
      say([start.includes(1023), start.length < 60, document.querySelectorAll(".cell").length === 31 * start.length]);
      scroll(0);
      say([columns()[0], columns().length < 60, grid.tabIndex]);
      scroll(grid.scrollWidth / 2);
      const middle = columns(), box = grid.getBoundingClientRect();
      const place = document.querySelector(`.top[data-p="${middle[5]}"]`).getBoundingClientRect();
      say([middle[0] > 480 && middle[0] < 540, place.left > box.left && place.right < box.right]);
    """
    document = opened(driven(page(make_reading(n_sites=31, n_positions=1024)), script))
    assert seen(document) == ["[true,true,true]", "[0,true,0]", "[true,true]"]


def test_lines_are_open_where_a_token_is_not_known(make_reading, opened):
    reading = make_reading(n_sites=3, n_positions=1, k=1, tokens=(" a", " b", " c"))
    reading.arrays["top_id"][0, :, 0, 0] = [0, 1, 0]
    reading.arrays["top_logprob"][0, :, 0, 0] = [-0.1, -0.2, -0.3]
    paths = re.findall(r'<path d="(M[^"]*)" fill="none"', opened(page(reading)))
    assert [path.count("M") for path in paths] == [2, 1, 2, 1, 1]
    assert ["L" in path for path in paths] == [False, False, False, False, True]


def test_every_target_has_a_line_of_its_own(make_reading, opened):
    reading = make_reading(n_sites=3, n_positions=1, targets=[f" t{i}" for i in range(7)])
    document = opened(page(reading))
    key = document[document.index('<div id="key">') : document.index('<div id="charts">')]
    looks = re.findall(r'stroke="([^"]*)" stroke-width="2.5" stroke-dasharray="([^"]*)"', key)
    assert len(looks) == len(set(looks)) == 7


def test_empty_reading_and_frame(make_reading, opened):
    assert "nothing was read" in opened(page(make_reading().at(position=[])))
    assert "<iframe" in opened(embedded(make_reading(n_prompts=2)))


PATCHES = """
  const patch = (row, column) => document.querySelector(`.patch[data-row="${row}"][data-column="${column}"]`);
  const parts = "#detail h2, #detail bdi, #detail .bars .code, #detail .bars > :nth-child(3n)";
  const detail = () => [...document.querySelectorAll(parts)].map((n) => n.textContent);
  const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const get = (id) => document.getElementById(id), text = (id) => get(id).textContent;
  const slide = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); };
  const count = (which) => document.querySelectorAll(which).length;
  const key = () => [...document.querySelectorAll("#swatches li")].map((n) => n.textContent);
"""


def test_the_patches_of_a_picture(make_seen, opened):
    reading = make_seen(k=2)
    script = f"""{PATCHES}
      say([text("layerName"), text("answer"), get("photo").naturalWidth, get("limits").hidden]);
      say([...document.querySelectorAll(".patch")].map((n) => n.getAttribute("aria-label")));
      slide("layer", 0);
      say([text("layerName"), text("answer"), patch(1, 2).getAttribute("aria-label")]);
      over(patch(1, 2)); say(detail());
      patch(1, 2).click();
      say([location.hash, document.querySelector(".cell.now").textContent, document.activeElement === patch(1, 2)]);
      press("ArrowDown"); say([detail()[1], document.activeElement.dataset.slot, location.hash]);
      press("Enter"); say([location.hash, count('.patch[tabindex="0"]'), count(".patch.now")]);
      say([patch(0, 0).style.background, getComputedStyle(patch(0, 0)).left, key()]);
    """
    lines = [json.loads(line) for line in seen(opened(driven(page(reading), script)))]

    def spoken(site, slot):
        cell = reading.cell(0, site, slot)
        return f"{cell.tokens[0]} {chance(cell.probabilities[0])}"

    places = {(row, column): p for p, row, column in reading.prompts[0].pictures[0].patches}
    slot, below = places[1, 2], places[2, 2]
    assert lines[0] == ["2.resid_post", f"answer at pooled: {spoken(2, 17)}", 64, True]
    assert lines[1] == [f"patch {row},{column}: {spoken(2, p)}" for (row, column), p in places.items()]
    assert lines[2] == ["0.resid_post", f"answer at pooled: {spoken(0, 17)}", f"patch 1,2: {spoken(0, slot)}"]
    cell = reading.cell(0, 0, slot)
    bars = [text for t, p in zip(cell.tokens, cell.probabilities, strict=True) for text in (t, chance(p))]
    assert lines[3] == ["0.resid_post", "patch 1,2", *bars]
    assert lines[4] == [f"#cell=0,{slot}&pin={slot}", cell.tokens[0], True]
    assert lines[5] == ["patch 2,2", str(below), f"#cell=0,{slot}&pin={slot}"]
    assert lines[6] == [f"#cell=0,{below}&pin={below}", 1, 1]
    tops = [reading.cell(0, 0, p).tokens[0] for p in places.values()]
    shown = {re.sub(r"\d+$", "", entry): int(re.search(r"\d+$", entry)[0]) for entry in lines[7][2]}
    others = shown.pop("others", 0)
    assert shown == {label: tops.count(label) for label in shown}
    assert sum(shown.values()) + others == 16
    assert lines[7][0].startswith("rgba(")
    assert lines[7][1] == "0px"


def chance(p):
    """As the page writes a probability."""
    return f"{100 * p:.1f}%" if p >= 0.0995 else f"{100 * p:.2g}%" if p >= 0.0001 else f"{p:.1e}"


def test_the_boxes_of_a_detector(make_detected, opened):
    reading = make_detected()
    script = f"""{PATCHES}
      const boxes = () => [...document.querySelectorAll(".box")].map((n) => n.getAttribute("aria-label")).sort();
      say([boxes(), text("answer"), key().sort()]);
      slide("limit", 100); say([boxes().length, count(".box.dashed"), text("answer"), location.hash]);
      slide("layer", 0); slide("limit", 0); say(boxes());
      const cat = document.querySelector('.box[data-slot="1"]');
      say([cat.style.left, cat.style.top, cat.style.width, cat.style.height]);
      over(cat); say(detail().slice(0, 2));
      cat.focus(); press("Enter"); say([location.hash, document.activeElement.dataset.slot]);
      get("overlay").click(); say(get("marks").hidden);
    """
    lines = [json.loads(line) for line in seen(opened(driven(page(reading), script)))]

    def spoken(site, least):
        found = []
        for slot in range(4):
            cell = reading.cell(0, site, slot)
            i = next(i for i, token in enumerate(cell.tokens) if token != "no object")
            if cell.probabilities[i] > least:
                found.append(f"query {slot}: {cell.tokens[i]} {chance(cell.probabilities[i])}")
        return found

    assert lines[0][:2] == [spoken(2, 0.5), f"{len(spoken(2, 0.5))} of 4 queries above 50%"]
    assert lines[0][2] == ["cat1", "dog1", "remote1"]
    assert lines[1] == [4, 4, "no query above 100%; the 4 best are dashed", "#cell=2,1&pin=1&limit=100"]
    assert lines[2] == spoken(0, 0)
    assert [round(float(side.rstrip("%"))) for side in lines[3]] == [40, 25, 40, 50]
    assert lines[4] == ["0.resid_post", "query 1"]
    assert lines[5] == ["#cell=0,1&pin=1&limit=0", "1"]
    assert lines[6] is True


def test_pictures_with_hostile_labels(make_seen, make_detected, hostile, opened):
    for reading in (make_seen(labels=hostile, n_pictures=2), make_detected(labels=hostile, n_queries=12)):
        document = opened(page(reading), "#cell=1,3&limit=1")
        body = document[: document.index('<script type="application/json"')]
        assert body.count("<img") == 1  # the picture
        assert 'src="data:image/png;base64,' in body
        shown = re.findall(r'<bdi class="code" title="[^"]*">([^<]*)</bdi>', body)
        assert {html.unescape(text) for text in shown} <= {visible(t, space=" ") for t in hostile} | {"others"}


def test_two_pictures_and_targets(make_seen, opened):
    reading = make_seen("vocabulary", n_pictures=2, targets=(3,))
    script = f"""{PATCHES}
      const first = get("photo").src;
      say([...document.querySelectorAll("#picture option")].map((n) => n.textContent));
      const choose = get("picture");
      choose.value = 1; choose.dispatchEvent(new Event("change"));
      say([patch(0, 0).dataset.slot, get("photo").src === first, location.hash]);
      const shade = get("colour");
      shade.value = "p0"; shade.dispatchEvent(new Event("change"));
      say([text("note"), key(), patch(0, 0).style.background]);
    """
    lines = [json.loads(line) for line in seen(opened(driven(page(reading), script)))]
    assert lines[0] == ["picture 1 of 2", "picture 2 of 2"]
    assert lines[1] == ["17", False, "#cell=2,36&pin=36&picture=1"]
    steps = colour.table()
    back, _ = steps[round(reading.cell(0, 2, 17).target_probabilities[0] * (len(steps) - 1))]
    rgb = ", ".join(str(int(back[i : i + 2], 16)) for i in (1, 3, 5))
    assert lines[2][:2] == ["shade: probability of sky", []]
    assert lines[2][2].startswith(f"rgba({rgb}, 0.65")


def test_a_picture_without_patches_is_shown(make_reading, make_seen, opened):
    picture = replace(make_seen().prompts[0].pictures[0], grid=(0, 0), patches=())
    reading = make_reading(n_sites=2, n_positions=2)
    reading = replace(reading, prompts=(replace(reading.prompts[0], pictures=(picture,)),))
    script = f"""{PATCHES}
      const there = (id) => get(id).getClientRects().length > 0;
      say(["view", "photo", "layers", "limits", "overlays", "grid"].map(there));
    """
    assert seen(opened(driven(page(reading), script))) == ["[true,true,false,false,false,true]"]
    assert seen(opened(driven(page(make_reading()), f"{PATCHES}say(get('view').hidden);"))) == ["true"]
