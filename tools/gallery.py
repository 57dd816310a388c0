"""Take the pictures of docs/gallery.md, and the README's: the page of a reading and the app, in headless Chromium.

The app is started as a user would start it, with the default model; every picture is of what it really shows.

Run: make gallery
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import logitlab as ll

OUT = Path("docs/images/gallery")
WIDE = {"width": 1440, "height": 900}
README = {"width": 1100, "height": 890}
FRANCE = "The capital of France is"


def main() -> None:
    """Write docs/images/page.png, and into docs/images/gallery the pictures and the reading of the live grid."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    out: Path = parser.parse_args().out
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("needs Debian's chromium: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        _pages(browser.new_page(viewport=README), out)
        with served() as address:
            page = browser.new_page(viewport=WIDE)
            page.goto(address)
            _app(page, out)
        browser.close()
    print(f"wrote {len(list(out.glob('*.png')))} pictures into {out}")


def _pages(page: Page, out: Path) -> None:
    """The exported page: the README's picture, and a long text by KL in the dark."""
    model = ll.load("default")
    with tempfile.TemporaryDirectory() as folder:
        reading = ll.read(model, FRANCE, target=" Paris")
        reading.save(out / "france.parquet")
        file = reading.html(Path(folder) / "france.html")
        page.goto(file.as_uri())
        page.screenshot(path=out.parent / "page.png")
        text = " ".join(Path("README.md").read_text(encoding="utf-8").split()[:1200])
        file = ll.read(model, text).html(Path(folder) / "long.html")
        page.goto(f"{file.as_uri()}#colour=kl&theme=dark&cell=24,300&pin=300")
        page.screenshot(path=out / "long.png")


@contextmanager
def served() -> Generator[str]:
    """The address of a server of its own; it keeps no history."""
    command = [sys.executable, "-m", "logitlab", "serve", "--port", "0", "--no-history"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def _app(page: Page, out: Path) -> None:
    """The tasks of the app, one after the other."""
    done = page.locator("#status")

    def task(name: str) -> None:
        page.get_by_role("radio", name=name).check()

    def run(expected: str) -> None:
        page.evaluate("document.getElementById('status').replaceChildren()")  # what the last one said
        page.get_by_role("button", name="Run", exact=True).click()
        done.filter(has_text=expected).wait_for(timeout=120_000)

    def shoot(name: str) -> None:
        page.wait_for_timeout(300)
        page.screenshot(path=out / f"{name}.png")

    done.filter(has_text="read in").wait_for(timeout=180_000)
    page.get_by_text("Lens, sites, targets").click()
    page.get_by_label("targets, one a line").fill(" Paris\n Rome")
    run("read in")
    shoot("read")
    page.get_by_role("button", name="Dark theme").click()
    shoot("read-dark")
    page.get_by_role("button", name="Light theme").click()
    page.get_by_label("targets, one a line").fill("")
    page.get_by_text("Lens, sites, targets").click()
    task("Compare")
    run("read in")
    shoot("compare")
    task("Patch")
    run("click a cell of the source")
    page.locator("#grids > section").nth(1).get_by_role("gridcell", name="site 12.resid_post, position 3").click()
    page.get_by_role("heading", name="12.resid_post, position 3").wait_for(timeout=60_000)
    shoot("patch")
    page.get_by_role("button", name="Patch every place").click()
    page.get_by_label("shade by").first.filter(has_text="recovery").wait_for(timeout=120_000)
    shoot("patch-all")
    task("Steer")
    page.locator("[name=text]").fill("The new restaurant in our street is")
    run("read in")
    shoot("steer")
    task("Write")
    page.locator("[name=text]").fill(FRANCE)
    run("read in")
    shoot("write")


if __name__ == "__main__":
    main()
