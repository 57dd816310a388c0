"""What reading adds to generation, beside what its statistics cost alone.

Run: python benchmarks/generating.py [--tokens 40 --rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from machine import Result, spread

PROMPT = "The capital of France is"


def measure(tokens: int, rounds: int) -> Result:
    """Seconds a token: generation alone, with readings, and the statistics of all sites alone; interleaved."""
    import logitlab as ll

    model = ll.load("default")
    module: Any = model.module
    ids = model.tokenizer(PROMPT, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    found: dict[str, list[float]] = {"generation alone": [], "with readings": [], "statistics alone": []}
    kept = ll.capture(model, PROMPT, positions=-1)
    rows = model.tail.prepare(kept.stacked(kept.sites).flatten(0, 1)).unsqueeze(1)
    final = rows[-1]

    def alone() -> None:
        module.generate(**ids, **options, pad_token_id=0)

    def read() -> None:
        for _ in ll.generate(model, PROMPT, **options):
            pass

    def decode() -> None:
        from logitlab.logits import statistics as statistics_of

        for _ in range(tokens):
            statistics_of(rows, model.tail.source, top_k=5, targets=torch.tensor([5]), reference=final)

    work = {"generation alone": alone, "with readings": read, "statistics alone": decode}
    for _ in range(rounds + 1):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - begin) / tokens)
    return {"seconds": {name: values[1:] for name, values in found.items()}, "tokens": tokens}


def markdown(found: Result) -> str:
    """A table and a sentence."""
    lines = ["| | milliseconds a token |", "|---|---|"]
    lines += [f"| {name} | {spread(values, 1e-3, 1)} |" for name, values in found["seconds"].items()]
    middle = {name: statistics.median(values) for name, values in found["seconds"].items()}
    added = middle["with readings"] - middle["generation alone"]
    return (
        "\n".join(lines)
        + f"\n\nReading adds {added / middle['statistics alone']:.2f} times what its statistics cost alone."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(markdown(measure(given.tokens, given.rounds)))
