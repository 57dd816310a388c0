"""logitlab beside its peers, the usual hand-written loop, and the floor: one run, interleaved.

Each contestant has a process and an environment of its own (`contestants/`, `peers/`). For every prompt length
and set of statistics the processes are asked in turn, in another order each round. The floor is the model's own
forward pass plus the bare float32 product [rows, d] x [d, V] of all rows that a lens decodes.
Run: python benchmarks/compare.py [--lengths 16 256 2048 --rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import Result, real_text, spread

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".bench"
PEERS = {
    "transformer_lens": ("TransformerLens", "transformer-lens", "no KL; ranks in a second call"),
    "interp_engine": ("interp-engine", "interp-engine", "entropy, KL and rank by the usual code; 30 of 31 sites"),
    "interpreto": ("interpreto", "interpreto", "top tokens only"),
    "tuned_lens": ("tuned-lens", "tuned-lens", "no top tokens of its own"),
}
OURS = {
    "logitlab_exact": "logitlab, exact",
    "logitlab_screened": "logitlab, screened",
    "logitlab_torch": "logitlab without a C compiler",
}
BASE = ("forward", "product", "product bfloat16")


class Process:
    """One contestant."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        self.name = name
        command = [python, "-m", "contestants.worker", name, folder]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
        )
        self.threads = self._read()["threads"]

    def ask(self, what: str, ids: list[int]) -> Result:
        """Have a case run and measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "ids": ids}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: run its worker by hand to see why")
        return json.loads(line)

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()


def environment(peer: str) -> str:
    """Python of a peer's environment, made if it is not there."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        print(f"making the environment of {peer} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "-r", str(HERE / "peers" / f"{peer}.txt")], check=True)
        done.touch()
    return str(python)


def measure(lengths: list[int], rounds: int, only: list[str] | None = None) -> Result:
    """Run everything; seconds and MB of every round."""
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    folder = str(converted(source))
    names = [n for n in ("by_hand", *OURS, *PEERS) if only is None or n in ("by_hand", *only)]
    pythons = {n: environment(PEERS[n][1]) if n in PEERS else sys.executable for n in names}
    processes = {n: Process(n, pythons[n], folder) for n in names}
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(real_text()[:200_000])["input_ids"]
    found: Result = {"lengths": {}, "threads": {n: p.threads for n, p in processes.items()}}
    try:
        for length in lengths:
            ids = tokens[1000 : 1000 + length]
            times: dict[str, list[float]] = {}
            memory: dict[str, list[float]] = {}
            fits: dict[str, bool] = {}
            cases = [("by_hand", what) for what in (*BASE, "top", "all")]
            cases += [(n, what) for what in ("top", "all") for n in names if n != "by_hand"]
            for n, what in cases:  # what is only done once (weights paged in, kernels chosen) is not counted
                processes[n].ask(what, ids[:6])
            for r in range(rounds):
                for n, what in cases[r % len(cases) :] + cases[: r % len(cases)]:
                    key = f"{n}: {what}"
                    if fits.get(key) is False:
                        continue
                    answer = processes[n].ask(what, ids)
                    if not answer["offered"]:
                        continue
                    fits[key] = "seconds" in answer
                    if fits[key]:
                        times.setdefault(key, []).append(answer["seconds"])
                        memory.setdefault(key, []).append(answer["memory"])
                        print(f"{length} {key}: {answer['seconds']:.3f} s, {answer['memory']:.0f} MB", file=sys.stderr)
            unfit = [key for key, fine in fits.items() if not fine]
            found["lengths"][str(length)] = {"seconds": times, "memory": memory, "does_not_fit": unfit}
    finally:
        for process in processes.values():
            process.end()
    return found


def markdown(found: Result) -> str:
    """Tables: one for each length."""
    lines: list[str] = []
    for length, part in found["lengths"].items():
        times = part["seconds"]
        floor = statistics.median(times["by_hand: forward"]) + statistics.median(times["by_hand: product"])
        lines += [
            f"### {int(length):,} tokens",
            "",
            f"Floor: {floor:.3f} s, of them the forward pass {statistics.median(times['by_hand: forward']):.3f} s and "
            f"the float32 product {statistics.median(times['by_hand: product']):.3f} s. (The product in bfloat16, "
            f"whose results are rounded to 8 bits: {statistics.median(times['by_hand: product bfloat16']):.3f} s.)",
            "",
            "| | top 5: time, in floors | memory over the forward pass | all statistics: time, in floors | "
            "memory over the forward pass | |",
            "|---|---|---|---|---|---|",
        ]
        rows = [*OURS.items(), ("by_hand", "the loop that everybody writes")]
        rows += [(name, title) for name, (title, _, _) in PEERS.items()]
        for name, title in rows:
            cells = [cell for what in ("top", "all") for cell in cells_of(part, f"{name}: {what}", floor)]
            note = PEERS[name][2] if name in PEERS else ""
            lines.append(f"| {title} | {' | '.join(cells)} | {note} |")
        lines.append("")
    return "\n".join(lines)


def cells_of(part: Result, key: str, floor: float) -> list[str]:
    """Time in floors, and memory over the forward pass, of one contestant and case."""
    if key in part["does_not_fit"]:
        return ["does not fit", "over 14 GiB"]
    if key not in part["seconds"]:
        return ["not offered", ""]
    forward = statistics.median(part["memory"]["by_hand: forward"])
    added = statistics.median(part["memory"][key]) - forward
    return [spread(part["seconds"][key], floor), f"{added:+,.0f} MB"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="contestants, besides what is done by hand")
    options: Any = parser.parse_args()
    print(markdown(measure(options.lengths, options.rounds, options.only)))


if __name__ == "__main__":
    main()
