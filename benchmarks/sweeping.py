"""Memory and rate of a sweep over 200,000 tokens, beside the rate of reading one batch again and again.

Peak memory is taken when 50,000, 100,000 and 200,000 tokens are done, so it shows whether it grows.
Run: python benchmarks/sweeping.py [--tokens 200000 --sites ::10.resid_post]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contestants.worker import status_of
from machine import Result, real_text

LENGTH = 256


def measure(tokens: int, sites: str) -> Result:
    """MB at some points, tokens a second of the sweep and of single batches before, between and after."""
    import logitlab as ll
    from logitlab.corpora import fetch_corpus

    fetch_corpus("books")

    model = ll.load("default")
    text = real_text()
    ids = model.tokenizer(text[:40_000])["input_ids"]
    batch = [ids[LENGTH * i : LENGTH * (i + 1)] for i in range(4)]

    single: list[float] = []
    spent = [0.0]

    def rate() -> None:
        begin = time.perf_counter()
        ll.read(model, batch, sites=sites, batch_tokens=1024)
        seconds = time.perf_counter() - begin
        spent[0] += seconds
        single.append(4 * LENGTH / seconds)

    marks = (tokens // 4, tokens // 2, tokens)
    peaks: dict[int, float] = {}

    def progress(p: Any) -> None:
        for mark in marks:
            if p.tokens >= mark and mark not in peaks:
                peaks[mark] = status_of("VmHWM") / 1024
                rate()

    for _ in range(4):
        rate()
    single.clear()
    for _ in range(3):
        rate()
    spent[0] = 0.0
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = ll.sweep(
            model, "books", sites=sites, length=LENGTH, max_tokens=tokens, folder=Path(folder) / "x", progress=progress
        )
        seconds = time.perf_counter() - begin - spent[0]
    done = report.about["corpus"]["tokens"]
    if done < tokens:
        raise SystemExit(f"the corpus has {done} tokens only")
    return {
        "tokens": done,
        "sites": len(report.sites),
        "peaks": {str(k): v for k, v in peaks.items()},
        "rate": done / seconds,
        "single": single,
    }


def markdown(found: Result) -> str:
    """Two sentences."""
    peaks = ", ".join(f"{float(v):,.0f} MB at {int(k):,} tokens" for k, v in found["peaks"].items())
    single = statistics.median(found["single"])
    return (
        f"{found['tokens']:,} tokens, {found['sites']} sites. Peak memory of the process: {peaks}. "
        f"{found['rate']:,.0f} tokens a second, {found['rate'] / single:.2f} times the rate at which a single batch is "
        f"read again and again ({single:,.0f}, median of {len(found['single'])}, taken before and in between)."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--sites", default="::10.resid_post")
    given = parser.parse_args()
    print(markdown(measure(given.tokens, given.sites)))
