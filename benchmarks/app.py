"""The app from a click on Run to the picture: what it adds to the reading itself.

A prompt of 20 tokens on the default model. The server runs in this process, the page in headless Chromium; the clock
is the page's, from the click to the second animation frame after the grid is there. What the reading took is what the
server says of the same request. It needs Debian's chromium and the extras `app` and `test`.
Run: python benchmarks/app.py [--rounds 20 --json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from machine import Result, described, spread

PROMPT = "When the train arrived at the station in the evening, nobody was there, and the clock had stopped"
"""20 tokens of the default model."""

CLICK = """() => new Promise((done) => {
  const status = document.getElementById("status"), results = document.getElementById("results");
  status.replaceChildren();
  const start = performance.now();
  const watch = new MutationObserver(() => {
    const read = status.textContent.match(/read in (\\d+) ms/);
    if (!read || results.hasAttribute("aria-busy")) return;
    watch.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => done({
      whole: performance.now() - start, reading: Number(read[1]),
      cells: document.querySelector("#grids .lens").shadowRoot.querySelectorAll(".cell").length })));
  });
  watch.observe(results, { subtree: true, childList: true, characterData: true, attributes: true });
  document.getElementById("run").click();
})"""


@contextmanager
def served() -> Generator[str]:
    """The address of a server with the default model."""
    from logitlab.server.app import Server
    from logitlab.server.serve import listening, uvicorn_of
    from logitlab.server.settings import Settings, named

    found = listening("127.0.0.1", 0)
    settings = Settings(
        models=named(["default"]), port=int(found.getsockname()[1]), token="benchmark-token-of-this-run"
    )
    server = Server(settings)
    running = uvicorn_of(server)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [found]})
    thread.start()
    try:
        yield settings.entrance
    finally:
        running.should_exit = True
        thread.join()
        found.close()


def measure(rounds: int) -> Result:
    """Milliseconds of the whole, of the reading, and between them, for each round."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    times: dict[str, list[float]] = {"whole": [], "reading": [], "added": []}
    with served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if root else [])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(address)
        page.locator("#status").filter(has_text="read in").wait_for(timeout=300_000)
        page.locator("[name=text]").fill(PROMPT)
        tokens = 0
        for turn in range(rounds + 2):
            found = page.evaluate(CLICK)
            tokens = page.locator("#grids .lens").get_by_role("grid").get_attribute("aria-colcount")
            assert found["cells"] > 0
            if turn < 2:  # the first ones warm caches
                continue
            times["whole"].append(found["whole"])
            times["reading"].append(found["reading"])
            times["added"].append(found["whole"] - found["reading"])
        version = browser.version
        browser.close()
    return {"browser": version, "tokens": int(tokens or 0) - 1, "milliseconds": times}


def markdown(found: Result) -> str:
    """One sentence."""
    ms = found["milliseconds"]
    return (
        f"A prompt of {found['tokens']} tokens on the default model, {len(ms['whole'])} times in Chromium "
        f"{found['browser']} (headless): from the click to the picture {spread(ms['whole'])} ms, of which the "
        f"reading takes {spread(ms['reading'])} ms; the app adds {spread(ms['added'])} ms."
    )


def main() -> None:
    """Measure, print, and keep the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    found = measure(options.rounds)
    if options.json:
        from logitlab.files import write_text

        write_text(options.json, json.dumps({"machine": described(), "found": found}, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
