"""The lens grid of a long prompt in a browser: how large its page is, how soon it is drawn, how smoothly it scrolls.

A made-up reading of 2,048 tokens and 31 sites with 5 top tokens, entropy, KL and one target. Frames are those of
headless Chromium, by the times between animation frames while a script scrolls. It needs Debian's chromium and the
extra `test`.
Run: python benchmarks/grid.py [--rounds 3 --tokens 2048 --sites 31 --seconds 3 --json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from machine import Result, described, spread

STEPS = {"across": {"slowly": 30, "fast": 300}, "down": {"slowly": 10, "fast": 100}}
"""Pixels a frame; a column is at least 64 wide, a row 23 high."""

TIMED = """
const source = document.getElementById("data").textContent, start = performance.now(), data = JSON.parse(source);
const parsed = performance.now();
const grid = mount(document.getElementById("lens"), data), mounted = performance.now();
requestAnimationFrame(() => requestAnimationFrame(() => {
  window.times = { parse: parsed - start, mount: mounted - parsed, painted: performance.now() - start };
}));
"""

SCROLL = """([side, step, seconds]) => new Promise((done) => {
  const grid = document.getElementById("lens").shadowRoot.querySelector(".grid"), deltas = [];
  let most = 0, begin, before, way = 1;
  [grid.scrollLeft, grid.scrollTop] = [0, 0];
  const frame = (now) => {
    begin ??= now;
    if (before !== undefined) deltas.push(now - before);
    before = now;
    most = Math.max(most, grid.querySelectorAll(".cell").length);
    if (now - begin > 1000 * seconds) return done({ deltas, cells: most });
    const was = grid[side];
    grid[side] += way * step;
    if (grid[side] === was) way = -way;  // at an end
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})"""


def reading(tokens: int, sites: int, k: int = 5) -> Any:
    """A table of random numbers with as many different tokens as a real vocabulary has."""
    from logitlab.reading import Prompt, Reading, Target

    random = np.random.default_rng(0)
    shape = (1, sites, tokens)
    ids = random.zipf(1.3, (*shape, k)) % 49_152
    logprob = np.sort(-random.exponential(3, (*shape, k)), axis=-1)[..., ::-1]
    target = -random.exponential(5, (*shape, 1))
    names = tuple(f" word{i}" for i in random.integers(0, 5000, tokens))
    return Reading(
        prompts=(Prompt("".join(names), tuple(range(tokens)), names, tuple(range(tokens))),),
        sites=("0.resid_pre", *(f"{layer}.resid_post" for layer in range(sites - 1))),
        targets=(Target(0, " word0"),),
        labels={int(i): f" token{i}" for i in np.unique(ids)},
        arrays={
            "top_id": ids.astype(np.int64),
            "top_logprob": logprob.astype(np.float32),
            "entropy": random.exponential(2, shape).astype(np.float32),
            "kl": random.exponential(2, shape).astype(np.float32),
            "target_logprob": target.astype(np.float32),
            "target_rank": random.integers(1, 49_152, (*shape, 1)),
        },
        provenance={"model": "made up", "lens": {"name": "none"}},
    )


def measure(rounds: int, tokens: int = 2048, sites: int = 31, seconds: float = 3.0) -> Result:
    """Bytes, milliseconds in Python and in the browser, and times between frames."""
    from logitlab.views.grid_data import grid_data
    from logitlab.views.page import lens_grid_path, page

    table = reading(tokens, sites)
    made: dict[str, list[float]] = {"grid_data": [], "page": []}
    for _ in range(rounds):
        for name, make in (("grid_data", grid_data), ("page", page)):
            begin = time.perf_counter()
            make(table)
            made[name].append(1000 * (time.perf_counter() - begin))
    data = json.dumps(grid_data(table), separators=(",", ":"), allow_nan=False)
    text = page(table)
    return {
        "tokens": tokens,
        "sites": sites,
        "bytes": {"data": len(data.encode()), "page": len(text.encode()), "module": lens_grid_path().stat().st_size},
        "python": made,
        **_in_browser(data.replace("<", "\\u003c"), rounds, seconds),
    }


def _in_browser(data: str, rounds: int, seconds: float) -> Result:
    from playwright.sync_api import sync_playwright

    from logitlab.views.page import module_text

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    times: dict[str, list[float]] = {"parse": [], "mount": [], "painted": []}
    scrolled: list[Result] = []
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "grid.html"
        file.write_text(
            "<!doctype html><meta charset=utf-8><style>html, body, #lens { height: 100%; margin: 0 }</style>"
            f'<body><div id="lens"></div><script type="application/json" id="data">{data}</script>'
            f'<script type="module">{module_text()}{TIMED}</script>',
            encoding="utf-8",
        )
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if root else [])
        version = browser.version
        for turn in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 640})
            page.goto(file.as_uri())
            page.wait_for_function("window.times")
            for name, value in page.evaluate("window.times").items():
                times[name].append(value)
            if turn == 0:
                for way, steps in STEPS.items():
                    for speed, step in steps.items():
                        side = {"across": "scrollLeft", "down": "scrollTop"}[way]
                        found = page.evaluate(SCROLL, [side, step, seconds])
                        scrolled.append({"way": way, "speed": speed, "step": step, **_frames(found)})
            page.close()
        browser.close()
    return {"browser": version, "milliseconds": times, "scrolling": scrolled}


def _frames(found: Result) -> Result:
    """Median, 95th percentile and long ones of the times between frames, in milliseconds."""
    deltas = found["deltas"]
    return {
        "frames": len(deltas),
        "rate": 1000 * len(deltas) / sum(deltas),
        "median": statistics.median(deltas),
        "p95": float(np.percentile(deltas, 95)),
        "long": sum(d > 33 for d in deltas),
        "cells": found["cells"],
    }


def markdown(found: Result) -> str:
    """A line on sizes and times, and a table of frames."""
    size, ms, python = found["bytes"], found["milliseconds"], found["python"]
    lines = [
        f"{found['tokens']:,} tokens and {found['sites']} sites: the page has {size['page'] / 1e6:.2f} MB, "
        f"{size['data'] / 1e6:.2f} MB of it data and {size['module'] / 1e6:.2f} MB the module. The data are made in "
        f"{spread(python['grid_data'])} ms, the whole page in {spread(python['page'])} ms.",
        "",
        f"In Chromium {found['browser']} (headless), from the text of the data to the first picture: "
        f"{spread(ms['painted'])} ms, of which {spread(ms['parse'])} for the JSON and {spread(ms['mount'])} for the "
        "grid.",
        "",
        "| scrolling | pixels a frame | frames a second | median, ms | 95 % below, ms | over 33 ms | cells drawn |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {s['way']}, {s['speed']} | {s['step']} | {s['rate']:.1f} | {s['median']:.1f} | {s['p95']:.1f} | "
            f"{s['long']} of {s['frames']} | {s['cells']} |"
            for s in found["scrolling"]
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often data are made and the page is opened")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sites", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each scroll goes on")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    found = measure(options.rounds, options.tokens, options.sites, options.seconds)
    if options.json:
        from logitlab.files import write_text

        write_text(options.json, json.dumps({"machine": described(), "found": found}, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
