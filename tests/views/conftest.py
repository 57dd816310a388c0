from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imsave

from logitlab.reading import Picture, Prompt, Reading, Target

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


def without(reading: Reading, *names: str) -> Reading:
    """The same Reading as if some statistics had not been asked for."""
    return replace(reading, arrays={name: values for name, values in reading.arrays.items() if name not in names})


def screened(reading: Reading, bounds: Sequence[float] = (0, 3.21e-4, 7e-9)) -> Reading:
    """The same Reading with bounds, which repeat from cell to cell."""
    shape = reading.arrays["top_id"].shape[:3]
    bound = np.resize(np.array(bounds, dtype=np.float32), shape)
    for n, prompt in enumerate(reading.prompts):
        bound[n, :, len(prompt.positions) :] = np.nan
    return replace(reading, arrays={**reading.arrays, "bound": bound})


ANIMALS = ("tabby, tabby cat", "dog", "grass", "sky", "tree", "ball", "car", "house", "road", "bird")


def png(width: int = 64, height: int = 48, shade: float = 0.2) -> bytes:
    """A small picture: a bright disc on a ramp."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x / width, y / height, np.full((height, width), shade)], -1)
    pixels[(x - 0.6 * width) ** 2 + (y - 0.5 * height) ** 2 < (0.2 * height) ** 2] = (1, 0.85, 0.3)
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def arrays_of(logits: Any, k: int, targets: Sequence[int] = (), activation: str = "softmax") -> dict[str, Any]:
    """Statistics of logits [prompts, sites, positions, columns], as a Reading holds them."""
    if activation == "sigmoid":
        logprobs = -np.log1p(np.exp(-logits))
    else:
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1, kind="stable")[..., :k]
    arrays = {
        "top_id": best.astype(np.int64),
        "top_logprob": np.take_along_axis(logprobs, best, -1).astype(np.float32),
        "entropy": np.abs((np.exp(logprobs) * logprobs).sum(-1)).astype(np.float32),
        "kl": np.abs(logprobs[:, -1:] - logprobs).sum(-1).astype(np.float32),
    }
    if targets:
        chosen = logprobs[..., list(targets)]
        arrays["target_logprob"] = chosen.astype(np.float32)
        arrays["target_rank"] = (1 + (logprobs[..., None] > chosen[..., None, :]).sum(-2)).astype(np.int64)
    return arrays


def build_seen(
    space: str = "classes",
    activation: str = "softmax",
    grid: tuple[int, int] = (4, 4),
    n_sites: int = 3,
    n_pictures: int = 1,
    labels: Sequence[str] = ANIMALS,
    targets: Sequence[int] = (),
    k: int = 3,
    words: Sequence[str] = (" What", " is", " this", "?"),
) -> Reading:
    """A Reading of patches: a class spreads from the middle of the picture while the rest settles on others.

    In a vocabulary the patches are followed by words; otherwise a class token comes first and the pooled
    answer last.
    """
    random = np.random.default_rng(1)
    rows, columns = grid
    vocabulary = space == "vocabulary"
    tokens = ["<s>"] if vocabulary else ["position 0"]
    pictures: list[Picture] = []
    centred: list[float] = [0.0]
    for i in range(n_pictures):
        places = [(len(tokens) + j, j // columns, j % columns) for j in range(rows * columns)]
        tokens += [f"patch {row},{column}" for _, row, column in places]
        centred += [1.5 - 4 * np.hypot((r + 0.5) / rows - 0.5, (c + 0.5) / columns - 0.6) for _, r, c in places]
        pictures.append(Picture(png(shade=0.2 + 0.3 * i), grid, tuple(places)))
    tokens += list(words) if vocabulary else ["pooled"]
    centred += [1.0] * (len(tokens) - len(centred))
    logits = random.standard_normal((1, n_sites, len(tokens), len(labels)))
    depth = np.linspace(0.2, 5, n_sites)[:, None]
    logits[0, :, :, 0] += depth * np.array(centred)
    logits[0, :, :, 2] -= depth * np.array(centred)
    ids = tuple(range(len(tokens))) if vocabulary else ()
    return Reading(
        prompts=(Prompt(None, ids, tuple(tokens), tuple(range(len(tokens))), tuple(pictures)),),
        sites=tuple(f"{layer}.resid_post" for layer in range(n_sites)),
        targets=tuple(Target(t, labels[t]) for t in targets),
        labels=dict(enumerate(labels)),
        arrays=arrays_of(logits, k, targets, activation),
        provenance={**PROVENANCE, "space": {"name": space, "activation": activation}},
    )


def build_detected(
    n_sites: int = 3,
    labels: Sequence[str] = ("cat", "dog", "remote", "no object"),
    targets: Sequence[int] = (),
    pictured: bool = True,
    activation: str = "softmax",
    n_queries: int = 4,
) -> Reading:
    """A Reading of a detector: a cat and a remote are found at the last site, the other queries find nothing."""
    random = np.random.default_rng(2)
    logits = random.standard_normal((1, n_sites, n_queries, len(labels)))
    logits[..., -1] += 2
    depth = np.linspace(0.2, 6, n_sites)
    logits[0, :, 1, 0] += 1.5 * depth
    logits[0, :, 3, 2] += depth
    boxes = np.tile(np.linspace(0.2, 0.8, n_queries)[None, None, :, None], (1, n_sites, 1, 4))
    boxes[0, :, :, 2:] = 0.25
    boxes[0, :, 1] = (0.6, 0.5, 0.4, 0.5)
    tokens = tuple(f"query {i}" for i in range(n_queries))
    picture = (Picture(png()),) if pictured else ()
    return Reading(
        prompts=(Prompt(None, (), tokens, tuple(range(n_queries)), picture),),
        sites=tuple(f"{layer}.resid_post" for layer in range(n_sites)),
        targets=tuple(Target(t, labels[t]) for t in targets),
        labels=dict(enumerate(labels)),
        arrays={**arrays_of(logits, 3, targets, activation), "box": boxes.astype(np.float32)},
        provenance={**PROVENANCE, "space": {"name": "boxes", "activation": activation}},
    )


@pytest.fixture(scope="session")
def make_seen() -> Callable[..., Reading]:
    return build_seen


@pytest.fixture(scope="session")
def make_detected() -> Callable[..., Reading]:
    return build_detected


@pytest.fixture(scope="session")
def make_reading() -> Callable[..., Reading]:
    return build


@pytest.fixture(scope="session")
def hostile() -> tuple[str, ...]:
    return HOSTILE
