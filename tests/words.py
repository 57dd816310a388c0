"""Small corpora for tests: sentences of a few words, drawn at random but always the same."""

from __future__ import annotations

import numpy as np

_SENTENCE = "the sea is calm and the moon is full while a ship goes on over the cold grey water to the far shore"
_WORDS = _SENTENCE.split()


def texts(count: int = 60) -> list[str]:
    """Texts of 30 words."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(_WORDS, 30)) for _ in range(count)]


def rows(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 3 to 29 words, each with a language."""
    draw = np.random.default_rng(seed)
    return [
        {"text": " ".join(draw.choice(_WORDS, int(draw.integers(3, 30)))), "lang": str(draw.choice(["en", "de"]))}
        for _ in range(count)
    ]
