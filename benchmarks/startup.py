"""Wall time of `logitlab read` on a short prompt against a bare script that runs one forward pass.

The bare script imports torch and transformers, loads the same safetensors weights and tokenizer and
runs the model once. Both are run in turn, five times each, in processes of their own.
Run: python benchmarks/startup.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The capital of France is"

BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    logits = model(**tokenizer(sys.argv[2], return_tensors="pt")).logits
print(tokenizer.decode(logits[0, -1].argmax()))
"""


def seconds(command: list[str]) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turn and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        sys.exit("the default model is not installed: make setup")
    bare = [sys.executable, "-c", BARE, str(converted(source)), PROMPT]
    ours = [str(Path(sys.executable).with_name("logitlab")), "read", PROMPT]
    seconds(bare), seconds(ours)  # warm the file cache
    pairs = [(seconds(bare), seconds(ours)) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    print(f"bare script        {statistics.median(a for a, _ in pairs):6.2f} s (median of {repeats})")
    print(f"logitlab read      {statistics.median(b for _, b in pairs):6.2f} s")
    print(f"ratio, paired      {statistics.median(ratios):6.2f}   (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
