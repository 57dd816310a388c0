"""One entrance for everything that can be read: texts, ids, tensors, pictures and sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from logitlab.errors import InputError
from logitlab.models.inputs import Encoded, check_text, encode
from logitlab.models.media import Media, media_of, prepare

if TYPE_CHECKING:
    from logitlab.models.handle import Model

_SEQUENCES = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"})


class Encoder:
    """Turn inputs into prompts of one model.

    Args:
        model: the model that they are for.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def encode(self, inputs: Any, decoder: Any, concepts: Sequence[Any] | None) -> list[Encoded]:
        """See `logitlab.models.handle.Model.encode`."""
        if self.model.space.name == "concepts":
            return self._compared(inputs, concepts)
        if concepts is not None:
            raise InputError("concepts= is for models that compare pictures with texts (CLIP, SigLIP)")
        many = self._items(inputs)
        if not many:
            raise InputError("there is nothing to read: the list of prompts is empty")
        media = [self._media(item) for item in many]
        if isinstance(inputs, list | tuple) and all(_is_encoded(item) for item in many):
            return [p for item in many for p in self.encode(item, decoder, None)]
        if not any(media):
            return self._plain(inputs, decoder)
        if not all(media):
            return [p for item in many for p in self.encode(item, decoder, None)]
        return [self._with_media(m, decoder) for m in media if m is not None]

    def _items(self, inputs: Any) -> list[Any]:
        """Several inputs, or one; a chat is one."""
        several = isinstance(inputs, list | tuple) and media_of(inputs, paths=False) is None
        return list(inputs) if several else [inputs]

    def _media(self, item: Any) -> Media | None:
        model = self.model
        textless = model.template.tokens is None or (model.encoder_decoder and "input_ids" not in model.template.inputs)
        return media_of(item, paths=textless)

    def _plain(self, inputs: Any, decoder: Any) -> list[Encoded]:
        model = self.model
        extra: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            extra = {k: v for k, v in tensors.items() if k not in _SEQUENCES}
            rows = _rows_beside(tensors, extra)
            if rows is not None:
                return [p for row in rows for p in self._plain(row, decoder)]
            if extra:
                self._check_extra(extra, tensors)
            if extra and "input_ids" not in tensors:
                written = tensors.get("decoder_input_ids")
                return [self._from_features(extra, decoder if written is None else written.reshape(-1), None, ())]
        if model.template.tokens is None:
            taken = ", ".join(k for k, v in model.template.inputs.items() if isinstance(v, torch.Tensor))
            raise InputError(
                f"{model.name} takes {taken}, not {_kind(inputs)}: give a picture or sound (path, PIL image, array), "
                f"or a mapping with {taken}"
            )
        if model.encoder_decoder and "input_ids" not in model.template.inputs and not extra:
            raise InputError(
                f"{model.name} reads sound or pictures: give one, not {_kind(inputs)} (decoder= is for its text)"
            )
        prompts = encode(
            inputs,
            model.tokenizer,
            vocab_size=model.input_vocab_size,
            encoder_decoder=model.encoder_decoder,
            start=model.decoder_start,
            decoder=decoder,
            limit=model.context_length,
        )
        if extra:
            prompts = [Encoded(p.text, p.ids, p.encoder_ids, extra) for p in prompts]
        return prompts

    def _check_extra(self, extra: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        unknown = [k for k in extra if not self.model.takes(k)]
        if unknown:
            raise InputError(f"{self.model.name} does not take {unknown[0]}")
        sizes = {int(v.shape[0]) for k, v in tensors.items() if k in _SEQUENCES and v.ndim > 1}
        if sizes - {1}:
            raise InputError(
                "tensors beside token ids are understood for a batch of one: give one mapping for each prompt"
            )
        bad = next((k for k, v in extra.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
        if bad is not None:
            raise InputError(f"{bad} has values that are NaN or infinite")
        lone = [k for k, v in extra.items() if k in ("pixel_values", "input_features", "input_values") and v.ndim > 1]
        if not sizes and any(extra[k].shape[0] != 1 for k in lone):
            raise InputError(f"{lone[0]} holds a batch of {extra[lone[0]].shape[0]}: give one mapping for each input")

    def _with_media(self, media: Media, decoder: Any) -> Encoded:
        inputs = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
        if not any(self.model.takes(name) for name in inputs):
            raise InputError(f"{self.model.name} reads text only: it has no input for pictures or sounds")
        made = prepare(media, self.model.processor, None)
        if "input_ids" in made:
            ids = [int(i) for i in made.pop("input_ids")[0]]
            made.pop("attention_mask", None)
            extra = {k: v for k, v in made.items() if self.model.takes(k)}
            checked = encode(
                [ids],
                self.model.tokenizer,
                vocab_size=max(self.model.input_vocab_size, *(i + 1 for i in ids)),  # an image token may be beyond it
                encoder_decoder=self.model.encoder_decoder,
                start=self.model.decoder_start,
                decoder=decoder,
                limit=self.model.context_length,
            )[0]
            return Encoded(media.text, checked.ids, checked.encoder_ids, extra, media.pictures)
        extra = {k: v for k, v in made.items() if self.model.takes(k)}
        if not extra:
            raise InputError(f"{self.model.name} takes none of what its processor makes ({', '.join(made)})")
        if media.text is not None:
            raise InputError(f"{self.model.name} takes no text beside a picture or sound: leave it out")
        if len(media.pictures) > 1:
            raise InputError(f"{self.model.name} reads one picture at a time: give a list of inputs")
        return self._from_features(extra, decoder, media.text, media.pictures)

    def _from_features(
        self, extra: Mapping[str, Any], decoder: Any, text: str | None, pictures: tuple[Any, ...]
    ) -> Encoded:
        """A prompt without text of its own; a decoder's token ids are what is read, if there is one."""
        model = self.model
        if not model.encoder_decoder:
            if decoder is not None:
                raise InputError("decoder= is for encoder-decoder models; this model has one sequence only")
            return Encoded(text, (), None, extra, pictures)
        written: list[int] = []
        if isinstance(decoder, str):
            check_text(decoder, "decoder=")
            if model.tokenizer is None:
                raise InputError("decoder= is text and this model has no tokenizer: give token ids")
            written = [int(i) for i in model.tokenizer(decoder, add_special_tokens=False)["input_ids"]]
        elif decoder is not None:
            written = [int(i) for i in (decoder.tolist() if hasattr(decoder, "tolist") else decoder)]
        ids = [*(model.decoder_start if written[: len(model.decoder_start)] != model.decoder_start else []), *written]
        checked = encode(
            [ids],
            None,
            vocab_size=model.input_vocab_size,
            encoder_decoder=False,
            start=(),
            decoder=None,
            limit=model.context_length,
        )
        return Encoded(text, checked[0].ids, None, extra, pictures)

    def _compared(self, inputs: Any, concepts: Sequence[Any] | None) -> list[Encoded]:
        """Pictures against texts, or texts against pictures where a text tower is read."""
        model = self.model
        texts = model.tail.texts
        what = "pictures" if texts else "texts"
        many = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if not many:
            raise InputError("there is nothing to read: the list of prompts is empty")
        prompts: list[Encoded] = []
        for item in many:
            if _is_encoded(item) and {"pixel_values", "input_ids"} <= set(item):
                prompts.append(self._compared_tensors(item))
                continue
            if not concepts or isinstance(concepts, str):
                raise InputError(f"{model.name} compares with {what}: give them as a list, concepts=[...]")
            if texts:
                if not isinstance(item, str) or not item.strip():
                    raise InputError(f"the text tower of {model.name} reads texts; got {type(item).__name__}")
                media = Media(text=item)
                columns = [p for c in concepts for p in (media_of(c, paths=True) or Media()).pictures]
                if len(columns) != len(concepts):
                    raise InputError("concepts= must be pictures where a text tower is read")
            else:
                found = media_of(item, paths=True)
                if found is None or not found.pictures:
                    raise InputError(f"{model.name} reads pictures: give a path, a PIL image or an array")
                if len(found.pictures) > 1:
                    raise InputError(f"{model.name} reads one picture at a time: give a list of inputs")
                media, columns = Media(found.pictures), list(concepts)
                bad = next((c for c in columns if not isinstance(c, str) or not c.strip()), None)
                if bad is not None:
                    raise InputError(f"the concept {bad!r} is not a text: give a list of texts")
            made = prepare(media, model.processor, columns)
            extra = {k: v for k, v in made.items() if model.takes(k)}
            prompts.append(Encoded(media.text, (), None, extra, media.pictures))
        return prompts

    def _compared_tensors(self, item: Mapping[str, Any]) -> Encoded:
        extra = {k: v for k, v in item.items() if isinstance(v, torch.Tensor)}
        unknown = [k for k in extra if not self.model.takes(k)]
        if unknown:
            raise InputError(f"{self.model.name} does not take {unknown[0]}")
        name = "input_ids" if self.model.tail.texts else "pixel_values"
        if len(extra.get(name, ())) != 1:
            raise InputError(f"{name} must hold a batch of 1: give one mapping for each input")
        return Encoded(None, (), None, extra)


def _kind(inputs: Any) -> str:
    """What was given, for messages."""
    one: Any = inputs[0] if isinstance(inputs, list | tuple) and inputs else inputs
    if isinstance(one, str):
        return "text"
    shape = getattr(one, "shape", None)
    return type(one).__name__ if shape is None else f"{type(one).__name__} {list(shape)} of {one.dtype}"


def _is_encoded(item: Any) -> bool:
    """Whether an input is a mapping with a tensor in it."""
    return isinstance(item, Mapping) and any(isinstance(v, torch.Tensor) for v in item.values())


def _rows_beside(tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """One mapping for each prompt, padding cut off, where everything beside the ids has one entry for each of them.

    That is what a tokenizer gives (``token_type_ids``). None if there is nothing to cut or split.
    """
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None or ids.ndim != 2 or not extra or any(v.shape[:2] != ids.shape for v in extra.values()):
        return None
    padded = mask is not None and mask.shape == ids.shape and not bool(mask.bool().all())
    if len(ids) == 1 and not padded:
        return None
    found: list[dict[str, Any]] = []
    for n in range(len(ids)):
        kept = torch.arange(ids.shape[1]) if mask is None or mask.shape != ids.shape else mask[n].cpu().nonzero()[:, 0]
        if not len(kept) or int(kept[-1] - kept[0]) + 1 != len(kept):
            return None  # left to the check of the mask, which says what is wrong
        beside = {k: v[n : n + 1, kept] for k, v in {"input_ids": ids, **extra}.items()}
        rest = {k: v[n : n + 1] for k, v in tensors.items() if k.startswith("decoder_")}
        found.append(beside | rest)
    return found


def concept_labels(concepts: Sequence[Any] | None, size: int) -> list[str]:
    """What the columns of a comparison are called."""
    names = [c if isinstance(c, str) else Path(c).name if isinstance(c, Path) else "" for c in concepts or ()]
    return [names[i] if i < len(names) and names[i] else f"concept {i}" for i in range(size)]
