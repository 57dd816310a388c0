"""Measure everything and write docs/benchmarks.md; results are kept in docs/benchmarks.json, section by section.

A section is saved when it is done, "compare" after each length: an interruption loses at most that.
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

import app
import batching
import compare
import decode
import fitting
import formats
import generating
import grid
import jacobian
import machine
import memory
import patching
import screening
import startup
import sweeping
import thresholds
import tiles
import where_time_goes

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
README = DOCS.parent / "README.md"

Keep = Callable[[Any], None]
"""Takes what a section has found so far."""

SECTIONS: dict[str, tuple[Callable[[Keep], Any], Callable[[Any], str]]] = {
    "compare": (lambda keep: compare.measure([16, 256, 2048], [3, 3, 1], keep=keep), compare.markdown),
    "decode": (lambda _: decode.measure([6, 256], 5), decode.markdown),
    "profile": (lambda _: where_time_goes.measure(256, "exact"), where_time_goes.markdown),
    "screening": (lambda _: screening.measure(4096), screening.markdown),
    "thresholds": (lambda _: thresholds.measure(), thresholds.markdown),
    "memory": (lambda _: memory.measure([256, 8192]), memory.markdown),
    "tiles": (lambda _: tiles.measure(), tiles.markdown),
    "startup": (lambda _: startup.measure(5), startup.markdown),
    "batching": (lambda _: batching.measure(), batching.markdown),
    "fitting": (lambda _: fitting.measure(steps=8, windows=2, length=128, rounds=3), fitting.markdown),
    "jacobian": (lambda _: jacobian.measure(prompts=2, tokens=48, rounds=3), jacobian.markdown),
    "formats": (lambda _: formats.measure(), formats.markdown),
    "sweeping": (lambda _: sweeping.measure(200_000, "::10.resid_post"), sweeping.markdown),
    "generating": (lambda _: generating.measure(40, 5), generating.markdown),
    "patching": (lambda _: patching.measure(30, 3), patching.markdown),
    "grid": (lambda _: grid.measure(3), grid.markdown),
    "app": (lambda _: app.measure(20), app.markdown),
}

TEXT = """# Benchmarks

Everything on this page is written by `make bench` ({command}); nothing is entered by hand. The numbers are in
`docs/benchmarks.json`. Times are medians with the least and the most in brackets; ratios are of numbers from the same
run.

{machine}

## Beside others

One run, every contestant in a process and an environment of its own, with the same number of threads and float32
weights, asked in turn. "All statistics" are the top 5, entropy, KL divergence from the final distribution, and a
target's log-probability and rank. Versions of the peers: `benchmarks/peers/`; how each is called:
`benchmarks/contestants/`.

*Floor*: the model's own forward pass, plus the bare float32 product of all rows that a lens decodes (31 sites × tokens)
with the head, and nothing else. The product is that of `torch.mm`, which `@` and `nn.Linear` call, so it is what a
hand-written lens would pay at least; many ways to cut and lay it out are tried, and the fastest is taken
(`benchmarks/floor.py`).

*Memory*: what a case needs at most beyond what the forward pass needs.

*Does not fit*: the case wanted more than 14 GiB of address space beyond what its process had after loading, or the
system ended the process for lack of memory. What is limited is address space (`RLIMIT_AS`), since Linux has no such
limit on resident memory, so a case that reserves more than it touches can be stopped too. There is a limit because all
contestants, eight processes, share one machine (24 GiB where these numbers were taken): one that took all of its memory
would have others killed.

{compare}

How can it be below the floor? In part because the floor writes every logit to memory, and logitlab's own kernel never
does: a lane of a vector is a row to decode, and statistics are taken where the product has just left them
([Speed](speed.md)). But it is a property of this processor, an AMD one, as much as of logitlab. `torch.mm` computes
float32 products with Intel's MKL, which is slow here. oneDNN, which PyTorch carries too and uses for tensors that are
converted for it (`to_mkldnn()`), is about twice as fast, and so is logitlab's kernel. The text above each table says
what the fastest way takes. On other processors, Intel's and Arm's among them, these ratios have **not been measured**.

## Decoding alone

Without the forward pass: the statistics of rows that are ready for the head, in units of their own product. With 6
tokens KL adds a large share: the final distribution is worked out for 6 rows, which takes as long as for 32, since the
kernel takes 32 at a time.

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

## Batches, shared beginnings and passes {{ #company }}

By how much a prompt's numbers change when other prompts, or other passes, are involved: largest differences over some
prompts, from a pass of each prompt's own.

{batching}

## Fitting a tuned lens {{ #fitting }}

