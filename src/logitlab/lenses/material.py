"""What a lens is fitted on: windows of a corpus, or inputs of other kinds, known by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from logitlab.corpora import Corpus, corpus, windows
from logitlab.errors import InputError
from logitlab.models.capture import by_tokens
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded

_MEDIA = ("image", "images", "audio", "pixel_values", "input_features", "input_values")


class Material(Protocol):
    """Prompts by number; those for validation come first.

    Attributes:
        described: plain values for the record.
    """

    @property
    def described(self) -> dict[str, Any]:
        """See above."""
        ...

    def __len__(self) -> int: ...

    def prompt(self, n: int) -> Encoded:
        """The prompt of a number."""
        ...

    def own(self, n: int) -> range:
        """Which of its positions may be used; none where it is not read token by token."""
        ...


def material(
    model: Model,
    source: Any,
    *,
    wanted: int,
    least: int,
    length: int,
    column: str,
    decoder_column: str | None,
    concepts: Sequence[Any] | None = None,
) -> Material:
    """As much as a fit can use of a corpus or of inputs.

    A model that is read from texts alone gets windows of a corpus. An encoder-decoder of text gets a row at a time:
    ``column`` goes to its encoder, ``decoder_column`` is what its decoder has written. All others, and a list with
    something else than texts in it, are taken as inputs, each as `logitlab.read` takes it; a classifier of texts gets a
    text of the corpus at a time.

    Args:
        model: the model.
        source: where they come from.
        wanted: the most that can be used.
        least: the fewest that will do.
        length: tokens of a window; of a row at most.
        column: which column of a table is the text.
        decoder_column: which is the decoder's text.
        concepts: what pictures are compared with, see `logitlab.read`.

    Raises:
        InputError: the source is of another form, or has too little.
    """
    if isinstance(source, Iterator):
        source = list(source)  # it is looked at more than once
    reads_text = model.template.tokens is not None
    if decoder_column is not None and not model.encoder_decoder:
        raise InputError(f"decoder_column is for encoder-decoder models; {model.name} has one sequence only")
    if concepts is not None and model.space.name != "concepts":
        raise InputError("concepts= is for models that compare pictures with texts (CLIP, SigLIP)")
    texts = reads_text and model.space.name != "concepts" and _of_texts(model, source, column)
    if texts and model.encoder_decoder and "input_ids" in model.template.inputs:
        if decoder_column is None:
            raise InputError(
                f"{model.name} has an encoder and a decoder: name the column with the decoder's text (decoder_column=)"
            )
        rows = corpus(source, column=decoder_column)  # both columns are texts then
        made = _Made(model, rows.name, _pairs(model, rows, column, decoder_column, length, wanted), concepts)
    elif texts and by_tokens(model, [Encoded(None, (0,))]):
        return _windows(model, corpus(source, column=column), wanted, least, length)
    elif texts:
        rows = corpus(source, column=column)
        made = _Made(model, rows.name, [_Raw(text.text) for text in islice(rows, wanted)], concepts)
    else:
        raw = _listed(model, source, decoder_column, wanted)
        made = _Made(model, type(source).__name__, raw, concepts)
    return made.checked(least)


def _of_texts(model: Model, source: Any, column: str) -> bool:
    """Whether a source is a corpus of texts, and not a list of inputs of other kinds."""
    if not isinstance(source, list | tuple):
        return True  # a file, a folder, a dataset
    items: Sequence[Any] = source
    sees = any(model.takes(name) for name in _MEDIA)
    for item in items:
        if isinstance(item, str):
            continue
        if not isinstance(item, Mapping) or "input_ids" in item:
            return False
        if set(_MEDIA) & set(item) and (sees or column not in item):
            return False
    return True


# -- windows of a corpus -----------------------------------------------------------------------


@dataclass
class Windowed:
    """Windows of a corpus, in memory: four bytes a token.

    Attributes:
        ids: [windows, length] int32.
        used: which positions may be used.
        described: plain values for the record.
    """

    ids: np.ndarray
    used: range
    described: dict[str, Any]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.ids)

    def prompt(self, n: int) -> Encoded:
        """See `Material`."""
        return Encoded(None, tuple(map(int, self.ids[n])))

    def own(self, n: int) -> range:
        """See `Material`."""
        return self.used


def _windows(model: Model, texts: Corpus, wanted: int, least: int, length: int) -> Windowed:
    found: list[np.ndarray] = []
    own = range(0)
    for window in islice(windows(model, texts, length), wanted):
        found.append(np.array(window.ids, dtype=np.int32))
        own = range(window.own.start, window.own.stop)
    if len(found) < least:
        raise InputError(
            f"the corpus {texts.name} gives {len(found)} windows of {length} tokens; at least {least} are needed "
            "(for validation and one step): give more text, or a smaller length"
        )
    ids = np.stack(found)
    described = {
        "name": texts.name,
        "windows": len(found),
        "tokens": int(ids.size),
        "digest": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    return Windowed(ids, own, described)


# -- inputs of other kinds ---------------------------------------------------------------------


@dataclass
class _Raw:
    """An input before it is prepared: pictures are prepared anew each time, so that few are held."""

    value: Any
    decoder: Any = None


@dataclass
class _Made:
    """Inputs that are prepared when they are needed."""

    model: Model
    name: str
    raw: list[_Raw]
    concepts: Sequence[Any] | None = None
    described: dict[str, Any] = field(default_factory=dict[str, Any])
    lengths: list[int] = field(default_factory=list[int])

    def __len__(self) -> int:
        return len(self.raw)

    def prompt(self, n: int) -> Encoded:
        """See `Material`."""
        raw = self.raw[n]
        found = self.model.encode(raw.value, decoder=raw.decoder, concepts=self.concepts)
        if len(found) != 1:
            raise InputError(f"input {n} of the {self.name} is {len(found)} inputs: give a list of single ones")
        return found[0]

    def own(self, n: int) -> range:
        """See `Material`."""
        return range(self.lengths[n])

    def checked(self, least: int) -> _Made:
        """The same, if there are enough, with a description that tells them from others."""
        if len(self) < least:
            raise InputError(
                f"the {self.name} has {len(self)} inputs; at least {least} are needed (for validation and one step)"
            )
        found = hashlib.sha256()
        tokens = 0
        for n in range(len(self)):
            prompt = self.prompt(n)
            tokens += len(prompt.ids)
            self.lengths.append(len(prompt.ids) if by_tokens(self.model, [prompt]) else 0)
            found.update(repr((prompt.ids, prompt.encoder_ids)).encode())
            for key, value in sorted(prompt.extra.items()):
                if isinstance(value, torch.Tensor):
                    data = value.detach().cpu().contiguous()
                    found.update(f"{key} {tuple(data.shape)} {data.dtype}".encode())
                    found.update(data.flatten().view(torch.uint8).numpy().tobytes())
        self.described = {"name": self.name, "inputs": len(self), "tokens": tokens, "digest": found.hexdigest()}
        return self


def _pairs(model: Model, rows: Corpus, column: str, decoder_column: str, length: int, wanted: int) -> list[_Raw]:
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: texts cannot be read with it")
    found: list[_Raw] = []
    for row in islice(rows, wanted):
        given = row.text if column == decoder_column else row.columns.get(column)
        if column != decoder_column and column not in row.columns:
            has = ", ".join(map(str, row.columns)) or f"none but {decoder_column}"
            raise InputError(f"{row.place} has no column {column!r}; there are {has}: name one as column=")
        for name, text in ((column, given), (decoder_column, row.text)):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{row.place}: column {name!r} is not a text, or is empty")
        ids = tokenizer(given, verbose=False)["input_ids"][:length]
        target = tokenizer(text_target=row.text, add_special_tokens=False, verbose=False)["input_ids"]
        target = [*model.decoder_start, *target][:length]
        found.append(_Raw({"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([target])}))
    return found


def _listed(model: Model, source: Any, decoder_column: str | None, wanted: int) -> list[_Raw]:
    if not isinstance(source, list | tuple):
        raise InputError(
            f"{model.name} is not read from texts alone: give a list of its inputs, each as read() takes it, not "
            f"a {type(source).__name__}"
        )
    name = decoder_column or "decoder"
    found: list[_Raw] = []
    written = 0
    for n, value in enumerate(islice(source, wanted)):
        if isinstance(value, Mapping) and name in value:
            written += 1
            found.append(_Raw({k: v for k, v in value.items() if k != name}, value[name]))
        elif decoder_column is not None or written:
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise InputError(f"input {n} has no {name!r}, which says what the decoder has written; it has {has}")
        else:
            found.append(_Raw(value))
    if 0 < written < len(found):
        raise InputError(f"input 0 has no {name!r}, and others have: give all of them one, or none")
    return found
