from __future__ import annotations

import base64
import csv
import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from logitlab.views import colour
from logitlab.views.grid_data import grid_data, packed
from logitlab.views.page import embedded, module_text, page
from logitlab.views.tokens import visible
from tests.browser import browser, open_tab, strict_document, tab
from tests.views.conftest import screened, without

__all__ = ["browser", "open_tab", "strict_document", "tab"]
pytestmark = pytest.mark.browser

HELPERS = """
  const root = document.getElementById("lens").shadowRoot, said = [], say = (value) => said.push(value);
  const get = (which) => root.querySelector(which), all = (which) => [...root.querySelectorAll(which)];
  const texts = (which) => all(which).map((n) => n.textContent), text = (which) => get(which).textContent;
  const cell = (s, p) => get(`.cell[data-s="${s}"][data-p="${p}"]`);
  const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  const press = (key) => root.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const set = (which, value, kind = "change") => {
    get(which).value = value;
    get(which).dispatchEvent(new Event(kind));
  };
  const facts = () => all(".detail dt").map((n) => [n.textContent, n.nextSibling.textContent]);
  const shades = () => all(".colour option").map((n) => n.value);
  const charts = () => texts(".charts h4");
  const described = () => all(".cell").map((n) =>
    [n.dataset.s, n.dataset.p, n.textContent, n.style.background, n.getAttribute("aria-label")].join());
  const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
"""


@pytest.fixture
def opened(tab, tmp_path):
    """``opened(text, state)`` is the tab with that page in it."""

    def open_page(text: str, state: str = "", where=tab):
        file = tmp_path / f"page{len(list(tmp_path.iterdir()))}.html"
        file.write_text(text, encoding="utf-8")
        where.goto(f"{file.as_uri()}{state}")
        return where

    return open_page


def seen(tab, script):
    """What the script says, which acts as the reader would."""
    return tab.evaluate(f"async () => {{ {HELPERS} {script}; return said; }}")


def cells(tab):
    return seen(tab, "say(texts('.cell'))")[0]


def markup(tab):
    """All that is drawn, as markup."""
    return seen(tab, "say(root.innerHTML)")[0]


def test_the_grid_is_drawn(make_reading, opened):
    reading = make_reading(n_sites=5, n_positions=4)
    tab = opened(page(reading))
    assert cells(tab) == [visible(reading.cell(0, s, p).tokens[0]) for s in range(4, -1, -1) for p in range(4)]
    script = "say(text('.verified')); say(texts('.side')); say(text('.over-title')); say(all('.charts svg').length)"
    assert seen(tab, script) == [
        "✓ tail equals the model's logits within 1.9e-05",
        ["", "3", "2", "1", "0", "in"],
        "Position 3 ·a over the sites",  # the last position is pinned at first
        4,
    ]
    assert tab.title() == "SmolLM2-135M-Instruct: logitlab"


def test_the_address_holds_the_state(make_reading, opened):
    reading = make_reading(n_prompts=2, n_sites=5, n_positions=4, targets=(" Paris",))
    tab = opened(page(reading), "#prompt=1&cell=2,1&pin=0&colour=r0&theme=dark")
    cell = reading.cell(1, 2, 1)
    script = "say(get('.lens').dataset.theme); say(text('.detail h3')); say(facts()); say(text('.over-title'))"
    theme, site, facts, title = seen(tab, script)
    assert (theme, site, title) == ("dark", "1.resid_post", "Position 0 ·Paris over the sites")
    assert facts[0] == ["entropy", f"{cell.entropy:.3f} nats"]
    assert facts[2][1].startswith(f"rank {cell.target_ranks[0]}, ")
    assert cells(tab)[:4] == [visible(reading.cell(1, 4, p).tokens[0]) for p in range(4)]


@pytest.mark.parametrize(
    "state", ["#cell=999,-4&pin=x&prompt=7&colour=constructor&theme=%3Cb%3E&stride=3", "#%%%", "#cell=,", "#stride=-1"]
)
def test_a_bad_address_is_harmless(make_reading, opened, state):
    assert len(cells(opened(page(make_reading(n_sites=3, n_positions=2)), state))) == 6


def test_hostile_labels_are_text(make_reading, hostile, opened):
    reading = make_reading(n_prompts=2, n_sites=8, n_positions=20, tokens=hostile, targets=hostile)
    reading = replace(reading, provenance={**reading.provenance, "model": hostile[0], hostile[0]: hostile[1]})
    tab = opened(page(reading), "#cell=3,0&pin=0")
    assert seen(tab, "say(root.querySelectorAll('img, script, b').length)") == [0]
    assert "<img" not in markup(tab)
    shown = cells(tab)
    assert set(shown) <= {visible(token) for token in hostile}
    assert {"</script><img·src=x·onerror=alert(1)>", "∅", "\\x1b[31m", "&amp;"} <= set(shown)
    assert tab.title() == f"{hostile[0]}: logitlab"


def test_nothing_is_requested(make_reading, opened):
    tab = opened(page(make_reading()))
    assert seen(tab, 'say(performance.getEntriesByType("resource").map((e) => e.name));') == [[]]


def test_reading_with_mouse_and_keyboard(make_reading, opened):
    reading = make_reading(n_sites=6, n_positions=5)
    script = """
      const now = () => [root.activeElement.dataset.s, root.activeElement.dataset.p];
      over(cell(3, 1));
      say(text(".detail h3"));
      cell(2, 1).click();
      say([now(), location.hash, all('.cell[tabindex="0"]').length]);
      press("ArrowUp"); press("ArrowRight");
      say([now(), location.hash]);
      press("Enter"); press("End"); press("PageDown");
      say([now(), location.hash, text(".over-title")]);
      say([text(".live"), all('[aria-selected="true"]').length]);
      set(".colour", "kl");
      get(".theme").click();
      say([location.hash, get(".lens").dataset.theme, text(".low")]);
    """
    assert seen(opened(page(reading)), script) == [
        "2.resid_post",
        [["2", "1"], "#cell=2,1&pin=1", 1],
        [["3", "2"], "#cell=3,2&pin=1"],
        [["0", "4"], "#cell=0,4&pin=2", "Position 2 ·the over the sites"],
        [f"site 0.resid_pre, position 4 ·city: {spoken(reading, 0, 4)}", 1],
        ["#cell=0,4&pin=2&colour=kl&theme=dark", "dark", "0"],
    ]


