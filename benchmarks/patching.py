"""Activation patching of all layers and positions beside TransformerLens', and beside plain forward passes.

Each in a process and environment of its own, in turn; the same pair, places and metric. *Plain* is the same number of
unpatched rows through the model itself, in batches of the same size, with the logits of the last position alone.
Run: python benchmarks/patching.py [--tokens 30 --rounds 3]
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
from machine import Result, spread

HERE = Path(__file__).parent
BATCH = 32
TEXT = (
    "When Mary and John went to the store on the corner of the street in the old town, {} gave a bottle of cold milk "
    "and some bread to"
)


def ours(pair: Path, out: Path, what: str) -> None:
    """Patch with logitlab, or run as many plain rows; print seconds and peak memory."""
    import torch

    import logitlab as ll
    from logitlab import interventions as iv

    model = ll.load("default", dtype="float32")
    given = json.loads(pair.read_text())
    found: list[iv.Patching] = []
    rows = model.n_layers * len(given["clean"])
    module: Any = model.module

    def patch() -> None:
        found.append(
            iv.patch(model, given["clean"], given["corrupted"], tuple(given["answers"]), sites="resid_pre", batch=BATCH)
        )

    def plain() -> None:
        with torch.no_grad():
            for start in range(0, rows, BATCH):
                ids = torch.tensor([given["corrupted"]] * min(BATCH, rows - start))
                module(input_ids=ids, use_cache=False, logits_to_keep=1)

    seconds, megabytes = peak_of(patch if what == "patch" else plain)
    if found:
        np.save(out, found[0].patched[0])
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}))


def measure(tokens: int, rounds: int) -> Result:
    """Seconds and MB of all three, and how far the two grids differ."""
    import logitlab as ll
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    model = ll.load("default")
    encode: Any = model.tokenizer
    clean, corrupted = (encode(TEXT.format(name))["input_ids"][-tokens:] for name in ("John", "Mary"))
    answers = [encode(name)["input_ids"][0] for name in (" Mary", " John")]
    if len(clean) != len(corrupted) or clean == corrupted:
        raise SystemExit("the two prompts are no pair")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "pair.json").write_text(json.dumps({"clean": clean, "corrupted": corrupted, "answers": answers}))
        script = str(HERE / "contestants" / "patch_transformer_lens.py")
        peer = [compare.environment("transformer-lens"), script, str(converted(source))]
        commands = {
            "TransformerLens": [*peer, str(place / "pair.json"), str(place / "theirs.npy")],
            "plain forward passes": [sys.executable, __file__, "--ours", str(place / "pair.json"), "-", "plain"],
            "logitlab": [
                sys.executable,
                __file__,
                "--ours",
                str(place / "pair.json"),
                str(place / "ours.npy"),
                "patch",
            ],
        }
        runs = compare.in_turn(commands, rounds)
        theirs, mine = np.load(place / "theirs.npy"), np.load(place / "ours.npy")
    return {
        "tokens": len(clean),
        "places": int(mine.size),
        "runs": runs,
        "gap": float(np.abs(theirs - mine).max()),
        "range": float(np.ptp(theirs)),
    }


def markdown(found: Result) -> str:
    """A table and a sentence."""
    lines = ["| | seconds | against plain passes | memory, MB |", "|---|---|---|---|"]
    plain = float(np.median(found["runs"]["plain forward passes"]["seconds"]))
    for name, values in found["runs"].items():
        seconds, memory = spread(values["seconds"]), spread(values["megabytes"], digits=0)
        lines.append(f"| {name} | {seconds} | {float(np.median(values['seconds'])) / plain:.2f} x | {memory} |")
    return (
        "\n".join(lines)
        + f"\n\n{found['places']} places (all layers, {found['tokens']} tokens), difference of two logits. The two "
        f"grids differ by at most {found['gap']:.1e} nats; their values span {found['range']:.1f}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.ours:
        ours(Path(given.ours[0]), Path(given.ours[1]), given.ours[2])
    else:
        print(markdown(measure(given.tokens, given.rounds)))
