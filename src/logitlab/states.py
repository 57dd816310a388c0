"""Readings of models that do not answer token by token: pooled classes, concepts, boxes, frames, other stacks.

Each input has one recorded forward pass. For every site the whole state is put where the last block's
was and the model's own code does the rest, so at the last site the answer is the model's own, which
is checked for every input. Where the answer is pooled, single positions are decoded too: as an input
that has their hidden state everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from logitlab.errors import InputError
from logitlab.lenses.base import Lens
from logitlab.logits import Asked, LogitSource, Statistics
from logitlab.logits.independent import independent
from logitlab.models.capture import checked_states, rows_at
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.media import shown
from logitlab.models.output import Output
from logitlab.models.patches import NONE, Grid, state_patches, token_patches
from logitlab.models.sites import Site
from logitlab.models.tail import shape_of
from logitlab.models.trace import Run
from logitlab.reading import Picture

POOLED = "pooled"
"""Label of the last position of a pooled reading: the answer for the whole input."""


@dataclass(frozen=True)
class StateReading:
    """What one input gave.

    Attributes:
        statistics: [sites, positions, ...].
        boxes: [sites, positions, 4] float32, or None.
        tokens: a label for every position.
        positions: the positions that were read.
        pictures: the input's pictures.
    """

    statistics: Statistics
    boxes: torch.Tensor | None
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    pictures: tuple[Picture, ...]


def read_states(
    model: Model,
    prompt: Encoded,
    sites: Sequence[Site],
    select: Callable[[int], Sequence[int]],
    *,
    lens: Lens,
    asked: Asked,
) -> StateReading:
    """Read one input at some sites; the arguments are those of `logitlab.read`, resolved.

    Args:
        model: the model.
        prompt: the input.
        sites: the sites, the last block's output among them.
        select: gives the positions to read for a number of positions.
        lens: the lens.
        asked: what is wanted of every state.

    Raises:
        VerificationError: the last site decoded is not the model's own answer for this input.
        ModelError: a state is not finite, or the model went another way than on its example.
    """
    run, rows, own = checked_states(model, prompt, sites)
    shape = shape_of(run.blocks[-1])
    grid = _grid(model, prompt, run, shape)
    count = model.stack.layout.count(shape)
    tokens = _labels(model, prompt, own, count, grid)
    chosen = tuple(select(len(tokens)))
    # One site at a time: logits of whole states, [positions, V], are never held for all of them.
    parts: list[Statistics] = []
    boxes: list[torch.Tensor] = []
    reference = _reference(model, own, len(tokens))[list(chosen)]
    for site in sites:
        hidden = lens.transport(rows_at(model, rows, site), site)
        z, box = _decoded(model, run, hidden, shape, chosen, count)
        parts.append(_statistics(model, z, reference, asked))
        if box is not None:
            boxes.append(box[list(chosen)])
    return StateReading(
        Statistics.join(parts, dim=0),
        torch.stack(boxes) if boxes else None,
        tokens,
        chosen,
        _pictures(model, prompt, run, grid),
    )


def _grid(model: Model, prompt: Encoded, run: Run, shape: torch.Size) -> list[Grid]:
    if prompt.ids and model.template.tokens is not None and not model.encoder_decoder:
        return token_patches(model.module, model.processor, prompt.ids, prompt.extra)
    if model.space.per == "output" or model.space.name == "boxes":
        return []
    found = state_patches(model.module, model.stack, run.inputs, shape)
    return [] if found == NONE else [found]


def _labels(model: Model, prompt: Encoded, own: Output, count: int, grids: Sequence[Grid]) -> tuple[str, ...]:
    if model.space.name == "boxes":
        return tuple(f"query {i}" for i in range(len(own.rows)))
    if model.space.per == "output":
        if len(prompt.ids) == len(own.rows):
            return tuple(model.vocabulary.labels(prompt.ids))
        return tuple(f"output {i}" for i in range(len(own.rows)))
    ids = prompt.encoder_ids if prompt.encoder_ids is not None and len(prompt.encoder_ids) == count else prompt.ids
    named = len(ids) == count
    labels = model.vocabulary.labels(ids) if named else [f"position {i}" for i in range(count)]
    for _, patches in grids:
        for position, row, column in patches:
            labels[position] = f"patch {row},{column}"
    if model.space.per != "input":
        return tuple(labels)
    return (*labels, POOLED) if model.tail.by is not None else (POOLED,)


def _reference(model: Model, own: Output, count: int) -> torch.Tensor:
    """The model's own answer for every position [positions, V]: a pooled one is the same for all."""
    return own.rows.expand(count, -1) if model.space.per == "input" else own.rows


