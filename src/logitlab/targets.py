"""From what a caller names to columns of the output: targets, and which columns are ranked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.models.handle import Model
from logitlab.models.inputs import check_text, whole_number
from logitlab.models.vocabulary import ColumnLabels, Vocabulary
from logitlab.reading import Target

VocabularyFilter = Callable[[str], bool] | Sequence[int] | torch.Tensor


def resolve_targets(
    model: Model, target: str | int | Sequence[str | int] | None, columns: Vocabulary | None = None
) -> list[Target]:
    """The tokens, classes or concepts that a caller names, as text or as ids.

    Args:
        model: the model.
        target: what the caller gave.
        columns: labels of the output's columns; by default the model's.

    Raises:
        InputError: an id is not in the vocabulary, or a text is not exactly one token; the message
            lists the tokens and what the text would be with or without a space before it.
    """
    if target is None:
        return []
    columns = model.columns if columns is None else columns
    single: Any = target
    alone = isinstance(single, str) or not hasattr(single, "__iter__") or getattr(single, "ndim", 1) == 0
    items: list[Any] = [single] if alone else list(single)
    found: list[Target] = []
    for item in items:
        if not isinstance(item, str):
            number = whole_number(item, "target")
        else:
            number = _one_column(columns, item) if isinstance(columns, ColumnLabels) else _one_token(model, item)
        if not 0 <= number < columns.size:
            raise InputError(f"target id {number} is not in the vocabulary (0 to {columns.size - 1})")
        if number not in [t.id for t in found]:
            found.append(Target(number, columns.label(number)))
    return found


def target_notes(model: Model, targets: Sequence[Target]) -> list[str]:
    """A sentence for every target that is another token with, or without, a space before it."""
    notes: list[str] = []
    for t in targets:
        other = t.token[1:] if t.token.startswith(" ") else f" {t.token}"
        ids = _ids(model, other) if model.tokenizer is not None and other.strip() else []
        if len(ids) == 1 and ids[0] != t.id:
            notes.append(f"target {t.token!r} is token {t.id}; {other!r} is another token, {ids[0]}")
    return notes


def _one_column(columns: ColumnLabels, text: str) -> int:
    """The class or concept that a text names: exactly, or as a word of only one of them."""
    wanted = text.strip().lower()
    names = [name.lower() for name in columns.names]
    exact = [i for i, name in enumerate(names) if name == wanted]
    if len(exact) == 1:
        return exact[0]
    near = [i for i, name in enumerate(names) if wanted and wanted in re.split(r",\s*", name)]
    near = near or [i for i, name in enumerate(names) if wanted and wanted in name]
    if len(near) == 1:
        return near[0]
    some = [columns.names[i] for i in (near or range(len(names)))][:8]
    problem = f"fits {len(near)} of the columns" if near else f"is none of the {len(names)} columns"
    raise InputError(f"target {text!r} {problem}: {', '.join(some)}{' ...' if len(near or names) > 8 else ''}")


def _one_token(model: Model, text: str) -> int:
    if model.tokenizer is None:
        raise InputError(f"target {text!r}: this model has no tokenizer, so give a token id (id:N)")
    if not text:
        raise InputError("the target is empty: give a token such as ' Paris', or an id")
    check_text(text, "the target")
    ids = _ids(model, text)
    if len(ids) == 1 and model.vocabulary.label(ids[0]) in (text, f" {text}"):
        return ids[0]
    pieces = ", ".join(f"{model.vocabulary.label(i)!r} ({i})" for i in ids)
    other = text[1:] if text.startswith(" ") else f" {text}"
    hint = _ids(model, other) if other.strip() else []
    with_or_without = "without" if text.startswith(" ") else "with"
    advice = (
        f"{with_or_without} a space before it, {other!r} is one token ({hint[0]})"
        if len(hint) == 1
        else "give one of them, or an id"
    )
    count = "another token" if len(ids) == 1 else f"{len(ids)} tokens"
    raise InputError(f"target {text!r} is {count} for this model: {pieces}; {advice}")


def _ids(model: Model, text: str) -> list[int]:
    return [int(i) for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def allowed_columns(columns: Vocabulary, vocabulary: VocabularyFilter | None) -> torch.Tensor | None:
    """Which columns a vocabulary filter leaves, [V] bool; None for all.

    Raises:
        InputError: the filter names no column, or one that is not there.
    """
    if vocabulary is None:
        return None
    allowed = torch.zeros(columns.size, dtype=torch.bool)
    if callable(vocabulary) and not isinstance(vocabulary, torch.Tensor):
        ids = [i for i in range(columns.size) if vocabulary(columns.label(i))]
    else:
        values: Any = torch.as_tensor(vocabulary)
        if values.dtype == torch.bool:
            if values.shape != allowed.shape:
                raise InputError(
                    f"the vocabulary mask has shape {tuple(values.shape)}; the vocabulary has {columns.size} entries"
                )
            values = values.nonzero().squeeze(1)
        if values.is_floating_point():
            raise InputError("the vocabulary filter holds fractions; give token ids, a boolean mask, or a function")
        ids = [int(i) for i in values.reshape(-1).tolist()]
        bad = next((i for i in ids if not 0 <= i < columns.size), None)
        if bad is not None:
            raise InputError(f"the vocabulary filter names id {bad}; ids go from 0 to {columns.size - 1}")
    allowed[ids] = True
    if not ids:
        raise InputError("the vocabulary filter leaves no token to rank")
    return allowed
