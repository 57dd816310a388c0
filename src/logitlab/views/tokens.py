"""The words that all views share: readable tokens, short site names, what is known about the model.

Everything that a view prints goes through `visible`: tokens, prompts and saved files come from
outside, and none of them may reach a terminal or a page as anything but text.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from logitlab.reading import Reading

_SYMBOLS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"})
_JOINERS = "\u200c\u200d"
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that look like nothing


def visible(text: str, *, space: str = "·") -> str:
    r"""Text with everything that cannot be seen made visible.

    Spaces become ``·``, newlines ``↵``, tabs ``⇥``; other control, format and bidirectional
    characters are escaped (``\x1b``, ``\u202e``); an empty text becomes ``∅``. Joiners stay where
    they join (emoji sequences, Persian).

    Args:
        text: a token or a text.
        space: what to show for a space; pass a space to keep a whole prompt readable.
    """
    if not text:
        return "∅"
    shown = [_shown(text, i, space) for i in range(len(text))]
    # A combining mark would otherwise sit on whatever the view puts in front of it.
    return ("◌" if unicodedata.category(text[0]).startswith("M") else "") + "".join(shown)


def _shown(text: str, i: int, space: str) -> str:
    character = text[i]
    if character == " ":
        return space
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if character in _JOINERS and 0 < i < len(text) - 1 and _joinable(text[i - 1]) and _joinable(text[i + 1]):
        return character
    if unicodedata.category(character) in _HIDDEN or character in _BLANK or _is_noncharacter(ord(character)):
        return _escaped(character)
    return character


def _joinable(character: str) -> bool:
    return ord(character) > 127 and unicodedata.category(character) not in _HIDDEN


def _is_noncharacter(code: int) -> bool:
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF or 0xE0000 <= code <= 0xE00FF


def _escaped(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def cell_label(reading: Reading, token_id: int, prompt: int, slot: int) -> str:
    """Visible label of a token in a cell; ``–`` where the table holds none."""
    return "–" if token_id < 0 else visible(reading.label(token_id, prompt, slot), space=label_space(reading))


def label_space(reading: Reading) -> str:
    """What stands for a space in a label: tokens hold spaces that matter, names of classes only separate words."""
    return "·" if reading.space == "vocabulary" else " "


def noun(reading: Reading) -> str:
    """What a column is called in prose."""
    return {"vocabulary": "token", "concepts": "concept"}.get(reading.space, "class")


def site_names(sites: Sequence[str]) -> list[str]:
    """Short names for the residual stream (``in``, ``0``, ``1``, ...), otherwise the sites' full names."""
    kinds = {site.partition(".")[2] for site in sites}
    if not kinds <= {"resid_post", "resid_pre"}:
        return [visible(site) for site in sites]
    return [_residual_name(site) for site in sites]


def _residual_name(site: str) -> str:
    layer, _, kind = site.partition(".")
    if kind == "resid_post":
        return visible(layer)
    return "in" if layer == "0" else visible(f"{layer} pre", space=" ")


def model_name(reading: Reading) -> str:
    """Name of the model that was read."""
    return _line(reading.provenance.get("model")) or "unnamed model"


def lens_name(reading: Reading) -> str:
    """Name of the lens; empty where the table does not say."""
    return _line(_mapping(reading.provenance.get("lens")).get("name"))


def verified(reading: Reading) -> str:
    """What was verified when the model was loaded, in one sentence; empty where nothing is recorded."""
    found = _mapping(reading.provenance.get("verification"))
    if text := _line(found.get("text")):
        return text
    difference = found.get("max_abs_difference")
    if isinstance(difference, int | float) and math.isfinite(difference):
        return f"tail equals the model's logits within {difference:.1e}"
    return ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(value: Any) -> str:
    return visible(str(value), space=" ") if value else ""


def percent(probability: float) -> str:
    """A probability in at most four characters."""
    if math.isnan(probability):
        return "nan"
    if 0 < probability < 0.01:
        return "<1%"
    return ">99%" if 0.995 <= probability < 1 else f"{probability:.0%}"


def largest_bound(reading: Reading) -> float:
    """The most that screening can have added to the error of any cell, in nats; 0 where nothing was screened."""
    import numpy as np

    return float(np.nanmax(reading.arrays["bound"], initial=0.0)) if "bound" in reading.arrays else 0.0


def rounded_up(value: float) -> float:
    """A bound with two significant digits, never smaller than it is (beyond what float32 can hold)."""
    if not (math.isfinite(value) and value > 0):
        return value
    nearest = float(f"{value:.1e}")
    half = 0.5 * 10.0 ** (math.floor(math.log10(value)) - 1)
    return nearest if nearest >= value * (1 - 1e-6) else float(f"{value + half:.1e}")
