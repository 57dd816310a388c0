"""By how much a padded batch changes the numbers, over each prompt in a forward pass of its own.

The logic of padding and masking is the same in both precisions; what is left in float32 is the
rounding of differently shaped products, through all blocks of the default model.
Run: python benchmarks/batching.py
"""

from __future__ import annotations

import numpy as np

import logitlab as ll

PROMPTS = (
    "The capital of France is",
    "Hello there my friend, how are you?",
    "def f(x): return x**2 + 1 # and then some more text to make it long",
    "One two",
    "A",
)


def main() -> None:
    """Print the largest difference of every statistic, in float32 and in float64."""
    for dtype in ("float32", "float64"):
        model = ll.load("default", dtype=dtype)
        batch = ll.read(model, list(PROMPTS), target=" Paris", batch_tokens=4096)
        largest: dict[str, float] = {}
        for n, prompt in enumerate(PROMPTS):
            alone = ll.read(model, prompt, target=" Paris")
            for name, values in alone.arrays.items():
                gap = np.abs(batch.arrays[name][n : n + 1, :, : values.shape[2]] - values).max()
                largest[name] = max(largest.get(name, 0.0), float(gap))
        print(f"{dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))


if __name__ == "__main__":
    main()
