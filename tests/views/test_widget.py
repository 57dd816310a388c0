from __future__ import annotations

import json
import subprocess
import sys

import pytest

from logitlab import InputError
from logitlab.views.grid_data import grid_data
from logitlab.views.page import lens_grid_path, module_text, page
from logitlab.views.tokens import visible
from tests.browser import browser, open_tab, strict_document, tab

__all__ = ["browser", "open_tab", "strict_document", "tab"]
pytest.importorskip("anywidget")


def test_the_widget_runs_the_module_of_the_page(make_reading):
    reading = make_reading()
    widget = reading.widget(theme="dark")
    assert widget._esm == lens_grid_path().read_text(encoding="utf-8")
    assert widget._esm in page(reading)
    assert widget.data == grid_data(reading)
    sent = widget.get_state()
    assert {"data", "selection", "theme", "state", "_esm"} <= sent.keys()
    assert (sent["theme"], sent["selection"], sent["state"]) == ("dark", None, "")
    json.dumps(sent["data"], allow_nan=False)


def test_a_selection_is_completed(make_reading):
    reading = make_reading(n_prompts=2, ragged=True)
    widget = reading.widget()
    widget.selection = {"site": "3.resid_post", "position": -1}
    assert widget.selection == {
        "prompt": 0,
        "site": "3.resid_post",
        "position": 5,
        "token": reading.prompts[0].tokens[5],
    }
    widget.selection = {"prompt": 1, "site": "0.resid_pre", "position": 4, "token": "shown"}
    assert widget.selection["token"] == reading.prompts[1].tokens[4]
    widget.selection = None
    assert widget.selection is None


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"site": "9.resid_post", "position": 0},
            "site '9.resid_post' cannot be selected: the Reading goes from",
        ),
        ({"site": 3, "position": 0}, "site 3 cannot be selected"),
        ({"site": "3.resid_post", "position": 6}, "position 6 cannot be selected: of prompt 0 there is 0 to 5"),
        ({"site": "3.resid_post", "position": -7}, "position -7 cannot be selected"),
        ({"site": "3.resid_post", "position": "x"}, "position 'x' cannot be selected"),
        ({"site": "3.resid_post", "position": True}, "position True cannot be selected"),
        ({"prompt": 1, "site": "3.resid_post", "position": 0}, "prompt 1 cannot be selected: the Reading has 1,"),
        ({"site": "3.resid_post"}, "a selection needs a position"),
        ({"position": 3}, "a selection needs a site"),
        ({"layer": 3, "position": 3}, "a selection has no 'layer': it has prompt, site and position"),
    ],
)
def test_what_cannot_be_selected_is_refused(make_reading, selection, message):
    widget = make_reading().widget()
    with pytest.raises(InputError) as raised:
        widget.selection = selection
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert widget.selection is None


def test_other_themes_are_refused(make_reading):
    with pytest.raises(InputError, match="there is no theme 'pink': take one of auto, light, dark"):
        make_reading().widget(theme="pink")
    widget = make_reading().widget()
    with pytest.raises(InputError, match="there is no theme"):
        widget.theme = ""
    assert widget.theme == "auto"


def test_another_reading_keeps_the_selection_that_it_has(make_reading):
    widget = make_reading().widget()
    chosen = {"prompt": 0, "site": "4.resid_post", "position": 2, "token": " the"}
    widget.selection = chosen
    larger, smaller = make_reading(n_sites=9, n_positions=9), make_reading(n_sites=3)
    widget.show(larger)
    assert (widget.data, widget.selection) == (grid_data(larger), chosen)
    widget.show(smaller)
    assert (widget.data, widget.selection) == (grid_data(smaller), None)


def test_without_anywidget_a_line_says_what_to_install():
    script = """
import sys
sys.modules["anywidget"] = None
from tests.views.conftest import build
try:
    build().widget()
except ValueError as error:
    print(type(error).__name__, error)
assert "<iframe" in build()._repr_html_()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "InputError the widget needs anywidget: pip install 'logitlab[notebook]'\n"


# A notebook's side of a widget: traits that are set, and callbacks when they change.
MODEL = """
  const traits = window.traits, listeners = {}, sent = [];
  const change = (name, value) => {
    traits[name] = value;
    for (const f of [...(listeners["change:" + name] ?? [])]) f();
  };
  const model = {
    get: (name) => traits[name],
    set: (name, value) => { change(name, value); sent.push([name, value]); },
    save_changes: () => sent.push("saved"),
    on: (name, f) => { (listeners[name] ??= []).push(f); },
    off: (name, f) => { listeners[name] = listeners[name].filter((g) => g !== f); },
  };
  const el = document.body.appendChild(document.createElement("div")), end = await window.render({ model, el });
  const root = el.firstChild.shadowRoot, get = (which) => root.querySelector(which);
  const now = () => [get(".cell.now").dataset.s, get(".cell.now").dataset.p, get(".detail h3").textContent];
"""


@pytest.mark.browser
def test_the_selection_goes_both_ways(make_reading, tab, strict_document, tmp_path):
    reading, other = make_reading(n_prompts=2, n_sites=6, n_positions=5), make_reading(n_sites=4, n_positions=3)
    script = module_text().replace("export default { render };", "window.render = render;")
    file = tmp_path / "notebook.html"
    file.write_text(strict_document(script), encoding="utf-8")
    tab.goto(file.as_uri())
    chosen = {"prompt": 1, "site": "2.resid_post", "position": 1, "token": " France"}
    traits = {
        "data": grid_data(reading),
        "selection": chosen,
        "theme": "dark",
        "state": "prompt=1&cell=5,0&pin=4&colour=kl",
    }
    tab.evaluate("([traits, other]) => Object.assign(window, { traits, other })", [traits, grid_data(other)])
    lines = tab.evaluate(f"""async () => {{
      {MODEL}
      const looks = [get(".lens").dataset.theme, get(".colour").value, get(".pinned").dataset.p];
      const said = [[now(), ...looks, sent.splice(0)]];
      get('.cell[data-s="4"][data-p="3"]').click();
      said.push(sent.splice(0));
      change("selection", {{ prompt: 1, site: "0.resid_post", position: 0, token: "?" }});
      said.push([now(), sent.splice(0)]);
      change("selection", {{ prompt: 0, site: "0.resid_post", position: 2, token: "?" }});
      said.push([now(), get(".prompt").value]);
      change("selection", null); change("selection", {{ prompt: 7, site: "x", position: 0 }});
      change("theme", "light"); change("state", "prompt=0&cell=1,1&pin=1&stride=2");
      said.push([now(), get(".lens").dataset.theme, get(".stride").value]);
      change("data", window.other);
      said.push([root.querySelectorAll(".row").length, sent.splice(0)]);
      end(); change("theme", "dark");
      said.push([root.childElementCount, el.firstChild.style.height]);
      return said;
    }}""")
    token = visible(reading.prompts[1].tokens[3])
    selected = {"prompt": 1, "site": "3.resid_post", "position": 3, "token": token}
    assert lines == [
        [["3", "1", "2.resid_post"], "dark", "kl", "4", []],
        [["selection", selected], "saved", ["state", "prompt=1&cell=4,3&pin=3&colour=kl"], "saved"],
        [["1", "0", "0.resid_post"], []],
        [["1", "2", "0.resid_post"], "0"],
        [["1", "1", "0.resid_post"], "light", "2"],
        [3, []],
        [0, "438px"],
    ]
