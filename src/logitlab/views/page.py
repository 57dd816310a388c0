"""A Reading as one interactive HTML file that loads nothing, and as a frame for notebooks.

The page holds the table as JSON in a script element that does not run. Numbers are packed as
integers, in ten-thousandths of a nat: negative log-probabilities, entropies and divergences
keep four digits in a few characters; -1 stands for a missing value. The bounds of a screened reading are far
smaller: they stay as numbers, with two digits, rounded up. Pictures are held in base64.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.reading import Picture, Reading
from logitlab.views import colour, pictures
from logitlab.views.tokens import label_space, lens_name, model_name, noun, rounded_up, site_names, verified, visible

SCALE = 10_000
"""Stored integers per nat."""

_LARGEST = 10**8  # stands for an infinite divergence or the log-probability of an impossible token


def page(reading: Reading) -> str:
    """One self-contained HTML document; it makes no network request and runs no other script."""
    data = json.dumps(page_data(reading), separators=(",", ":"), allow_nan=False)
    # Inside JSON these characters occur only in strings, where an escape means the same.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, between, after = _template()
    return before + _policy() + between + data + after


def embedded(reading: Reading) -> str:
    """The page in a sandboxed frame, for notebooks."""
    pictured = any(prompt.pictures for prompt in reading.prompts) or pictures.is_detector(reading)
    height = 920 if pictured else min(300 + 23 * len(reading.sites), 860)
    source = html.escape(page(reading), quote=True)
    return (
        f'<iframe srcdoc="{source}" sandbox="allow-scripts" title="logitlab reading" loading="lazy" '
        f'style="width:100%;height:{height}px;border:0;border-radius:8px"></iframe>'
    )


def page_data(reading: Reading) -> dict[str, Any]:
    """What the page holds, as plain values."""
    table = _Labels(reading)
    space = label_space(reading)
    prompts = [_prompt(reading, n, table) for n in range(len(reading.prompts))]
    return {
        "model": model_name(reading),
        "lens": lens_name(reading),
        "verified": verified(reading),
        "sites": site_names(reading.sites),
        "siteNames": [visible(site) for site in reading.sites],
        "targets": [visible(target.token, space=space) for target in reading.targets],
        "targetIds": [target.id for target in reading.targets],
        "labels": table.labels,
        "ids": table.ids,
        "k": int(reading.arrays["top_id"].shape[-1]),
        "scale": SCALE,
        "prompts": prompts,
        "provenance": [[visible(key), visible(value, space=" ")] for key, value in _flat(reading.provenance)],
        "colours": {"light": colour.table(), "dark": colour.table(dark=True)},
        "noun": noun(reading),
        "independent": pictures.INDEPENDENT if reading.activation == "sigmoid" else "",
        "categories": colour.CATEGORIES,
        "others": colour.OTHERS,
        "none": [i for i in table.ids if reading.space == "boxes" and reading.labels.get(i) == pictures.NO_OBJECT],
        "threshold": pictures.THRESHOLD,
        "fewest": pictures.FEWEST,
    }


class _Labels:
    """The tokens of all cells, the most frequent first, so that their numbers are short."""

    def __init__(self, reading: Reading) -> None:
        found, counts = np.unique(reading.arrays["top_id"], return_counts=True)
        self.order: NDArray[np.int64] = found[np.argsort(-counts, kind="stable")]
        self.order = self.order[self.order >= 0]
        self.ids: list[int] = self.order.tolist()
        self.space = label_space(reading)
        self.labels: list[str] = [visible(reading.labels.get(i, f"[{i}]"), space=self.space) for i in self.ids]
        self._reading = reading
        self._extra: dict[tuple[int, str], int] = {}

    def numbers(self, n: int, length: int) -> NDArray[np.int64]:
        """Numbers in the table of labels for the cells of a prompt, [sites, positions, k]."""
        ids = self._reading.arrays["top_id"][n, :, :length]
        ranked = np.argsort(self.order)
        place = np.searchsorted(self.order, ids, sorter=ranked).clip(max=max(len(ranked) - 1, 0))
        numbers = np.where(ids >= 0, ranked[place] if len(ranked) else -1, -1)
        for (prompt, slot), labels in self._reading.completions.items():
            if prompt == n and slot < length:
                for token, label in labels.items():
                    numbers[:, slot][ids[:, slot] == token] = self._number(token, visible(label, space=self.space))
        return numbers

    def _number(self, token: int, label: str) -> int:
        if (token, label) not in self._extra:
            self._extra[token, label] = len(self.ids)
            self.ids.append(token)
            self.labels.append(label)
        return self._extra[token, label]


def _prompt(reading: Reading, n: int, table: _Labels) -> dict[str, Any]:
    prompt, arrays = reading.prompts[n], reading.arrays
    length = len(prompt.positions)
    held: dict[str, Any] = {
        "text": visible(pictures.title(prompt), space=" "),
        "positions": list(prompt.positions),
        "tokens": pictures.position_names(prompt),
        "answer": pictures.answer(prompt) if length else 0,
        "pictures": [_picture(reading, n, picture) for picture in prompt.pictures],
        "top": table.numbers(n, length).ravel().tolist(),
        "logprob": _packed(-arrays["top_logprob"][n, :, :length]),
    }
    for name in ("entropy", "kl"):
        if name in arrays:
            held[name] = _packed(arrays[name][n, :, :length])
    if "bound" in arrays:
        held["bound"] = _rounded_up(arrays["bound"][n, :, :length])
    if reading.targets:
        held["targetLogprob"] = _packed(-arrays["target_logprob"][n, :, :length])
        held["targetRank"] = arrays["target_rank"][n, :, :length].ravel().tolist()
    if pictures.is_detector(reading):
        boxes = arrays["box"][n, :, :length].astype(np.float64).ravel()
        held["boxes"] = [round(side, 4) if np.isfinite(side) else None for side in boxes.tolist()]
        found = [pictures.detections(reading, n, s) for s in range(len(reading.sites))] if length else []
        if found and found[-1]:
            held["answer"] = found[-1][0].slot
        seen = [d.column for best in found for d in best if d.probability > pictures.THRESHOLD]
        rest = [d.column for best in found for d in best[: pictures.FEWEST]]
        held["palette"] = pictures.frequent([*seen, *rest], len(colour.CATEGORIES), pictures.frequent(seen, 99))
    return held


def _picture(reading: Reading, n: int, picture: Picture) -> dict[str, Any]:
    """A picture with its patches, and the columns whose patches have a colour of their own."""
    prompt = reading.prompts[n]
    patches = pictures.patches(prompt, picture)
    ids = reading.arrays["top_id"][n, :, :, 0]
    first = int(ids[-1, pictures.answer(prompt)]) if patches and len(ids) else -1
    tops = ids[:, [patch.slot for patch in patches]].ravel().tolist()
    return {
        "png": base64.b64encode(picture.png).decode(),
        "size": pictures.size(picture),
        "grid": picture.grid,
        "patches": [[patch.slot, patch.row, patch.column] for patch in patches],
        "palette": pictures.frequent(tops, len(colour.CATEGORIES), [first]),
    }


def _packed(values: NDArray[Any]) -> list[int]:
    """Values of 0 or more as integers; rounding may have left them a little below."""
    scaled = np.nan_to_num(values.astype(np.float64) * SCALE, nan=-np.inf, posinf=_LARGEST)
    rounded = np.where(np.isneginf(scaled), -1, np.rint(scaled).clip(0, _LARGEST))
    return rounded.astype(np.int64).ravel().tolist()


def _rounded_up(bounds: NDArray[Any]) -> list[float]:
    """Bounds with two digits; zeros as integers, since they are many and shorter."""
    known = np.nan_to_num(bounds.astype(np.float64), nan=-1, posinf=_LARGEST).clip(max=_LARGEST)
    return [rounded_up(value) if value > 0 else int(value) for value in known.ravel().tolist()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


@cache
def _template() -> tuple[str, str, str]:
    text = resources.files("logitlab.views").joinpath("page.html").read_text(encoding="utf-8")
    before, rest = text.split("{{policy}}")
    between, after = rest.split("{{data}}")
    return before, between, after


@cache
def _policy() -> str:
    """A content security policy that allows this page's own style and script and nothing else."""
    text = "".join(_template())
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("style", "script"))
    assert style is not None
    assert script is not None
    allowed = f"style-src {_hash(style[1])}; script-src {_hash(script[1])}; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
