"""Wall time of `logitlab read` on a short prompt against a bare script that runs one forward pass.

The bare script imports torch and transformers, loads the same safetensors weights and tokenizer and
runs the model once. Both are run in turn, each time in a process of its own. A third part says where the time of
the command goes, step by step in one process.
Run: python benchmarks/startup.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import Result, spread

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

STEPS = """
import json, sys, time
marks, clock = [], time.perf_counter
def mark(name, start): marks.append((name, clock() - start))
start = clock(); import logitlab as ll; mark("import logitlab", start)
start = clock(); import torch; mark("import torch", start)
start = clock(); import transformers; from transformers import AutoModelForCausalLM, AutoTokenizer
mark("import transformers, and what it imports for a model", start)
start = clock(); import logitlab.models.load, logitlab.reader; mark("import logitlab's parts for reading", start)
start = clock(); module = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
mark("weights, mapped from the file", start)
start = clock(); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); mark("tokenizer", start)
start = clock(); model = ll.wrap(module, tokenizer); mark("find the stack, verify the tail", start)
start = clock(); reading = ll.read(model, sys.argv[2], target=" Paris"); mark("the first reading", start)
start = clock(); ll.read(model, sys.argv[2], target=" Paris"); mark("(the second reading)", start)
start = clock(); repr(reading); mark("the printed grid", start)
print(json.dumps(marks))
"""


def seconds(command: list[str]) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(repeats: int) -> Result:
    """Seconds of both, and of each step."""
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    folder = str(converted(source))
    bare = [sys.executable, "-c", BARE, folder, PROMPT]
    ours = [str(Path(sys.executable).with_name("logitlab")), "read", PROMPT]
    steps = [sys.executable, "-c", STEPS, folder, PROMPT]
    seconds(bare), seconds(ours)  # warm the file cache
    pairs = [(seconds(bare), seconds(ours)) for _ in range(repeats)]
    runs = [subprocess.run(steps, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    marks = [dict(json.loads(run.splitlines()[-1])) for run in runs]
    return {
        "bare": [a for a, _ in pairs],
        "read": [b for _, b in pairs],
        "steps": {name: statistics.median(m[name] for m in marks) for name in marks[0]},
    }


def markdown(found: Result) -> str:
    """The ratio, and a table of steps."""
    ratios = [b / a for a, b in zip(found["bare"], found["read"], strict=True)]
    lines = [
        f"`logitlab read` takes {spread(ratios)} times as long as a bare script that loads the model and runs it once "
        f"({statistics.median(found['read']):.2f} s and {statistics.median(found['bare']):.2f} s; paired).",
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in found["steps"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    print(markdown(measure(parser.parse_args().repeats)))


if __name__ == "__main__":
    main()