def test_a_page_without_entropy_and_divergence(make_reading, opened):
    reading = make_reading(n_prompts=2, n_sites=4, n_positions=3, targets=(" Paris",))
    for absent in (("entropy", "kl"), ("entropy",), ("kl",)):
        script = "say(shades()); say(charts()); over(cell(2, 1)); say(facts()); say(get('.colour').value);"
        tab = opened(page(without(reading, *absent)), "#prompt=1&colour=" + absent[-1])
        lines = seen(tab, script)
        there = [name for name in ("entropy", "kl") if name not in absent]
        cell = reading.cell(1, 2, 1)
        titles = {"entropy": "entropy", "kl": "KL to the final distribution"}
        assert lines[0] == ["top", *there, "p0", "r0"]
        assert lines[1] == ["probability", "rank", *(f"{titles[name]}, nats" for name in there)]
        *facts, (label, rank) = lines[2]
        assert facts == [[titles[name], f"{getattr(cell, name):.3f} nats"] for name in there]
        assert label == "·Paris"
        assert rank.startswith(f"rank {cell.target_ranks[0]}, ")
        assert lines[3] == "top"  # the address asks for a shade that is not there
        assert len(cells(tab)) == 12


def test_a_cell_says_how_far_off_screening_can_have_put_it(make_reading, opened):
    bounds = (0, 3.21e-4, 7.04e-9, np.nan, 2e-3, np.inf, 9.99e-5)
    reading = screened(make_reading(n_sites=4, n_positions=7), bounds)
    script = "say(shades()); for (let p = 0; p < 7; p++) { over(cell(2, p)); say(facts().slice(2)); }"
    lines = seen(opened(page(reading)), script)
    assert lines[0] == ["top", "entropy", "kl"]
    said = ["0 (done in full)", "3.3e-4 nats", "7.1e-9 nats", "–", "2.0e-3 nats", "∞ nats", "1.0e-4 nats"]
    assert lines[1:] == [[["screening: off by at most", text]] for text in said]
    assert seen(opened(page(make_reading(n_sites=4, n_positions=4))), "say(facts().length);") == [2]


def test_long_prompts_draw_only_what_is_in_view(make_reading, opened):
    script = """
      const columns = () => all(".head .top").map((c) => Number(c.dataset.p)), grid = get(".grid");
      const scroll = async (left) => { grid.scrollLeft = left; await frame(); };
      const start = columns();
      const rows = all(".row:not(.head)").length;
      say([start.includes(1023), start.length < 60, all(".cell").length === rows * start.length]);
      await scroll(0);
      say([columns()[0], columns().length < 60, grid.tabIndex]);
      await scroll(grid.scrollWidth / 2);
      const middle = columns(), box = grid.getBoundingClientRect();
      const place = get(`.top[data-p="${middle[5]}"]`).getBoundingClientRect();
      say([middle[0] > 480 && middle[0] < 540, place.left > box.left && place.right < box.right]);
    """
    tab = opened(page(make_reading(n_sites=31, n_positions=1024)))
    assert seen(tab, script) == [[True, True, True], [0, True, 0], [True, True]]


def test_lines_are_open_where_a_token_is_not_known(make_reading, opened):
    reading = make_reading(n_sites=3, n_positions=1, k=1, tokens=(" a", " b", " c"))
    reading.arrays["top_id"][0, :, 0, 0] = [0, 1, 0]
    reading.arrays["top_logprob"][0, :, 0, 0] = [-0.1, -0.2, -0.3]
    (paths,) = seen(opened(page(reading)), "say(all('.charts path').map((n) => n.getAttribute('d')))")
    assert [path.count("M") for path in paths] == [2, 1, 2, 1, 1, 1]
    assert ["L" in path for path in paths] == [False, False, False, False, True, True]


def test_every_target_has_a_line_of_its_own(make_reading, opened):
    reading = make_reading(n_sites=3, n_positions=1, targets=[f" t{i}" for i in range(7)])
    script = (
        "say(all('.key path').map((n) => [n.getAttribute('stroke'), n.getAttribute('stroke-dasharray')].join('|')))"
    )
    (looks,) = seen(opened(page(reading)), script)
    assert len(looks) == len(set(looks)) == 7


def test_empty_reading_and_frame(make_reading, opened, tab):
    assert seen(opened(page(make_reading().at(position=[]))), "say(text('.grid'))") == ["nothing was read"]
    opened(f"<!doctype html><title>notebook</title>{embedded(make_reading(n_prompts=2, n_sites=3))}")
    frame = tab.frames[1]
    frame.wait_for_selector(".cell")
    assert frame.locator(".cell").count() == 18
    frame.locator(".copy").click()
    with tab.expect_download() as saved:  # a sandboxed frame has no clipboard
        frame.locator('[data-kind="csv"]').click()
    assert saved.value.path().read_text(encoding="utf-8").count("\n") == 19
    assert frame.locator(".status").inner_text().startswith("saved as CSV: 18 cells: ")


# -- pictures ----------------------------------------------------------------------------------

PICTURES = """
  const patch = (row, column) => get(`.patch[data-row="${row}"][data-column="${column}"]`);
  const detail = () => texts(".detail h3, .detail bdi, .detail .bars .code, .detail .bars > :nth-child(3n)");
  const key = () => texts(".swatches li"), count = (which) => all(which).length;
"""


def chance(p):
    """As the page writes a probability."""
    return f"{100 * p:.1f}%" if p >= 0.0995 else f"{100 * p:.2g}%" if p >= 0.0001 else f"{p:.1e}"


def spoken(reading, site, slot):
    cell = reading.cell(0, site, slot)
    space = "·" if reading.space == "vocabulary" else " "
    return f"{visible(cell.tokens[0], space=space)} {chance(cell.probabilities[0])}"


def test_the_patches_of_a_picture(make_seen, opened):
    reading = make_seen(k=2)
    script = f"""{PICTURES}
      await get(".photo").decode();
      say([text(".layer-name"), text(".answer"), get(".photo").naturalWidth, get(".limits").hidden]);
      say(all(".patch").map((n) => n.getAttribute("aria-label")));
      set(".layer", 0, "input");
      say([text(".layer-name"), text(".answer"), patch(1, 2).getAttribute("aria-label")]);
      over(patch(1, 2)); say(detail());
      patch(1, 2).click();
      say([location.hash, text(".cell.now"), root.activeElement === patch(1, 2)]);
      press("ArrowDown"); say([detail()[1], root.activeElement.dataset.slot, location.hash]);
      press("Enter"); say([location.hash, count('.patch[tabindex="0"]'), count(".patch.now")]);
      say([patch(0, 0).style.background, getComputedStyle(patch(0, 0)).left, key()]);
    """
    lines = seen(opened(page(reading)), script)
    places = {(row, column): p for p, row, column in reading.prompts[0].pictures[0].patches}
    slot, below = places[1, 2], places[2, 2]
    assert lines[0] == ["2.resid_post", f"answer at pooled: {spoken(reading, 2, 17)}", 64, True]
    assert lines[1] == [f"patch {row},{column}: {spoken(reading, 2, p)}" for (row, column), p in places.items()]
    said = [f"answer at pooled: {spoken(reading, 0, 17)}", f"patch 1,2: {spoken(reading, 0, slot)}"]
    assert lines[2] == ["0.resid_post", *said]
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


