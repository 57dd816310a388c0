from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from logitlab.reading import Prompt, Reading, Target

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "[bold]",
    "[/]",
    "\x1b[31m",
    "\u202eevil",
    "\u2028",
    "👩‍👩‍👧",
    "日本語",
    "$x$",
    "",
    "a" * 200,
    "\n\t",
    "\u0301",
    "\ud800",
    "\ufffe",
    " the",
    " the",
    "مرحبا",
    "&amp;",
)

PROVENANCE = {
    "model": "SmolLM2-135M-Instruct",
    "fingerprint": "3f2a",
    "verification": {
        "max_abs_difference": 1.9e-05,
        "tolerance": 3.2e-4,
        "text": "tail equals the model's logits within 1.9e-05",
    },
    "lens": {"name": "logit lens"},
    "versions": {"logitlab": "0.1.0", "torch": "2.13.0"},
    "settings": {"top_k": 5},
    "created": "2026-11-24T10:00:00+00:00",
}

WORDS = (" Paris", " France", " the", " a", " city", ",", " known", " Lyon", "is", " capital", " called", " in")


def build(
    n_prompts: int = 1,
    n_sites: int = 7,
    n_positions: int = 6,
    k: int = 5,
    targets: Sequence[str] = (),
    tokens: Sequence[str] = WORDS,
    kind: str = "resid_post",
    ragged: bool = False,
) -> Reading:
    """A Reading of random numbers whose distributions sharpen with depth."""
    random = np.random.default_rng(0)
    vocabulary = dict(enumerate([*tokens, *(f"w{i}" for i in range(max(0, k + 1 - len(tokens))))]))
    lengths = [max(1, n_positions - n) if ragged else n_positions for n in range(n_prompts)]
    shape = (n_prompts, n_sites, n_positions)
    depth = np.linspace(0.3, 7, n_sites)[None, :, None, None]
    logits = depth * random.standard_normal((*shape, max(len(vocabulary), k + 1)))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)[..., :k]
    final = logprobs[:, -1:]
    arrays = {
        "top_id": best.astype(np.int64),
        "top_logprob": np.take_along_axis(logprobs, best, -1).astype(np.float32),
        "entropy": -(np.exp(logprobs) * logprobs).sum(-1).astype(np.float32),
        "kl": (np.exp(final) * (final - logprobs)).sum(-1).astype(np.float32),
    }
    if targets:
        m = len(targets)
        arrays["target_logprob"] = logprobs[..., :m].astype(np.float32)
        arrays["target_rank"] = (1 + (logprobs[..., None] > logprobs[..., None, :m]).sum(-2)).astype(np.int64)
    for n, length in enumerate(lengths):
        for values in arrays.values():
            values[n, :, length:] = np.nan if values.dtype.kind == "f" else -1
    prompts = tuple(
        Prompt(
            text="".join(vocabulary[i % len(vocabulary)] for i in range(length)),
            ids=tuple(i % len(vocabulary) for i in range(length)),
            tokens=tuple(vocabulary[i % len(vocabulary)] for i in range(length)),
            positions=tuple(range(length)),
        )
        for length in lengths
    )
    sites = [f"{layer}.{kind}" for layer in range(n_sites)]
    if kind == "resid_post":
        sites = ["0.resid_pre", *sites[:-1]]
    return Reading(
        prompts=prompts,
        sites=tuple(sites),
        targets=tuple(Target(i, token) for i, token in enumerate(targets)),
        labels=vocabulary,
        arrays=arrays,
        provenance=PROVENANCE,
    )


@pytest.fixture(scope="session")
def make_reading() -> Callable[..., Reading]:
    return build


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    return HOSTILE
