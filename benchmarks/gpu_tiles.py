"""The launch of the Triton kernel alone, by tile, beside cuBLAS' product of the same rows and head in bfloat16.

Where `gpu.py` times whole scans, with what goes on around the kernel, this repeats one launch with the arguments that a
scan gives it, and takes times on the GPU.
Run: python benchmarks/gpu_tiles.py [--repeats 5 --json FILE], on a machine with a CUDA GPU, PyTorch for it, and triton.
With TRITON_INTERPRET=1 it runs anywhere, on a tiny shape, to show that this file works; its times then say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from logitlab.logits import Head, gpu
from logitlab.logits.statistics import Request
from machine import Result, described

SHAPES = ((49_152, 576, 8192), (128_256, 4096, 4096), (256_000, 2304, 4096))
"""Vocabulary, width, rows."""

TINY = ((500, 64, 70),)

TILES = (gpu.TILE, gpu.HOPPER_TARGETS, gpu.HOPPER)


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of some runs, on the GPU's clock where there is one."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        if gpu.interpreted():
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return stats.median(times)


class _Noted:
    """Stands for the kernel, and keeps what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launch = kernel, None

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*given: Any, **constants: Any) -> None:
            self.launch = lambda: self.kernel[grid](*given, **constants)
            self.launch()

        return run


def _launch(rows: Any, request: Request, tile: Any) -> Callable[[], object]:
    """The launch that a scan with that tile makes."""
    noted = _Noted(gpu.scan_kernel)
    gpu.scan_kernel = noted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        gpu.scan(rows, request, tile=tile)
    finally:
        gpu.scan_kernel = noted.kernel
    assert noted.launch is not None
    return noted.launch


def measure(repeats: int) -> Result:
    """Seconds by shape: the product, and by tile the launch without and with one target."""
    interpreted = gpu.interpreted()
    device = "cpu" if interpreted else "cuda"
    shapes: dict[str, Result] = {}
    for size, width, count in TINY if interpreted else SHAPES:
        generator = torch.Generator(device).manual_seed(size)
        head = Head((torch.randn(size, width, generator=generator, device=device) / width**0.5).bfloat16())
        x = (torch.randn(count, width, generator=generator, device=device) * 4).bfloat16()
        rows = gpu._Rows(x, head)
        target = torch.full((count, 1), size // 7, device=device)
        tiles: dict[str, Any] = {}
        for tile in TILES:
            for name, targets in (("top", None), ("target", target)):
                try:
                    launch = _launch(rows, Request(5, size, targets), tile)
                    tiles[f"{tuple(tile)}, {name}"] = _seconds(launch, repeats)
                except Exception as error:  # a tile that does not fit this GPU
                    tiles[f"{tuple(tile)}, {name}"] = str(error).splitlines()[0][:80]
        product = _seconds(lambda x=x, head=head: x @ head.weight.T, repeats)
        shapes[f"{size:,}, {width:,}, {count:,}"] = {"product": product, "tiles": tiles}
    where = "Triton's interpreter" if interpreted else torch.cuda.get_device_name()
    return {"gpu": where, "shapes": shapes}


def markdown(found: Result) -> str:
    """A table: a line for each shape and tile."""
    lines = [
        found["gpu"],
        "",
        "| vocabulary, width, rows | tile, statistics | product | kernel | share of the product's rate |",
        "|---|---|---|---|---|",
    ]
    for shape, r in found["shapes"].items():
        for tile, seconds in r["tiles"].items():
            known = isinstance(seconds, float)
            said = f"{1e3 * seconds:.2f} ms | {r['product'] / seconds:.0%}" if known else f"{seconds} | –"
            lines.append(f"| {shape} | {tile} | {1e3 * r['product']:.2f} ms | {said} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not gpu.interpreted():
        raise SystemExit("there is no CUDA GPU here: the kernel's tests run in Triton's interpreter (make test)")
    found = measure(options.repeats)
    if options.json:
        from logitlab.files import write_text

        write_text(options.json, json.dumps({"machine": described(), "found": found}, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
