"""Lenses that other tools have written, read by them and by logitlab: how far the readings differ.

Each tool writes a lens in an environment of its own, and reads a text with it. The same file is loaded here, and the
same text read. Run: python benchmarks/formats.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import compare
from machine import Result

HERE = Path(__file__).parent
TOKENS = 8
WRITERS = {
    "tuned-lens": ("tuned-lens", "write_tuned_lens.py", "lens"),
    "TransformerLens, Jacobian lens": ("transformer-lens", "write_jacobian_lens.py", "lens.pt"),
}


def measure() -> Result:
    """For each writer the largest differences, in nats."""
    import logitlab as ll
    from logitlab.errors import InputError
    from logitlab.models.cache import default_gguf
    from logitlab.models.gguf import converted

    source = default_gguf()
    if source is None:
        raise SystemExit("the default model is not installed: make setup")
    model = ll.load("default", dtype="float32")
    ids = model.tokenizer("The capital of France is Paris, and that of Japan is")["input_ids"][:TOKENS]
    found: Result = {}
    for name, (environment, script, file) in WRITERS.items():
        with TemporaryDirectory() as folder:
            place = Path(folder)
            np.save(place / "ids.npy", np.array(ids))
            python, reading = compare.environment(environment), place / "reading.npy"
            command = [python, str(HERE / "contestants" / script), str(converted(source)), str(place / "ids.npy")]
            quiet = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
            subprocess.run(
                [*command, str(place / file), str(reading)], check=True, env=quiet, stdout=subprocess.DEVNULL
            )
            theirs = np.load(reading)
            try:
                ll.load_lens(place / file)
                refused = False
            except InputError:
                refused = True
            lens = ll.load_lens(place / file, allow_pickle=True)
            mine = ll.read(model, ids, sites=[str(s) for s in lens.sites], lens=lens, top_k=20, target=[7042, 0])
            ours, layers = mine.arrays, len(theirs)
            ids_found = ours["top_id"][0, :layers].astype(np.int64)
            gaps = {
                "top 20": np.abs(ours["top_logprob"][0, :layers] - np.take_along_axis(theirs, ids_found, -1)),
                "targets": np.abs(ours["target_logprob"][0, :layers] - theirs[..., [7042, 0]]),
                "entropy": np.abs(ours["entropy"][0, :layers] + (np.exp(theirs) * theirs).sum(-1)),
            }
            found[name] = {
                "layers": layers,
                "refused without the flag": refused,
                "largest": float(-theirs.min()),
                **{key: float(gap.max()) for key, gap in gaps.items()},
            }
    return found


def markdown(found: Result) -> str:
    """A table."""
    lines = [
        "| written by | sites | refused without `allow_pickle` | top 20 | two targets | entropy |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        refused = "yes" if row["refused without the flag"] else "NO"
        gaps = " | ".join(f"{row[key]:.1e}" for key in ("top 20", "targets", "entropy"))
        lines.append(f"| {name} | {row['layers']} | {refused} | {gaps} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(markdown(measure()))
