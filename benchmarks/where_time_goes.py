"""Where the time of a reading goes: 256 tokens, all residual sites, all statistics.

Run: python benchmarks/where_time_goes.py [--tokens 256 --precision exact]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import logitlab as ll
from logitlab.logits import native, partial
from logitlab.models import passes
from logitlab.models.handle import Model
from logitlab.models.tail import Tail
from machine import Result, real_text

PLACES: list[tuple[str, Any, str]] = [
    ("the model's forward pass, watched", passes, "_forward"),
    ("what comes before the head, by the model's own code (its final norm)", Tail, "prepare"),
    ("the scan: products and statistics", native, "scan"),
    ("the reference's mean head row, for KL", native.NativeRows, "mean_row"),
    ("candidates and targets in float64", native.NativeRows, "at_all"),
    ("conclusions: sorting, sums, divergences", partial, "conclude"),
    ("fingerprint of the model", Model, "fingerprint"),
]


@contextmanager
def timed(spent: dict[str, float]) -> Generator[None]:
    """Count the time in each place, without what is counted further in."""
    stack: list[list[float]] = []
    undo: list[tuple[Any, str, Any]] = []

    def wrapper(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            stack.append([0.0])
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                whole = time.perf_counter() - start
                spent[name] = spent.get(name, 0.0) + whole - stack.pop()[0]
                if stack:
                    stack[-1][0] += whole

        return run

    for name, owner, attribute in PLACES:
        original = owner.__dict__[attribute]
        undo.append((owner, attribute, original))
        if isinstance(original, property):
            assert original.fget is not None
            setattr(owner, attribute, property(wrapper(name, original.fget)))
        else:
            setattr(owner, attribute, wrapper(name, original))
    native.conclude = partial.conclude
    try:
        yield
    finally:
        for owner, attribute, original in undo:
            setattr(owner, attribute, original)
        native.conclude = partial.conclude


def measure(tokens: int, precision: str, repeats: int = 5) -> Result:
    """Seconds in each place, and in all."""
    model = ll.load("default")
    ids = model.tokenizer(real_text()[:40_000])["input_ids"][1000 : 1000 + tokens]
    ll.read(model, ids, target=[7042], precision=precision)
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        spent: dict[str, float] = {}
        start = time.perf_counter()
        with timed(spent):
            ll.read(model, ids, target=[7042], precision=precision)
        spent["all"] = time.perf_counter() - start
        rounds.append(spent)
    return {name: statistics.median(r.get(name, 0.0) for r in rounds) for name in rounds[0]} | {"tokens": tokens}


def markdown(found: Result) -> str:
    """One table."""
    whole = found["all"]
    places = [(name, found[name]) for name, _, _ in PLACES if name in found]
    places.append(("everything else: inputs, labels, tables, provenance", whole - sum(s for _, s in places)))
    lines = [f"| {found['tokens']} tokens: {whole:.3f} s | of it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {seconds / whole:.1%} |" for name, seconds in places)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--precision", default="exact")
    options = parser.parse_args()
    print(markdown(measure(options.tokens, options.precision)))


if __name__ == "__main__":
    main()
