"""The page of `logitlab serve` in Chromium, with the default model, used as someone would who has just installed it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import logitlab as ll
from logitlab import interventions as iv
from logitlab.views.tokens import visible
from tests.browser import CHROMIUM, browser, open_tab, tab
from tests.server.conftest import settings
from tests.server.running import running

__all__ = ["browser", "open_tab", "tab"]

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that `logitlab serve` prints."""
    history = tmp_path_factory.mktemp("history")
    command = [sys.executable, "-m", "logitlab", "serve", "--port", "0", "--history", str(history)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


class App:
    """The page, and what a user does with it."""

    def __init__(self, tab: Any, address: str, status: str = "read in") -> None:
        self.tab = tab
        tab.goto(address)
        self.wait(status)

    def wait(self, status: str) -> None:
        """Wait until the page says so, and works no more."""
        if status:
            self.tab.locator("#status").filter(has_text=status).wait_for(timeout=60_000)
        self.tab.locator("#results:not([aria-busy])").wait_for()

    def task(self, name: str) -> None:
        self.tab.get_by_role("radio", name=name).check()

    def fill(self, name: str, text: str) -> None:
        self.tab.locator(f"[name={name}]").fill(text)

    def run(self, status: str = "read in") -> None:
        self.tab.evaluate("document.getElementById('status').replaceChildren()")  # what the last one said
        self.tab.get_by_role("button", name="Run", exact=True).click()
        self.wait(status)

    def grid(self, n: int = 0) -> Any:
        return self.tab.locator("#grids > section").nth(n)

    def cell(self, site: str, position: int, n: int = 0) -> Any:
        return self.grid(n).get_by_role("gridcell", name=re.compile(rf"^site {re.escape(site)}, position {position} "))

    def text(self, which: str) -> str:
        return str(self.tab.locator(which).inner_text())

    @property
    def message(self) -> str:
        return self.text("#message")


@pytest.fixture
def app(tab: Any, served: str) -> App:
    return App(tab, served)


def chance(text: str) -> float:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)


def last_words(reading: ll.Reading) -> str:
    """The label of the answer at the last position."""
    return visible(reading.cell(0, len(reading.sites) - 1, len(reading.prompts[0].positions) - 1).tokens[0])


def test_the_demo_prompt_is_read(app: App, default_model: ll.Model) -> None:
    reading = ll.read(default_model, FRANCE)
    assert app.cell("29.resid_post", 4).inner_text() == "·Paris"
    panel = app.grid().locator(".panel")
    app.cell("20.resid_post", 3).hover()
    shown = reading.cell(0, reading.sites.index("20.resid_post"), 3)
    bars = panel.locator(".bars > *").all_inner_texts()
    assert bars[::3] == [visible(token) for token in shown.tokens]
    assert [chance(text) for text in bars[2::3]] == pytest.approx(shown.probabilities, rel=0.06)
    assert f"{shown.entropy:.3f} nats" in panel.inner_text()
    app.cell("20.resid_post", 3).click()
    assert "Position 3 ·France over the sites" in panel.inner_text()
    assert panel.locator("svg[role=img]").count() == 4  # probability, rank, entropy, divergence
    assert "✓ last site decoded equals the model's logits" in app.text("#facts")


