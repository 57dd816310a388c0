"""Fit every kind of lens on the default model, compare them on text that none has seen, write docs/fitted.md.

About 205,000 tokens of nine novels, a quarter of the positions of each window; the pieces of the novels that come after
those are the held-out text. Everything is kept in --work, so a run that was broken off goes on. About an hour on two
cores. Run: make lenses, or python tools/fit_lenses.py [--work .lenses]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import logitlab as ll
from logitlab.corpora import corpus, windows
from logitlab.lenses.recipe import Progress, Recipe
from logitlab.sweeps import SweepReport
from logitlab.views.curves import curves

DOCS = Path(__file__).parents[1] / "docs"
KINDS = ("bias", "diagonal", "low-rank", "affine")
RECIPE = Recipe(steps=200, windows_per_step=4, length=256, share=0.25, validation_windows=8, validate_every=40)
PROMPTS, PROMPT_LENGTH = 24, 64
SHOWN = ("logit lens", "tuned lens", "Jacobian lens")
"""Lenses that are drawn side by side."""

HELD_OUT = 20_000
"""Tokens of the comparison."""


def main() -> None:
    """Fit, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DOCS.parent / ".lenses")
    work: Path = parser.parse_args().work
    work.mkdir(exist_ok=True)
    model = ll.load("default")
    rows = [{"text": t.text, **t.columns} for t in corpus("books")]
    used = last_text(model, rows)
    lenses: dict[str, Any] = {"logit lens": ll.LogitLens()}
    times = json.loads((work / "times.json").read_text()) if (work / "times.json").is_file() else {}
    for kind in (*KINDS, "jacobian"):
        if not (work / kind / "lens.json").is_file():
            begin = time.perf_counter()
            options: dict[str, Any] = {"recipe": RECIPE}
            if kind == "jacobian":
                options = {"prompts": PROMPTS, "length": PROMPT_LENGTH}
            ll.fit(model, rows[:used], kind=kind, folder=work / kind, progress=tell(kind), **options)
            times[kind] = time.perf_counter() - begin
            (work / "times.json").write_text(json.dumps(times))
        lens = ll.load_lens(work / kind)
        lenses[lens.name] = lens
    report = ll.sweep(model, rows[used:], lens=lenses, max_tokens=HELD_OUT, folder=work / "sweep")
    report.about["corpus"]["name"] = "books, held out"
    curves(report, DOCS / "images" / "lenses.png", measures=["kl", "agreement", "cross_entropy"])
    prompt = "The capital of France is"
    ll.compare(model, prompt, {n: lenses[n] for n in SHOWN}).figure(DOCS / "images" / "lenses-compared.png")
    (DOCS / "fitted.md").write_text(page(model, report, lenses, times), encoding="utf-8")


def last_text(model: ll.Model, rows: list[dict[str, Any]]) -> int:
    """How many of the texts the recipe uses."""
    wanted = RECIPE.validation_windows + RECIPE.steps * RECIPE.windows_per_step
    found = list(islice(windows(model, corpus(rows), RECIPE.length), wanted + 1))
    return found[-1].text + 1


def tell(kind: str) -> Any:
    """Report on standard error."""

    def progress(p: Progress) -> None:
        print(f"{kind}: {p.step} of {p.steps}, {p.left / 60:.1f} min left, {p.words}", file=sys.stderr, flush=True)

    return progress


def page(model: ll.Model, report: SweepReport, lenses: dict[str, Any], times: dict[str, float]) -> str:
    """The page."""
    tokens = report.about["corpus"]["tokens"]
    affine = lenses["tuned lens"].corpus
    positions = round(RECIPE.share * RECIPE.length) * RECIPE.windows_per_step * RECIPE.steps
    header = " | ".join(report.lenses)
    lines = [
        "# Fitted lenses on the default model",
        "",
        "This page is written by `make lenses` (`python tools/fit_lenses.py`); nothing is entered by hand.",
        "",
        f"{model.name}. Fitted on {affine['tokens']:,} tokens of nine novels (`books`), {positions:,} positions, by",
        f"recipe: {RECIPE.steps} steps of {RECIPE.windows_per_step} windows, {RECIPE.optimiser}, rate {RECIPE.rate:g};",
        f"the Jacobian lens measured on {PROMPTS} windows of {PROMPT_LENGTH} tokens.",
        f"Compared on {tokens:,} other tokens of the",
        "same novels. Minutes of fitting on two cores: "
        + ", ".join(f"{kind} {seconds / 60:.0f}" for kind, seconds in times.items())
        + ".",
        "",
        "![KL, agreement, cross-entropy and prediction depth by layer](images/lenses.png)",
        "",
        "KL divergence from the model's own distribution, nats, with half the width of the 95 % interval:",
        "",
        f"| site | {header} |",
        "|---" * (1 + len(report.lenses)) + "|",
    ]
    for site in report.sites:
        found = [report.measure("kl", name, site) for name in report.lenses]
        cells = " | ".join(f"{m.mean:.3f} ± {(m.high - m.low) / 2:.3f}" for m in found)
        lines.append(f"| {site} | {cells} |")
    worse = [
        f"{name} at {site}"
        for name in report.lenses[1:]
        for site in report.sites[:-1]
        if report.measure("kl", name, site).mean >= report.measure("kl", "logit lens", site).mean
    ]
    lines += [
        "",
        "Not below the logit lens: " + (", ".join(worse) if worse else "none, at any layer before the last") + ".",
        "",
        "One prompt through three of them (`logitlab compare`):",
        "",
        "![Top tokens by layer through three lenses](images/lenses-compared.png)",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
