"""By how much company changes the numbers: padded batches, shared beginnings, and prompts cut into passes.

The logic of padding, masking and caches is the same in every precision; what is left in float32 is the
rounding of differently shaped products, through all blocks of the default model.
Run: python benchmarks/batching.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

import logitlab as ll
from logitlab.models import passes
from machine import Result, real_text, show

PROMPTS = (
    "The capital of France is",
    "Hello there my friend, how are you?",
    "def f(x): return x**2 + 1 # and then some more text to make it long",
    "One two",
    "A",
)
WAYS = {
    "padded": "short prompts in one padded batch",
    "shared": "prompts whose first 200 tokens are run once",
    "cut": "a prompt of 1,500 tokens in passes of at most 512",
}


def measure() -> Result:
    """The largest difference of every statistic from a pass of each prompt's own, in float32 and in float64."""
    found: Result = {}
    for dtype in ("float32", "float64"):
        model = ll.load("default", dtype=dtype)
        ids = model.tokenizer(real_text()[:20_000])["input_ids"]
        few = {"sites": "::6.resid_post", "target": " Paris"}
        alike = [ids[:200] + ids[500 + 30 * i : 520 + 30 * i] for i in range(4)]
        pairs: dict[str, tuple[Any, Any]] = {
            "padded": (
                ll.read(model, list(PROMPTS), batch_tokens=4096, **few),
                [ll.read(model, p, **few) for p in PROMPTS],
            ),
            "shared": (
                ll.read(model, alike, share_prefixes=True, **few),
                [ll.read(model, p, **few) for p in alike],
            ),
        }
        cut = ll.read(model, ids[:1500], **few)
        before, passes.PASS_TOKENS = passes.PASS_TOKENS, 10_000
        try:
            pairs["cut"] = cut, [ll.read(model, ids[:1500], **few)]
        finally:
            passes.PASS_TOKENS = before
        for way, (together, alone) in pairs.items():
            for n, own in enumerate(alone):
                for name, values in own.arrays.items():
                    gap = np.abs(together.arrays[name][n : n + 1, :, : values.shape[2]] - values).max()
                    row = found.setdefault(way, {}).setdefault(dtype, {})
                    row[name] = max(row.get(name, 0.0), float(gap))
    return found


def markdown(found: Result) -> str:
    """One table."""
    names = [n for n in next(iter(found.values()))["float32"] if n != "top_id"]
    lines = ["| | | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for way, by_dtype in found.items():
        for dtype, gaps in by_dtype.items():
            lines.append(f"| {WAYS[way]} | {dtype} | " + " | ".join(f"{gaps[n]:.1e}" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    show(__doc__, measure, markdown)
