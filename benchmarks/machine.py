"""What a measurement was made on, and how numbers are summed up."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def show(text: str | None, measure: Callable[[], Result], markdown: Callable[[Result], str]) -> None:
    """What a script without options does: explain itself with --help, else measure and print."""
    argparse.ArgumentParser(description=text).parse_args()
    print(markdown(measure()))


def described() -> Result:
    """Processor, memory, versions and date."""
    import torch

    from logitlab.logits.compiled import library

    kernel = library()
    name = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "MemTotal: 0 kB")
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "processor": name.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": f"{int(memory.split()[1]) / 2**20:.0f} GiB",
        "vectors": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f} " in f"{flags} "],
        "kernel": None if kernel is None else {"panel": kernel.panel, "bfloat16": kernel.bfloat16},
        "versions": {p: version(p) for p in ("logitlab", "torch", "transformers", "numpy")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def words(about: Result) -> Result:
    """What `described` found, as phrases: the machine, the versions, the commit and the date."""
    vectors = ", ".join(about["vectors"]) or "no vector extensions that matter here"
    return {
        "machine": f"{about['processor']}, {about['cores']} cores ({vectors}), {about['memory']} of memory, "
        f"{about['threads']} threads",
        "versions": ", ".join(f"{name} {v}" for name, v in about["versions"].items()),
        "commit": f"commit {about['commit']}" if about.get("commit") else "commit not recorded",
        "date": f"measured {about['date']}",
    }


def _commit() -> str | None:
    """Short hash, and whether what is measured has changes that are not in it; None where there is no git."""
    folder = Path(__file__).parents[1]
    measured = ("src", "benchmarks", "pyproject.toml", "constraints.txt")  # results and pages change on the way
    try:
        said = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", *measured))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{said[0]} with local changes" if said[1] else said[0]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def real_text() -> str:
    """Real English prose that every Python carries: the language reference behind ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 2) -> str:
    """Median with the least and the most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle / unit:.{digits}f} ({low / unit:.{digits}f} to {high / unit:.{digits}f})"
