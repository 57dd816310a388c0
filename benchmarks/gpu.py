"""The Triton kernel on a GPU: right, and how much of the rate of a bare bfloat16 product it keeps.

For each shape: statistics against the float64 reference on a few rows, then the time of the kernel beside
cuBLAS' product of the same rows and head in bfloat16, which writes all logits, and memory beside both.
"rows counted again" are those that the tiled backend has to scan once more for the ranks of their targets.
Run: python benchmarks/gpu.py [--save docs/gpu.json], on a machine with a CUDA GPU, PyTorch for it, and triton. With
TRITON_INTERPRET=1 it runs anywhere, on a tiny shape, to show that this file works; its times then say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

from logitlab.logits import Head, gpu, statistics
from logitlab.logits.partial import Partial
from logitlab.logits.statistics import Request
from machine import Result, described

SHAPES = ((49_152, 576, 8192), (128_256, 4096, 4096), (256_000, 2304, 4096))
"""Vocabulary, width, rows."""

TINY = ((500, 24, 32),)

TILES = (gpu.TILE, gpu.HOPPER_TARGETS, gpu.HOPPER)


def _seconds(work: Callable[[], object], repeats: int = 20) -> float:
    if gpu.interpreted():
        repeats = 1
    work()
    _wait()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - start)
    return stats.median(times)


def _wait() -> None:
    if not gpu.interpreted():
        torch.cuda.synchronize()


def _megabytes(work: Callable[[], object]) -> float:
    """Most memory of the GPU that ``work`` takes beyond what is there."""
    if gpu.interpreted():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    _wait()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _counted_again(work: Callable[[], object]) -> int:
    """Rows that the tiled backend scans while ``work`` runs."""
    rows = 0
    scan = gpu._tiled.scan

    def counted(given: gpu.HeadRows, *others: object, **named: object) -> Partial:
        nonlocal rows
        rows += given.x.shape[0]
        return scan(given, *others, **named)

    with patch.object(gpu._tiled, "scan", counted):
        work()
    return rows


def measure() -> Result:
    """Differences from float64, and seconds, by shape."""
    where = "Triton's interpreter" if gpu.interpreted() else torch.cuda.get_device_name()
    shapes = TINY if gpu.interpreted() else SHAPES
    return {
        "gpu": where,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "shapes": {str(shape): _measured(*shape) for shape in shapes},
    }


def _measured(size: int, width: int, rows: int) -> Result:
    """One shape."""
    device = "cpu" if gpu.interpreted() else "cuda"
    generator = torch.Generator(device).manual_seed(size)
    weight = torch.randn(size, width, generator=generator, device=device) / width**0.5
    head = Head(weight.bfloat16())
    x = (torch.randn(4, rows // 4, width, generator=generator, device=device) * 4).bfloat16()
    flat, few, target = x.reshape(-1, width), x[:, :8], torch.tensor([size // 7])
    fast = statistics(few, head, backend="triton", targets=target, reference=few[-1])
    exact = statistics(few, head, backend="reference", targets=target, reference=few[-1])
    names = ("top_logprob", "logsumexp", "entropy", "target_logprob", "kl")
    assert fast.target_rank is not None
    assert exact.target_rank is not None
    given, request = gpu._Rows(flat, head), Request(5, size)
    tiles: dict[str, float | str] = {}
    for tile in TILES:
        try:
            tiles[str(tuple(tile))] = _seconds(partial(gpu.scan, given, request, tile=tile))
        except Exception as error:  # a tile that does not fit this GPU
            tiles[str(tuple(tile))] = str(error).splitlines()[0][:80]

    def product() -> torch.Tensor:
        return flat @ head.weight.T

    def whole(backend: str) -> object:
        return statistics(x, head, backend=backend, targets=target, reference=x[-1])

    return {
        "gaps": {name: float((getattr(fast, name) - getattr(exact, name)).abs().max()) for name in names},
        "ids and ranks equal": torch.equal(fast.top_ids, exact.top_ids)
        and torch.equal(fast.target_rank, exact.target_rank),
        "product": _seconds(product),
        "product, MB": _megabytes(product),
        "tiles": tiles,
        "top and sums": _seconds(partial(gpu.scan, given, request)),
        "top and sums, MB": _megabytes(partial(gpu.scan, given, request)),
        "all statistics": _seconds(partial(whole, "triton")),
        "all statistics, MB": _megabytes(partial(whole, "triton")),
        "rows counted again": _counted_again(partial(whole, "triton")),
        "tiled": _seconds(partial(whole, "tiled"), repeats=3),
    }


def markdown(found: Result) -> str:
    """One table."""
    lines = [
        found["gpu"],
        "",
        "| vocabulary, width, rows | product, bfloat16 | kernel: top 5, sums | share of the product's rate | "
        "all statistics | rows counted again | PyTorch alone | largest difference | ids, ranks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, r in found["shapes"].items():
        lines.append(
            f"| {shape.strip('()')} | {1e3 * r['product']:.2f} ms, {r['product, MB']:.0f} MB | "
            f"{1e3 * r['top and sums']:.2f} ms, {r['top and sums, MB']:.0f} MB | "
            f"{r['product'] / r['top and sums']:.0%} | "
            f"{1e3 * r['all statistics']:.1f} ms, {r['all statistics, MB']:.0f} MB | {r['rows counted again']} | "
            f"{1e3 * r['tiled']:.0f} ms | {max(r['gaps'].values()):.1e} | "
            f"{'equal' if r['ids and ranks equal'] else 'DIFFER'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="where to put the numbers, as JSON")
    save: Path | None = parser.parse_args().save
    if not torch.cuda.is_available() and not gpu.interpreted():
        raise SystemExit("there is no CUDA GPU here: the kernel's tests run in Triton's interpreter (make test)")
    found = measure()
    if save is not None:
        save.write_text(json.dumps({"about": described(), "found": found}, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