def test_the_boxes_of_a_detector(make_detected, opened):
    reading = make_detected()
    script = f"""{PICTURES}
      const boxes = () => all(".box").map((n) => n.getAttribute("aria-label")).sort();
      say([boxes(), text(".answer"), key().sort()]);
      set(".limit", 100, "input"); say([boxes().length, count(".box.dashed"), text(".answer"), location.hash]);
      set(".layer", 0, "input"); set(".limit", 0, "input"); say(boxes());
      const cat = get('.box[data-slot="1"]');
      say([cat.style.left, cat.style.top, cat.style.width, cat.style.height]);
      over(cat); say(detail().slice(0, 2));
      cat.focus(); press("Enter"); say([location.hash, root.activeElement.dataset.slot]);
      get(".overlay").click(); say(get(".marks").hidden);
    """
    lines = seen(opened(page(reading)), script)

    def found(site, least):
        lines = []
        for slot in range(4):
            cell = reading.cell(0, site, slot)
            i = next(i for i, token in enumerate(cell.tokens) if token != "no object")
            if cell.probabilities[i] > least:
                lines.append(f"query {slot}: {cell.tokens[i]} {chance(cell.probabilities[i])}")
        return lines

    assert lines[0][:2] == [found(2, 0.5), f"{len(found(2, 0.5))} of 4 queries above 50%"]
    assert lines[0][2] == ["cat1", "dog1", "remote1"]
    assert lines[1] == [4, 4, "no query above 100%; the 4 best are dashed", "#cell=2,1&pin=1&limit=100"]
    assert lines[2] == found(0, 0)
    assert [round(float(side.rstrip("%"))) for side in lines[3]] == [40, 25, 40, 50]
    assert lines[4] == ["0.resid_post", "query 1"]
    assert lines[5] == ["#cell=0,1&pin=1&limit=0", "1"]
    assert lines[6] is True


def test_pictures_with_hostile_labels(make_seen, make_detected, hostile, opened):
    for reading in (make_seen(labels=hostile, n_pictures=2), make_detected(labels=hostile, n_queries=12)):
        tab = opened(page(reading), "#cell=1,3&limit=1")
        script = "say(all('img').map((n) => n.src.slice(0, 22))); say(texts('bdi.code[title]'))"
        pictures, shown = seen(tab, script)
        assert markup(tab).count("<img") == 1  # the picture
        assert pictures == ["data:image/png;base64,"]
        assert set(shown) <= {visible(t, space=" ") for t in hostile} | {"others"}


def test_two_pictures_and_targets(make_seen, opened):
    reading = make_seen("vocabulary", n_pictures=2, targets=(3,))
    script = f"""{PICTURES}
      const first = get(".photo").src;
      say(texts(".picture-choice option"));
      set(".picture-choice", 1);
      say([patch(0, 0).dataset.slot, get(".photo").src === first, location.hash]);
      set(".colour", "p0");
      say([text(".note"), key(), patch(0, 0).style.background]);
    """
    lines = seen(opened(page(reading)), script)
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
    script = """
      const there = (which) => get(which).getClientRects().length > 0;
      say([".view", ".photo", ".layers", ".limits", ".overlays", ".grid"].map(there));
    """
    assert seen(opened(page(reading)), script) == [[True, True, False, False, False, True]]
    assert seen(opened(page(make_reading())), "say(get('.view').hidden);") == [True]


# -- many cells ----------------------------------------------------------------------------------


def test_a_large_grid_draws_few_cells_wherever_it_is_scrolled(make_reading, opened):
    script = """
      const grid = get(".grid"), number = (node, name) => Number(node.getAttribute(name));
      const sorted = (list) => list.every((v, i) => !i || v === list[i - 1] + 1);
      // What is in view is drawn, in the order of the document, and says of itself where it is.
      const right = () => {
        const box = grid.getBoundingClientRect(), rows = all(".row:not(.head)"), parts = [0.3, 0.6, 0.9];
        const at = (x, y) => root.elementFromPoint(box.left + x * box.width, box.top + y * box.height);
        const drawn = parts.every((x) => parts.every((y) => {
          const cell = at(x, y)?.closest(".cell");
          if (!cell) return false;
          const row = Math.floor((grid.scrollTop + y * box.height - 1 - 42) / 23), wide = parseFloat(cell.style.width);
          const side = parseFloat(get(".side").style.width);
          const column = Math.floor((grid.scrollLeft + x * box.width - 1 - side) / wide);
          return cell.dataset.s === String(99 - row) && cell.dataset.p === String(column);
        }));
        const numbers = all(".cell").every((n) => number(n, "aria-colindex") === Number(n.dataset.p) + 2
          && number(n.parentNode, "aria-rowindex") === 99 - Number(n.dataset.s) + 2);
        const inOrder = [grid.querySelector(".head"), ...rows].every((row) =>
          sorted([...row.querySelectorAll(".cell, .top")].map((n) => number(n, "aria-colindex"))));
        return drawn && numbers && inOrder && sorted(rows.map((row) => number(row, "aria-rowindex")));
      };
      say([grid.getAttribute("aria-rowcount"), grid.getAttribute("aria-colcount")]);
      const counts = [], fine = [];
      const places = [[0, 0], [1, 0], [0.5, 0.5], [0.5004, 0.51], [0.503, 0.49], [0, 1], [1, 1], [0.2, 1], [0.21, 0.2]];
      for (const [x, y] of places) {
        [grid.scrollLeft, grid.scrollTop] = [x * grid.scrollWidth, y * grid.scrollHeight];
        await frame();
        counts.push(all(".cell").length); fine.push(right());
      }
      say(Math.max(...counts)); say(fine);
      // On a small step the elements are the same, and only those of one column get other texts.
      const touched = new Set(), before = new Set(all(".cell")), step = parseFloat(get(".cell").style.width);
      new MutationObserver((list) => { for (const m of list) if (m.target.matches?.(".cell")) touched.add(m.target); })
        .observe(root, { subtree: true, childList: true });
      grid.scrollLeft += step; await frame();
      say([touched.size, all(".row:not(.head)").length, all(".cell").every((n) => before.has(n))]);
    """
    tab = opened(page(make_reading(n_sites=100, n_positions=2048)))
    counts, most, fine, recycled = seen(tab, script)
    assert counts == ["101", "2049"]
    assert most < 1500
    assert fine == [True] * 9
    touched, rows, same = recycled
    assert touched == rows
    assert same