Beside tuned-lens' own training loop, with the same model, tokens, steps, optimiser (SGD with Nesterov momentum),
schedule and clipping. Both multiply with the head in bfloat16 for the gradient: theirs by autocast, ours summed in
float32. *Memory* is what fitting needs at most beyond the loaded model and the lens. The second table is
the KL divergence from the model's own distribution, nats, on other text, of every third site: what counts is that the
last two columns agree. After so few steps neither lens is good; [Fitted lenses](fitted.md) shows what longer fits come
to.

{fitting}

## Measuring a Jacobian lens

Beside TransformerLens' fit of the same prompts, with 16 coordinates side by side in both.

{jacobian}

## Lenses that others have written

Largest differences, in nats, between what a tool reads with a lens that it has written itself, and what logitlab reads
with the same file. Log-probabilities and entropies of {formats_tokens} tokens at all sites.

{formats}

## Sweeping a corpus

{sweeping}

## Reading while a model writes

{generating}

## Activation patching

Every layer and position of a pair, patched one by one. *Plain* is the same number of unpatched rows through the model
itself, in batches of the same size, with the logits of the last position alone. A patched pass begins at the patched
layer: what is below it is as in the unpatched run.

{patching}

## The grid in a browser

A made-up reading: {grid}

## From a click to the picture

{app}

## GPU

{gpu}
"""

NO_GPU = """No GPU was there when this page was made. On an H200 the Triton kernel has been run and measured by
itself, and a whole reading before it was made quicker: see [Speed](speed.md#on-a-gpu). `python benchmarks/gpu.py`
measures it where there is one: its differences from float64, its share of the rate of a bare bfloat16 product, memory,
and all statistics."""


def page(results: dict[str, Any]) -> str:
    """The page from the results that there are."""
    measured = [results[name] for name in SECTIONS if name in results]
    first = machine.words(measured[0]["machine"] if measured else machine.described())
    parts: dict[str, str] = {}
    for name, (_, markdown) in SECTIONS.items():
        if name not in results:
            parts[name] = "*Not measured yet.*"
            continue
        about = machine.words(results[name]["machine"])
        other = ", ".join(phrase for key, phrase in about.items() if phrase != first[key])
        parts[name] = markdown(results[name]["found"]) + (f"\n\n*This section: {other}.*" if other else "")
    text = (
        f"Machine: {first['machine']}. {first['versions']}. {first['date'].capitalize()}, {first['commit']}. Where a "
        "section was measured otherwise, a line under it says how."
    )
    return TEXT.format(
        machine=text, command="`python benchmarks/run.py`", gpu=NO_GPU, formats_tokens=formats.TOKENS, **parts
    )


def summary(results: dict[str, Any]) -> str | None:
    """The few numbers of the README: 256 tokens, 31 sites; None if those have not been measured."""
    part = results.get("compare", {"found": {"lengths": {}}})["found"]["lengths"].get("256")
    if part is None:
        return None
    floor = compare.floor_of(part)
    lines = [
        "| 31 layers of 256 tokens; in units of forward pass + float32 product | top 5 | memory over the forward pass "
        "| all statistics | memory over the forward pass |",
        "|---|---|---|---|---|",
    ]
    for name, title in compare.titles():
        cells: list[str] = []
        for key in (f"{name}: top", f"{name}: all"):
            if key in part["seconds"] and key not in part["does_not_fit"]:
                cells.append(f"{statistics.median(part['seconds'][key]) / floor:.2f}")
                cells.append(compare.added_memory(part, key))
            else:
                cells += compare.cells_of(part, key, floor)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


BEFORE, AFTER = "<!-- benchmarks: written by benchmarks/run.py -->\n", "<!-- /benchmarks -->"
"""What the README's numbers stand between."""


def into_readme(text: str) -> None:
    """Put the summary between its marks."""
    readme = README.read_text(encoding="utf-8")
    before, mark, rest = readme.partition(BEFORE)
    if not mark or AFTER not in rest:
        raise SystemExit(f"{README} has lost the marks that its numbers stand between: {BEFORE.strip()} and {AFTER}")
    README.write_text(f"{before}{mark}\n{text}\n\n{AFTER}{rest.partition(AFTER)[2]}", encoding="utf-8")


def save(results: dict[str, Any]) -> None:
    """Write the results, and the page and the README's numbers that are made of them."""
    whole = json.dumps(results, indent=1) + "\n"
    part = RESULTS.with_name(RESULTS.name + ".part")
    part.write_text(whole, encoding="utf-8")
    part.replace(RESULTS)  # at no time is there half a file
    PAGE.write_text(page(results), encoding="utf-8")
    numbers = summary(results)
    if numbers is not None:
        into_readme(numbers)


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
        about = machine.described()

        def keep(found: Any, name: str = name, about: dict[str, Any] = about) -> None:
            results[name] = {"machine": about, "found": found}
            save(results)

        keep(measure(keep))
        print(markdown(results[name]["found"]), flush=True)
    if options.page:
        save(results)


if __name__ == "__main__":
    main()
