"""What the views share about pictures: which cells are patches, which queries saw something, which labels get a colour.

A patch is a read position that stands for a part of a picture. A detection is a query with its most
likely real class; "no object", the column that some detectors have beyond their classes, is none.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from logitlab.reading import Picture, Prompt, Reading
from logitlab.views.tokens import visible

THRESHOLD = 0.5
"""A query is drawn where its best real class is more probable than this."""
FEWEST = 5
"""So many of the best queries are drawn where none passes the threshold."""
NO_OBJECT = "no object"
POOLED = "pooled"
INDEPENDENT = "sigmoid: each probability is a question of its own, they do not sum to 1"
"""What a legend has to say where probabilities are not a distribution over the labels."""


@dataclass(frozen=True)
class Patch:
    """A read position that stands for a part of a picture; ``slot`` counts the read positions."""

    slot: int
    row: int
    column: int


@dataclass(frozen=True)
class Detection:
    """A query and what it most likely saw; ``box`` is centre x, centre y, width, height, as fractions."""

    slot: int
    label: str
    column: int
    probability: float
    box: tuple[float, ...]


def patches(prompt: Prompt, picture: Picture) -> tuple[Patch, ...]:
    """The patches of a picture that were read, inside its grid."""
    slots = {position: slot for slot, position in enumerate(prompt.positions)}
    rows, columns = picture.grid
    return tuple(
        Patch(slots[position], row, column)
        for position, row, column in picture.patches
        if position in slots and 0 <= row < rows and 0 <= column < columns
    )


def patched(prompt: Prompt) -> list[tuple[int, Picture, tuple[Patch, ...]]]:
    """The pictures of a prompt of which patches were read: number, picture, patches."""
    found = [(i, picture, patches(prompt, picture)) for i, picture in enumerate(prompt.pictures)]
    return [(i, picture, read) for i, picture, read in found if read]


def others(prompt: Prompt) -> list[int]:
    """The read positions, as slots, that stand for no part of a picture."""
    taken = {patch.slot for _, _, read in patched(prompt) for patch in read}
    return [slot for slot in range(len(prompt.positions)) if slot not in taken]


def answer(prompt: Prompt) -> int:
    """The slot of the model's answer: the pooled position, else the last one that is no patch, else the last."""
    pooled = [s for s, p in enumerate(prompt.positions) if prompt.tokens[p] == POOLED and p >= len(prompt.ids)]
    return (pooled or others(prompt) or [len(prompt.positions) - 1])[-1]


def is_detector(reading: Reading) -> bool:
    """Whether the positions are queries with boxes."""
    return "box" in reading.arrays


def detections(reading: Reading, prompt: int, site: int, target: int | None = None) -> list[Detection]:
    """Every query's most likely real class at one site, or the target's probability there; the best first."""
    arrays = reading.arrays
    found: list[Detection] = []
    for slot in range(len(reading.prompts[prompt].positions)):
        where = (prompt, site, slot)
        box = tuple(float(side) for side in arrays["box"][where])
        if not np.isfinite(box).all():
            continue
        if target is not None:
            wanted, chance = reading.targets[target], arrays["target_logprob"][where][target]
            found.append(Detection(slot, wanted.token, wanted.id, float(np.exp(chance)), box))
            continue
        for column, chance in zip(arrays["top_id"][where].tolist(), arrays["top_logprob"][where], strict=True):
            label = NO_OBJECT if column < 0 else reading.label(column, prompt, slot)
            if label != NO_OBJECT:
                found.append(Detection(slot, label, column, float(np.exp(chance)), box))
                break
    found = [d for d in found if not np.isnan(d.probability)]
    return sorted(found, key=lambda d: -d.probability)


def frequent(counted: Iterable[int], most: int, first: Sequence[int] = ()) -> list[int]:
    """At most ``most`` columns, those in ``first`` before the most frequent ones; missing ones (-1) do not count."""
    counts = Counter(i for i in counted if i >= 0)
    order = [*dict.fromkeys(i for i in first if i in counts), *(i for i, _ in counts.most_common())]
    return list(dict.fromkeys(order))[:most]


def thinned(count: int, most: int | None) -> list[int]:
    """At most ``most`` of ``count`` numbers, evenly chosen; the last and (unless it is one) the first remain."""
    if most is None or count <= most:
        return list(range(count))
    return [round(x) for x in np.linspace(0, count - 1, most).tolist()] if most > 1 else [count - 1]


def title(prompt: Prompt) -> str:
    """The prompt in one line, with [picture] where a picture is; not yet made visible."""
    if prompt.text is not None:
        return prompt.text
    where = {position: i for i, picture in enumerate(prompt.pictures) for position, _, _ in picture.patches}
    parts: list[str] = []
    named: set[int] = set()
    for position, token in enumerate(prompt.tokens):
        if position in where:
            if where[position] not in named:
                parts.append("[picture]")
            named.add(where[position])
        elif position < len(prompt.ids):
            parts.append(token)
    return "".join(parts) or ("[picture]" if prompt.pictures else "[input]")


def position_names(prompt: Prompt) -> list[str]:
    """Visible labels of the read positions; the spaces in names such as ``patch 3,4`` are not those of a token."""
    where = {p for picture in prompt.pictures for p, _, _ in picture.patches}
    return [
        visible(prompt.tokens[p], space=" " if p >= len(prompt.ids) or p in where else "·") for p in prompt.positions
    ]


def size(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels, from the header of the PNG; (1, 1) where it has none."""
    png = picture.png
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or png[12:16] != b"IHDR" or len(png) < 24:
        return 1, 1
    width, height = struct.unpack(">II", png[16:24])
    return (width, height) if width and height else (1, 1)