def test_thinning_keeps_the_last_layer(make_reading, opened):
    reading = make_reading(n_sites=12, n_positions=3)
    script = """
      say(texts(".stride option"));
      cell(8, 1).click();
      set(".stride", 4);
      say([texts(".side"), get(".grid").getAttribute("aria-rowcount"), location.hash]);
      say(all(".row").map((n) => n.getAttribute("aria-rowindex")));
      say(texts(".cell"));
      get(".cell.now").focus(); press("ArrowUp"); say(location.hash);
      press("PageDown"); press("ArrowDown"); say(location.hash);
      set(".stride", 1);
      say([all(".row").length, location.hash]);
    """
    lines = seen(opened(page(reading)), script)
    assert lines[0] == ["all", "every 2nd", "every 4th", "every 8th"]
    assert lines[1] == [["", "10", "6", "2"], "4", "#cell=7,1&pin=1&stride=4"]
    assert lines[2] == ["1", "2", "3", "4"]
    assert lines[3] == [visible(reading.cell(0, s, p).tokens[0]) for s in (11, 7, 3) for p in range(3)]
    assert lines[4:] == ["#cell=11,1&pin=1&stride=4", "#cell=3,1&pin=1&stride=4", [13, "#cell=3,1&pin=1"]]
    tab = opened(page(reading), "#cell=8,1&pin=0&stride=8")
    assert seen(tab, "say(texts('.side')); say(location.hash); say(text('.cell.now'))") == [
        ["", "10", "2"],
        "#cell=8,1&pin=0&stride=8",
        visible(reading.cell(0, 11, 1).tokens[0]),
    ]


def test_equal_tokens_are_columns_of_their_own(make_reading, opened):
    tab = opened(page(make_reading(n_sites=3, n_positions=5, tokens=(" the",) * 5, k=2)))
    assert seen(tab, "say(texts('.top'))") == [[f"{i}·the" for i in range(5)]]


def test_curves_are_of_the_tokens_that_peak_highest_anywhere(make_reading, opened):
    reading = make_reading(n_sites=6, n_positions=2, k=1, tokens=[f" t{i}" for i in range(8)])
    peaks = {0: 0.9, 1: 0.3, 2: 0.8, 3: 0.5, 4: 0.6, 5: 0.2}  # of the top token at each site
    for site, peak in peaks.items():
        reading.arrays["top_id"][0, site, 1, 0] = site
        reading.arrays["top_logprob"][0, site, 1, 0] = np.log(peak)
    (shown,) = seen(opened(page(reading)), "say(texts('.key bdi'))")
    assert shown == [f"·t{i}" for i in sorted(peaks, key=lambda i: -peaks[i])][:5]
    assert "·t5" not in shown  # the last site's


def test_a_few_far_values_do_not_stretch_the_scale(make_reading, opened):
    reading = make_reading(n_sites=31, n_positions=8)
    reading.arrays["kl"][:] = np.linspace(0, 4, 31 * 8).reshape(1, 31, 8)
    reading.arrays["kl"][0, 0, :] = 200.0
    script = "say(text('.high')); for (const s of [0, 30]) say(cell(s, 7).style.background)"
    end, far, largest = seen(opened(page(reading), "#colour=kl"), script)
    usual = np.sort(reading.arrays["kl"].ravel())[int(0.95 * (31 * 8 - 1))]
    assert end == f"≥ {usual:.1f} nats"
    assert far == largest  # both at the end of the scale
    reading.arrays["kl"][0, 0, :] = 4.5  # no far values: the scale is whole
    assert seen(opened(page(reading), "#colour=kl"), "say(text('.high'))") == ["4.5 nats"]


def test_what_is_infinite_does_not_stretch_the_scale(make_reading, opened):
    reading = make_reading(n_sites=3, n_positions=3)
    reading.arrays["kl"][0, 0] = (np.inf, 2.5, np.nan)
    reading.arrays["kl"][0, 1:] = 0.5
    script = "say(text('.high')); over(cell(0, 0)); say(facts()[1][1]); over(cell(0, 2)); say(facts()[1][1]);"
    script += "for (const p of [0, 1, 2]) say(cell(0, p).style.background)"
    *said, infinite, largest, missing = seen(opened(page(reading), "#colour=kl"), script)
    assert said == ["2.5 nats", "∞ nats", "–"]
    assert infinite == largest != ""
    assert missing == ""


# -- what can be copied ----------------------------------------------------------------------------

CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}


def copied(tab, kind):
    """What the menu puts on the clipboard, and what it says it did."""
    tab.get_by_role("button", name="copy").click()
    tab.locator(f'.menu [data-kind="{kind}"]').click()
    tab.locator(".status:not(:empty)").wait_for()
    said = seen(tab, "say(text('.status')); get('.status').textContent = ''")[0]
    if kind != "png":
        return tab.evaluate("navigator.clipboard.readText()"), said
    script = """async () => {
      const [item] = await navigator.clipboard.read(), blob = await item.getType("image/png");
      const bytes = new Uint8Array(await blob.arrayBuffer());
      return btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(""));
    }"""
    return base64.b64decode(tab.evaluate(script)), said


def test_copied_text_is_aligned(make_reading, opened, open_tab):
    reading = make_reading(
        n_sites=5, n_positions=6, tokens=(" Paris", " 日本", "e\u0301x", " " + "long" * 9, "👩‍👩‍👧", ","), k=3
    )
    tab = opened(page(reading), "#stride=2", open_tab(**CLIPBOARD))
    text, said = copied(tab, "text")
    assert said == "copied as text"
    lines = text.splitlines()
    assert len(lines) == 5

    def columns(line):  # by hand: how wide this test's characters are
        return sum(2 if c in "日本" else 0 if c in "\u0301\u200d" else 1 for c in line.replace("👩‍👩‍👧", "日"))

    labels = [[visible(reading.cell(0, s, p).tokens[0]) for p in range(6)] for s in (4, 2, 0)]
    rows = [["", *(str(p) for p in range(6))], ["", *(visible(t) for t in reading.prompts[0].tokens)]]
    rows += [[name, *row] for name, row in zip(("3", "1", "in"), labels, strict=True)]
    rows = [[c if len(c) <= 20 else c[:19] + "…" for c in row] for row in rows]
    widths = [max(columns(row[i]) for row in rows) for i in range(7)]
    expected = []
    for row in rows:
        cells = [" " * (widths[0] - columns(row[0])) + row[0]]
        cells += [c + " " * (w - columns(c)) for c, w in zip(row[1:], widths[1:], strict=True)]
        expected.append("  ".join(cells).rstrip())
    assert lines == expected


