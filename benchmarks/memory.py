"""Peak memory of reading, over the model's own forward pass, for a short and a long prompt.

Each case runs in a process of its own, after a few tokens have gone through the model, and reports the most resident
memory that it needed beyond what was held before. Linux only (`/proc/self/clear_refs`).
Run: python benchmarks/memory.py [--tokens 256 8192]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from contestants.worker import peak_of
from machine import Result, real_text

CASES = {
    "forward": "the forward pass as it is called: with its cache, logits of the last token",
    "forward, all logits": "the forward pass with all logits, as `model(ids)` gives them",
    "forward, lean": "the forward pass without a cache, logits of the last token",
    "top": "read: all residual sites, top 5",
    "exact": "read: all residual sites, all statistics",
    "screened": "read: the same, screened",
}


def run(case: str, tokens: int) -> None:
    """Run one case and print what it needed."""
    import torch

    import logitlab as ll

    model = ll.load("default")
    text = real_text()[: 10 * tokens]
    ids = model.tokenizer(text)["input_ids"][:tokens]

    def forward(some: list[int], **options: Any) -> None:
        with torch.no_grad():
            model.module(torch.tensor([some]), **options)

    def work(some: list[int]) -> None:
        if case == "forward":
            forward(some, logits_to_keep=1)
        elif case == "forward, all logits":
            forward(some)
        elif case == "forward, lean":
            forward(some, logits_to_keep=1, use_cache=False)
        elif case == "top":
            ll.read(model, some, statistics=())
        else:
            ll.read(model, some, target=[7042], precision=case)

    work(ids[:6])
    seconds, megabytes = peak_of(lambda: work(ids))
    print(json.dumps({"megabytes": megabytes, "seconds": seconds}))


def measure(lengths: list[int]) -> Result:
    """MB by length and case."""
    found: Result = {}
    for tokens in lengths:
        for case in CASES:
            command = [sys.executable, str(Path(__file__)), "--case", case, "--tokens", str(tokens)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.setdefault(str(tokens), {})[case] = json.loads(out.splitlines()[-1])["megabytes"]
    return found


def markdown(found: Result) -> str:
    """One table."""
    lengths = list(found)
    header = " | ".join(f"{int(n):,} tokens: MB | over the forward pass" for n in lengths)
    lines = [f"| | {header} |", "|---" * (1 + 2 * len(lengths)) + "|"]
    for case, text in CASES.items():
        cells: list[str] = []
        for n in lengths:
            cells.append(f"{found[n][case]:,.0f}")
            cells.append("" if case.startswith("forward") else f"{found[n][case] - found[n]['forward']:+,.0f}")
        lines.append("| " + " | ".join([text, *cells]) + " |")
    for n in lengths:
        whole = 31 * int(n) * 49_152 * 4 / 2**20
        lines += ["", f"A float32 table of [31 sites × {int(n):,} tokens × 49,152 columns] would be {whole:,.0f} MB."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 8192])
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        run(options.case, options.tokens[0])
    else:
        print(markdown(measure(options.tokens)))


if __name__ == "__main__":
    main()
