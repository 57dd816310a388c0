"""Fit a tuned lens beside tuned-lens' own training loop: same model, tokens, steps, optimiser and schedule.

Each in a process and environment of its own, in turn. What is compared in the end is the KL divergence from the
model's own distribution on other tokens, measured by one and the same `logitlab.sweep`.
Run: python benchmarks/fitting.py [--steps 8 --windows 2 --length 128 --rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import compare
from contestants.worker import peak_of
from machine import Result, real_text, spread

HERE = Path(__file__).parent


def ours(ids: Path, steps: int, windows: int, out: Path) -> None:
    """Fit with logitlab and print seconds and peak memory; what `fit_tuned_lens` does with the other."""
    import torch

    import logitlab as ll
    from logitlab.lenses import fit as fitting
    from logitlab.lenses.fitted import identity
    from logitlab.lenses.material import Windowed

    model = ll.load("default", dtype="float32")
    rows = np.load(ids)
    recipe = fitting.Recipe(
        kind="affine", steps=steps, windows_per_step=windows, length=rows.shape[1], share=1.0, optimiser="sgd",
        rate=0.1, decay=1e-3, clip=1.0, clip_together=True, validation_windows=1,
    )  # fmt: skip
    lens = identity(model, "affine")
    data = Windowed(rows, range(rows.shape[1]), {"name": "given"})
    run = fitting._Fit(model, lens, recipe, data)
    run.validation, run.training = range(1), range(len(rows))
    run._chosen = lambda step: list(range(step * windows, (step + 1) * windows))  # the same order as the other's

    def work() -> None:
        lens.maps.requires_grad_(True)
        state = fitting._State(lens, run._optimiser(), {}, torch.zeros(0))
        run._look = lambda state: None  # no validation: the other has none
        for _ in range(steps):
            run.advance(state)

    seconds, megabytes = peak_of(work)
    lens.save(out)
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}))


def measure(steps: int, windows: int, length: int, rounds: int) -> Result:
    """Seconds, memory and the resulting KL by layer of both."""
    import logitlab as ll
    from logitlab.corpora import corpus
    from logitlab.corpora import windows as windows_of
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted
    from logitlab.sweeps import sweep

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    model = ll.load("default", dtype="float32")
    text = real_text()
    every = [np.array(w.ids) for w in windows_of(model, corpus([text]), length)]
    need = steps * windows
    with TemporaryDirectory() as folder:
        place = Path(folder)
        np.save(place / "ids.npy", np.stack(every[:need]).astype(np.int32))
        peer = compare.environment("tuned-lens")
        arguments = [str(place / "ids.npy"), str(steps), str(windows)]
        scripts = {
            "tuned-lens": [peer, str(HERE / "contestants" / "fit_tuned_lens.py"), str(converted(source))],
            "logitlab": [sys.executable, __file__, "--ours"],
        }
        commands = {name: [*script, *arguments, str(place / f"lens-{name}")] for name, script in scripts.items()}
        found = compare.in_turn(commands, rounds)
        lenses: dict[str, Any] = {
            "logit lens": ll.LogitLens(),
            "tuned-lens": ll.load_lens(place / "lens-tuned-lens", allow_pickle=True),
            "logitlab": ll.load_lens(place / "lens-logitlab"),
        }
        held_out = real_text()[-40_000:]
        report = sweep(model, [held_out], lens=lenses, length=length, max_tokens=4096)
    table = {
        site: {name: [m.mean, m.low, m.high] for name in lenses if (m := report.measure("kl", name, site))}
        for site in report.sites[:-1]
    }
    return {"steps": steps, "windows": windows, "length": length, "runs": found, "kl": table}


def markdown(found: Result) -> str:
    """Two tables."""
    runs = found["runs"]
    lines = ["| | seconds | against tuned-lens | memory, MB | against tuned-lens |", "|---|---|---|---|---|"]
    theirs = runs["tuned-lens"]
    for name, values in runs.items():
        quick = float(np.median(theirs["seconds"]) / np.median(values["seconds"]))
        small = float(np.median(theirs["megabytes"]) / np.median(values["megabytes"]))
        seconds, memory = spread(values["seconds"]), spread(values["megabytes"], digits=0)
        lines.append(f"| {name} | {seconds} | {quick:.1f} x as fast | {memory} | {small:.1f} x less |")
    lines += ["", "| site | " + " | ".join(next(iter(found["kl"].values()))) + " |", "|---|---|---|---|"]
    for site, row in list(found["kl"].items())[::3]:
        cells = " | ".join(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in row.values())
        lines.append(f"| {site} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.ours:
        ids, steps, windows, out = given.ours
        ours(Path(ids), int(steps), int(windows), Path(out))
    else:
        print(markdown(measure(given.steps, given.windows, given.length, given.rounds)))