def test_copied_rows_hold_every_cell(make_reading, opened, open_tab):
    reading = screened(make_reading(n_prompts=2, n_sites=5, n_positions=4, targets=(" Paris", "=1+1")), (0, 1e-4))
    tab = opened(page(reading), "#prompt=1&stride=4", open_tab(**CLIPBOARD))
    text, said = copied(tab, "csv")
    assert said == "copied as CSV: 20 cells"
    rows = list(csv.DictReader(io.StringIO(text)))
    names = ["entropy", "kl", "bound", "probability of ·Paris", "rank of ·Paris", "probability of =1+1", "rank of =1+1"]
    tops = [name for i in range(1, 6) for name in (f"top_{i}", f"prob_{i}")]
    assert list(rows[0]) == ["site", "position", "token", *tops, *names]
    for (s, p), row in zip(np.ndindex(5, 4), rows, strict=True):
        cell = reading.cell(1, s, p)
        assert (row["site"], row["position"]) == (reading.sites[s], str(p))
        assert row["token"] == visible(reading.prompts[1].tokens[p])
        assert [row[f"top_{i}"] for i in range(1, 6)] == [visible(t) for t in cell.tokens]
        found = [float(row[name]) for name in [f"prob_{i}" for i in range(1, 6)] + names]
        (paris, one), (first, second) = cell.target_probabilities, cell.target_ranks
        exact = [*cell.probabilities, cell.entropy, max(cell.kl, 0), cell.bound, paris, first, one, second]
        np.testing.assert_allclose(found, exact, rtol=2e-6)


def test_copied_rows_are_no_formulas(make_reading, opened, open_tab):
    bad = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", 'a"b,c', "plain", " x", "it's")
    reading = make_reading(n_sites=8, n_positions=8, tokens=bad, targets=bad, k=4)
    reading.arrays["top_id"][0, 0, 0] = -1
    reading.arrays["top_logprob"][0, 0, 0] = np.nan
    reading.arrays["kl"][0, 0, 0] = np.inf
    reading.arrays["target_rank"][0, 0, 0, 0] = -1
    tab = opened(page(reading), "", open_tab(**CLIPBOARD))
    text, _ = copied(tab, "csv")
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {len(rows[0])}
    words = {field for row in rows[1:] for field in (row[2], *row[3:11:2])}
    assert words == {"", *("'" + w if w[0] in "=+-@" else w for w in map(visible, bad))}
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["top_1"], first["prob_1"], first["kl"], first["rank of " + visible(bad[0])]) == ("", "", "inf", "")
    assert not [f for row in rows for f in row if f[:1] in ("=", "+", "@") or re.match(r"-(?!inf$|[\d.])", f)]


def test_copied_svg_is_the_grid(make_reading, hostile, opened, open_tab):
    reading = make_reading(n_sites=5, n_positions=20, tokens=hostile, targets=hostile[:1], k=2)
    reading = replace(reading, provenance={**reading.provenance, "model": hostile[0]})
    tab = opened(page(reading), "#stride=2&colour=entropy&theme=dark", open_tab(**CLIPBOARD))
    text, said = copied(tab, "svg")
    assert said == "copied as SVG"
    tree = ElementTree.fromstring(text)
    assert {node.tag for node in tree.iter()} == {
        f"{{http://www.w3.org/2000/svg}}{t}" for t in ("svg", "title", "rect", "text")
    }
    assert not [name for node in tree.iter() for name in node.attrib if name.startswith("on") or name == "style"]
    words = [node.text for node in tree.iter() if node.tag.endswith("}text")]
    assert words[0] == visible(hostile[0], space=" ")
    assert words[2] == "0"
    assert words[3].startswith(f"{np.nanmax(reading.arrays['entropy']):.1f} nats  entropy")
    assert [words[4 + 2 * p] for p in range(20)] == [str(p) for p in range(20)]
    sites = [words[44 + 21 * r] for r in range(3)]
    assert sites == ["3", "1", "in"]
    scale, most = colour.table(dark=True), max(1, float(np.nanmax(reading.arrays["entropy"])))
    rects = [node.attrib["fill"] for node in tree.iter() if node.tag.endswith("}rect")][1 + len(scale) :]
    expected = [
        scale[int(reading.arrays["entropy"][0, s, p] / most * 63 + 0.5)][0] for s in (4, 2, 0) for p in range(20)
    ]
    assert rects == expected
    for r, s in enumerate((4, 2, 0)):
        for p in range(20):
            label, shown = visible(reading.cell(0, s, p).tokens[0]), words[45 + 21 * r + p]
            assert shown == label or (shown.endswith("…") and label.startswith(shown[:-1]))


def test_copied_png_has_the_colours_of_the_cells(make_reading, opened, open_tab):
    reading = make_reading(n_sites=5, n_positions=6)
    tab = opened(page(reading), "", open_tab(**CLIPBOARD))
    data, said = copied(tab, "png")
    assert said == "copied as PNG"
    pixels = np.rint(255 * imread(io.BytesIO(data))[..., :3]).astype(int)
    width = seen(tab, "say(parseFloat(get('.cell').style.width))")[0]
    side = seen(tab, "say(parseFloat(get('.side').style.width))")[0]
    scale = colour.table()
    for r, s in enumerate(range(4, -1, -1)):
        for p in range(6):
            x, y = 16 + side + p * width + width - 4, 92 + 42 + 23 * r + 3  # above the text
            back, _ = scale[int(reading.cell(0, s, p).probabilities[0] * 63 + 0.5)]
            assert pixels[int(2 * y), int(2 * x)].tolist() == [int(back[i : i + 2], 16) for i in (1, 3, 5)]


def test_large_pictures_are_drawn_smaller(make_reading, opened, open_tab):
    tab = opened(page(make_reading(n_sites=20, n_positions=1000)), "", open_tab(**CLIPBOARD))
    data, said = copied(tab, "png")
    assert re.fullmatch(r"copied as PNG, at [\d.]+% of its size: more than 8,192 pixels are too many", said)
    assert imread(io.BytesIO(data)).shape[1] <= 8192
    text, said = copied(tab, "svg")
    svg = ElementTree.fromstring(text)
    assert float(svg.attrib["width"]) <= 8192 < float(svg.attrib["viewBox"].split()[2])
    assert "too many" in said


def test_without_a_clipboard_a_file_is_saved(make_reading, opened, tab):
    opened(page(make_reading(n_sites=3, n_positions=2)))
    tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    tab.get_by_role("button", name="copy").click()
    with tab.expect_download() as saved:
        tab.locator('.menu [data-kind="csv"]').click()
    assert saved.value.suggested_filename == "SmolLM2-135M-Instruct.csv"
    assert saved.value.path().read_text(encoding="utf-8").startswith("site,position,token,top_1,")
    said = "saved as CSV: 6 cells: SmolLM2-135M-Instruct.csv (no clipboard here: TypeError)"
    assert seen(tab, "say(text('.status'))") == [said]


