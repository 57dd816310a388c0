"""Time of the statistics against the bare product [rows, d] x [d, V] that they need.

Real rows: all residual sites of a real text on the default model. The cases run in turn.
Run: python benchmarks/decode.py [--tokens 128 --repeats 3]
"""

from __future__ import annotations

import argparse
import statistics as stats
import time
from collections.abc import Callable

import torch

import logitlab as ll
from logitlab.logits import Head, statistics
from logitlab.models.capture import capture

TEXT = (
    "The history of the city begins with a small settlement on the banks of the river. In 1849 engineers built the "
    'first bridge, and the population grew from 3,000 to 12,500 within a decade. "We never expected this", said a '
    "historian; the archives tell another story: trade, floods, and fire. "
)


def main() -> None:
    """Measure every case in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = ll.load("default")
    head = model.tail.source
    assert isinstance(head, Head)
    ids = model.tokenizer(TEXT * 40)["input_ids"][: options.tokens]
    states = capture(model, ids)
    hidden = states.stacked(states.sites)
    x = model.tail.head_input(hidden.reshape(-1, model.width)).reshape(len(states.sites), -1, model.width)
    flat, target = x.reshape(-1, model.width), torch.tensor([7042])

    def product() -> None:
        for start in range(0, head.vocab_size, 4096):
            flat @ head.weight[start : start + 4096].T

    def usual() -> None:
        for rows in flat.split(64):
            logp = torch.log_softmax(rows @ head.weight.T, -1)
            logp.topk(5)
            -(logp.exp() * logp).sum(-1)
            (logp > logp[:, 7042:7043]).sum(-1)

    cases: dict[str, Callable[[], object]] = {
        "bare product, float32": product,
        "log_softmax, top-k, entropy, rank by rows of 64": usual,
        "logitlab: top 5, entropy": lambda: statistics(x, head),
        "logitlab: and KL to the final distribution": lambda: statistics(x, head, reference=x[-1]),
        "logitlab: and a target's rank": lambda: statistics(x, head, reference=x[-1], targets=target),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - start)
    floor = stats.median(times["bare product, float32"])
    print(f"{len(states.sites)} sites x {len(ids)} tokens, d = {model.width}, V = {head.vocab_size}")
    for name, values in times.items():
        spread = f"{min(values) / floor:.2f} to {max(values) / floor:.2f}"
        print(f"{name:50} {stats.median(values):6.2f} s   {stats.median(values) / floor:5.2f} x the product ({spread})")


if __name__ == "__main__":
    main()
