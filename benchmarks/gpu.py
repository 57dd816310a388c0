"""The Triton kernel on a GPU: right, and how much of the rate of a bare bfloat16 product it keeps.

For each shape: statistics against the float64 reference on a few rows, then the time of the kernel beside
cuBLAS' product of the same rows and head in bfloat16, which writes all logits.
"rows counted again" are those that the tiled backend has to scan once more for the ranks of their targets.
Run: python benchmarks/gpu.py, on a machine with a CUDA GPU, PyTorch for it, and triton. With TRITON_INTERPRET=1 it runs
anywhere, on a tiny shape, to show that this file works; its times then say nothing.
"""

from __future__ import annotations

import statistics as stats
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch

from logitlab.logits import Head, gpu, statistics
from logitlab.logits.partial import Partial
from logitlab.logits.statistics import Request
from machine import Result

SHAPES = ((49_152, 576, 8192), (128_256, 4096, 4096), (256_000, 2304, 4096))
"""Vocabulary, width, rows."""

TINY = ((500, 24, 32),)

BLOCKS = ((64, 128, 64), (128, 128, 64), (64, 256, 64), (128, 64, 64), (64, 64, 64))


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
    return {"gpu": where, "shapes": {str(shape): _measured(*shape) for shape in shapes}}


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
    blocks: dict[str, float | str] = {}
    for block in BLOCKS:
        try:
            blocks[str(block)] = _seconds(partial(gpu.scan, given, request, block=block))
        except Exception as error:  # a tile that does not fit this GPU
            blocks[str(block)] = str(error).splitlines()[0][:80]

    def whole(backend: str) -> object:
        return statistics(x, head, backend=backend, targets=target, reference=x[-1])

    return {
        "gaps": {name: float((getattr(fast, name) - getattr(exact, name)).abs().max()) for name in names},
        "ids and ranks equal": torch.equal(fast.top_ids, exact.top_ids)
        and torch.equal(fast.target_rank, exact.target_rank),
        "product": _seconds(lambda: flat @ head.weight.T),
        "blocks": blocks,
        "all statistics": _seconds(partial(whole, "triton")),
        "rows counted again": _counted_again(partial(whole, "triton")),
        "tiled": _seconds(partial(whole, "tiled"), repeats=3),
    }


def markdown(found: Result) -> str:
    """One table."""
    lines = [
        found["gpu"],
        "",
        "| vocabulary, width, rows | product, bfloat16 | kernel, top 5 and entropy | share of the product's rate | "
        "all statistics | rows counted again | PyTorch alone | largest difference | ids, ranks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, r in found["shapes"].items():
        best = min(v for v in r["blocks"].values() if isinstance(v, float))
        lines.append(
            f"| {shape} | {1e3 * r['product']:.2f} ms | {1e3 * best:.2f} ms | {r['product'] / best:.0%} | "
            f"{1e3 * r['all statistics']:.2f} ms | {r['rows counted again']} | {1e3 * r['tiled']:.1f} ms | "
            f"{max(r['gaps'].values()):.1e} | {'equal' if r['ids and ranks equal'] else 'DIFFER'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available() and not gpu.interpreted():
        raise SystemExit("there is no CUDA GPU here: the kernel's tests run in Triton's interpreter (make test)")
    print(markdown(measure()))


if __name__ == "__main__":
    main()