REFUSED = """() => {
  const no = () => Promise.reject(new DOMException("no", "NotAllowedError"));
  Object.defineProperty(navigator, "clipboard", { value: { writeText: no, write: no } });
}"""


def test_names_of_files_are_plain(make_reading, opened, tab):
    reading = make_reading(n_sites=2, n_positions=1)
    opened(page(replace(reading, provenance={"model": "../../<b>& x/y"})))
    tab.evaluate(REFUSED)
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG"), ("text", b" ")):
        tab.get_by_role("button", name="copy").click()
        with tab.expect_download() as saved:
            tab.locator(f'.menu [data-kind="{kind}"]').click()
        assert saved.value.suggested_filename == f"b-x-y.{'txt' if kind == 'text' else kind}"
        assert saved.value.path().read_bytes().startswith(start)


def test_a_link_is_to_what_is_seen(make_reading, opened, open_tab):
    tab = opened(page(make_reading(n_sites=3, n_positions=2)), "#cell=1,0&pin=1", open_tab(**CLIPBOARD))
    seen(tab, "set('.colour', 'kl')")
    link, said = copied(tab, "link")
    assert link == tab.url
    assert link.endswith("#cell=1,0&pin=1&colour=kl")
    assert said == "the link was copied"


def test_the_menu_by_keyboard(make_reading, opened, tab):
    opened(page(make_reading(n_sites=3, n_positions=2)))
    tab.locator(".copy").focus()
    script = "say([get('.menu').hidden, get('.copy').getAttribute('aria-expanded'), root.activeElement?.textContent])"
    tab.keyboard.press("Enter")
    assert seen(tab, script) == [[False, "true", "as text"]]
    tab.keyboard.press("ArrowUp")
    assert seen(tab, script) == [[False, "true", "a link to this view"]]
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowDown")
    assert seen(tab, script) == [[False, "true", "as CSV, a row a cell"]]
    tab.keyboard.press("Escape")
    assert seen(tab, script) == [[True, "false", "copy ▾"]]
    tab.keyboard.press("ArrowUp")
    assert seen(tab, script) == [[False, "true", "a link to this view"]]
    tab.keyboard.press("Tab")
    assert seen(tab, script)[0][:2] == [True, "false"]


# -- the component, as a host uses it ---------------------------------------------------------------


@pytest.fixture
def mounted(tab, strict_document, tmp_path):
    """``mounted(*data)``: a grid each, side by side, in a page that allows nothing but its own script."""

    def open_page(*data, width="600px", height="500px"):
        script = (
            module_text()
            + f"""
          window.mount = mount;
          window.data = JSON.parse(document.getElementById("data").textContent);
          window.grids = window.data.map((given, i) => {{
            const host = document.body.appendChild(document.createElement("div"));
            Object.assign(host.style, {{ width: "{width}", height: "{height}", display: "inline-block" }});
            host.id = i ? "other" : "lens";
            return {{ host, ...mount(host, given) }};
          }});
        """
        )
        file = tmp_path / "host.html"
        file.write_text(strict_document(script, data), encoding="utf-8")
        tab.goto(file.as_uri())
        return tab

    return open_page


EVENTS = """
  const events = [], kinds = ["lens-select", "lens-hover", "lens-state", "lens-action", "lens-scroll"];
  for (const kind of kinds) document.addEventListener(kind, (e) => events.push([kind, e.detail]));
  const got = (kind) => events.splice(0).filter(([name]) => !kind || name === kind).map((e) => (kind ? e[1] : e));
  const grid = window.grids[0], data = window.data;
"""


def test_events_say_what_the_reader_did_and_the_handle_is_silent(make_reading, mounted):
    reading = make_reading(n_prompts=2, n_sites=30, n_positions=40)
    script = f"""{EVENTS}
      over(cell(29, 39)); say(got());
      get(".grid").dispatchEvent(new MouseEvent("mouseleave")); say(got());
      cell(28, 38).click(); say(got());
      grid.select({{ prompt: 1, site: 2, slot: 3, pin: 4 }}); grid.setTheme("dark");
      grid.restore("prompt=1&cell=3,4&pin=5&stride=2");
      grid.scroll({{ left: 200, top: 30 }}); await frame(); await frame();
      say(got()); say(grid.state());
      say([get(".grid").scrollLeft, get(".grid").scrollTop, get(".lens").dataset.theme]);
      get(".grid").scrollLeft = 300; await frame(); await frame(); say(got());
      set(".colour", "kl"); say(got());
      set(".prompt", 0); say(got("lens-select"));
      get(".cell.now").focus(); press("ArrowDown"); press("Enter"); say(got("lens-select"));
    """
    lines = seen(mounted(grid_data(reading)), script)
    token = [visible(t) for t in reading.prompts[0].tokens]
    cell = {
        "prompt": 0,
        "site": 29,
        "slot": 39,
        "pin": 39,
        "siteName": "28.resid_post",
        "position": 39,
        "token": token[39],
    }
    assert lines[0] == [["lens-hover", cell]]
    assert lines[1] == [["lens-hover", None]]
    cell |= {"site": 28, "slot": 38, "pin": 38, "siteName": "27.resid_post", "position": 38, "token": token[38]}
    assert lines[2] == [
        ["lens-select", cell | {"pinned": True}],
        ["lens-state", {"state": "prompt=0&cell=28,38&pin=38"}],
    ]
    assert lines[3:6] == [[], "prompt=1&cell=3,4&pin=5&stride=2", [200, 30, "dark"]]
    ((name, detail),) = lines[6]
    column = detail.pop("column")
    assert (name, detail) == ("lens-scroll", {"left": 300, "top": 30})
    assert 64 <= 300 / column <= 120  # pixels of a column
    assert lines[7] == [["lens-state", {"state": "prompt=1&cell=3,4&pin=5&colour=kl&stride=2"}]]
    assert [(d["prompt"], d["site"], d["slot"], d["pinned"]) for d in lines[8]] == [(0, 29, 39, False)]
    assert [(d["site"], d["pinned"]) for d in lines[9]] == [(27, False), (27, True)]


