"""Pictures and sounds as inputs: recognise them, and let the model's own processor prepare them."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitlab.errors import InputError
from logitlab.models.inputs import whole_number

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUND_SUFFIXES = (".wav",)
SHOWN = 512
"""Longest side, in pixels, of the picture that is kept in a Reading."""


@dataclass(frozen=True)
class Media:
    """One raw input that holds more than text.

    Attributes:
        pictures: PIL images.
        sound: samples, float32 [n], or None.
        rate: samples a second.
        text: the text that goes with them, or None.
        messages: the chat that they came in, or None.
    """

    pictures: tuple[Any, ...] = ()
    sound: Any = None
    rate: int = 16000
    text: str | None = None
    messages: Sequence[Any] | None = field(default=None, repr=False)


def media_of(value: Any, *, paths: bool) -> Media | None:
    """The pictures or sounds that an input is or holds; None if it is something else.

    Args:
        value: a PIL image, an array (uint8 [height, width, 3] a picture, float [n] a sound), a path,
            a mapping with ``image``, ``images`` or ``audio`` and perhaps ``text``, or chat messages
            with pictures in their content.
        paths: whether a text that names a picture or sound file is meant as that file.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if isinstance(value, list | tuple):
        return _from_chat(value)
    if isinstance(value, Path) or (paths and isinstance(value, str) and _suffix(value)):
        path = Path(value).expanduser()
        return Media(sound=_sound(path)) if path.suffix.lower() in SOUND_SUFFIXES else Media((_picture(path),))
    if _is_image(value):
        return Media((_picture(value),))
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint8 and value.ndim == 3:
            return Media((_picture(value),))
        if value.dtype.kind == "f" and value.ndim == 1:
            return Media(sound=_sound(value))
    return None


def _suffix(text: str) -> bool:
    return text.lower().endswith((*PICTURE_SUFFIXES, *SOUND_SUFFIXES))


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _from_mapping(value: Mapping[str, Any]) -> Media | None:
    if not {"image", "images", "audio"} & set(value):
        return None
    unknown = set(value) - {"image", "images", "audio", "rate", "text"}
    if unknown:
        raise InputError(f"the input has an unknown part {sorted(unknown)[0]!r}: give image, images, audio, rate, text")
    given = value.get("images", value.get("image"))
    many = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    sound = None if value.get("audio") is None else _sound(value["audio"])
    if not many and sound is None:
        raise InputError("the input holds no picture and no sound: give image, images or audio something")
    rate = whole_number(16000 if value.get("rate") is None else value["rate"], "rate")
    return Media(tuple(_picture(p) for p in many), sound, rate, value.get("text"))


def _from_chat(messages: Sequence[Any]) -> Media | None:
    pictures: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") == "image":
                pictures.append(_picture(next((part[k] for k in ("image", "path") if k in part), None)))
    return Media(tuple(pictures), messages=messages) if pictures else None


def _picture(value: Any) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError("pictures need Pillow: pip install 'logitlab[vision]'") from error
    if _is_image(value):
        return value.convert("RGB")
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        if not path.is_file():
            raise InputError(f"there is no picture at {path}: check the path")
        try:
            with Image.open(path) as opened:
                return opened.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is not a picture that can be read: {error}") from error
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3) and value.size:
        try:
            return Image.fromarray(value).convert("RGB")
        except (TypeError, ValueError) as error:
            raise InputError(f"an array of shape {value.shape} is not a picture: give [height, width, 3]") from error
    what = f"array of shape {value.shape} and {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise InputError(
        f"a picture that is {what} is not understood: give a path, a PIL image or a uint8 array [height, width, 3]"
    )


def _sound(value: Any) -> Any:
    if isinstance(value, str | Path):
        return _wave(Path(value).expanduser())
    try:
        samples = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"a sound of type {type(value).__name__} is not understood: give its samples") from error
    if samples.ndim != 1 or not samples.size:
        raise InputError(f"a sound of shape {samples.shape} is not understood: give its samples as one row")
    if not np.isfinite(samples).all():
        raise InputError("the sound has samples that are not finite")
    return samples


