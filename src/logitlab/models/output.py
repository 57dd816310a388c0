"""What a model's task head gives, and the name of the space that it is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError

_FIELDS = ("logits", "prediction_logits", "logits_per_image", "logits_per_video")
"""Names under which models return their last step's result, in the order in which they are tried."""


@dataclass(frozen=True)
class Output:
    """A model's own answer, or what its tail makes of a hidden state.

    Attributes:
        logits: as the model gives them: [batch, positions, columns], or [batch, columns].
        boxes: [batch, queries, 4] as fractions of the picture (centre x, centre y, width, height),
            from detectors; else None.
        name: the field that the logits came from.
        is_map: whether they were a picture, [batch, columns, height, width]: positions are its pixels.
    """

    logits: torch.Tensor
    boxes: torch.Tensor | None = None
    name: str = "logits"
    is_map: bool = False

    @property
    def rows(self) -> torch.Tensor:
        """Logits as [batch x positions, columns] float32."""
        return self.logits.detach().reshape(-1, self.logits.shape[-1]).float()

    @property
    def flat(self) -> torch.Tensor:
        """Everything that a tail has to reproduce, [rows, columns (+ 4)] float32."""
        if self.boxes is None:
            return self.rows
        return torch.cat([self.rows, self.boxes.detach().reshape(-1, self.boxes.shape[-1]).float()], dim=1)


@dataclass(frozen=True)
class Space:
    """The space that a tail reads into.

    Attributes:
        name: ``vocabulary``, ``classes``, ``concepts`` (similarity to texts or pictures given with the
            input), ``boxes`` (a class and a box for each query) or ``map`` (yes or no at every pixel).
        size: number of columns.
        per: ``position`` (an answer at every position of the stack), ``input`` (one answer, pooled
            over positions) or ``output`` (answers at positions of their own, such as the decoder's
            tokens when an encoder is read, or a detector's queries).
        activation: ``softmax`` where the columns exclude each other, ``sigmoid`` where each is a
            question of its own (multi-label heads, SigLIP, focal-loss detectors).
    """

    name: str
    size: int
    per: str
    activation: str = "softmax"


def output_of(value: Any, *, texts: bool = False, pixels: bool = False) -> Output | None:
    """The logits (and boxes) in what a model returns, or None if there are none.

    Args:
        value: a model's output.
        texts: of an image-text model, take texts against pictures instead of pictures against texts.
        pixels: the model was given a picture and no text, so that four axes are a map of the picture.
    """
    if isinstance(value, torch.Tensor):
        is_map = value.ndim == 4 and pixels
        return Output(value.flatten(2).transpose(1, 2) if is_map else value, is_map=is_map)
    fields = ("logits_per_text",) if texts else _FIELDS
    for name in fields:
        found = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            is_map = found.ndim == 4 and pixels
            found = found.flatten(2).transpose(1, 2) if is_map else found
            boxes = getattr(value, "pred_boxes", None)
            return Output(found, boxes if isinstance(boxes, torch.Tensor) else None, name, is_map)
    return None if texts else _unnamed(value)


def _unnamed(value: Any) -> Output | None:
    """An answer that a model with a head returns as its last hidden state.

    Structure tells it from a hidden state: no base model returns one vector for an input, or a
    picture of one channel with values from 0 to 1 (a map of probabilities; its logits are taken).
    """
    found = value.get("last_hidden_state") if isinstance(value, dict) else None
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return None
    if found.ndim == 2:
        return Output(found, None, "last_hidden_state")
    if found.ndim == 4 and found.shape[1] == 1 and bool(((found >= 0) & (found <= 1)).all()):
        p = found.float().clamp(1e-7, 1 - 1e-7)
        return Output(torch.log(p / (1 - p)).flatten(1).unsqueeze(-1), None, "last_hidden_state", True)
    return None


def space_of(output: Output, module: nn.Module, batch: int, positions: int, *, tokens: bool = True) -> Space:
    """Name the space of an output of a stack with ``batch`` items of ``positions`` positions.

    A vocabulary is told from classes by its size: it has as many columns as the model embeds tokens.

    Args:
        output: the model's output on its example.
        module: the model.
        batch: items in the stack's batch.
        positions: positions of the stack's state.
        tokens: whether token ids go into the model.

    Raises:
        ModelError: the columns are neither a vocabulary nor labels (pixels that are painted in, say).
    """
    size = int(output.logits.shape[-1])
    rows = output.logits.numel() // size
    # one answer for the input has no axis of positions: [batch, columns]
    if output.logits.ndim == 2 and rows == batch and (positions > 1 or output.logits.shape[0] == batch):
        per = "input"
    elif rows == batch * positions and not output.is_map:
        per = "position"
    else:
        per = "output"
    config: Any = getattr(module, "config", None)
    labels = getattr(config, "num_labels", None)
    if output.boxes is not None:
        # a softmax detector has one more column than labels, "nothing here"; focal-loss detectors do not,
        # and those with an open vocabulary have one for each text
        closed = isinstance(labels, int) and size == labels + 1
        return Space("boxes", size, per, "softmax" if closed else "sigmoid")
    if output.name.startswith("logits_per_"):
        # a bias on the similarity comes with the sigmoid loss (SigLIP); CLIP has a temperature only
        biased = any(name.rpartition(".")[2] == "logit_bias" for name, _ in module.named_parameters())
        return Space("concepts", size, per, "sigmoid" if biased else "softmax")
    if output.is_map and size == 1:
        return Space("map", size, "output", "sigmoid")
    # one column has nothing to exclude: a reward, or yes and no
    several = size == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
    known = _vocabulary_sizes(module, config)
    padded = per != "input" and labels != size and bool(known) and size >= max(known)  # rows that no token has
    words = (size in known and (tokens or per != "input")) or (tokens and padded)
    if words and not output.is_map:
        return Space("vocabulary", size, per)
    if config is not None and not tokens and per != "input" and labels != size:
        raise ModelError(
            f"{type(module).__name__} gives {size} numbers at each position that are neither a vocabulary nor its "
            f"{labels} labels: there is nothing to name them by"
        )
    return Space("classes", size, per, "sigmoid" if several else "softmax")


def _vocabulary_sizes(module: nn.Module, config: Any) -> set[int]:
    sizes = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 2}
    found = {getattr(c, "vocab_size", None) for c in configs_of(config)}
    positions = {m.num_embeddings for n, m in module.named_modules() if isinstance(m, nn.Embedding) and "position" in n}
    labels = getattr(config, "num_labels", None)
    return {s for s in (sizes - positions) | found if isinstance(s, int) and s != labels}


def configs_of(config: Any) -> list[Any]:
    """A configuration and every configuration inside it, outermost first."""
    found: list[Any] = []
    queue: list[Any] = [config]
    while queue:
        this = queue.pop(0)
        if this is None or any(this is other for other in found):
            continue
        found.append(this)
        queue += [v for v in vars(this).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return found