def test_what_is_seen_stays_in_place_when_the_size_changes(make_reading, mounted):
    script = f"""{EVENTS}
      const at = () => Math.round(10 * get(".grid").scrollLeft / parseFloat(get(".cell").style.width)) / 10;
      get(".grid").scrollLeft = 50 * parseFloat(get(".cell").style.width); get(".grid").scrollTop = 200; await frame();
      const before = [at(), get(".grid").scrollTop];
      set(".colour", "kl"); say([before, [at(), get(".grid").scrollTop]]);  // nor by another colour
      grid.host.style.width = "900px"; await frame(); await frame();
      say([at(), get(".grid").scrollTop, get(".cell.now")]);
      grid.select({{ site: 3, slot: 7 }}); say(get(".cell.now").dataset.p);
      grid.host.style.display = "none"; await frame(); grid.select({{ slot: 90 }}); await frame();
      grid.host.style.display = "block"; await frame(); await frame();
      const box = get(".grid").getBoundingClientRect(), now = get(".cell.now").getBoundingClientRect();
      say([get(".cell.now").dataset.p, now.left >= box.left && now.right <= box.right]);
      grid.host.style.width = "420px"; await frame(); await frame();
      say(get(".cell.now").getBoundingClientRect().right <= get(".grid").getBoundingClientRect().right);
      set(".stride", 8); say(got("lens-select").map((d) => [d.site, d.slot, d.pinned]));
      grid.destroy(); grid.host.style.width = "500px"; await frame(); say(root.childElementCount);
    """
    lines = seen(mounted(grid_data(make_reading(n_sites=40, n_positions=100))), script)
    assert lines == [[[50, 200], [50, 200]], [50, 200, None], "7", ["90", True], True, [[7, 90, False]], 0]


def test_two_grids_follow_each_other(make_reading, mounted):
    one = make_reading(n_sites=20, n_positions=40)
    two = make_reading(n_sites=20, n_positions=40, tokens=[f" w{i}" for i in range(30)])
    script = """
      const [a, b] = window.grids, other = b.host.shadowRoot, counts = { a: 0, b: 0 };
      for (const [name, from, to] of [["a", a, b], ["b", b, a]]) {
        from.host.addEventListener("lens-select", (e) => { counts[name]++; to.select(e.detail); });
        from.host.addEventListener("lens-scroll", (e) => { counts[name]++; to.scroll(e.detail); });
      }
      const chosen = (r) => {
        const { s, p } = r.querySelector(".cell.now")?.dataset ?? {};
        return [s, p, r.querySelector(".detail h3").textContent];
      };
      cell(17, 38).click(); await frame(); await frame();
      say([chosen(root), chosen(other), other.activeElement === null]);
      press("PageDown"); press("Home"); press("Enter"); await frame(); await frame();
      const places = () => [root, other].map((r) => r.querySelector(".grid")).map((n) => [n.scrollLeft, n.scrollTop]);
      const alike = places()[0].join() === places()[1].join();
      say([chosen(root), chosen(other), alike, other.querySelector(".pinned").dataset.p]);
      other.querySelector(".grid").scrollLeft = 321; await frame(); await frame(); await frame();
      const wide = (r) => parseFloat(r.querySelector(".cell").style.width);
      const columns = [root, other].map((r) => r.querySelector(".grid").scrollLeft / wide(r));
      say([other.querySelector(".grid").scrollLeft, columns]); say(counts.b);
    """
    lines = seen(mounted(grid_data(one), grid_data(two)), script)
    assert lines[0] == [["17", "38", "16.resid_post"], ["17", "38", "16.resid_post"], True]
    assert lines[1] == [["0", "0", "0.resid_pre"], ["0", "0", "0.resid_pre"], True, "0"]
    left, columns = lines[2]  # columns have other widths: the same one is at the left
    assert left == 321
    assert columns[0] == pytest.approx(columns[1], abs=0.02)
    assert lines[3] == 1  # nothing went to and fro


def appended(reading, p):
    """Data of one position of a reading."""
    return grid_data(reading.at(position=p))


def test_appending_equals_the_whole_reading(make_reading, mounted):
    whole = screened(
        make_reading(n_sites=6, n_positions=40, targets=(" Paris", " the"), tokens=[f" t{i}" for i in range(70)])
    )
    whole.arrays["kl"][0, 0, 39] = 77
    parts = [grid_data(whole.at(position=[0])), *(appended(whole, p) for p in range(1, 40))]
    script = f"""{EVENTS}
      const [full, first, ...rest] = [data[0], ...window.parts];
      const csv = async (handle) => {{
        let text; const copy = {{ writeText: async (t) => {{ text = t; }} }};
        Object.defineProperty(navigator, "clipboard", {{ value: copy, configurable: true }});
        handle.host.shadowRoot.querySelector('[data-kind="csv"]').click();
        await frame();
        return text;
      }};
      const box = grid.host, whole = await csv(grid);
      const reference = described();
      grid.destroy();
      const stream = {{ host: box, ...window.mount(box, first) }};
      say([all(".cell").length, get(".grid").getAttribute("aria-colcount")]);
      for (const part of rest.slice(0, 20)) stream.append(part);
      await frame();
      const atEnd = ({{ scrollLeft, clientWidth, scrollWidth }}) => scrollLeft + clientWidth >= scrollWidth - 2;
      say([get(".grid").getAttribute("aria-colcount"), atEnd(get(".grid"))]);
      get(".grid").scrollLeft = 0; await frame();
      for (const part of rest.slice(20)) {{ stream.append(part); await frame(); }}
      say([get(".grid").getAttribute("aria-colcount"), get(".grid").scrollLeft, stream.state()]);
      say((await csv(stream)) === whole);
      set(".colour", "kl"); say(text(".high")); set(".colour", "top");
      stream.select({{ site: 5, slot: 39, pin: 39 }});
      say(described().join() === reference.join());
      stream.append(full); await frame();
      say(get(".grid").getAttribute("aria-colcount"));
      try {{ stream.append({{ ...full, siteNames: ["x"] }}); }} catch (error) {{ say(error.message); }}
    """
    tab = mounted(grid_data(whole))
    tab.evaluate("(parts) => { window.parts = parts; }", parts)
    lines = seen(tab, script)
    assert lines[:3] == [[6, "2"], ["22", True], ["41", 0, "cell=5,0&pin=0"]]
    assert lines[3:7] == [True, "≥ 17.2 nats", True, "81"]
    assert lines[7] == "what is appended has other sites, targets or numbers of top tokens than the grid"


