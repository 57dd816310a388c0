"""Is the rule for tile sizes any good? Every size in turn, for heads of several widths, beside the rule's choice.

Run: python benchmarks/tiles.py
"""

from __future__ import annotations

import statistics
import time

import torch

from logitlab.logits import Head, native
from logitlab.logits.compiled import library
from logitlab.logits.statistics import Request
from machine import Result, show

SHAPES = {576: 49_152, 1024: 32_768, 2048: 32_768, 4096: 16_384}
"""Vocabulary by width: small enough for a few minutes in all."""

MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Tiles, in columns that one product takes."""


def measure(rows: int = 992, repeats: int = 3) -> Result:
    """Seconds by width and tile."""
    lib = library()
    assert lib is not None
    found: Result = {}
    for width, size in SHAPES.items():
        generator = torch.Generator().manual_seed(width)
        head = Head(torch.randn(size, width, generator=generator) / width**0.5)
        x = native.NativeRows(torch.randn(rows, width, generator=generator) * 3, head)
        rule = native.tile_of(lib.panel, lib.columns)
        tiles = sorted({m * lib.columns for m in MULTIPLES} | {rule})
        times: dict[str, list[float]] = {}
        for _ in range(repeats + 1):  # the first is not counted
            for tile in tiles:
                start = time.perf_counter()
                native.scan(x, Request(5, size), tile=tile)
                times.setdefault(str(tile), []).append(time.perf_counter() - start)
        found[str(width)] = {"rule": rule, "seconds": {tile: values[1:] for tile, values in times.items()}}
    return found


def markdown(found: Result) -> str:
    """One table: how much slower each size is than the best, the rule's choice in bold."""
    widths = list(found)
    tiles = sorted({int(t) for w in widths for t in found[w]["seconds"]})
    lines = [
        "| columns of a tile | " + " | ".join(f"width {w}" for w in widths) + " |",
        "|---" * (1 + len(widths)) + "|",
    ]
    for tile in tiles:
        cells: list[str] = []
        for w in widths:
            times = {int(t): statistics.median(v) for t, v in found[w]["seconds"].items()}
            text = f"{times[tile] / min(times.values()):.2f}" if tile in times else ""
            cells.append(f"**{text}**" if tile == found[w]["rule"] else text)
        lines.append(f"| {tile} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    show(__doc__, measure, markdown)