def test_what_it_shows_is_reproduced_by_its_python(
    app: App, default_model: ll.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.tab.get_by_text("As Python").click()
    code = app.tab.locator("#python pre").inner_text()
    monkeypatch.setattr(ll, "load", lambda name: default_model)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    (reading,) = [value for value in namespace.values() if isinstance(value, ll.Reading)]
    assert last_words(reading) == app.cell("29.resid_post", 4).inner_text()


def test_prompts_side_by_side(app: App, default_model: ll.Model) -> None:
    app.task("Compare")
    app.fill("other", ITALY)
    app.run()
    assert app.tab.locator("#grids > section").count() == 2
    assert app.cell("29.resid_post", 4, 1).inner_text() == last_words(ll.read(default_model, ITALY)) == "·Rome"
    app.cell("15.resid_post", 2).click()
    for n in (0, 1):  # they follow each other
        assert app.grid(n).locator(".panel h3").first.inner_text() == "15.resid_post"
        assert "Position 2 ·of" in app.grid(n).locator(".panel").inner_text()


def test_patching_by_a_click(app: App, default_model: ll.Model) -> None:
    app.task("Patch")
    app.run("click a cell of the source")
    app.cell("12.resid_post", 3, 1).click()
    app.tab.locator("#outcome h2").wait_for()
    kept = ll.capture(default_model, ITALY, "12.resid_post", positions=3)["12.resid_post"]
    with iv.intervene(default_model, iv.replace("12.resid_post", kept[0], positions=3)):
        expected = ll.read(default_model, FRANCE, target=[" Rome", " Paris"]).at(position=-1)
    rows = [row.locator("td").all_inner_texts() for row in app.tab.locator("#outcome tbody tr").all()]
    found = {token: chance(after) for token, _, after in rows}
    assert found["·Rome"] == pytest.approx(float(expected.prob[0, -1, 0, 0]), rel=0.06)
    assert found["·Paris"] == pytest.approx(float(expected.prob[0, -1, 0, 1]), rel=0.06)
    assert rows[0][0] == "·Rome"
    assert app.cell("29.resid_post", 4).inner_text() == "·Rome"
    app.tab.reload()  # the address holds what was patched
    app.wait("read in")
    app.tab.locator("#outcome h2").wait_for()
    assert app.cell("29.resid_post", 4).inner_text() == "·Rome"


def test_patching_every_place(app: App, default_model: ll.Model) -> None:
    app.task("Patch")
    app.run("click a cell of the source")
    app.tab.get_by_role("button", name="Patch every place").click()
    app.grid().get_by_label("shade by").filter(has_text="recovery").wait_for(timeout=60_000)
    found = iv.patch(default_model, ITALY, FRANCE, (" Rome", " Paris"), sites=["10.resid_post"])
    app.cell("10.resid_post", 3).click()
    facts = app.grid().locator(".panel dl").first.inner_text()
    shown = float(re.search(r"recovery\s+([\d.]+)", facts)[1])  # pyright: ignore[reportOptionalSubscript]
    assert shown == pytest.approx(found.recovery[0, 0, 3], abs=1e-3)


def test_steering(app: App, default_model: ll.Model) -> None:
    app.task("Steer")
    app.fill("site", "14.resid_post")
    app.fill("text", "The film was")
    app.fill("steerTokens", "3")
    app.run()
    good, bad = ll.capture(default_model, ["I love this, it is", "I hate this, it is"], "14.resid_post", positions=-1)[
        "14.resid_post"
    ]
    change = iv.add("14.resid_post", good - bad, strength=4.0)
    plain = "".join(step.text for step in ll.generate(default_model, "The film was", max_new_tokens=3, do_sample=False))
    with iv.intervene(default_model, change):
        steered = "".join(s.text for s in ll.generate(default_model, "The film was", max_new_tokens=3, do_sample=False))
        answer = last_words(ll.read(default_model, "The film was"))
    assert app.tab.locator("#written bdi").all_inner_texts() == [plain, steered]
    assert app.cell("29.resid_post", 2, 1).inner_text() == answer
    app.tab.locator("[name=strength]").fill("0")  # the answer follows the slider
    app.tab.locator("#outcome h2").filter(has_text="strength 0:").wait_for(timeout=30_000)
    assert app.text("#outcome p") == "KL(before ‖ after) at the last position: 0 nats"


def test_writing_streams_and_can_be_cancelled(app: App, default_model: ll.Model) -> None:
    app.task("Write")
    app.fill("newTokens", "6")
    app.run()
    steps = list(ll.generate(default_model, FRANCE, max_new_tokens=6, do_sample=False))
    words = app.tab.locator("#written .word")
    assert words.all_text_contents() == [
        visible(step.token) if not step.text.strip("\n") else step.text for step in steps
    ]
    assert app.cell("29.resid_post", 9).inner_text() == visible(steps[-1].token)
    words.nth(2).click()
    assert "position 6" in app.grid().locator(".panel").inner_text()
    ranks = steps[2].reading.rank.sel(site="29.resid_post").values
    assert int(ranks.flatten()[0]) == 1
    app.fill("newTokens", "400")
    app.tab.get_by_role("button", name="Run", exact=True).click()
    words.nth(8).wait_for(timeout=30_000)  # it comes while it is being written
    app.tab.get_by_role("button", name="Cancel").click()
    app.tab.locator("#status").filter(has_text="cancelled").wait_for()
    assert words.count() < 400
    app.task("Read")
    app.run()  # the server goes on
    assert app.cell("29.resid_post", 4).inner_text() == "·Paris"


def test_a_reload_brings_the_view_back(app: App) -> None:
    app.fill("text", "Two plus two is")
    app.tab.get_by_text("Lens, sites, targets").click()
    app.fill("targets", " four")
    app.run()
    app.cell("24.resid_post", 1).click()
    app.grid().get_by_label("shade by").select_option("r0")
    app.grid().get_by_label("layers").select_option("4")
    address = app.tab.url
    assert "Two+plus+two+is" in address
    app.tab.reload()
    app.wait("read in")
    assert app.tab.locator("[name=text]").input_value() == "Two plus two is"
    assert app.grid().get_by_label("shade by").input_value() == "r0"
    assert app.grid().get_by_label("layers").input_value() == "4"
    assert "Position 1 ·plus over the sites" in app.grid().locator(".panel").inner_text()
    assert app.tab.url == address


def test_everything_by_keyboard(app: App) -> None:
    tab = app.tab
    tab.locator("[name=text]").focus()
    tab.keyboard.press("Control+A")
    tab.keyboard.type("One two three")
    tab.evaluate("document.getElementById('status').replaceChildren()")
    tab.keyboard.press("Control+Enter")
    app.wait("read in")
    assert app.cell("29.resid_post", 2).count() == 1
    inside = "document.activeElement.shadowRoot?.activeElement?.matches('[role=gridcell]') ?? false"
    for _ in range(30):  # Tab reaches the grid
        tab.keyboard.press("Tab")
        if tab.evaluate(inside):
            break
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowDown")
    assert app.grid().locator(".panel h3").first.inner_text() == "28.resid_post"
    tab.keyboard.press("Enter")
    assert "Position 1 " in app.grid().locator(".panel").inner_text()
    tab.get_by_role("radio", name="Read").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("[name=other]").is_visible()


def test_a_chat_and_the_history(app: App) -> None:
    app.tab.get_by_label("as a chat").check()
    message = app.tab.get_by_label("message 1", exact=True)
    assert message.input_value() == FRANCE
    message.fill("Name a colour.")
    app.run()
    assert app.grid().get_by_role("columnheader", name="<|im_start|>").count() >= 1
    app.tab.get_by_role("button", name="History").click()
    entries = app.tab.locator("#entries li")
    assert "Name a colour." in entries.first.inner_text()
    count = entries.count()
    app.tab.locator("#entries .open").filter(has_text=FRANCE).last.click()
    app.wait("read in")
    expect(app.tab.locator("[name=text]")).to_have_value(FRANCE)
    expect(app.tab.locator("#grids > section")).to_have_count(1)
    app.tab.get_by_role("button", name="History").click()
    entries.first.get_by_role("button", name=re.compile("^forget")).click()
    expect(entries).to_have_count(count)  # one more was asked for, and one forgotten
    app.tab.keyboard.press("Escape")


HOSTILE = "</textarea><img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}\u202e"


def test_a_prompt_is_never_markup(app: App) -> None:
    dialogs: list[str] = []
    app.tab.on("dialog", lambda dialog: dialogs.append(dialog.message))
    app.fill("text", HOSTILE)
    app.run()
    assert app.tab.locator("img").count() == 0
    app.task("Write")
    app.fill("newTokens", "2")
    app.run()
    assert HOSTILE in app.tab.locator("#written").text_content()
    app.tab.get_by_role("button", name="History").click()
    app.tab.locator("#entries li").first.wait_for()
    assert app.tab.locator("img").count() == 0
    assert dialogs == []


def test_what_cannot_be_done_is_said(app: App) -> None:
    app.tab.get_by_text("Lens, sites, targets").click()
    app.fill("sites", "99.resid_post")
    app.tab.get_by_role("button", name="Run", exact=True).click()
    app.tab.locator("#message").wait_for()
    assert "99" in app.message
    app.fill("sites", "resid")
    app.fill("text", "word " * 5000)
    app.tab.get_by_role("button", name="Run", exact=True).click()
    app.tab.locator("#message").filter(has_text="shorten it").wait_for()
    app.tab.locator("#file").set_input_files({"name": "bad.txt", "mimeType": "text/plain", "buffer": b"\xff\xfe\xff"})
    app.tab.locator("#message").filter(has_text="bad.txt is not UTF-8 text").wait_for()
    app.tab.locator("#file").set_input_files({"name": "good.txt", "mimeType": "text/plain", "buffer": FRANCE.encode()})
    app.run()
    assert app.cell("29.resid_post", 4).inner_text() == "·Paris"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(open_tab: Callable[..., Any], served: str, theme: str) -> None:
    import axe_playwright_python

    app = App(open_tab(color_scheme=theme), served)
    script = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    app.tab.evaluate(script)

    def check() -> None:
        found = app.tab.evaluate("axe.run()")["violations"]
        serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == []

    check()
    app.tab.get_by_text("Lens, sites, targets").click()
    app.tab.get_by_text("As Python").click()
    check()
    for task, status in (("Compare", "read in"), ("Patch", "click a cell"), ("Steer", "read in")):
        app.task(task)
        app.run(status)
        check()
    app.task("Write")
    app.fill("newTokens", "3")
    app.run()
    check()
    app.tab.get_by_role("button", name="History").click()
    app.tab.locator("#entries li").first.wait_for()
    check()


# -- with tiny models, of which there are many kinds -----------------------------------------------------------


@pytest.fixture
def tiny(open_tab: Callable[..., Any], shelf: Any) -> Iterator[Callable[..., App]]:
    """``tiny(state)`` is the page of a server with the models, the lens and the vectors of `conftest`."""
    with running(settings(shelf)) as server:
        yield lambda state="", status="read in", **options: App(
            open_tab(**options), f"{server.server.settings.entrance}&{state}", status
        )


def test_another_model_is_loaded_when_it_is_chosen(tiny: Callable[..., App]) -> None:
    app = tiny("text=word")
    app.tab.locator("[name=model]").select_option("llava")
    expect(app.tab.get_by_role("button", name="Add a picture")).to_be_visible()
    expect(app.tab.locator("#status")).to_be_empty()
    app.tab.locator("[name=model]").select_option("vit")
    expect(app.tab.locator("[name=text]")).to_be_hidden()
    for task in ("Patch", "Steer", "Write"):
        expect(app.tab.get_by_role("radio", name=task)).to_be_disabled()


def test_a_picture(tiny: Callable[..., App], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 30, 60)).save(tmp_path / "red.png")
    app = tiny("model=vit", "add a picture")
    app.tab.locator("#image").set_input_files(tmp_path / "red.png")
    expect(app.tab.locator("#images img")).to_be_visible()
    app.run()
    assert app.grid().locator(".patch").count() == 16
    assert app.grid().locator(".photo").count() == 1
    app.tab.reload()
    expect(app.tab.locator("#message")).to_contain_text("the 1 pictures: add them again")


