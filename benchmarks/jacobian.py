"""Measure a Jacobian lens beside TransformerLens: same model, same prompts; how long, how much memory, how alike.

Each in a process and environment of its own, in turn. Both put 16 coordinates side by side.
Run: python benchmarks/jacobian.py [--prompts 2 --tokens 48 --rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import compare
from contestants.worker import peak_of
from machine import Result, real_text, spread

HERE = Path(__file__).parent


def ours(prompts: Path, out: Path) -> None:
    """Measure with logitlab; print seconds and peak memory."""
    import torch

    import logitlab as ll
    from logitlab.lenses.published import save_jacobian_lens

    model = ll.load("default", dtype="float32")
    texts = json.loads(prompts.read_text())
    found: list[ll.FittedLens] = []
    seconds, megabytes = peak_of(lambda: found.append(ll.fit_jacobian(model, texts, sites="resid_post")))
    save_jacobian_lens(found[0], out, dtype=torch.float32)
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}))


def measure(prompts: int, tokens: int, rounds: int) -> Result:
    """Seconds and MB of both, and by layer the difference relative to the largest entry."""
    import torch

    import logitlab as ll
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    model = ll.load("default")
    ids = model.tokenizer(real_text()[:60_000])["input_ids"]
    texts = [model.tokenizer.decode(ids[1000 * n : 1000 * n + tokens]) for n in range(prompts)]
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "prompts.json").write_text(json.dumps(texts))
        script = str(HERE / "contestants" / "fit_transformer_lens.py")
        scripts = {
            "TransformerLens": [compare.environment("transformer-lens"), script, str(converted(source))],
            "logitlab": [sys.executable, __file__, "--ours"],
        }
        prompts_file = str(place / "prompts.json")
        commands = {name: [*first, prompts_file, str(place / f"{name}.pt")] for name, first in scripts.items()}
        runs = compare.in_turn(commands, rounds)
        theirs, mine = (torch.load(place / f"{name}.pt", weights_only=True)["J"] for name in commands)
        worst = max(float((theirs[i] - mine[i]).abs().max() / theirs[i].abs().max()) for i in theirs)
        norm = max(float((theirs[i] - mine[i]).norm() / theirs[i].norm()) for i in theirs)
    return {"prompts": prompts, "tokens": tokens, "runs": runs, "worst": worst, "norm": norm, "layers": len(theirs)}


def markdown(found: Result) -> str:
    """A table and a sentence."""
    lines = ["| | seconds | speed | memory, MB |", "|---|---|---|---|"]
    base = float(np.median(found["runs"]["TransformerLens"]["seconds"]))
    for name, values in found["runs"].items():
        seconds, memory = spread(values["seconds"]), spread(values["megabytes"], digits=0)
        lines.append(f"| {name} | {seconds} | {base / float(np.median(values['seconds'])):.2f} x | {memory} |")
    return (
        "\n".join(lines)
        + f"\n\n{found['prompts']} prompts of {found['tokens']} tokens, {found['layers']} layers. Largest "
        f"difference of an entry, relative to the layer's largest: {found['worst']:.1e}; of a matrix, in the Frobenius "
        f"norm: {found['norm']:.1e}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.ours:
        ours(Path(given.ours[0]), Path(given.ours[1]))
    else:
        print(markdown(measure(given.prompts, given.tokens, given.rounds)))