def _wave(path: Path) -> Any:
    """Samples of a WAV file at 16,000 a second, its channels averaged."""
    if not path.is_file():
        raise InputError(f"there is no sound at {path}: check the path")
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, size = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise InputError(f"{path} is not a WAV file that can be read: {error}") from error
    if size != 2:
        raise InputError(f"{path} has samples of {8 * size} bits: give 16-bit ones")
    if rate != 16000:
        raise InputError(f"{path} has {rate} samples a second: give 16000 (for instance: sox in.wav -r 16000 out.wav)")
    if not raw:
        raise InputError(f"{path} holds no samples")
    samples = np.frombuffer(raw, dtype="<i2").astype(np.float32) / 32768
    return samples.reshape(-1, channels).mean(axis=1)


def prepare(media: Media, processor: Any, columns: Sequence[Any] | None) -> dict[str, Any]:
    """Tensors for one forward pass, made by the model's own processor (a batch of one).

    Args:
        media: the input.
        processor: a transformers processor, image processor or feature extractor.
        columns: texts (or pictures, where the input is a text) that the input is compared with.

    Raises:
        InputError: there is no processor, or it refuses the input.
    """
    if processor is None:
        raise InputError(
            "this model has no processor for pictures or sounds: pass prepared tensors (pixel_values, input_features), "
            "or wrap(module, processor)"
        )
    try:
        made = _processed(media, processor, columns)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise InputError(
            f"the model's processor refuses this input: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    tensors = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    if not any(value.is_floating_point() for value in tensors.values()):
        what = "sounds" if media.sound is not None else "pictures"
        raise InputError(f"the model's processor makes nothing of {what}: this model does not read them")
    return tensors


def _processed(media: Media, processor: Any, columns: Sequence[Any] | None) -> Any:
    if media.sound is not None:
        extractor = getattr(processor, "feature_extractor", processor)
        return extractor(media.sound, sampling_rate=media.rate, return_tensors="pt")
    if columns is not None and media.text is not None:
        return processor(text=[media.text], images=list(columns), return_tensors="pt", padding=True)
    pictures = list(media.pictures)
    if columns is not None:
        fill = "max_length" if _pads_fully(processor) else True
        return processor(text=list(columns), images=pictures, return_tensors="pt", padding=fill)
    if media.messages is not None:
        return processor.apply_chat_template(
            list(media.messages), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    if not hasattr(processor, "tokenizer"):
        return processor(images=pictures, return_tensors="pt")
    text = media.text or ""
    mark = str(getattr(processor, "image_token", "<image>"))
    if mark not in text:
        if getattr(processor, "chat_template", None):
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
        else:
            text = mark * len(pictures) + text
    return processor(text=[text], images=pictures, return_tensors="pt")


def _pads_fully(processor: Any) -> bool:
    """SigLIP was trained on texts padded to full length; its tokenizer says so by its missing mask."""
    names = getattr(getattr(processor, "tokenizer", None), "model_input_names", None)
    return names is not None and "attention_mask" not in names


def _colours(values: torch.Tensor, part: Any) -> torch.Tensor:
    """Values [3, height, width] as colours from 0 to 255: what an image processor does last is undone first."""
    if not hasattr(part, "do_rescale") and not hasattr(part, "do_normalize"):  # nothing is known: stretch
        low, high = values.min(), values.max()
        fractions = float(low) >= 0 and float(high) <= 1
        return 255 * (values if fractions else (values - low) / (high - low).clamp_min(1e-6))
    if getattr(part, "do_flip_channel_order", False):
        values = values.flip(0)
    if getattr(part, "do_normalize", False) and getattr(part, "image_mean", None) is not None:
        mean, std = (torch.tensor(getattr(part, k)).reshape(-1, 1, 1) for k in ("image_mean", "image_std"))
        values = values * std + mean
    if getattr(part, "do_rescale", False):
        offset = 1.0 if getattr(part, "rescale_offset", False) else 0.0
        values = (values + offset) / float(getattr(part, "rescale_factor", None) or 1 / 255)
    return values


def shown(pixels: torch.Tensor | None, processor: Any, original: Any) -> bytes:
    """PNG bytes of a picture as the model sees it.

    The pixels that the processor made are turned back into colours, so that patches lie where the
    model has them; packed pixels (one row a patch) cannot be, and the original is shown.
    """
    from PIL import Image

    image = original
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] == 3:
        part = getattr(processor, "image_processor", processor)
        colours = _colours(pixels[0].detach().float().cpu(), part)
        image = Image.fromarray(colours.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    if image is None:
        return b""
    image = image.copy()
    image.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