def test_an_address_with_what_is_not_there(tiny: Callable[..., App]) -> None:
    app = tiny("model=gone&lens=lost&text=word", "")
    expect(app.tab.locator("#message")).to_contain_text("model “gone”, lens “lost”: choose anew")
    assert app.tab.locator("#grids > section").count() == 0
    app.run()
    assert app.tab.locator("#grids > section").count() == 1


def test_patching_keeps_to_what_was_read(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+capital+of&source=the+sea")
    app.task("Patch")
    app.tab.locator("[name=into]").select_option("end")
    app.run("click a cell of the source")
    app.fill("source", "something else altogether")  # not read yet
    cell = app.grid(1).get_by_role("gridcell").first
    cell.click()
    app.tab.locator("#outcome h2").wait_for()
    code = app.tab.locator("#python pre").text_content()
    assert "the sea" in code
    assert "something else" not in code
    focused = "document.activeElement.shadowRoot?.activeElement?.getAttribute('role')"
    assert app.tab.evaluate(focused) == "gridcell"  # the keyboard stays in the source
    title = app.text("#outcome h2")
    app.tab.reload()  # the address is that of what is shown
    app.wait("read in")
    app.tab.locator("#outcome h2").wait_for()
    assert app.text("#outcome h2") == title
    app.task("Read")  # and then a click only chooses
    app.grid(1).get_by_role("gridcell").nth(1).click()
    app.tab.wait_for_timeout(200)
    assert app.text("#outcome h2") == title


def test_every_place_without_a_run_before_and_its_address(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+capital+of")
    app.task("Patch")
    app.fill("source", "capital of the")
    app.tab.get_by_role("button", name="Patch every place").click()
    app.wait("read in")
    expect(app.tab.locator("#message")).to_be_hidden()
    expect(app.grid().get_by_label("shade by")).to_have_value("heat")
    told = app.text("#outcome p")
    assert "recovery of the logit of" in told
    app.fill("source", "something that was not run")
    app.tab.reload()
    app.wait("read in")
    expect(app.tab.locator("#outcome p")).to_have_text(told)
    assert app.tab.locator("[name=source]").input_value() == "capital of the"


def test_what_fails_leaves_the_address_of_what_is_shown(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+sea")
    address = app.tab.url
    app.fill("text", "word " * 200)
    app.tab.get_by_role("button", name="Run", exact=True).click()
    expect(app.tab.locator("#message")).to_contain_text("shorten it")
    app.grid().get_by_role("gridcell").first.click()
    assert app.tab.url.partition("&view")[0] == address.partition("&view")[0]


def test_the_skip_link_leaves_the_form_alone(tiny: Callable[..., App]) -> None:
    app = tiny("text=word")
    app.fill("text", "not run yet")
    app.tab.locator(".skip").focus()
    app.tab.keyboard.press("Enter")
    assert app.tab.locator("[name=text]").input_value() == "not run yet"
    assert app.tab.evaluate("document.activeElement.id") == "results"


def test_the_keyboard_stays_in_the_grid(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+sea")
    app.grid().get_by_role("gridcell").first.click()
    app.tab.evaluate("document.getElementById('status').replaceChildren()")
    app.tab.keyboard.press("Control+Enter")
    app.wait("read in")
    assert app.tab.evaluate("document.activeElement.shadowRoot?.activeElement?.getAttribute('role')") == "gridcell"
    before = app.grid().locator(".panel h3").first.inner_text()
    app.tab.keyboard.press("ArrowDown")
    assert app.grid().locator(".panel h3").first.inner_text() != before


def test_buttons_of_a_task_come_and_go_with_it(tiny: Callable[..., App]) -> None:
    app = tiny("do=generate&text=the+sea&newTokens=3")
    steer = app.tab.get_by_role("button", name="Steer here")
    assert steer.count() == 0
    app.task("Read")
    app.run()
    steer.click()
    assert app.tab.get_by_role("radio", name="Steer").is_checked()
    assert app.tab.locator("[name=site]").input_value() == "2.resid_post"


def test_a_cell_that_is_chosen_while_it_writes_stays_chosen(tiny: Callable[..., App]) -> None:
    app = tiny("model=slow&text=the+sea&view=cell%3D0%2C0%26pin%3D0")
    app.task("Write")
    app.fill("newTokens", "30")
    app.tab.get_by_role("button", name="Run", exact=True).click()
    words = app.tab.locator("#written .word")
    words.nth(4).wait_for()
    words.nth(3).click()
    app.wait("read in")
    assert words.count() == 30
    assert "cell%3D3%2C3%26pin%3D3" in app.tab.url


def test_writing_with_a_vector_from_a_file(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+sea")
    app.task("Write")
    app.fill("newTokens", "4")
    app.run()
    plain = app.tab.locator("#written .word").all_text_contents()
    app.tab.get_by_label("with a vector").check()
    app.tab.locator("[name=kind]").select_option("file")
    app.fill("site", "2.resid_post")
    app.tab.locator("[name=strength]").fill("20")
    app.run()
    assert app.tab.locator("#written .word").all_text_contents() != plain
    assert "mood" in app.tab.locator("#python pre").text_content()


def test_a_number_out_of_range_is_said_wherever_it_stands(tiny: Callable[..., App]) -> None:
    app = tiny("text=word")
    app.tab.get_by_text("Lens, sites, targets").click()
    app.fill("topK", "50")
    app.tab.get_by_text("Lens, sites, targets").click()  # closed again
    app.tab.get_by_role("button", name="Run", exact=True).click()
    expect(app.tab.locator("#message")).to_contain_text("top_k")
    app.tab.get_by_text("Lens, sites, targets").click()
    app.fill("topK", "")  # empty: as at the start
    app.run()
    app.tab.complaints[:] = [c for c in app.tab.complaints if "422" not in c]


def test_grids_take_the_theme_of_the_page(tiny: Callable[..., App]) -> None:
    app = tiny("text=word")
    app.grid().get_by_role("gridcell").first.click()
    app.tab.get_by_role("button", name="Dark theme").click()
    app.run()
    assert (
        app.tab.evaluate("document.querySelector('#grids .lens').shadowRoot.querySelector('.lens').dataset.theme")
        == "dark"
    )
    assert "theme" not in app.tab.url


def test_two_grids_are_shaded_and_thinned_together(tiny: Callable[..., App]) -> None:
    app = tiny("do=compare&text=the+sea&by=lens&otherLens=tuned")
    app.grid().get_by_label("shade by").select_option("entropy")
    app.grid(1).get_by_label("layers").select_option("2")
    for n in (0, 1):
        expect(app.grid(n).get_by_label("shade by")).to_have_value("entropy")
        expect(app.grid(n).get_by_label("layers")).to_have_value("2")


def test_another_prompt_opens_at_its_own_answer(tiny: Callable[..., App]) -> None:
    app = tiny("text=the+capital+of+the+sea")
    app.grid().get_by_role("gridcell").first.click()
    app.fill("text", "of the sea")
    app.run()
    last = app.grid().get_by_role("columnheader").last.locator("small").inner_text()
    assert f"position {last} " in app.grid().locator(".panel").inner_text()


def test_without_the_token_there_is_only_a_word(open_tab: Callable[..., Any], served: str) -> None:
    tab = open_tab()
    tab.goto(served.partition("#")[0])
    expect(tab.locator("#message")).to_contain_text("open the address that logitlab serve has printed")
    assert tab.locator("#grids > section").count() == 0
    tab.goto("about:blank")
    tab.goto(served.partition("=")[0] + "=wrong-token-of-enough-characters")
    expect(tab.locator("#message")).to_contain_text("open the address that logitlab serve has printed")
    assert "token" not in tab.url  # it does not stay in the address
    tab.complaints[:] = [c for c in tab.complaints if "401" not in c]
