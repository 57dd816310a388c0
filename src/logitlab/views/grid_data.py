"""What the lens grid (lens_grid.js) is given: a Reading as plain JSON, with its numbers as packed arrays.

The same dictionary goes into an HTML page, to a notebook widget and through the app's API. At its top it holds:

* ``model``, ``lens``, ``verified``, ``independent``, ``noun``: what the header says; ``provenance``, pairs of texts;
* ``sites`` (short names) and ``siteNames``, in order of depth;
* ``targets`` (labels) and ``targetIds``;
* ``labels`` and ``ids``: every label that a cell can have, and its token id. Cells hold *numbers of labels*;
* ``k``: top tokens a cell; ``colours``: the scale by theme, pairs of background and foreground;
* ``categories``, ``others``, ``none``, ``threshold``, ``fewest``: how pictures and boxes are drawn;
* ``prompts``: one dictionary each.

A prompt holds ``text``, ``positions``, ``tokens``, ``answer`` (the slot that is selected at first), ``pictures``,
and arrays:

========================  =======================  ======  ====================================================
name                      shape                    dtype   values
========================  =======================  ======  ====================================================
``top``                   sites, positions, k      u2, u4  numbers of labels; the dtype's largest value is none
``logprob``               sites, positions, k      f4      log-probabilities, nats
``entropy``, ``kl``       sites, positions         f4      nats; only what the Reading has
``bound``                 sites, positions         f4      nats; only of screened readings
``targetLogprob``         sites, positions, m      f4      nats; only with targets
``targetRank``            sites, positions, m      i4      from 1; -1 is missing
``boxes``                 sites, positions, 4      f4      centre, width, height; only of detectors
========================  =======================  ======  ====================================================

An array is ``{"dtype": "f4", "shape": [31, 6], "data": ...}`` with its bytes in base64, little-endian, in C order
(`packed`). Missing floats are NaN, infinite ones are infinite. A prompt may have ``heat`` besides: ``{"name":
"recovery", "unit": "1", "low": 0, "high": 1, "values": f4 array [sites, positions]}``. It is then what the grid is
coloured by.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.reading import Picture, Reading
from logitlab.views import colour, pictures
from logitlab.views.tokens import label_space, lens_name, model_name, noun, site_names, verified, visible

DTYPES = ("u2", "u4", "i4", "f4")
"""The types that an array may have, as NumPy writes them."""


def grid_data(reading: Reading) -> dict[str, Any]:
    """What the grid needs to draw a Reading, as plain values for JSON; the layout is at the top of this module.

    Args:
        reading: the table; pictures and boxes are taken along.

    Example:
        ``json.dumps(grid_data(reading), allow_nan=False)`` is what a page holds.
    """
    space = label_space(reading)
    table = _Labels(reading, space)
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


def packed(values: NDArray[Any], dtype: str = "f4") -> dict[str, Any]:
    """An array as the grid reads it: its type, its shape, its bytes in base64.

    Args:
        values: any shape; what does not fit the type wraps, as in NumPy.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: another type.

    Example:
        ``packed(np.zeros((31, 6)))`` is an array of 31 sites and 6 positions for a prompt's ``heat``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"no array of {dtype!r} goes into the grid: take one of {', '.join(DTYPES)}")
    plain = np.ascontiguousarray(values, dtype="<" + dtype)
    return {"dtype": dtype, "shape": list(plain.shape), "data": base64.b64encode(plain.tobytes()).decode()}


class _Labels:
    """The tokens of all cells, the most frequent first, and their numbers in that order."""

    def __init__(self, reading: Reading, space: str) -> None:
        ids = reading.arrays["top_id"]
        found, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        order = order[found[order] >= 0]
        number = np.full(len(found), -1, dtype=np.int64)  # stays -1 for ids that are missing
        number[order] = np.arange(len(order))
        self.ids: list[int] = found[order].tolist()
        self.labels: list[str] = [_quick(reading.labels.get(i, f"[{i}]"), space) for i in self.ids]
        self.numbers: NDArray[np.int64] = number[inverse].reshape(ids.shape)
        extra: dict[tuple[int, str], int] = {}
        for (prompt, slot), labels in reading.completions.items():
            if prompt >= ids.shape[0] or slot >= ids.shape[2]:
                continue
            for token, text in labels.items():
                label = visible(text, space=space)
                if (token, label) not in extra:
                    extra[token, label] = len(self.ids)
                    self.ids.append(token)
                    self.labels.append(label)
                self.numbers[prompt, :, slot][ids[prompt, :, slot] == token] = extra[token, label]

    def packed(self, n: int, length: int) -> dict[str, Any]:
        """Numbers of the labels of a prompt's cells, [sites, positions, k]."""
        dtype = "u2" if len(self.ids) < np.iinfo(np.uint16).max else "u4"
        numbers = self.numbers[n, :, :length]
        return packed(np.where(numbers < 0, np.iinfo(dtype).max, numbers), dtype)


def _quick(text: str, space: str) -> str:
    """`visible`, without looking at each character where all are plain."""
    return text.replace(" ", space) if text and text.isascii() and text.isprintable() else visible(text, space=space)


def _prompt(reading: Reading, n: int, table: _Labels) -> dict[str, Any]:
    prompt, arrays = reading.prompts[n], reading.arrays
    length = len(prompt.positions)
    held: dict[str, Any] = {
        "text": visible(pictures.title(prompt), space=" "),
        "positions": list(prompt.positions),
        "tokens": pictures.position_names(prompt),
        "answer": pictures.answer(prompt) if length else 0,
        "pictures": [_picture(reading, n, picture) for picture in prompt.pictures],
        "top": table.packed(n, length),
        "logprob": packed(np.minimum(arrays["top_logprob"][n, :, :length], 0)),
    }
    for name in ("entropy", "kl"):
        if name in arrays:  # rounding may have left them a little below zero
            held[name] = packed(np.maximum(arrays[name][n, :, :length], 0))
    if "bound" in arrays:
        held["bound"] = packed(arrays["bound"][n, :, :length])
    if reading.targets:
        held["targetLogprob"] = packed(np.minimum(arrays["target_logprob"][n, :, :length], 0))
        held["targetRank"] = packed(arrays["target_rank"][n, :, :length], "i4")
    if pictures.is_detector(reading):
        held["boxes"] = packed(arrays["box"][n, :, :length])
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
