"""From whatever a caller passes (text, chat, ids, encoded tensors) to lists of token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logitlab.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """One prompt, ready for the model.

    Attributes:
        text: the text it came from, or None.
        ids: the ids whose hidden states are read (the decoder's, in an encoder-decoder model).
        encoder_ids: the encoder's ids in an encoder-decoder model of text, else None.
        extra: other keyword arguments of the forward pass: pixels, sound features.
        pictures: PIL images that are part of it.
    """

    text: str | None
    ids: tuple[int, ...]
    encoder_ids: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    pictures: tuple[Any, ...] = field(default=(), repr=False, compare=False)


def encode(
    inputs: Any,
    tokenizer: Any,
    *,
    vocab_size: int,
    encoder_decoder: bool,
    start: Sequence[int],
    decoder: Any,
    limit: int | None,
) -> list[Encoded]:
    """Turn inputs into prompts.

    Args:
        inputs: a text, a list of texts, a chat (list of ``{"role", "content"}``), a list of chats,
            token ids, a list of lists of ids, a tensor [tokens] or [batch, tokens], or a mapping
            with ``input_ids`` and perhaps ``attention_mask`` and ``decoder_input_ids``. Padding that
            the mask marks is left out, on whichever side it is.
        tokenizer: a transformers tokenizer or None.
        vocab_size: ids must be below it.
        encoder_decoder: whether ``inputs`` go to an encoder.
        start: first ids of the decoder.
        decoder: text or ids that the decoder has already written.
        limit: longest sequence that the model takes, or None.

    Raises:
        InputError: empty, too long, not in the vocabulary, or of no known form.
    """
    if decoder is not None and not encoder_decoder:
        raise InputError("decoder= is for encoder-decoder models; this model has one sequence only")
    pairs = _pairs(inputs, tokenizer)
    if not pairs:
        raise InputError("there is nothing to read: the list of prompts is empty")
    prompts: list[Encoded] = []
    own_decoder = inputs.get("decoder_input_ids") if isinstance(inputs, Mapping) else None
    if own_decoder is not None:
        own_decoder = _rows(own_decoder)
        if len(own_decoder) != len(pairs):
            raise InputError(
                f"decoder_input_ids has {len(own_decoder)} rows for {len(pairs)} rows of input_ids; give one for each"
            )
    for n, (text, ids) in enumerate(pairs):
        where = f"prompt {n}" if len(pairs) > 1 else "the prompt"
        _check(ids, where, vocab_size, limit)
        if not encoder_decoder:
            prompts.append(Encoded(text, tuple(ids)))
            continue
        if own_decoder is not None:
            target = own_decoder[n]
        else:
            target = [*start, *_decoder_ids(decoder, tokenizer)]
        _check(target, f"the decoder's part of {where}", vocab_size, limit)
        prompts.append(Encoded(text, tuple(target), tuple(ids)))
    return prompts


def whole_number(value: Any, what: str) -> int:
    """A Python, NumPy or torch whole number as an int.

    Raises:
        InputError: it is something else, a truth value for instance.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        if "bool" in kind:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} {value!r} is not a whole number") from None


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _check(ids: Sequence[int], where: str, vocab_size: int, limit: int | None) -> None:
    if not ids:
        raise InputError(f"{where} is empty: give at least one token")
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InputError(f"{where} has token id {bad}, which is not in the vocabulary (0 to {vocab_size - 1})")
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"{where} has {len(ids)} tokens, but the model's context holds {limit}: shorten it or read it in parts"
        )


