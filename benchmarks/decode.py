"""Decoding alone against the bare product [rows, d] x [d, V] that it needs, for a short prompt and a longer one.

Real rows: all residual sites of a real text on the default model, ready for the head. The product is the fastest of
many ways with `torch.mm`, and the fastest way of all is shown beside it (`floor.py`). The cases run in turn.
Run: python benchmarks/decode.py [--tokens 6 256 --repeats 5]
"""

from __future__ import annotations

import argparse
import statistics as stats
import time
from collections.abc import Callable

import torch

import logitlab as ll
from floor import Product, fastest
from logitlab.logits import Head, statistics
from logitlab.models.capture import capture
from machine import Result, real_text, spread

FASTEST, PRODUCT = "product, float32, the fastest way known", "product, float32, with `torch.mm`"


def measure(lengths: list[int], repeats: int) -> Result:
    """Seconds of every case."""
    model = ll.load("default")
    head = model.tail.source
    assert isinstance(head, Head)
    tokens = model.tokenizer(real_text()[:40_000])["input_ids"]
    found: Result = {}
    for length in lengths:
        states = capture(model, tokens[1000 : 1000 + length])
        hidden = states.stacked(states.sites)
        x = model.tail.head_input(hidden.reshape(-1, model.width)).reshape(len(states.sites), -1, model.width)
        times: dict[str, list[float]] = {}
        cases = _cases(x, head)
        for case in cases.values():
            case()
        for _ in range(repeats if length > 100 else 4 * repeats):
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times.setdefault(name, []).append(time.perf_counter() - start)
        ways = {name: str(case.way) for name, case in cases.items() if isinstance(case, Product)}
        found[str(length)] = {"rows": x.shape[0] * x.shape[1], "seconds": times, "ways": ways}
    return found


def _cases(x: torch.Tensor, head: Head) -> dict[str, Callable[[], object]]:
    flat, target = x.reshape(-1, x.shape[-1]), torch.tensor([7042])
    weight = head.weight.detach()
    kinds: dict[str, dict[str, object]] = {
        "top 5": {"entropy": False},
        "top 5, entropy": {},
        "top 5, entropy, KL": {"reference": x[-1]},
        "top 5, entropy, KL, a target's rank": {"reference": x[-1], "targets": target},
    }
    cases: dict[str, Callable[[], object]] = {PRODUCT: fastest(flat, weight, ("mm",)), FASTEST: fastest(flat, weight)}
    for precision in ("exact", "screened"):
        for name, options in kinds.items():
            cases[f"{name} ({precision})"] = lambda o=options, p=precision: statistics(x, head, precision=p, **o)  # type: ignore[arg-type]
    return cases


def markdown(found: Result) -> str:
    """One table."""
    lengths = list(found)
    lines = [
        "| " + " | ".join(["in products", *(f"{n} tokens, {found[n]['rows']:,} rows" for n in lengths)]) + " |",
        "|---" * (1 + len(lengths)) + "|",
    ]
    for name in found[lengths[0]]["seconds"]:
        cells: list[str] = []
        for n in lengths:
            times = found[n]["seconds"]
            floor = stats.median(times[PRODUCT])
            own = f"{floor:.4f} s" if name == PRODUCT else spread(times[name], floor)
            cells.append(own)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    for n in lengths:
        told = "; ".join(f"{name}: {way}" for name, way in found[n].get("ways", {}).items())
        lines += ["", f"Fastest with {int(n):,} tokens: {told}."] if told else []
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[6, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(markdown(measure(options.tokens, options.repeats)))


if __name__ == "__main__":
    main()
