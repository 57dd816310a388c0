"""Inputs for one small forward pass of any transformers model, from its signature, its config and its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from logitlab.errors import ModelError
from logitlab.models.template import DECODER_TOKENS, ENCODER_TOKENS, device_of, forward_parameters

CAPTIONS = 3  # texts that one image is compared with, so that a distribution over texts has something to say
IMAGE_SIZE = 128  # of models that take any size: detectors halve it six times and more
FRAMES = 8 * DECODER_TOKENS  # of features over time: as many as the text has tokens are left, of eight one
SOUND_FRAMES = 16  # that the convolutions leave of a waveform

_TEXT_CONFIGS = (
    "text_config",
    "text_encoder_config",
    "decoder",
    "decoder_config",
    "generation_config",
    "qformer_config",
)
_MEDIA = (
    "pixel_values",
    "pixel_values_videos",
    "flattened_patches",
    "input_features",
    "input_values",
    "visual_feats",
    "inputs",
)
_SPECIAL = re.compile(r"_(token|tok)(_id|_ids|_index|_idx)?$")


def example_inputs(module: nn.Module, *, seed: int = 20260, vision: bool = False) -> dict[str, Any]:
    """Keyword arguments for one small forward pass of a model: a batch of one, fixed and pseudo-random.

    What is given follows from the names in the forward signature: token ids (never special ones),
    pixels, waveforms or features over time, boxes. A model that decodes text gets no image or sound unless
    it cannot do without; one that compares texts with an image gets `CAPTIONS` texts.

    Args:
        module: a transformers model with any head.
        seed: of the pseudo-random values.
        vision: give a model that decodes text about an image that image, and its place in the text, too.

    Raises:
        ModelError: the model takes no input that is known here, or needs one that is not; or the image
            that was asked for cannot be given.
    """
    return _Example(module, seed).inputs(vision=vision)


class _Stop(Exception):  # noqa: N818 - not an error: it ends a pass that has shown what it was run for
    """Ends a forward pass at its first layer with weights, with the shape of what came there."""

    def __init__(self, layer: nn.Module, shape: torch.Size | None) -> None:
        super().__init__()
        self.layer = layer
        self.shape = shape

    @property
    def fits(self) -> bool:
        """Whether the layer can take what came."""
        if self.shape is None:
            return False
        if isinstance(self.layer, nn.Linear):
            return self.shape[-1] == self.layer.in_features
        space = 1 if isinstance(self.layer, nn.Conv1d) else 2 if isinstance(self.layer, nn.Conv2d) else 3
        return len(self.shape) == space + 2 and self.shape[1] == getattr(self.layer, "in_channels", None)


class _Example:
    def __init__(self, module: nn.Module, seed: int) -> None:
        self.module = module
        self.config: Any = getattr(module, "config", None)
        self.name = type(module).__name__
        self.parameters = {
            name: parameter
            for name, parameter in forward_parameters(module).items()
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        self.device = device_of(module)
        self.dtype = next((p.dtype for p in module.parameters() if p.dtype in _FLOATS), torch.float32)
        self.generator = torch.Generator().manual_seed(seed)
        self.configs = list(_configs(self.config))
        self.special = set(_special_ids(self.config))

    # what is given

    def inputs(self, *, vision: bool) -> dict[str, Any]:
        takes = self.parameters
        required = {name for name, parameter in takes.items() if parameter.default is parameter.empty}
        decodes = bool({"past_key_values", "use_cache", "logits_to_keep", "decoder_input_ids"} & set(takes))
        media = self._media(required)
        given: dict[str, Any] = {}
        # An encoder reads sound or text, never both; pixels go with text where there is a place for it.
        sound = bool({"input_features", "input_values"} & set(media)) and "decoder_input_ids" in takes
        if "input_ids" in takes and not (sound and "input_ids" not in required):
            given |= self._text()
        for name in media:
            given |= self._medium(name, given)
        if not given:
            raise ModelError(
                f"{self.name} takes {', '.join(list(takes)[:8]) or 'no named input'}, none of which logitlab can make "
                "up: wrap(module, example={...}) takes its inputs"
            )
        if self._wants_decoder(given):
            channels, size = self._channels() or (0, self._vocabulary(decoder=True))
            shape = (1, DECODER_TOKENS, channels) if channels else (1, DECODER_TOKENS)
            given["decoder_input_ids"] = self._ids(shape, size)
        missing = sorted(required - set(given))
        if missing:
            raise ModelError(
                f"{self.name} needs {', '.join(missing)}, which logitlab cannot make up: "
                "wrap(module, example={...}) takes its inputs"
            )
        placed = decodes and "pixel_values" in media and (self._image_token() is not None or self._films())
        if "input_ids" in given and (placed or (vision and "pixel_values" not in given)):
            try:
                given |= self._picture(given["input_ids"])
            except ModelError:
                if vision:
                    raise
        if "use_cache" in takes:
            given["use_cache"] = False
        return given

    def _media(self, required: set[str]) -> list[str]:
        """The inputs other than text that the model cannot do without."""
        known = [name for name in _MEDIA if name in self.parameters]
        if {"input_features", "input_values"} <= set(known):
            known.remove("input_features" if self._raw_sound() else "input_values")
        main = getattr(self.module, "main_input_name", None)
        main = None if main == "inputs" else main  # a name for any input: the others say what it is
        if "input_ids" not in self.parameters:
            known = [name for name in known if name in required] or known
            return [main] if main in known else known[:1]
        chosen = [name for name in known if name in required]
        if not chosen and "decoder_input_ids" in self.parameters:
            chosen = [name for name in known if name == main]
        if chosen or not known:
            return chosen
        alone = not self._compares() and self._first_layer(self._text()) is not None
        return [] if alone else known[:1]

    def _compares(self) -> bool:
        """Whether texts are scored against an image or a sound."""
        return bool({"return_loss", "use_image_text_matching_head"} & set(self.parameters))

    def _wants_decoder(self, given: Collection[str]) -> bool:
        """Whether a decoder is there, and not fed by the model itself, from input_ids, as by most task heads."""
        if "decoder_input_ids" not in self.parameters:
            return False
        if "input_ids" not in given:
            return True
        if not any(getattr(config, "is_encoder_decoder", False) for config in self.configs):
            return False
        generates = getattr(self.module, "can_generate", lambda: False)()
        return generates or self._head() is not None or not {"labels", "start_positions"} & set(self.parameters)

    def _head(self) -> Any:
        return getattr(self.module, "get_output_embeddings", lambda: None)()

    # text

    def _text(self) -> dict[str, Any]:
        compares = self._compares()
        rows = CAPTIONS if compares else 1
        encoder = "decoder_input_ids" in self.parameters
        length = ENCODER_TOKENS if self._wants_decoder(("input_ids",)) else DECODER_TOKENS
        # A decoder's ids are drawn by the caller from the same generator, after these.
        channels, size = (self._channels() if not encoder else None) or (0, self._vocabulary(decoder=False))
        ids = self._ids((rows, length, channels) if channels else (rows, length), size)
        if compares or (encoder and length == DECODER_TOKENS):
            # Read at its end-of-text token, by models that compare and by encoder-decoders with a task head.
            eos = next((e for e in self._ends() if e < size), None)
            if eos is not None:
                ids[:, -1] = eos
        given: dict[str, Any] = {"input_ids": ids}
        if "visual_bbox" in self.parameters:  # boxes of words and of patches are joined: both in parts of the page
            given["bbox"] = (self._boxes(length) / 1000).to(self.dtype)
        elif "bbox" in self.parameters:
            given["bbox"] = self._boxes(length)
        if "entity_ids" in self.parameters:
            given |= self._entities()
        if "qformer_input_ids" in self.parameters:
            given["qformer_input_ids"] = self._ids(
                (rows, length), self._size_in("qformer_config", "vocab_size") or size
            )
        return given

    def _ids(self, shape: tuple[int, ...], size: int) -> torch.Tensor:
        count = math.prod(shape)
        drawn = torch.randint(0, size, (4 * count + 256,), generator=self.generator).tolist()
        pool = [i for i in dict.fromkeys(drawn) if i not in self.special]  # all different, where there are enough
        pool = pool or [i for i in range(size) if i not in self.special] or [0]
        ids = (pool * -(-count // len(pool)))[:count]
        return torch.tensor(ids, device=self.device).reshape(shape)

    def _ends(self) -> Iterator[int]:
        for config in self.configs:
            yield from _ints(getattr(config, "eos_token_id", None))

    def _vocabulary(self, *, decoder: bool) -> int:
        """How many ids the encoder (or the only part), or the decoder, has rows for."""
        if decoder:
            find: Callable[[], Any] = getattr(self.module, "get_decoder", lambda: None)
            part: Any = find()
            rows = _rows(part)
            for name in ("decoder", "decoder_config", "text_config"):
                rows = rows or self._size_in(name, "vocab_size")
            rows = rows or getattr(self.config, "decoder_vocab_size", None)
            if rows:
                return int(rows)
        rows = _rows(self.module)
        stated = [getattr(config, "vocab_size", None) for config in self.configs]
        stated = [size for size in stated if isinstance(size, int) and size > 0]
        if rows and stated:
            rows = min(rows, max(stated))  # rows beyond are padding, or extra tokens for other media
        return rows or (stated[0] if stated else 256)  # ids that are hashed, not looked up: bytes will do

    def _channels(self) -> tuple[int, int] | None:
        """Columns of ids, and ids in each, of a model that offsets several streams of ids into one embedding."""
        if any(name.endswith("_input_ids") and not name.startswith("decoder") for name in self.parameters):
            return None  # the streams have an input of their own
        for part in self.module.modules():
            if not any(isinstance(child, nn.Embedding) for child in part.children()):
                continue
            for name, buffer in part.named_buffers(recurse=False):
                if name.endswith("offsets") and buffer.dim() == 1 and len(buffer) > 1:
                    return len(buffer), int(buffer.diff().min())
        return None

    def _boxes(self, length: int) -> torch.Tensor:
        corners = torch.randint(0, 400, (1, length, 2), generator=self.generator)
        boxes = torch.cat([corners, corners + torch.randint(20, 400, (1, length, 2), generator=self.generator)], -1)
        limit = self._size("max_2d_position_embeddings")
        if limit is not None and limit <= 1000:
            boxes = boxes * (limit - 1) // 1000
        return boxes.to(self.device)

    def _entities(self) -> dict[str, Any]:
        size = self._size("entity_vocab_size") or 3
        mention = self._size("max_mention_length") or 4
        positions = torch.full((1, 1, mention), -1, device=self.device)
        positions[0, 0, :2] = torch.tensor([1, 2], device=self.device)
        given: dict[str, Any] = {
            "entity_ids": self._ids((1, 1), size),
            "entity_position_ids": positions,
            "entity_attention_mask": torch.ones(1, 1, dtype=torch.long, device=self.device),
            "entity_start_positions": torch.tensor([[1]], device=self.device),
            "entity_end_positions": torch.tensor([[2]], device=self.device),
        }
        if not any("entity_embeddings" in name for name, _ in self.module.named_modules()):
            return {}
        if self._pair():
            given = {name: value.repeat(1, 2, *[1] * (value.dim() - 2)) for name, value in given.items()}
        return {name: value for name, value in given.items() if name in self.parameters}

    def _pair(self) -> bool:
        """Whether a head reads two entities: its input is two hidden states wide."""
        width = self._size("hidden_size")
        linears = [m for m in self.module.children() if isinstance(m, nn.Linear)]
        return bool(linears) and linears[-1].in_features == 2 * (width or 0)

    # other media

    def _medium(self, name: str, text: dict[str, Any]) -> dict[str, Any]:
        if name == "pixel_values" and "image_attention_mask" in self.parameters:  # of which image each token knows
            ids: torch.Tensor = text["input_ids"]
            pixels = self._floats(1, 1, self._colours(), *self._image_size())
            return {
                name: pixels,
                "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long, device=self.device),
            }
        if name == "pixel_values" and "image_embeds_position_mask" in self.parameters:  # ids there are not looked at
            ids = text["input_ids"]
            place = self._size("latent_query_num") or 1
            mask = torch.cat([torch.zeros_like(ids[:, :1]), ids.new_ones(1, place), torch.zeros_like(ids[:, 1:])], -1)
            ids = torch.cat([ids[:, :1], ids[:, :1].expand(1, place), ids[:, 1:]], -1)
            return self._pixels() | {"input_ids": ids, "image_embeds_position_mask": mask}
        if name == "pixel_values":
            return self._pixels()
        if name == "pixel_values_videos":
            clips = 2 if "return_loss" in self.parameters else 1  # scores are made up among clips, too
            return {name: self._floats(clips, self._frames() or 2, self._colours(), *self._image_size())}
        if name == "flattened_patches":
            return self._flat_patches()
        if name == "visual_feats":
            return {
                name: self._floats(1, 4, self._size("visual_feat_dim") or 8),
                "visual_pos": torch.rand(1, 4, 4, generator=self.generator).to(self.device, self.dtype),
            }
        return {name: self._sound(name, text)}

    def _pixels(self) -> dict[str, Any]:
        if "spatial_shapes" in self.parameters:
            return self._patches()
        if "image_grid_thw" in self.parameters:
            return self._grid()
        frames = self._frames()
        if self._films():
            frames = frames or 2
        size = self._image_size()
        pixels = self._floats(1, frames or 1, self._colours(), *size)
        if frames and "input_ids" not in self.parameters:
            first = self._first_layer({"pixel_values": pixels})
            frames = frames if first is None or first.fits else None
        return {"pixel_values": pixels if frames else pixels[:, 0]}

    @torch.no_grad()
    def _image_rows(self, features: Any, media: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """How many vectors the model makes of an image, and the image, with its size where that is asked for."""
        attempts = [media, media | {"pixel_values": media["pixel_values"][:, None]}]  # of which there may be several
        if "image_sizes" in self.parameters:
            sizes = torch.tensor([media["pixel_values"].shape[-2:]], device=self.device)
            attempts += [media | {"image_sizes": sizes}]
            crops = media["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)  # the whole, and itself again as its only part
            attempts += [{"pixel_values": crops, "image_sizes": sizes}]
        reason = ""
        for attempt in attempts:
            try:
                return _feature_rows(features(**attempt)), attempt
            except Exception as error:  # whatever the model says, it does not take this one
                reason = reason or f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{self.name} made no features of an image of shape {list(media['pixel_values'].shape)} ({reason}): "
            "ask for vision=False"
        )

    def _films(self) -> bool:
        """Whether pixels are those of films, since the config has a token for films and none for images."""
        return self._image_token() is None and self._token("video_token_id", "video_token_index") is not None

    def _patches(self) -> dict[str, Any]:
        """An image cut into patches, each a row: the layer that takes them says how wide, the config how many."""
        side = self._size("patch_size") or 16
        high = wide = max(2, min(4, math.isqrt(self._size("num_patches") or 4)))
        given: dict[str, Any] = {
            "pixel_values": self._floats(1, high * wide, self._colours() * side * side),
            "spatial_shapes": torch.tensor([[high, wide]], device=self.device),
        }
        if "pixel_attention_mask" in self.parameters:
            given["pixel_attention_mask"] = torch.ones(1, high * wide, dtype=torch.long, device=self.device)
        return given

    def _flat_patches(self) -> dict[str, Any]:
        """Rows of [row, column, pixels of the patch]; rows and columns count from 1."""
        side = self._size("patch_size") or 16
        first = next((m for m in self.module.modules() if isinstance(m, nn.Linear)), None)
        width = first.in_features if first is not None else self._colours() * side * side
        places = torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 4)).to(self.device, self.dtype)
        return {"flattened_patches": torch.cat([places, self._floats(9, width)], -1)[None]}

    def _frames(self) -> int | None:
        return self._size("num_frames")

    def _colours(self) -> int:
        stated = next((s for s in (self._size("num_channels"), self._size("in_channels")) if s and s <= 4), None)
        if stated is None:
            first = next((m for m in self.module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
            stated = first.in_channels if first is not None and first.in_channels <= 4 else 3
        return stated

    def _image_size(self) -> tuple[int, int]:
        for name in ("image_size", "img_size", "input_size"):
            for config in self.configs:
                value: Any = getattr(config, name, None)
                if isinstance(value, int) and value > 0:
                    return value, value
                if isinstance(value, list | tuple) and len(value) == 2:  # pyright: ignore[reportUnknownArgumentType]
                    return int(value[0]), int(value[1])
        return IMAGE_SIZE, IMAGE_SIZE

    def _sound(self, name: str, text: dict[str, Any]) -> torch.Tensor:
        """A waveform where the first convolution has one channel, else features over time."""
        convolutions = [m for m in self.module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
        first = convolutions[0] if convolutions else None
        if name != "input_features" and self._raw_sound():
            samples = SOUND_FRAMES
            for layer in reversed(convolutions):
                if isinstance(layer, nn.Conv1d) and layer.stride[0] > 1:
                    padding = 0 if isinstance(layer.padding, str) else int(layer.padding[0])
                    samples = max(1, (samples - 1) * layer.stride[0] + layer.kernel_size[0] - 2 * padding)
            return self._floats(1, samples)
        if name == "input_values" and not isinstance(first, nn.Conv2d):  # frames of the waveform, each a row
            rows = next((m for m in self.module.modules() if isinstance(m, nn.Linear)), None)
            return self._floats(1, SOUND_FRAMES * (rows.in_features if rows is not None else 1))
        widths = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "d_model", "hidden_size")
        width = next((size for size in map(self._size, widths) if size), 80)
        fixed = self._size("max_length") if isinstance(first, nn.Conv2d) else None
        stride = math.prod(m.stride[0] for m in convolutions if isinstance(m, nn.Conv1d))
        whole = (self._size("max_source_positions") or 0) * stride
        shapes = [(1, fixed, width)] if fixed else [(1, FRAMES, width), (1, width, FRAMES)]
        shapes += [(1, width, whole), (1, whole, width)] if whole else []
        for shape in shapes:
            first = self._first_layer(text | {name: torch.zeros(shape, device=self.device, dtype=self.dtype)})
            if first is not None and first.fits:
                return self._floats(*shape)
            if first is not None and isinstance(first.layer, nn.Linear) and first.shape == shape == shapes[0]:
                return self._floats(1, FRAMES, first.layer.in_features)  # several frames in one
        return self._floats(*shapes[0])

    def _raw_sound(self) -> bool:
        first = next((m for m in self.module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)), None)
        return isinstance(first, nn.Conv1d) and first.in_channels == 1

    @torch.no_grad()
    def _first_layer(self, inputs: dict[str, Any]) -> _Stop | None:
        """The first layer that these inputs get to, None if the model refuses them; no layer is computed."""

        def stop(layer: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Stop(layer, args[0].shape if args and isinstance(args[0], torch.Tensor) else None)

        layers = [m for m in self.module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
        hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
        try:
            self.module(**inputs)
        except _Stop as reached:
            return reached
        except Exception:  # whatever the model says, it does not take these inputs
            return None
        finally:
            for hook in hooks:
                hook.remove()
        return None

    # an image for a model that decodes text

    def _picture(self, ids: torch.Tensor) -> dict[str, Any]:
        """The image, and the ids with as many image tokens as the model makes of it, before the text."""
        token = self._token("video_token_id", "video_token_index") if self._films() else self._image_token()
        features: Any = getattr(self.module, "get_video_features" if self._films() else "get_image_features", None)
        if token is None or features is None or "pixel_values" not in self.parameters:
            raise ModelError(f"{self.name} does not say where in its text an image goes: ask for vision=False")
        media = self._pixels()
        asked = self._size("num_query_tokens")  # an image that is asked questions becomes the answers to them
        if asked:
            count = asked * (media["pixel_values"].shape[1] if self._films() else 1)
        else:
            count, media = self._image_rows(features, media)
        placed = torch.full((1, count), token, device=self.device)
        media["input_ids"] = torch.cat([ids[:, :1], placed, ids[:, 1:]], -1)
        image = (media["input_ids"] == token).long()
        return media | {name: image for name in ("mm_token_type_ids", "token_type_ids") if name in self.parameters}

    def _image_token(self) -> int | None:
        return self._token("image_token_id", "image_token_index", "img_token_id", "media_placeholder_token_id")

    def _token(self, *names: str) -> int | None:
        ids = (i for name in names for config in self.configs for i in _ints(getattr(config, name, None)))
        return next(ids, None)

    def _grid(self) -> dict[str, Any]:
        """Patches as rows, for models that are told the grid they come from: one frame, two merged cells."""
        side = self._size("patch_size") or 14
        merge = self._size("spatial_merge_size") or self._size("merge_size") or 2
        grid = (1, merge, 2 * merge)
        width = self._colours() * (self._size("temporal_patch_size") or 1) * side * side
        return {
            "pixel_values": self._floats(math.prod(grid), width),
            "image_grid_thw": torch.tensor([grid], device=self.device),
        }

    # values and sizes

    def _floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def _size(self, name: str) -> int | None:
        """A whole number of the config, or of the first of its parts that has it: those for text come last."""
        for config in self.configs:
            value: Any = getattr(config, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]  # pyright: ignore[reportUnknownVariableType]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def _size_in(self, part: str, name: str) -> int | None:
        value: Any = getattr(getattr(self.config, part, None), name, None)
        return value if isinstance(value, int) and value > 0 else None


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _configs(config: Any) -> Iterator[Any]:
    """The config and its parts, those for text after all others."""
    later: list[Any] = []
    level = [config] if config is not None else []
    while level or later:
        if not level:
            level, later = later, []
        current = level.pop(0)
        yield current
        names: dict[str, Any] = getattr(current, "__dict__", {})
        for name, value in names.items():
            if hasattr(value, "model_type") and hasattr(value, "to_dict"):
                (later if name in _TEXT_CONFIGS else level).append(value)


def _special_ids(config: Any) -> Iterator[int]:
    """Every id that the config, or a part of it, gives a name to."""
    for part in _configs(config):
        for name, value in dict[str, Any](getattr(part, "__dict__", {})).items():
            if _SPECIAL.search(name):
                yield from _ints(value)


def _ints(value: Any) -> list[int]:
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _rows(part: Any) -> int | None:
    """How many ids the input embedding of a model has; None where its input layer is not an embedding."""
    try:
        embedding: Any = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    weight = getattr(embedding, "weight", None)
    if rows is None and weight is not None and weight.dim() == 2 and not isinstance(embedding, nn.Linear):
        rows = weight.shape[0]
    return int(rows) if rows else None


def _feature_rows(features: Any) -> int:
    """How many vectors the image became: one image token stands for each."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, list | tuple):
        return sum(_feature_rows(f) for f in features)  # pyright: ignore[reportUnknownVariableType]
    return math.prod(features.shape[:-1])