def _pairs(inputs: Any, tokenizer: Any) -> list[tuple[str | None, list[int]]]:
    if isinstance(inputs, str):
        return [_from_text(inputs, tokenizer)]
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InputError(f"the encoded input has no input_ids (it has {', '.join(map(str, inputs))})")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        rows = _rows(ids)
        masks: Sequence[Any] = [None] * len(rows) if mask is None else _rows(mask)
        if len(masks) != len(rows):
            raise InputError(
                f"attention_mask has {len(masks)} rows for {len(rows)} rows of input_ids; give one for each"
            )
        return [(None, _unpadded(row, m)) for row, m in zip(rows, masks, strict=True)]
    if isinstance(inputs, torch.Tensor) or (hasattr(inputs, "tolist") and hasattr(inputs, "ndim")):
        return [(None, row) for row in _rows(inputs)]
    if isinstance(inputs, Sequence):
        items: Sequence[Any] = inputs
        if not items:
            return []
        if all(_is_whole(i) for i in items):
            return [(None, [int(i) for i in items])]
        if all(isinstance(i, str) for i in items):
            return [_from_text(i, tokenizer) for i in items]
        if all(isinstance(i, Mapping) for i in items):
            return [_from_chat(items, tokenizer)]
        if all(isinstance(i, Sequence) and not isinstance(i, str) for i in items):
            if all(_is_whole(j) for i in items for j in i):
                return [(None, [int(j) for j in i]) for i in items]
            if all(isinstance(j, Mapping) for i in items for j in i):
                return [_from_chat(i, tokenizer) for i in items]
    raise InputError(
        f"inputs of type {type(inputs).__name__} are not understood: give a text, a list of texts, chat messages, "
        "token ids, or encoded tensors"
    )


def _rows(value: Any) -> list[list[int]]:
    data: Any = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(data, list) and data and isinstance(data[0], int):
        data = [data]
    if not isinstance(data, list) or any(
        not isinstance(row, list) or any(not isinstance(i, int) for i in row) for row in data
    ):
        raise InputError("token ids must be whole numbers in one or two dimensions: [tokens] or [batch, tokens]")
    return data


def _unpadded(row: list[int], mask: list[int] | None) -> list[int]:
    if mask is None:
        return row
    if len(mask) != len(row):
        raise InputError(f"attention_mask has {len(mask)} entries for {len(row)} input_ids; give one for each")
    kept = [i for i, m in enumerate(mask) if m]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise InputError("attention_mask has a hole in the middle; only padding at the ends is understood")
    return [row[i] for i in kept]


def _need_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise InputError("this model has no tokenizer: pass token ids, or wrap(module, tokenizer)")


def _from_text(text: str, tokenizer: Any) -> tuple[str, list[int]]:
    if not text.strip():
        raise InputError("the text is empty: give at least one word")
    check_text(text, "the text")
    _need_tokenizer(tokenizer)
    return text, [int(i) for i in tokenizer(text)["input_ids"]]


def check_text(text: str, what: str) -> None:
    """Raise `InputError` if a text holds half a surrogate pair, which no tokenizer takes."""
    bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise InputError(
            f"{what} has a character at {bad} that is not text ({ascii(text[bad])[1:-1]}, half a character or a stray "
            "byte); take it out, or write the text as UTF-8"
        )


def _from_chat(messages: Sequence[Any], tokenizer: Any) -> tuple[str, list[int]]:
    if not messages:
        raise InputError("the chat is empty: give at least one message")
    for message in messages:
        if "role" not in message or "content" not in message:
            raise InputError(
                f"a chat message needs 'role' and 'content'; got {', '.join(map(str, message)) or 'nothing'}"
            )
    _need_tokenizer(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this model's tokenizer has no chat template: pass the text as one string")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's own
        raise InputError(
            f"the model's chat template refuses these messages: {error}; give texts as 'content'"
        ) from error
    return text, [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _ids_of(value: Any) -> list[int]:
    return [int(i) for i in (value.tolist() if hasattr(value, "tolist") else value)]


def _decoder_ids(decoder: Any, tokenizer: Any) -> list[int]:
    if decoder is None:
        return []
    if isinstance(decoder, str):
        _need_tokenizer(tokenizer)
        return [int(i) for i in tokenizer(text_target=decoder, add_special_tokens=False)["input_ids"]]
    return _ids_of(decoder)