def test_another_reading_keeps_what_is_chosen(make_reading, mounted):
    one = make_reading(n_prompts=2, n_sites=8, n_positions=9)
    two = make_reading(n_prompts=2, n_sites=12, n_positions=12, targets=(" Paris",))
    script = f"""{EVENTS}
      set(".prompt", 1); set(".colour", "kl"); set(".stride", 2);
      cell(5, 3).click(); get('.top[data-p="6"]').click();
      const before = [text(".detail h3"), grid.state()];
      got();
      grid.update(data[1]);
      say([before, [text(".detail h3"), grid.state()], shades(), got()]);
      grid.update(window.fewer);
      say([grid.state(), text(".detail h3")]);
      grid.update(window.less);
      say([grid.state(), text(".detail h3"), shades()]);
    """
    tab = mounted(grid_data(one), grid_data(two))
    less = grid_data(without(two, "kl").at(prompt=0, position=[0, 1, 2], site=["0.resid_pre", "9.resid_post"]))
    fewer = grid_data(two.at(site=two.sites[2:]))
    tab.evaluate("([less, fewer]) => Object.assign(window, { less, fewer })", [less, fewer])
    (before, after, shades, events), moved, last = seen(tab, script)
    assert moved == ["prompt=1&cell=3,6&pin=6&colour=kl&stride=2", "4.resid_post"]  # the same site, elsewhere
    assert before == ["4.resid_post", "prompt=1&cell=5,6&pin=6&colour=kl&stride=2"]
    assert after == ["4.resid_post", "prompt=1&cell=5,6&pin=6&colour=kl&stride=2"]
    assert (shades, events) == (["top", "entropy", "kl", "p0", "r0"], [])
    assert last == ["cell=1,2&pin=2&stride=2", "9.resid_post", ["top", "entropy", "p0", "r0"]]


def test_heat_colours_the_cells(make_reading, mounted):
    reading = make_reading(n_sites=3, n_positions=4)
    data = grid_data(reading)
    values = np.array([[-0.5, 0, 0.25, 0.5], [0.75, 1, 1.75, np.nan], [0.1, 0.2, 0.3, 0.4]])
    data["prompts"][0]["heat"] = {"name": "recovery", "unit": "1", "low": 0, "high": 1, "values": packed(values)}
    script = f"""{EVENTS}
      say([shades()[0], get(".colour").value, text(".colour option"), text(".low"), text(".high"), charts()[0]]);
      const found = [];
      for (let s = 0; s < 3; s++) for (let p = 0; p < 4; p++) {{
        over(cell(s, p));
        found.push([cell(s, p).style.background, ...facts()[0]]);
      }}
      say(found);
      set(".colour", "top"); say(grid.state());
    """
    first, found, state = seen(mounted(data), script)
    assert first == ["heat", "heat", "recovery", "0", "1", "recovery"]
    scale = colour.table()
    for value, (back, name, said) in zip(values.ravel(), found, strict=True):
        assert name == "recovery"
        if np.isnan(value):
            assert (back, said) == ("", "–")
            continue
        assert float(said) == pytest.approx(value, rel=1e-6)
        step = scale[int(min(max(value, 0), 1) * 63 + 0.5)][0]
        assert back == f"rgb({', '.join(str(int(step[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert state == "cell=2,3&pin=3&colour=top"


def test_heat_without_tokens_is_written_in_the_cells(make_reading, mounted):
    data = grid_data(make_reading(n_sites=2, n_positions=2))
    data |= {"k": 0, "labels": [], "ids": []}
    (prompt,) = data["prompts"]
    for name in ("entropy", "kl"):
        del prompt[name]
    prompt |= {"top": packed(np.zeros((2, 2, 0)), "u2"), "logprob": packed(np.zeros((2, 2, 0)))}
    prompt["heat"] = {
        "name": "effect",
        "unit": "nats",
        "low": -1,
        "high": 1,
        "values": packed(np.array([[0.5, -0.25], [1, 0]])),
    }
    script = "say(texts('.cell')); say(shades()); say([text('.low'), text('.high')]); say(facts()); say(charts())"
    assert seen(mounted(data), script) == [
        ["1.00", "0.00", "0.50", "-0.25"],
        ["heat"],
        ["-1 nats", "1 nats"],
        [["effect", "0 nats"]],
        ["effect (nats)"],
    ]


def test_a_host_offers_actions_and_hides_the_header(make_reading, mounted):
    reading = make_reading(n_sites=4, n_positions=3)
    script = f"""{EVENTS}
      const host = grid.host; grid.destroy();
      say(root.childElementCount);
      const options = {{ compact: true, theme: "dark", state: "cell=1,1&pin=0",
        actions: [{{ name: "steer", label: "Steer <b>", title: "from here" }},
          {{ name: "last", label: "Last", when: (c) => c.site === 3 }}] }};
      const made = window.mount(host, data[0], options);
      say([get(".theme"), get(".verified"), text(".said"), get(".lens").dataset.theme, made.state()]);
      say(texts(".actions button"));
      get(".actions button").click(); say(got());
      made.select({{ site: 3 }}); say(texts(".actions button"));
      made.destroy();
      window.mount(host, data[0], {{ compact: true, title: "before <i>" }});
      say([text(".said"), all('[data-kind="link"]').length]);
    """
    lines = seen(mounted(grid_data(reading)), script)
    assert lines[:3] == [0, [None, None, "", "dark", "cell=1,1&pin=0"], ["Steer <b>"]]
    ((name, detail),) = lines[3]
    assert name == "lens-action"
    assert detail == {"name": "steer", "prompt": 0, "site": 1, "slot": 1, "pin": 0, "siteName": "0.resid_post"} | {
        "position": 1,
        "token": visible(reading.prompts[0].tokens[1]),
    }
    assert lines[4:] == [["Steer <b>", "Last"], ["before <i>", 0]]


@pytest.mark.parametrize(
    ("width", "height", "beside"), [("1200px", "600px", True), ("700px", "600px", False), ("380px", "420px", False)]
)
def test_the_panel_goes_below_where_the_component_is_narrow(make_reading, mounted, width, height, beside):
    script = """
      const [box, grid, panel] = [".lens", ".grid", ".panel"].map((w) => get(w).getBoundingClientRect());
      say([panel.left >= grid.right, panel.top >= grid.bottom, Math.round(box.height)]);
      say(get(".lens").scrollWidth <= get(".lens").clientWidth);
      say(get(".grid").scrollHeight > get(".grid").clientHeight && grid.height <= box.height);
    """
    tab = mounted(grid_data(make_reading(n_sites=40, n_positions=60)), width=width, height=height)
    seen(tab, "await frame(); await frame();")
    assert seen(tab, script) == [[beside, not beside, int(height[:-2])], True, True]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["words", "patches", "boxes", "nothing", "long"])
def test_accessibility(make_reading, make_seen, make_detected, opened, tab, kind, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    reading = {
        "words": lambda: make_reading(n_prompts=2, n_sites=12, n_positions=12, targets=(" Paris",)),
        "patches": lambda: make_seen(n_pictures=2, targets=(1,)),
        "boxes": make_detected,
        "nothing": lambda: make_reading().at(position=[]),
        "long": lambda: make_reading(n_sites=40, n_positions=200),
    }[kind]()
    opened(page(reading), f"#theme={theme}")
    if kind == "words":
        tab.locator("summary").click()
        tab.locator(".copy").click()
    found = axe.Axe().run(tab).response
    assert found["passes"]
    bad = [
        (v["id"], [n["html"] for n in v["nodes"]][:3])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert bad == []
