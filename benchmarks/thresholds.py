"""What the thresholds of screening cost: how likely a column must be to be computed again, and when rows are given up.

Real rows: 256 tokens at all residual sites. Run: python benchmarks/thresholds.py
"""

from __future__ import annotations

import statistics as stats
import time
from typing import Any

import logitlab as ll
from logitlab.logits import Head, native, statistics
from logitlab.models.capture import capture
from machine import Result, real_text, show

THETAS = (12.0, 14.0, 15.0, 16.0, 17.0, 18.0, 20.0)
PATIENCES = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1.0)
NAMES = {"top 5": {"entropy": False}, "top 5 and entropy": {}}


def measure(repeats: int = 3) -> Result:
    """Seconds, and the part of the rows that is done in full, by threshold."""
    model = ll.load("default")
    head = model.tail.source
    assert isinstance(head, Head)
    states = capture(model, model.tokenizer(real_text()[:8000])["input_ids"][:256])
    hidden = states.stacked(states.sites)
    x = model.tail.head_input(hidden.reshape(-1, model.width)).reshape(len(states.sites), -1, model.width)
    own: dict[str, Any] = {n: getattr(native, n) for n in ("THETA", "THETA_ENTROPY", "PATIENCE")}
    settings = [(f"theta {t:g}", {"THETA": t, "THETA_ENTROPY": t}) for t in THETAS]
    settings += [(f"patience 1/{round(1 / p)}", {"PATIENCE": p}) for p in PATIENCES]
    found: Result = {}
    try:
        for r in range(repeats + 1):  # the first is not counted
            for name, values in settings:
                for key, value in (own | values).items():
                    setattr(native, key, value)
                for kind, options in NAMES.items():
                    start = time.perf_counter()
                    got = statistics(x, head, precision="screened", **options)
                    seconds = time.perf_counter() - start
                    assert got.bound is not None
                    row = found.setdefault(name, {}).setdefault(kind, {"seconds": [], "in full": 0.0})
                    row["in full"] = float((got.bound == 0).double().mean())
                    if r:
                        row["seconds"].append(seconds)
            for kind, options in NAMES.items():
                start = time.perf_counter()
                statistics(x, head, **options)
                if r:
                    found.setdefault("exact", {}).setdefault(kind, []).append(time.perf_counter() - start)
    finally:
        for key, value in own.items():
            setattr(native, key, value)
    return found


def markdown(found: Result) -> str:
    """One table, in units of the exact scan."""
    exact = {kind: stats.median(values) for kind, values in found["exact"].items()}
    header = " | ".join(f"{kind}: time, in exact ones | rows in full" for kind in NAMES)
    lines = [f"| | {header} |", "|---" * (1 + 2 * len(NAMES)) + "|"]
    for name, row in found.items():
        if name == "exact":
            continue
        cells = [
            c for k in NAMES for c in (f"{stats.median(row[k]['seconds']) / exact[k]:.2f}", f"{row[k]['in full']:.1%}")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    show(__doc__, measure, markdown)