def _decoded(
    model: Model, run: Run, hidden: torch.Tensor, shape: torch.Size, chosen: Sequence[int], count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [chosen positions, V] of one site, and the boxes of all queries."""
    tail = model.tail
    places = [p for p in chosen if p < count]
    pooled = model.space.per == "input"
    single = tail.logits(hidden[places], run) if pooled and tail.by is not None and places else None
    if pooled and single is not None and len(places) == len(chosen):
        return single, None
    output = tail.output(model.stack.layout.state(hidden, shape), run)
    if not pooled:
        boxes = None if output.boxes is None else output.boxes.detach().reshape(-1, 4).float()
        return output.rows[list(chosen)], boxes
    if single is None:
        return output.rows.expand(len(chosen), -1), None
    answers = [single[places.index(p)] if p < count else output.rows[0] for p in chosen]
    return torch.stack(answers), None


def _statistics(model: Model, z: torch.Tensor, reference: torch.Tensor, asked: Asked) -> Statistics:
    if model.space.activation != "sigmoid":
        source = LogitSource(lambda rows: rows, int(z.shape[-1]))
        return asked.of(z.unsqueeze(0), source, reference)
    found = independent(
        z.unsqueeze(0),
        top_k=min(asked.top_k, z.shape[-1]),
        targets=asked.targets,
        allowed=asked.allowed,
        reference=reference if asked.kl else None,
    )
    if not asked.entropy:
        found.entropy = None
    if asked.precision != "exact":  # there is nothing to screen
        found.bound = torch.zeros_like(found.logsumexp)
    return found


def _pictures(model: Model, prompt: Encoded, run: Run, grids: Sequence[Grid]) -> tuple[Picture, ...]:
    if model.tail.texts:  # the pixels are those of the concepts
        return ()
    return pictures_of(model, prompt, grids, run.inputs.get("pixel_values"))


def pictures_of(model: Model, prompt: Encoded, grids: Sequence[Grid], pixels: object = None) -> tuple[Picture, ...]:
    """The pictures of a prompt with their patches; a prompt of bare pixels shows those."""
    tensor = pixels if isinstance(pixels, torch.Tensor) else None
    if not prompt.pictures and (tensor is None or tensor.ndim != 4):
        return ()
    found: list[Picture] = []
    pictures = prompt.pictures or (None,) * max(1, len(grids))
    # Where the model cuts a picture into tiles, neither pixels nor grids are those of whole pictures.
    whole = tensor is not None and tensor.ndim == 4 and len(tensor) == len(pictures)
    for i, picture in enumerate(pictures):
        part = tensor[i : i + 1] if tensor is not None and whole else None
        size, patches = grids[i] if len(grids) == len(pictures) else NONE
        png = shown(part, model.processor, picture)
        if png:
            found.append(Picture(png, size, patches))
    return tuple(found)


def check_concepts(model: Model, concepts: Sequence[object] | None) -> None:
    """Raise `InputError` if two concepts are the same."""
    names = [c for c in concepts or () if isinstance(c, str)]
    twice = next((c for i, c in enumerate(names) if c in names[:i]), None)
    if twice is not None:
        raise InputError(f"the concept {twice!r} is given twice")
