"""logitlab beside its peers, the usual hand-written loop, and the floor: one run, interleaved.

Each contestant has a process and an environment of its own (`contestants/`, `peers/`). For every prompt length
and set of statistics the processes are asked in turn, in another order each round. The floor is the model's own
forward pass plus the bare float32 product [rows, d] x [d, V] of all rows that a lens decodes, by `torch.mm`; the
fastest way known stands beside it (`floor.py`).
Run: python benchmarks/compare.py [--lengths 16 256 2048 --rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import Result, real_text, spread

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".bench"
PEERS = {
    "transformer_lens": (
        "TransformerLens",
        "transformer-lens",
        "no KL; the top 5 always come with entropy",
    ),
    "interp_engine": ("interp-engine", "interp-engine", "entropy, KL and rank by the usual code; 30 of 31 sites"),
    "interpreto": ("interpreto", "interpreto", "top tokens only"),
    "tuned_lens": ("tuned-lens", "tuned-lens", "its top tokens are labels of a figure, so the top 5 by `torch.topk`"),
}
OURS = {
    "logitlab_exact": "logitlab, exact",
    "logitlab_screened": "logitlab, screened",
    "logitlab_torch": "logitlab without a C compiler",
}
BY_HAND = "the usual loop, written by hand"
BASE = ("forward", "product", "product torch.mm", "product bfloat16")


class Process:
    """One contestant."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        self.name = name
        self._command = [python, "-m", "contestants.worker", name, folder]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
        )
        ready = self._read()
        if ready is None:
            raise SystemExit(f"{self.name} does not start: run its worker by hand to see why")
        self.threads: int = ready["threads"]
        self.dtypes: list[str] = ready["dtypes"]

    def ask(self, what: str, ids: list[int]) -> Result:
        """Have a case run and measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "ids": ids}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if answer is None:  # the system has ended it, as it does with what takes the last memory
            self.end()
            self._start()
            return {"offered": True, "does_not_fit": True}
        if "error" in answer:
            raise SystemExit(f"{self.name}: {what}, {len(ids)} tokens: {answer['error']}")
        return answer

    def _read(self) -> Result | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

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


def in_turn(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run some commands in turn; by command, the seconds and megabytes that each prints in the end, as JSON."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "megabytes": []} for name in commands}
    threads = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    for _ in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=threads)
            result = json.loads(done.stdout.splitlines()[-1])
            for key, values in found[name].items():
                values.append(result[key])
    return found


def check_alike(processes: list[Process]) -> None:
    """Stop unless all contestants have as many threads, and float32 weights: nothing could be compared."""
    for what, values in (
        ("threads", {p.name: p.threads for p in processes}),
        ("weights", {p.name: ", ".join(p.dtypes) for p in processes}),
    ):
        if len(set(values.values())) > 1:
            told = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise SystemExit(f"the contestants' {what} differ, so they cannot be compared ({told})")


def measure(
    lengths: list[int], rounds: list[int], only: list[str] | None = None, keep: Callable[[Result], None] | None = None
) -> Result:
    """Run everything, each length so many rounds; seconds and MB of every round.

    What there is so far is given to `keep` after each length.
    """
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    folder = str(converted(source))
    names = [n for n in ("by_hand", *OURS, *PEERS) if only is None or n in ("by_hand", *only)]
    pythons = {n: environment(PEERS[n][1]) if n in PEERS else sys.executable for n in names}
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(real_text()[:200_000])["input_ids"]
    found: Result = {"lengths": {}}
    processes: dict[str, Process] = {}
    try:
        for n in names:
            processes[n] = Process(n, pythons[n], folder)
        check_alike(list(processes.values()))
        found["threads"] = {n: p.threads for n, p in processes.items()}
        for length, count in zip(lengths, rounds, strict=True):
            ids = tokens[1000 : 1000 + length]
            times: dict[str, list[float]] = {}
            memory: dict[str, list[float]] = {}
            fits: dict[str, bool] = {}
            ways: dict[str, str] = {}
            cases = [("by_hand", what) for what in (*BASE, "top", "all")]
            cases += [(n, what) for what in ("top", "all") for n in names if n != "by_hand"]
            for n, what in cases:  # what is only done once (weights paged in, kernels chosen) is not counted
                processes[n].ask(what, ids[:6])
            for r in range(count):
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
                        ways |= {key: answer["way"]} if "way" in answer else {}
                        print(f"{length} {key}: {answer['seconds']:.3f} s, {answer['memory']:.0f} MB", file=sys.stderr)
            unfit = [key for key, fine in fits.items() if not fine]
            found["lengths"][str(length)] = {"seconds": times, "memory": memory, "does_not_fit": unfit, "ways": ways}
            if keep is not None:
                keep(found)
    finally:
        for process in processes.values():
            process.end()
    return found


def markdown(found: Result) -> str:
    """Tables: one for each length."""
    lines: list[str] = []
    for length, part in found["lengths"].items():
        base = {what: statistics.median(part["seconds"][f"by_hand: {what}"]) for what in BASE}
        ways = {what: part["ways"][f"by_hand: {what}"] for what in BASE if what != "forward"}
        floor = floor_of(part)
        lines += [
            f"### {int(length):,} tokens",
            "",
            f"Floor: {floor:.3f} s, of them the forward pass {base['forward']:.3f} s and the float32 product "
            f"{base['product torch.mm']:.3f} s ({ways['product torch.mm']}). The fastest way known takes "
            f"{base['product']:.3f} s ({ways['product']}): with that in the floor, every ratio below would be "
            f"{floor / (base['forward'] + base['product']):.2f} times as large. In bfloat16, whose results are rounded "
            f"to 8 bits, the product takes {base['product bfloat16']:.3f} s ({ways['product bfloat16']}).",
            "",
            "| | top 5: time, in floors | top 5: memory over the forward pass | all statistics: time, in floors | "
            "all statistics: memory over the forward pass | |",
            "|---|---|---|---|---|---|",
        ]
        for name, title in titles():
            cells = [cell for what in ("top", "all") for cell in cells_of(part, f"{name}: {what}", floor)]
            note = PEERS[name][2] if name in PEERS else ""
            lines.append(f"| {title} | {' | '.join(cells)} | {note} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def titles() -> list[tuple[str, str]]:
    """Name and title of every contestant, in the order of the tables."""
    return [*OURS.items(), ("by_hand", BY_HAND), *((name, title) for name, (title, _, _) in PEERS.items())]


def floor_of(part: Result) -> float:
    """Seconds of the forward pass and the float32 product as PyTorch computes it, for one length."""
    return sum(statistics.median(part["seconds"][f"by_hand: {what}"]) for what in ("forward", "product torch.mm"))


def cells_of(part: Result, key: str, floor: float) -> list[str]:
    """Time in floors, and memory over the forward pass, of one contestant and case."""
    if key in part["does_not_fit"]:
        return ["does not fit", "does not fit"]
    if key not in part["seconds"]:
        return ["not offered", ""]
    return [spread(part["seconds"][key], floor), added_memory(part, key)]


def added_memory(part: Result, key: str) -> str:
    """MB over the forward pass."""
    return f"{statistics.median(part['memory'][key]) - statistics.median(part['memory']['by_hand: forward']):+,.0f} MB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="contestants, besides what is done by hand")
    options: Any = parser.parse_args()
    print(markdown(measure(options.lengths, [options.rounds] * len(options.lengths), options.only)))


if __name__ == "__main__":
    main()
