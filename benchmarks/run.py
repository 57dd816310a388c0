"""Measure everything and write docs/benchmarks.md; results are kept in docs/benchmarks.json, section by section.

Run: make bench, or python benchmarks/run.py [--only compare decode ...] [--page]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batching
import compare
import decode
import machine
import memory
import screening
import startup
import thresholds
import tiles
import where_time_goes

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
README = DOCS.parent / "README.md"

SECTIONS: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
    "compare": (lambda: compare.measure([16, 256, 2048], 3), compare.markdown),
    "decode": (lambda: decode.measure([6, 256], 5), decode.markdown),
    "profile": (lambda: where_time_goes.measure(256, "exact"), where_time_goes.markdown),
    "screening": (lambda: screening.measure(4096), screening.markdown),
    "thresholds": (thresholds.measure, thresholds.markdown),
    "memory": (lambda: memory.measure([256, 8192]), memory.markdown),
    "tiles": (tiles.measure, tiles.markdown),
    "startup": (lambda: startup.measure(5), startup.markdown),
    "batching": (batching.measure, batching.markdown),
}

TEXT = """# Benchmarks

Everything on this page is written by `make bench` ({command}); nothing is entered by hand. The numbers are in
`docs/benchmarks.json`. Times are medians with the least and the most in brackets; ratios are of numbers from the same
run.

{machine}

## Beside others

One run, every contestant in a process and an environment of its own, asked in turn. The floor is the model's own
forward pass plus the bare float32 product of all rows that a lens decodes (31 sites × tokens) with the head, by plain
PyTorch and with the fastest of three ways to cut it. "All statistics" are the top 5, entropy, KL divergence from the
final distribution, and a target's log-probability and rank. Memory is what a case needs at most beyond what the
forward pass needs. Versions of the peers: `benchmarks/peers/`; how each is called: `benchmarks/contestants/`.

{compare}

How can it be below the floor? PyTorch multiplies float32 matrices with a library that uses half the width of this
processor's vectors. logitlab's own kernel uses all of it, and never writes the logits down: a lane of a vector is a
row to decode, and statistics are taken where the product has just left them. See [Speed](speed.md).

## Decoding alone

Without the forward pass: the statistics of rows that are ready for the head, in units of their own product. (With 6
tokens KL is dear: the final distribution is worked out for 6 rows, and the kernel takes 32 at a time.)

{decode}

## Where the time goes

{profile}

## Screening keeps its promise

{screening}

Its thresholds, in units of the exact scan: columns likelier than e to the minus theta are computed again; a row of
which more than the given part of the columns had to be is given up and done in full. In use are a theta of 16, or 18
where the entropy is wanted, and a patience of 1/12.

{thresholds}

## Memory

{memory}

## Tile sizes

How much longer a scan of 992 rows takes with each size than with the best one; the size that the rule picks is in bold.

{tiles}

## Start-up

{startup}

The first conversion of a GGUF file (the default model's takes some seconds) happens once; afterwards weights are mapped
from a safetensors file. The kernel is compiled once too, in about a second.

## Company

By how much a prompt's numbers change when other prompts, or other passes, are involved: largest differences over some
prompts, from a pass of each prompt's own.

{batching}

## GPU

{gpu}
"""

NO_GPU = """No GPU was available where these pages were made. The Triton kernel is tested in Triton's interpreter, and
compiled for Ampere and Hopper GPUs without one being there (`tests/logits/test_gpu.py`); its speed has **not been
measured**. `python benchmarks/gpu.py` measures it where there is one: its differences from float64, and its share of
the rate of a bare bfloat16 product."""


def page(results: dict[str, Any]) -> str:
    """The page from the results that there are."""
    parts: dict[str, str] = {}
    for name, (_, markdown) in SECTIONS.items():
        entry = results.get(name)
        parts[name] = markdown(entry["found"]) if entry else "*Not measured yet.*"
    about = next((entry["machine"] for entry in results.values()), machine.described())
    dates = sorted({entry["machine"]["date"] for entry in results.values()})
    vectors = ", ".join(about["vectors"]) or "no vector extensions that matter here"
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    text = (
        f"Machine: {about['processor']}, {about['cores']} cores ({vectors}), {about['memory']} of memory, "
        f"{about['threads']} threads. {versions}. Measured {' and '.join(dates)}."
    )
    return TEXT.format(machine=text, command="`python benchmarks/run.py`", gpu=NO_GPU, **parts)


def summary(results: dict[str, Any]) -> str:
    """The few numbers of the README: 256 tokens, 31 sites."""
    part = results["compare"]["found"]["lengths"]["256"]
    times = {name: statistics.median(values) for name, values in part["seconds"].items()}
    memory = {name: statistics.median(values) for name, values in part["memory"].items()}
    floor = times["by_hand: forward"] + times["by_hand: product"]
    lines = [
        "| 31 layers of 256 tokens; in units of forward pass + float32 product | top 5 | all statistics | memory over "
        "the forward pass |",
        "|---|---|---|---|",
    ]
    names = [*compare.OURS.items(), ("by_hand", "the loop that everybody writes")]
    names += [(name, title) for name, (title, _, _) in compare.PEERS.items()]
    for name, title in names:
        both = [f"{name}: {what}" for what in ("top", "all")]
        cells = [f"{times[k] / floor:.2f}" if k in times else compare.cells_of(part, k, floor)[0] for k in both]
        most = max(memory[k] for k in both if k in memory) - memory["by_hand: forward"]
        lines.append(f"| {title} | {' | '.join(cells)} | {most:+,.0f} MB |")
    return "\n".join(lines)


def into_readme(text: str) -> None:
    """Put the summary between its marks."""
    readme = README.read_text(encoding="utf-8")
    before, mark, rest = readme.partition("<!-- benchmarks: written by benchmarks/run.py -->\n")
    after = rest.partition("<!-- /benchmarks -->")[2]
    README.write_text(f"{before}{mark}\n{text}\n\n<!-- /benchmarks -->{after}", encoding="utf-8")


def main() -> None:
    """Measure what is wanted, keep it, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to measure; the others stay as they are")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page again")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in [] if options.page else options.only or SECTIONS:
        print(f"-- {name}", file=sys.stderr, flush=True)
        measure, markdown = SECTIONS[name]
        results[name] = {"machine": machine.described(), "found": measure()}
        print(markdown(results[name]["found"]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    if "compare" in results:
        into_readme(summary(results))


if __name__ == "__main__":
    main()
